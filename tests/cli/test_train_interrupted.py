"""Stops on the way: Ctrl-C, SIGTERM, SIGHUP, a loss that is not finite; each says how to go on, and --resume does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_job import ROOT, different, job, nifti_job, one_thread, resume, weights  # noqa: F401

import train_cov_dfp_3d as train
from myutils.finite_watch import NonFiniteLossError
from myutils.run_log import read_metrics
from myutils.trainer import Trainer
from myutils.validation import Validation

pytestmark = pytest.mark.usefixtures("one_thread")
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def press_ctrl_c(patch: Patch, *, method: str, step: int) -> None:
    """Send SIGINT to this process when ``method`` comes to ``step``."""
    original = Trainer.train_step

    def press(self: Trainer, network: object, batch: object, now: int) -> object:
        if self.state.config.method == method and now == step:
            signal.raise_signal(signal.SIGINT)
        return original(self, network, batch, now)  # type: ignore[arg-type]

    patch.setattr(Trainer, "train_step", press)


@pytest.mark.parametrize(
    ("started", "shown"),
    [
        ("/opt/venv/bin/covdfp-train", "covdfp-train"),
        ("../toolkit/train_cov_dfp_3d.py", "python ../toolkit/train_cov_dfp_3d.py"),
        ("/usr/bin/pytest", "python train_cov_dfp_3d.py"),
    ],
)
def test_the_command_to_go_on_is_that_of_the_start(
    folder: Path, monkeypatch: Patch, capsys: Capture, started: str, shown: str
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    press_ctrl_c(monkeypatch, method="mean_teacher", step=0)
    assert train.main(job(folder, "--no-evaluate", exp="a")) == 130
    assert f"\n  {shown} --output_dir {folder / 'runs'} --exp a --resume\n" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_no_reason_to_repeat_the_step(
    folder: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def fail(*args: object) -> None:
        raise NonFiniteLossError("step 1: the gradient not finite; cases: ball00. Look at these images")

    monkeypatch.setattr(Trainer, "train_step", fail)
    assert train.main(job(folder, exp="a")) == 1
    message = capsys.readouterr().err
    assert "error: step 1: the gradient not finite" in message and "Go on from" not in message


def test_ctrl_c_saves_and_resume_ends_with_the_same_weights(folder: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert train.main(job(folder, "--no-evaluate", exp="whole", max_iteration="4")) == 0
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, method="mean_teacher", step=1)
        assert train.main(job(folder, "--no-evaluate", exp="broken", max_iteration="4")) == 130
    message = capsys.readouterr().err
    assert "stopped mean_teacher at step 2 of 4, saved" in message and "Traceback" not in message
    command = f"python train_cov_dfp_3d.py --output_dir {folder / 'runs'} --exp broken --resume"
    assert message.rstrip().endswith(command)
    assert train.main(command.split()[2:]) == 0
    assert different(weights(folder, "whole"), weights(folder, "broken")) == []
    assert read_metrics(folder / "runs" / "broken", "Loss/total")[0] == [1, 2, 3, 4]


def start_in_background(argv: list[str], log: Path, steps: int) -> subprocess.Popen[bytes]:
    """A training process, in a group of its own, that has logged at least ``steps`` steps to ``log``."""
    command = [sys.executable, str(ROOT / "train_cov_dfp_3d.py"), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, int] = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    end = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < steps:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_killed_process_is_resumed_bit_identically(folder: Path, workers: str) -> None:
    """The signal goes to the workers too, as from a terminal or ``torchrun``."""
    settings = {"max_iteration": "20", "save_every": "5", "num_workers": workers}
    assert train.main(job(folder, "--no-evaluate", exp="whole", **settings)) == 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL):
        log = folder / "runs" / number.name / "metrics.jsonl"
        process = start_in_background(job(folder, "--no-evaluate", exp=number.name, **settings), log, steps=7)
        os.killpg(process.pid, number)
        _, message = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130
            assert f"--exp {number.name} --resume".encode() in message and b"Traceback" not in message
        assert len(log.read_text().splitlines()) < 20
        assert train.main(resume(folder, number.name)) == 0
        assert different(weights(folder, "whole"), weights(folder, number.name)) == []
        assert read_metrics(log.parent, "Loss/total")[0] == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="workers cannot tell who sends a signal")
def test_a_worker_ends_with_its_parent_and_not_before(tmp_path: Path) -> None:
    """A fetch that never ends, a signal to all processes, and a parent that gives up."""
    script = tmp_path / "endless.py"
    script.write_text("""
import os, signal, subprocess, sys, time
from torch.utils.data import DataLoader
from myutils.stop_signals import leave_stops_to_parent

class Endless:
    def __len__(self):
        return 2
    def __getitem__(self, index):
        time.sleep(1000 * index)
        return index

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    batches = iter(DataLoader(Endless(), num_workers=1, worker_init_fn=leave_stops_to_parent))
    next(batches)
    assert os.getpgrp() == os.getpid()
    other = f"import os; os.killpg({os.getpid()}, {int(signal.SIGTERM)})"
    subprocess.run([sys.executable, "-c", other], check=True)
    time.sleep(1)
    assert all(worker.is_alive() for worker in batches._workers)
