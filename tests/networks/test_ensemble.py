"""Several networks as one: the mean of probabilities by hand, checkpoints that may and may not segment together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_scans import trained_run, write_cohort

import evaluate_3d
import predict_3d
from dataloaders.splits import TrainingSplit
from myutils.ensemble import joined_splits, load_together
from networks.base import SegmentationNetwork, SegmentationOutput
from networks.ensemble import Ensemble

CPU = torch.device("cpu")


class Constant(SegmentationNetwork):
    """The same two probabilities in every voxel."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__(1, len(probabilities))
        self.probabilities = probabilities

    def encode(self, images: torch.Tensor) -> list[torch.Tensor]:
        raise AssertionError("an ensemble asks for whole passes")

    def forward(self, images: torch.Tensor) -> SegmentationOutput:
        logits = torch.tensor(self.probabilities).log().reshape(1, -1, 1, 1, 1).expand(len(images), -1, 4, 4, 4)
        return SegmentationOutput(logits + 3.0, logits)  # a shift of all logits changes no probability


def test_probabilities_are_the_mean_of_the_members() -> None:
    network = Ensemble([Constant(0.9, 0.1), Constant(0.2, 0.8), Constant(0.4, 0.6)])
    probabilities = network(torch.zeros(2, 1, 4, 4, 4)).logits.softmax(1)
    assert probabilities.shape == (2, 2, 4, 4, 4)
    torch.testing.assert_close(probabilities[0, :, 0, 0, 0], torch.tensor([0.5, 0.5]))
    certain = Ensemble([Constant(1.0, 0.0), Constant(1.0, 0.0)])  # a class that no member knows
    assert certain(torch.zeros(1, 1, 4, 4, 4)).logits.isfinite().all()


def test_a_case_is_in_its_closest_role() -> None:
    joined = joined_splits([TrainingSplit(("a",), ("b", "c"), ("d", "e")), TrainingSplit(("b",), ("d",), ("f",))])
    assert joined == TrainingSplit(("a", "b"), ("c", "d"), ("e", "f"))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("data") / "balls")


@pytest.fixture(scope="module")
def checkpoints(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of other seeds and methods on the same cases."""
    lists = tmp_path_factory.mktemp("lists") / "train.txt"
    lists.write_text("ball00\nball01\nball02\nball03\n")
    runs = tmp_path_factory.mktemp("runs")
    settings = {"train_list": lists, "patch_size": (24, 24, 24)}  # a scan is one window
    return [
        trained_run(cohort, runs / "one", method="supervised", **settings),
        trained_run(cohort, runs / "two", method="mean_teacher", seed=5, max_iteration=3, **settings),
    ]


def test_predictions_are_those_of_the_mean_probabilities(cohort: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    scan = cohort / "images/ball05.nii.gz"
    for name, chosen in (("one", checkpoints[:1]), ("two", checkpoints[1:]), ("both", checkpoints)):
        flags = ["--checkpoint", *map(str, chosen), "--input", str(scan), "--output", str(tmp_path / name)]
        assert predict_3d.main([*flags, "--probabilities"]) == 0
    one, two, both = (nib.load(tmp_path / name / "ball05_prob.nii.gz").get_fdata() for name in ("one", "two", "both"))
    assert np.abs(one - two).max() > 0.01
    np.testing.assert_allclose(both, (one + two) / 2, atol=1e-5)
    label_map = np.asarray(nib.load(tmp_path / "both" / "ball05.nii.gz").dataobj)
    np.testing.assert_array_equal(label_map, both.argmax(-1))


def test_evaluation_has_a_folder_of_its_own(checkpoints: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_3d.main(["--checkpoint", *map(str, checkpoints)]) == 0
    folder = checkpoints[0].parent / "evaluation" / "test_mean_of_2"
    assert str(folder / "cases.csv") in capsys.readouterr().out and (folder / "summary.json").is_file()


def test_a_training_case_of_any_member_is_no_test_case(
    cohort: Path, checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.txt").write_text("ball04\nball01\nball02\nball03\n")
    settings = {"train_list": tmp_path / "train.txt", "patch_size": (24, 24, 24), "method": "supervised"}
    both = ["--checkpoint", str(checkpoints[0]), str(trained_run(cohort, tmp_path / "run", **settings))]
    assert evaluate_3d.main([*both, "--output_dir", str(tmp_path / "out")]) == 0
    scored = (tmp_path / "out/cases.csv").read_text()
    assert "ball05" in scored and "ball04" not in scored  # alone, the first would be scored on both
    (tmp_path / "test.txt").write_text("ball04\n")
    with pytest.raises(SystemExit):
        evaluate_3d.main([*both, "--test_list", str(tmp_path / "test.txt")])
    assert "test cases 'ball04' are training cases" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": (16, 16, 16)}, r"--patch_size \(16, 16, 16\), .* with \(24, 24, 24\)"),
        ({"spacing": (2.0, 2.0, 2.0)}, r"--spacing \(2.0, 2.0, 2.0\), .* with None"),
        ({"flip_axes": ()}, r"--flip_axes \(\), .* with \(0,\)"),
    ],
)
def test_runs_that_see_scans_otherwise_are_refused(
    cohort: Path, checkpoints: list[Path], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    other = trained_run(cohort, tmp_path / "run", **({"method": "supervised", "patch_size": (24, 24, 24)} | change))
    with pytest.raises(ValueError, match=f"run/last.pt was trained with {message}"):
        load_together([checkpoints[0], other], CPU)


def test_runs_of_other_classes_or_channels_are_refused(checkpoints: list[Path], tmp_path: Path) -> None:
    for name, channels, classes, message in (
        ("exchanged", 1, "background\ncore\nball", "classes background, core, ball, .* with background, ball, core"),
        ("two", 2, "background\nball\ncore", "image channels 2, .* with 1"),
    ):
        root = write_cohort(tmp_path / name, channels=channels)
        (root / "classes.txt").write_text(classes)
        other = trained_run(root, tmp_path / f"run_{name}", method="supervised", patch_size=(24, 24, 24))
        with pytest.raises(ValueError, match=f"last.pt was trained with {message}"):
            load_together([checkpoints[0], other], CPU)


def test_one_checkpoint_twice_is_refused_and_one_alone_is_itself(checkpoints: list[Path], tmp_path: Path) -> None:
    (tmp_path / "link.pt").symlink_to(checkpoints[0])
    with pytest.raises(ValueError, match=r"link\.pt twice"):
        load_together([checkpoints[0], checkpoints[1], tmp_path / "link.pt"], CPU)
    alone = load_together(checkpoints[:1], CPU)
    assert not isinstance(alone.network, Ensemble) and alone.step == 2
    together = load_together(checkpoints[::-1], CPU)
    assert together.step == 2 and together.config.seed == 5
    assert dataclasses.asdict(together.split) == dataclasses.asdict(joined_splits([alone.split, together.split]))
