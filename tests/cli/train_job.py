"""Shared by the tests of the command line: a tiny NIfTI data set, and the whole job on it in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BallSource

import train_cov_dfp_3d as train
from myutils.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LABELED = 6


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread, so that a run elsewhere on one thread is comparable; restore the log handlers after."""
    root, threads = logging.getLogger(), torch.get_num_threads()
    handlers, level = root.handlers[:], root.level
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(name="folder")
def nifti_job(tmp_path: Path) -> Path:
    """A fresh folder that holds the data set as ``data``."""
    write_nifti_folder(tmp_path / "data")
    return tmp_path


def write_nifti_folder(root: Path, cases: int = 9, labeled: int = LABELED) -> Path:
    """Noisy balls as ``images/`` and ``labels/``; the first ``labeled`` cases have a label."""
    source = BallSource(cases=cases, labeled=labeled)
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    for case_id in source.case_ids():
        volume = source.load(case_id, with_label=True)
        assert volume.label is not None
        nib.save(nib.Nifti1Image(volume.image[0], volume.affine), root / "images" / f"{case_id}.nii.gz")
        if case_id in source.labeled_ids():
            nib.save(nib.Nifti1Image(volume.label, volume.affine), root / "labels" / f"{case_id}.nii.gz")
    return root


def write_list(path: Path, *numbers: int) -> str:
    """A list file of case ids; returns its path for the command line."""
    path.write_text("".join(f"ball{number:02d}\n" for number in numbers))
    return str(path)


def set_label(root: Path, case_id: str, class_id: int) -> None:
    """Overwrite a label with one that holds a single voxel of ``class_id``."""
    label = np.zeros((20, 18, 16), np.uint8)
    label[5, 5, 5] = class_id
    nib.save(nib.Nifti1Image(label, np.diag([1.0, 2.0, 1.0, 1.0])), root / "labels" / f"{case_id}.nii.gz")


def job(folder: Path, *flags: str, **changes: str) -> list[str]:
    """Arguments of a run of a second on the data in ``folder / "data"``, written to ``folder / "runs"``."""
    settings = {
        "dataset_name": "nifti",
        "dataset_path": str(folder / "data"),
        "output_dir": str(folder / "runs"),
        "num_classes": "3",
        "labelnum": "2",
        "patch_size": "16 16 16",
        "max_iteration": "3",
        "embedding_dim": "8",
        "prototype_samples": "64",
        "log_every": "1",
        "amp": "no",
    } | changes
    words = [word for name, value in settings.items() for word in (f"--{name}", *value.split(" ")) if word]
    return [*words, *flags]


def resume(folder: Path, exp: str, *flags: str) -> list[str]:
    """Arguments that go on with a run of ``job``."""
    return ["--output_dir", str(folder / "runs"), "--exp", exp, "--resume", *flags]


def assert_refused(argv: list[str], capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """Exit code 2, and one line on stderr that holds ``parts``; what was logged before is left aside."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("train_cov_dfp_3d.py: error: ")]
    assert errors == [len(lines) - 1], lines
    for part in parts:
        assert part in lines[-1]


def weights(folder: Path, exp: str) -> dict[str, torch.Tensor]:
    """The method's state in the last checkpoint of a run."""
    tensors: dict[str, torch.Tensor] = read_checkpoint(folder / "runs" / exp / "last.pt")[1]["method"]
    return tensors


def different(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not bit-identical."""
    assert set(first) == set(second)
    return [name for name, value in first.items() if not torch.equal(value, second[name])]
