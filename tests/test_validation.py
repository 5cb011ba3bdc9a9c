"""Validation during a training: read once, whole, before the save, and no step lost to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BallSource
from helpers_runs import resumed_run, small_trainer

from dataloaders.base import Volume
from myutils.checkpoint import RunState
from myutils.evaluation import DamagedCasesError
from myutils.run_log import read_metrics
from myutils.trainer import TrainingInterrupted

CPU = torch.device("cpu")


def test_trainer_validates_on_held_out_labelled_cases_and_keeps_the_best(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, labelnum=4, val_num=1, save_every=2)
    assert len(trainer.state.split.labeled) == 3 and len(trainer.state.split.val) == 1
    trainer.fit()
    assert (tmp_path / "best.pt").exists() and 0 <= trainer.state.best_dice <= 1
    assert resumed_run(tmp_path).state.best_dice == trainer.state.best_dice


def test_trainer_reads_a_validation_case_once(tmp_path: Path) -> None:
    source = BallSource()
    trainer = small_trainer(source, tmp_path, labelnum=4, val_num=1, save_every=1)
    trainer.read_labels()
    trainer.fit()
    assert trainer.state.step == 4  # validations
    assert source.label_reads.count(trainer.state.split.val[0]) == 1


def test_trainer_stopped_at_a_validation_step_validates_first(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, labelnum=4, val_num=1, save_every=2)
    trainer.interrupted = True  # asked to stop before the first step: it ends at step 1, which is no validation step
    with pytest.raises(TrainingInterrupted):
        trainer.fit()
    assert (trainer.state.step, trainer.state.best_dice) == (1, -1.0) and not (tmp_path / "best.pt").exists()
    resumed = resumed_run(tmp_path)
    resumed.interrupted = True
    with pytest.raises(TrainingInterrupted):
        resumed.fit()
    assert resumed.state.step == 2 and resumed.state.best_dice >= 0 and (tmp_path / "best.pt").exists()


def test_trainer_refuses_a_validation_case_that_cannot_be_prepared(tmp_path: Path) -> None:
    source = BallSource()
    trainer = small_trainer(source, tmp_path, labelnum=4, val_num=1)
    load, val = source.load, trainer.state.split.val[0]

    def damaged(case_id: str, *, with_label: bool = True) -> Volume:
        volume = load(case_id, with_label=with_label)
        if case_id == val:
            volume.image[0, 0, 0, 0] = np.nan
        return volume

    source.load = damaged  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=f"{val}: .*NaN"):
        trainer.read_labels()


def test_trainer_that_cannot_validate_keeps_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = small_trainer(BallSource(), tmp_path, labelnum=4, val_num=1, save_every=2)

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(DamagedCasesError, match="ball04: MemoryError"):
            patched.setattr("myutils.evaluation.predict_label_map", full)
            trainer.fit()
        trainer = resumed_run(tmp_path)
        assert trainer.state.step == 2 and trainer.state.validates  # made up for before the next step
    trainer.fit()
    assert read_metrics(tmp_path, "Validation/dice")[0] == [2, 4] and not trainer.state.validates
    assert (tmp_path / "best.pt").exists()


def test_trainer_makes_up_for_the_validation_of_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(DamagedCasesError):
        patched.setattr("myutils.evaluation.predict_label_map", full)
        small_trainer(BallSource(), tmp_path, labelnum=4, val_num=1, max_iteration=1).fit()
    trainer = resumed_run(tmp_path)
    trainer.fit()
    assert trainer.state.step == 1 and trainer.state.best_dice >= 0 and (tmp_path / "best.pt").exists()


def test_trainer_killed_between_best_and_last_repeats_the_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write(path: Path, state: RunState, tensors: object) -> None:
        written.append((path.name, state.validates))

    monkeypatch.setattr("myutils.trainer.write_checkpoint", write)
    small_trainer(BallSource(), tmp_path, labelnum=4, val_num=1, max_iteration=1).fit()
    # The start, the step that is still to be validated, and what tells that it was, once best.pt is whole.
    assert written == [("last.pt", False), ("last.pt", True), ("best.pt", False), ("last.pt", False)]


def test_trainer_without_validation_writes_no_best(tmp_path: Path) -> None:
    small_trainer(BallSource(), tmp_path).fit()
    assert (tmp_path / "last.pt").exists() and not (tmp_path / "best.pt").exists()
