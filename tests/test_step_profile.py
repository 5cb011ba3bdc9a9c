"""Timing the parts of a step: exclusive, complete, nothing kept."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from conftest import BallSource
from helpers_runs import small_trainer

from myutils.step_profile import OTHER, PartTimer, check_length, format_profile, profile_training


def test_time_of_an_inner_part_counts_once() -> None:
    timer = PartTimer(torch.device("cpu"))
    with timer.part("outer"):
        time.sleep(0.02)
        with timer.part("inner"):
            time.sleep(0.05)
    assert 0.05 <= timer.seconds["inner"] < 0.2
    assert 0.02 <= timer.seconds["outer"] < 0.05


@pytest.mark.parametrize(
    ("method", "own"),
    [("mean_teacher", {"forward of the teacher", "prototypes"}), ("cps", {"forward of the second"}), ("mc_net", set())],
)
def test_parts_of_each_method_add_up_to_the_whole(tmp_path: Path, method: str, own: set[str]) -> None:
    trainer = small_trainer(BallSource(), tmp_path, method=method, max_iteration=6)
    started = time.perf_counter()
    parts = profile_training(trainer, 3)
    elapsed = time.perf_counter() - started
    common = {"forward of the student", "backward", "losses and mixing", "gradient norm and optimizer", "logging"}
    assert own | common | {OTHER} <= set(parts)
    assert all(value >= 0 for value in parts.values())
    assert 3 * sum(parts.values()) < elapsed
    assert trainer.state.step == 6


def test_a_profile_is_of_steps_after_the_warm_up(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, method="bcp", max_iteration=12, warmup_iteration=6)
    with pytest.raises(ValueError, match=r"--profile 4: at most 3, .* less 3 to warm up and the 6 on labelled"):
        check_length(trainer, 4)
    assert "forward of the teacher" in profile_training(trainer, 3)
    assert trainer.state.step == 12


def test_profile_with_workers_sends_them_no_timer(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, max_iteration=5, num_workers=1)
    get = trainer.cache.get
    assert "reading cases" not in profile_training(trainer, 2)
    assert trainer.cache.get == get  # a GPU's clock would be read in a process that has no part in it


def test_profile_of_a_training_that_is_too_short_is_refused(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, max_iteration=6)
    check_length(trainer, 3)
    with pytest.raises(ValueError, match="--profile 4: at most 3"):
        check_length(trainer, 4)


def test_table_shows_the_largest_part_first() -> None:
    lines = format_profile({"small": 0.001, "large": 0.003}).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["large", "small"]
    assert lines[1].split()[1:] == ["3.0", "75.0%"]
    assert lines[-1].split()[-2:] == ["4.0", "100%"]
