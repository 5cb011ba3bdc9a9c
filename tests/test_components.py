"""Connected components: which classes are one in the labels, and what is kept of a prediction."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BallSource
from helpers_runs import small_trainer
from helpers_scans import trained_run, write_cohort

import evaluate_3d
import predict_3d
from dataloaders.base import SOURCES, SourceOptions, Volume
from myutils import components, evaluation
from myutils.build import DataFacts, kept_components
from myutils.checkpoint import load_for_inference
from myutils.components import Components, cut_to_largest, largest_component, survey_components
from myutils.report import evaluate_run


def label_with(*voxels: tuple[int, int, int, int]) -> np.ndarray:
    """Class ids of single voxels: (x, y, z, class)."""
    label = np.zeros((6, 6, 6), np.uint8)
    for x, y, z, class_id in voxels:
        label[x, y, z] = class_id
    return label


def test_largest_component_keeps_one_of_each_class_that_is_named() -> None:
    label_map = np.zeros((8, 8, 8), np.uint8)
    label_map[0:3, 0:3, 0:3] = 1
    label_map[3, 3, 3] = 1  # touches at a corner: belongs to the block
    label_map[6, 6, 6] = 1
    label_map[5:7, 0:2, 0:2], label_map[0, 7, 7] = 3, 3
    expected = label_map.copy()
    expected[6, 6, 6] = expected[0, 7, 7] = 0
    before = label_map.copy()
    np.testing.assert_array_equal(largest_component(label_map, (1, 2, 3)), expected)
    np.testing.assert_array_equal(label_map, before)
    expected[6, 6, 6] = 1
    np.testing.assert_array_equal(largest_component(label_map, [3, 7]), expected)  # the others stay as they are
    assert largest_component(label_map, ()) is label_map
    assert not largest_component(np.zeros((3, 3, 3), np.uint8), [1]).any()


def test_classes_are_single_if_every_case_that_shows_them_has_one_component() -> None:
    both = label_with((0, 0, 0, 1), (1, 1, 1, 1), (4, 4, 4, 2))  # corners touch
    two_components = label_with((0, 0, 0, 1), (4, 4, 4, 2), (0, 5, 0, 2))
    without = label_with((3, 3, 3, 1))
    assert survey_components([both] * 4, 4) == Components((0, 4, 4, 0), (1, 2))
    assert survey_components([both] * 9 + [two_components], 3) == Components((0, 10, 10), (1,))
    three = survey_components([both] * 3 + [without] * 9, 3)  # cases with class 2 are too few
    assert three == Components((0, 12, 3), (1,))
    assert survey_components([both] * 4 + [without] * 9, 3).single == (1, 2)
    assert survey_components([], 3) == Components((0, 0, 0), ())


def test_specks_are_no_components() -> None:
    label = np.zeros((10, 10, 10), np.uint8)
    label[:5, :8, :5] = 1  # 200 voxels
    label[8, 9, 9] = label[8, 9, 8] = 1
    assert survey_components([label] * 4, 2).single == (1,)
    label[8, 9, 7] = 1  # three of 203 are more than a hundredth
    assert survey_components([label] * 4, 2).single == ()


@pytest.mark.parametrize(("labelnum", "kept"), [(4, (1, 2)), (3, ())])
def test_a_run_keeps_what_its_labels_say(tmp_path: Path, labelnum: int, kept: tuple[int, ...]) -> None:
    trainer = small_trainer(BallSource(), tmp_path, labelnum=labelnum, max_iteration=1, method="supervised")
    trainer.read_labels()
    trainer.fit()
    bundle = load_for_inference(tmp_path / "last.pt", torch.device("cpu"))
    assert bundle.facts.single_components == kept == kept_components(bundle.config, bundle.facts)


@pytest.mark.parametrize(("asked", "kept"), [(True, (1, 2)), (False, ())])
def test_a_flag_goes_before_the_labels(tmp_path: Path, asked: bool, kept: tuple[int, ...]) -> None:
    trainer = small_trainer(BallSource(), tmp_path, labelnum=4, largest_component=asked)
    trainer.read_labels()
    assert kept_components(trainer.state.config, trainer.state.facts) == kept


def test_a_class_that_no_label_shows_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = BallSource()
    source.num_classes, source.class_names = 4, ("background", "ball", "core", "shell")
    small_trainer(source, tmp_path).read_labels()
    assert "no labelled case shows shell: the network cannot learn it" in caplog.text


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The classes of which a prediction was asked to keep the largest component, one entry per prediction."""
    found: list[tuple[int, ...]] = []

    def spy(label_map: np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
        found.append(tuple(classes))
        return label_map

    for module in (evaluation, components):
        monkeypatch.setattr(module, "largest_component", spy)
    return found


def test_validation_keeps_the_largest_component(tmp_path: Path, asked: list[tuple[int, ...]]) -> None:
    trainer = small_trainer(BallSource(), tmp_path, labelnum=5, val_num=1, max_iteration=1, method="supervised")
    trainer.read_labels()
    trainer.fit()
    assert asked == [(1, 2)]


def test_evaluation_and_prediction_keep_the_largest_component(tmp_path: Path, asked: list[tuple[int, ...]]) -> None:
    cohort = write_cohort(tmp_path / "balls")
    settings = {"labelnum": 4, "method": "supervised"}
    checkpoint = str(trained_run(cohort, tmp_path / "run", **settings))
    source = SOURCES.get("nifti").from_options(SourceOptions(root=cohort))
    evaluate_run(tmp_path / "run", source, ["ball00"], torch.device("cpu"))
    assert evaluate_3d.main(["--checkpoint", checkpoint]) == 0
    scan = ["--input", str(cohort / "images/ball05.nii.gz"), "--output", str(tmp_path / "out")]
    scan += ["--existing", "replace"]
    assert predict_3d.main(["--checkpoint", checkpoint, *scan]) == 0
    assert predict_3d.main(["--checkpoint", checkpoint, *scan, "--probabilities"]) == 0
    assert asked == [(1, 2)] * 4
    for flag, kept in (("--largest_component", (1, 2)), ("--no-largest_component", ())):
        asked.clear()
        assert evaluate_3d.main(["--checkpoint", checkpoint, flag]) == 0
        assert predict_3d.main(["--checkpoint", checkpoint, *scan, flag]) == 0
        assert asked == [kept] * 2
    asked.clear()  # a run of fewer labels cannot tell
    other = str(trained_run(cohort, tmp_path / "few", **(settings | {"labelnum": 3})))
    assert predict_3d.main(["--checkpoint", checkpoint, other, *scan]) == 0
    assert asked == [()]


def test_facts_of_an_older_checkpoint_keep_their_single_classes() -> None:
    facts = DataFacts(3, 1, ("background", "ball", "core"), "mr", (0,), (2,))
    stored = dataclasses.asdict(facts)
    assert DataFacts.from_dict(stored) == facts
    stored["single_parts"] = stored.pop("single_components")
    assert DataFacts.from_dict(stored) == facts


def test_components_are_counted_on_the_labels_own_grid(tmp_path: Path) -> None:
    class Halves(BallSource):
        """The core in two halves, with a gap of a voxel that no voxel of 3 mm has its centre in."""

        def load(self, case_id: str, *, with_label: bool) -> Volume:
            volume = super().load(case_id, with_label=with_label)
            if volume.label is not None:
                volume.label[8][volume.label[8] == 2] = 1
            return volume

    trainer = small_trainer(Halves(), tmp_path, labelnum=4, spacing=(3.0, 3.0, 3.0))
    trainer.read_labels()
    assert trainer.state.facts.single_components == (1,)
    resampled = (trainer.cache.get(name, with_label=True).volume.label for name in trainer.state.split.labeled)
    assert survey_components(resampled, 3).single == (1, 2)


def test_a_component_that_is_left_out_is_named_unless_it_is_a_speck(caplog: pytest.LogCaptureFixture) -> None:
    label_map = np.zeros((40, 4, 4), np.uint8)
    label_map[:20], label_map[22:24], label_map[30:] = 1, 1, 2
    arguments = (1,), ("background", "left", "right"), Path("a.nii.gz")
    kept = cut_to_largest(label_map, *arguments)
    assert (kept[:20] == 1).all() and not kept[20:30].any() and (kept[30:] == 2).all()
    assert not caplog.text  # 32 of 352 voxels
    label_map[24:26] = 1
    cut_to_largest(label_map, *arguments)
    assert "a.nii.gz: of left, 64 of 384 voxels lay apart" in caplog.text and "--no-largest_component" in caplog.text