""")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(script)], env=environment, start_new_session=True, check=True, timeout=60)


@pytest.mark.slow
def test_ctrl_c_in_the_baseline_does_not_train_the_main_run_again(
    folder: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, method="supervised", step=1)
        assert train.main(job(folder, "--baseline", exp="a")) == 130
    assert "stopped supervised at step 2 of 3, saved" in capsys.readouterr().err
    trained = []
    original = Trainer.train_step

    def count(self: Trainer, network: object, batch: object, step: int) -> object:
        trained.append((self.state.config.method, step))
        return original(self, network, batch, step)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", count)
        assert train.main(resume(folder, "a")) == 0
    printed = capsys.readouterr()
    assert trained == [("supervised", 2)]
    assert "steps: all 3 are done" in printed.err and "supervised only" in printed.out

    assert train.main(job(folder, "--baseline", exp="b")) == 0
    assert different(weights(folder, "a/baseline"), weights(folder, "b/baseline")) == []


def test_ctrl_c_in_a_validation_with_no_step_left_starts_nothing_more(
    folder: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def press(self: Validation, network: object) -> float:
        signal.raise_signal(signal.SIGINT)
        return 0.5

    def die(*args: object) -> float:
        raise KeyboardInterrupt  # as at a second Ctrl-C: the validation is still to come

    settings = {"exp": "a", "labelnum": "3", "val_num": "1"}
    for dice in (die, press):
        with monkeypatch.context() as patch:
            patch.setattr(Validation, "dice", dice)
            assert train.main(resume(folder, "a") if dice is press else job(folder, "--baseline", **settings)) == 130
    assert "stopped mean_teacher at step 3 of 3, saved" in capsys.readouterr().err
    assert not (folder / "runs" / "a" / "baseline").exists() and not (folder / "runs" / "a" / "test").exists()


def test_ctrl_c_at_the_last_step_starts_nothing_more(folder: Path, monkeypatch: Patch, capsys: Capture) -> None:
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, method="mean_teacher", step=2)
        assert train.main(job(folder, "--baseline", exp="a")) == 130
    assert "stopped mean_teacher at step 3 of 3, saved" in capsys.readouterr().err
    assert not (folder / "runs" / "a" / "baseline").exists() and not (folder / "runs" / "a" / "test").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_evaluation_says_how_to_evaluate_again(
    folder: Path, monkeypatch: Patch, capsys: Capture, number: signal.Signals
) -> None:
    def press(*args: object, **settings: object) -> None:
        signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_run", press)
        assert train.main(job(folder, exp="a", max_iteration="1")) == 130
    message = capsys.readouterr().err
    assert "Traceback" not in message and "--exp a --resume" in message
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert train.main(resume(folder, "a")) == 0
    assert (folder / "runs" / "a" / "test" / "cases.csv").exists()


def test_ctrl_c_before_the_start_leaves_nothing(folder: Path, monkeypatch: Patch, capsys: Capture) -> None:
    def press(*args: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "read_labels", press)
    assert train.main(job(folder, exp="a")) == 130
    assert "stopped before the first step" in capsys.readouterr().err and not (folder / "runs").exists()


def test_resume_of_a_finished_run_evaluates_again_and_can_add_the_baseline(folder: Path, capsys: Capture) -> None:
    assert train.main(job(folder, exp="a")) == 0
    before, run = weights(folder, "a"), folder / "runs" / "a"
    table = (run / "test" / "cases.csv").read_text()
    shutil.rmtree(run / "test")
    capsys.readouterr()
    assert train.main(resume(folder, "a", "--baseline")) == 0
    assert (run / "test" / "cases.csv").read_text() == table
    assert different(before, weights(folder, "a")) == []
    assert "supervised only" in capsys.readouterr().out


def test_resume_follows_data_that_moved(folder: Path) -> None:
    assert train.main(job(folder, exp="a", max_iteration="1")) == 0
    (folder / "data").rename(folder / "elsewhere")
    assert train.main(resume(folder, "a", "--dataset_path", str(folder / "elsewhere"))) == 0


def test_resume_takes_its_flags_to_the_baseline_and_misses_a_test_list_at_once(folder: Path, capsys: Capture) -> None:
    assert train.main(job(folder, "--baseline", "--no-evaluate", exp="a", method="best", max_iteration="1")) == 0
    stored = json.loads((folder / "runs" / "a" / "baseline" / "config.json").read_text())
    assert not stored["deep_supervision"] and stored["tta_flips"]  # supervised training, scored as ``best`` is
    assert (folder / "runs" / "a" / "baseline" / "split.json").exists()
    (folder / "data").rename(folder / "moved")
    given = {"resume": True, "exp": "a", "output_dir": folder / "runs", "dataset_path": folder / "moved"}
    baseline = train.baseline_trainer(train.prepare(given | {"num_workers": 2}))
    assert (baseline.state.config.num_workers, baseline.state.config.dataset_path) == (2, folder / "moved")
    with pytest.raises(FileNotFoundError, match=r"--test_list .*nosuch.txt"):
        train.prepare(given | {"test_list": folder / "nosuch.txt", "evaluate": True})
