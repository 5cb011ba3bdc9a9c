"""Full disks and damaged files on the way: each says what to do, and --resume goes on after it is done."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers_runs import BrokenStream
from train_job import different, job, nifti_job, one_thread, resume, weights  # noqa: F401

import train_cov_dfp_3d as train
from myutils import checkpoint
from myutils.run_log import RunLog, read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def test_full_disk_keeps_the_last_checkpoint_and_says_how_to_go_on(
    folder: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    original = checkpoint.write_checkpoint

    def write(path: Path, state: checkpoint.RunState, tensors: dict[str, object]) -> None:
        with monkeypatch.context() as patch:
            if state.step == 2:
                patch.setattr(checkpoint.torch, "save", full)
            original(path, state, tensors)

    with monkeypatch.context() as patch:
        patch.setattr("myutils.trainer.write_checkpoint", write)
        assert train.main(job(folder, "--no-evaluate", exp="a", save_every="1")) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message and "--exp a --resume" in message and "Traceback" not in message
    assert f"or copy {folder / 'runs' / 'a'} elsewhere and pass that --output_dir; it has the checkpoint" in message
    shutil.copytree(folder / "runs", folder / "elsewhere" / "runs")
    assert train.main(resume(folder, "a")) == 0
    assert train.main(resume(folder / "elsewhere", "a")) == 0
    assert different(weights(folder, "a"), weights(folder / "elsewhere", "a")) == []
    assert train.main(job(folder, "--no-evaluate", exp="b", save_every="1")) == 0
    assert different(weights(folder, "a"), weights(folder, "b")) == []


def test_full_disk_at_the_first_checkpoint_says_to_start_again(
    folder: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full)
        assert train.main(job(folder, "--no-evaluate", exp="a")) == 1
    message = capsys.readouterr().err
    assert f"delete {folder / 'runs' / 'a'} and start again" in message and "--resume" not in message


def test_a_full_disk_under_the_shown_results_fails_nothing(folder: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "stdout", BrokenStream(errno.ENOSPC))
    assert train.main(job(folder, exp="a")) == 0
    assert capsys.readouterr().err.count("standard output: No space left on device; results are in files alone") == 1
    assert (folder / "runs" / "a" / "test" / "cases.csv").exists() and (folder / "runs" / "a" / "overlay.png").exists()


def test_full_disk_in_the_log_is_no_traceback(folder: Path, monkeypatch: Patch, capsys: Capture) -> None:
    original = Path.open

    def full(self: Path, *args: object, **settings: object) -> object:
        if self.name == "metrics.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *args, **settings)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        assert train.main(job(folder, "--no-evaluate", exp="a")) == 1
    message = capsys.readouterr().err
    assert "cannot write the log in" in message and "free space there" in message and "--resume" in message
    assert train.main(resume(folder, "a")) == 0
    assert isinstance(RunLog(folder / "runs" / "a", first_step=3), RunLog)


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_damaged_unlabelled_image_is_named_and_training_goes_on_after_its_repair(
    folder: Path, workers: str, capsys: Capture
) -> None:
    image = folder / "data" / "images" / "ball08.nii.gz"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])  # its header is whole
    settings = {"exp": "a", "num_workers": workers, "max_iteration": "12"}
    assert train.main(job(folder, "--no-evaluate", **settings)) == 1
    message = capsys.readouterr().err
    assert "ball08.nii.gz" in message and "--exp a --resume" in message and "Traceback" not in message
    done = torch.load(folder / "runs" / "a" / "last.pt", weights_only=True)["step"]
    assert done == len(read_metrics(folder / "runs" / "a", "Loss/total")[0]) > 0  # none of its steps is lost
    image.write_bytes(whole)
    assert train.main(resume(folder, "a")) == 0
