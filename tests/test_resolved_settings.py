"""What the data and the method decide of a run's settings, and what they must not say of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import BallSource
from listed_cases import IDS, ListedCases, write_list

from dataloaders.base import SOURCES
from dataloaders.splits import make_training_split
from myutils.build import build_source
from myutils.config import RunConfig
from myutils.methods.base import METHODS
from myutils.resolving import resolve_config


def test_by_default_no_label_of_own_data_is_left_unused(tmp_path: Path) -> None:
    assert ListedCases.defaults.labelnum is None
    assert resolve_config(RunConfig(), ListedCases()).labelnum == 7  # of 8, one for the test
    assert resolve_config(RunConfig(val_num=2), ListedCases()).labelnum == 7  # as in the flag, with these
    listed = write_list(tmp_path / "v.list", IDS[0])
    config = resolve_config(RunConfig(val_list=listed), ListedCases(test=[IDS[7]]))
    assert (config.labelnum, config.exp) == (6, "demo_mean_teacher_6labels_seed0")
    split = make_training_split(ListedCases(test=[IDS[7]]), config.split_request())
    assert (len(split.labeled), len(split.unlabeled), split.val) == (6, 2, (IDS[0],))


def test_what_a_reader_and_a_method_say_of_flags_must_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOURCES, "get", lambda name: BallSource)
    with pytest.raises(ValueError, match="--num_classes 5: demo has 3; leave it out"):
        build_source(RunConfig(num_classes=5))
    monkeypatch.setattr(METHODS.get("supervised"), "reads", frozenset({"ema_deca"}))
    with pytest.raises(ValueError, match=r"Supervised\.reads has 'ema_deca'; name flags of the trainer"):
        resolve_config(RunConfig(method="supervised"), BallSource())
