"""Ranks with different settings or data are refused, by each of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from conftest import BallSource
from helpers_runs import small_config

from dataloaders.splits import make_training_split
from myutils import rank_checks
from myutils.build import DataFacts
from myutils.checkpoint import RunState
from myutils.rank_checks import require_equal, require_equal_states


def state_with(step: int = 0, **flags: Any) -> RunState:
    source = BallSource()
    config = small_config(source, **flags)
    return RunState(config, DataFacts.of(source), make_training_split(source, config.split_request()), step)


def told(state: RunState, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a rank with this state tells the others."""
    heard: list[Any] = []
    monkeypatch.setattr(rank_checks, "join_shares", lambda share: heard.extend(share) or heard)
    require_equal_states(state)
    return heard[0]


STATE = state_with()
OTHER_CASES = dataclasses.replace(STATE, split=dataclasses.replace(STATE.split, unlabeled=("x",)))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (state_with(seed=1), "--seed 1, process 0 0;"),
        (state_with(labelnum=3), "--labelnum 3, process 0 2;"),
        (state_with(step=2), "step 2, process 0 0;"),
        (dataclasses.replace(STATE, facts=dataclasses.replace(STATE.facts, modality="ct")), "modality ct"),
        (OTHER_CASES, "unlabeled with 'x', process 0 with 'ball07', "),
    ],
)
def test_a_rank_that_differs_is_named(other: RunState, difference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = [told(state, monkeypatch) for state in (state_with(), state_with(), other)]
    monkeypatch.setattr(rank_checks, "join_shares", lambda _: heard)
    with pytest.raises(ValueError, match=f"process 2 has {difference}"):
        require_equal_states(state_with())


def test_folders_workers_and_caches_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = state_with(dataset_path=tmp_path, cache_dir=tmp_path, output_dir=tmp_path, num_workers=3, cache_gb=1.0)
    heard = [told(state, monkeypatch) for state in (STATE, elsewhere)]
    monkeypatch.setattr(rank_checks, "join_shares", lambda _: heard)
    require_equal_states(STATE)


@pytest.mark.parametrize(
    ("told", "difference"),
    [
        (
            {"cases": ["a", "b"], "old": 1},
            r"process 1 has old 1, process 0 None; start all with the same flags, version",
        ),
        ({"cases": ["a", "c"]}, "process 1 has cases with 'c', process 0 with 'b'"),
        ({"cases": ["b", "a"]}, "process 1 has cases of 2, process 0 of 2"),
        ({}, r"process 1 has cases None, process 0 \['a', 'b'\]"),
    ],
)
def test_what_differs_is_shown(told: dict[str, Any], difference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_checks, "join_shares", lambda share: [*share, told])
    with pytest.raises(ValueError, match=difference):
        require_equal({"cases": ["a", "b"]})
