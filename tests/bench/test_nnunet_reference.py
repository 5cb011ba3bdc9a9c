"""The reference from outside: what nnU-Net gets, how its answers are scored, what is left to it. No test needs it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import BallSource
from helpers_runs import small_trainer

from benchmarks import nnunet_reference
from benchmarks.nnunet_reference import (
    DATASET,
    export,
    plan,
    predict,
    prepared_as,
    request_of,
    score_network,
    stored_patch,
)
from dataloaders.base import Volume
from myutils.checkpoint import InferenceBundle

AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])


@pytest.fixture
def bundle(tmp_path: Path) -> InferenceBundle:
    """A run on two balls with two channels and a patch whose sizes differ."""
    changes = {"max_iteration": 2, "patch_size": (20, 18, 16), "batch_size": 3}
    trainer = small_trainer(BallSource(channels=2), tmp_path / "run", method="supervised", **changes)
    state = trainer.state
    return InferenceBundle(trainer.method.student, state.config, SimpleNamespace(), state.facts, state.split, 2)


def test_nnunet_gets_the_labelled_cases_and_no_other(tmp_path: Path, bundle: InferenceBundle) -> None:
    source = BallSource(channels=2)
    export(tmp_path, bundle, source)
    raw = tmp_path / "nnUNet_raw" / DATASET
    assert sorted(path.name for path in (raw / "labelsTr").iterdir()) == ["ball00.nii.gz", "ball05.nii.gz"]
    images = [f"ball0{case}_000{channel}.nii.gz" for case in (0, 5) for channel in range(2)]
    assert sorted(path.name for path in (raw / "imagesTr").iterdir()) == images
    case = source.load("ball05", with_label=True)
    assert np.array_equal(nib.load(raw / "labelsTr" / "ball05.nii.gz").dataobj, case.label)
    second = nib.load(raw / "imagesTr" / "ball05_0001.nii.gz")
    assert np.array_equal(second.dataobj, case.image[1]) and np.allclose(second.affine, case.affine)
    assert json.loads((raw / "dataset.json").read_text()) == {
        "channel_names": {"0": "MRI", "1": "MRI"},
        "labels": {"background": 0, "ball": 1, "core": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }


class Echo:
    """Answers with the second channel, after a look at what it was given."""

    def predict_single_npy_array(self, image: np.ndarray, properties: dict[str, Any]) -> np.ndarray:
        assert image.dtype == np.float32 and image.flags.c_contiguous
        assert properties == {"spacing": [4.0, 3.0, 2.0]}
        return image[1]


def test_a_prediction_has_the_axes_of_the_case() -> None:
    label = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    case = Volume("a", np.stack([label * 0, label]).astype(np.float32), label, AFFINE, (2.0, 3.0, 4.0))
    found = predict(Echo(), case)
    assert found.dtype == np.uint8 and np.array_equal(found, label)


def test_the_test_cases_are_scored(monkeypatch: pytest.MonkeyPatch, bundle: InferenceBundle) -> None:
    made: list[tuple[object, ...]] = []
    predictor = SimpleNamespace(manual_initialization=lambda *parts: made.append(parts))
    modules(monkeypatch, "nnunetv2.inference.predict_from_raw_data", nnUNetPredictor=lambda **_: predictor)
    monkeypatch.setattr(nnunet_reference, "predict", lambda _, case: case.label)
    trainer = SimpleNamespace(network=bundle.network, plans_manager=1, configuration_manager=2, dataset_json={})
    results = list(score_network(trainer, bundle, BallSource(channels=2)))  # type: ignore[arg-type]
    assert [result.case_id for result in results] == ["ball01"]  # the one with a label that the run did not take
    assert all(figures.dice == 1 for result in results for figures in result.metrics.values())
    assert made[0][:3] == (bundle.network, 1, 2)


@pytest.mark.parametrize(
    ("own", "stages", "features"), [(False, 2, [32, 64]), (False, 5, [32, 64, 128, 256, 320]), (True, 2, [])]
)
def test_the_plan_takes_the_runs_patch_unless_it_is_left_to_nnunet(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bundle: InferenceBundle,
    own: bool,
    stages: int,
    features: list[int],
) -> None:
    path = tmp_path / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    path.parent.mkdir(parents=True)
    network = {"features_per_stage": [32, 64, 128], "n_conv_per_stage": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2]}
    planned = {"patch_size": [9, 9, 9], "batch_size": 9, "spacing": [1, 1, 1], "architecture": {"arch_kwargs": network}}
    content = {"transpose_forward": [2, 0, 1], "configurations": {"3d_fullres": planned}}
    asked: list[list[int]] = []
    strides = [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1)

    def topology(spacing: list[float], patch: list[int], *_: object) -> tuple[object, ...]:
        asked.append(patch)
        return None, strides, [[3, 3, 3]] * stages, [np.int64(size) for size in patch], None

    api = {
        "extract_fingerprints": lambda *_, **__: None,
        "plan_experiments": lambda *_: path.write_text(json.dumps(content)),
        "preprocess": lambda *_, **__: None,
    }
    modules(monkeypatch, "nnunetv2.experiment_planning", plan_and_preprocess_api=SimpleNamespace(**api))
    name = "nnunetv2.experiment_planning.experiment_planners.network_topology"
    modules(monkeypatch, name, get_pool_and_conv_props=topology)
    plan(tmp_path, None if own else (20, 18, 16, 3))
    found = json.loads(path.read_text())
    if own:
        assert found == content
        return
    chosen = found["configurations"]["3d_fullres"]
    assert asked == [[20, 16, 18]]  # (Z, Y, X) is 16 18 20, of which the plan takes the last first
    assert (chosen["patch_size"], chosen["batch_size"]) == ([20, 16, 18], 3)
    assert chosen["architecture"]["arch_kwargs"] == {
        "features_per_stage": features,
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "n_stages": stages,
        "strides": strides,
        "kernel_sizes": [[3, 3, 3]] * stages,
    }


def test_the_patch_follows_the_files_axes(bundle: InferenceBundle) -> None:
    """The run's patch has 20 voxels to the right, 18 forward and 16 up; the files' axes run up, right and forward."""
    to_ras = np.array([[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    affines = {"ball00": to_ras, "ball05": to_ras @ np.diag([1.0, -1, 1, 1])}
    source: Any = SimpleNamespace(grid=lambda case_id: SimpleNamespace(affine=affines[case_id]))
    chosen = replace(bundle, config=replace(bundle.config, orientation="ras"))
    assert stored_patch(chosen, source) == (16, 20, 18)
    assert stored_patch(replace(bundle, config=replace(bundle.config, orientation="stored")), source) == (20, 18, 16)
    affines["ball05"] = AFFINE
    with pytest.raises(SystemExit, match="axes in different order"):
        stored_patch(chosen, source)
    with pytest.raises(SystemExit, match="resamples"):
        stored_patch(replace(bundle, config=replace(bundle.config, spacing=(1.0, 1.0, 1.0))), source)


@pytest.mark.skipif(find_spec("nnunetv2") is not None, reason="nnU-Net is installed")
def test_without_nnunet_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nnunet_reference", "--checkpoint", "last.pt", "--output_dir", "runs/nnunet"])
    with pytest.raises(SystemExit, match=r"pip install torch==[0-9.]+ nnunetv2==[0-9.]+$"):
        nnunet_reference.main()


def test_a_folder_that_was_prepared_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: InferenceBundle
) -> None:
    folder = tmp_path / "out"
    source = BallSource(channels=2)
    ours, theirs = (request_of(bundle, source, own_patches=own) for own in (False, True))
    assert not prepared_as(folder, ours)
    assert not prepared_as(folder, ours)  # not to its end
    (folder / "nnUNet_preprocessed" / DATASET / "gt_segmentations").mkdir(parents=True)
    assert prepared_as(folder, ours)
    with pytest.raises(SystemExit, match=r"was made for .*20, 18, 16, 3.* not .*None.*; pass another folder"):
        prepared_as(folder, theirs)
    monkeypatch.setattr(nnunet_reference, "make_test_ids", lambda *_: ("ball03",))
    with pytest.raises(SystemExit, match="pass another folder"):  # its seeds were scored on other cases
        prepared_as(folder, request_of(bundle, source, own_patches=False))


def modules(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    """Stand in for a module of nnU-Net and those above it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        above = ".".join(parts[:depth])
        monkeypatch.setitem(sys.modules, above, sys.modules.get(above) or ModuleType(above))
    for attribute, value in content.items():
        monkeypatch.setattr(sys.modules[name], attribute, value, raising=False)
