"""Which cases are scored where patients have several: none of a patient that the training saw, unless asked for all."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import BallSource

from dataloaders.splits import TrainingSplit
from myutils.evaluation_cases import choose_cases, warn_if_moved


class Pairs(BallSource):
    """ball00 and ball01 are of one patient, and so on."""

    def patient(self, case_id: str) -> str:
        return str(int(case_id[-1]) // 2) if case_id.startswith("ball") else case_id


def trained_on(*labeled: str) -> SimpleNamespace:
    """What ``choose_cases`` looks at of a checkpoint; "gone" is not in the data, so that these are other data."""
    return SimpleNamespace(split=TrainingSplit(labeled, ("gone",), ()))


def test_other_cases_of_training_patients_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_cases(Pairs(), trained_on("ball00"), "test") == ("ball02", "ball03", "ball04", "ball05")
    assert "2 cases of training patients" in caplog.text
    with pytest.raises(ValueError, match="all labelled cases are of training patients"):
        choose_cases(Pairs(labeled=2), trained_on("ball00"), "test")


def test_lists_with_training_patients_are_refused_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("ball01\nball04\n")
    with pytest.raises(ValueError, match="'ball01', whose patients this run was trained on"):
        choose_cases(Pairs(), trained_on("ball00"), "val", val_list=listed)
    with caplog.at_level(logging.WARNING):
        assert choose_cases(Pairs(), trained_on("ball00"), "test", test_list=listed) == ("ball01", "ball04")
    assert "1 of 2 cases are of training patients" in caplog.text


def test_test_cases_that_moved_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_if_moved(["ball00"], tmp_path)  # never scored
    (tmp_path / "test").mkdir()
    for content in ("{}", "[]", "no json"):  # not the run's own
        (tmp_path / "test/summary.json").write_text(content)
        warn_if_moved(["ball00"], tmp_path)
    (tmp_path / "test/summary.json").write_text(json.dumps({"test_ids": ["ball01", "ball00"]}))
    warn_if_moved(["ball00", "ball01"], tmp_path)
    assert not caplog.text
    warn_if_moved(["ball00", "ball01", "ball02"], tmp_path)
    assert "3 test cases, not the 2 of the end of the training" in caplog.text


def test_validation_cases_of_training_patients_are_named(caplog: pytest.LogCaptureFixture) -> None:
    joined = SimpleNamespace(split=TrainingSplit(("ball01",), (), ("ball00", "ball02")))
    assert choose_cases(Pairs(), joined, "val") == ("ball00", "ball02")
    assert "1 of 2 validation cases are of training patients" in caplog.text
