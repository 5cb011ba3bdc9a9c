"""Which cases are scored where patients have several: none of a patient that the training saw, unless asked for all."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import BallSource
from helpers_scans import trained_run, write_cohort
from listed_cases import write_list

import evaluate_3d
from dataloaders.base import Grid
from dataloaders.say_once import warn_once
from dataloaders.splits import SplitRequest, TrainingSplit
from myutils.evaluation_cases import (
    choose_cases,
    is_training_data,
    require_match,
    warn_if_moved,
    warn_of_stored_axes,
)


class Pairs(BallSource):
    """ball00 and ball01 are of one patient, and so on."""

    def patient(self, case_id: str) -> str:
        return str(int(case_id[-1]) // 2) if case_id.startswith("ball") else case_id


def trained_on(*labeled: str, test_list: Path | None = None) -> SimpleNamespace:
    """What ``choose_cases`` looks at of a checkpoint; "gone" is not in the data, so that these are other data."""
    config = SimpleNamespace(dataset_path=None, test_list=test_list)
    return SimpleNamespace(split=TrainingSplit(labeled, ("gone",), ()), config=config)


def test_data_that_lost_a_training_scan_keep_the_lists_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lists other cases would be scored, under the name of other data."""
    write_list(tmp_path / "test.txt", "ball05")
    write_list(tmp_path / "train.txt", "ball00", "ball01", "ball02", "ball07")
    source = Pairs()
    source.root = tmp_path
    request = SplitRequest(labelnum=2, train_list=tmp_path / "train.txt", test_list=tmp_path / "test.txt")
    config = SimpleNamespace(dataset_path=tmp_path, split_request=lambda: request)
    split = TrainingSplit(("ball00", "ball01"), ("ball02", "ball07"), ())
    bundle = SimpleNamespace(split=split, config=config)
    assert choose_cases(source, bundle, "test") == ("ball05",)
    left = [case_id for case_id in source.case_ids() if case_id != "ball07"]
    monkeypatch.setattr(source, "case_ids", lambda: left)
    assert choose_cases(source, bundle, "test") == ("ball05",)
    config.dataset_path = tmp_path / "elsewhere"
    assert not is_training_data(source, bundle)


def test_other_names_of_the_classes_are_named_and_other_numbers_refused(caplog: pytest.LogCaptureFixture) -> None:
    source = BallSource()
    facts = {"in_channels": 1, "num_classes": 3, "class_names": ("background", "core", "ball")}
    require_match(source, SimpleNamespace(**facts))
    assert "class names differ: background, ball, core in the data, background, core, ball in" in caplog.text
    for name, message in (
        ("in_channels", "1 image channels, the checkpoint was trained on 2"),
        ("num_classes", "3 cl"),
    ):
        with pytest.raises(ValueError, match=message):
            require_match(source, SimpleNamespace(**(facts | {name: facts[name] + 1})))


def test_other_cases_of_training_patients_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_cases(Pairs(), trained_on("ball00"), "test") == ("ball02", "ball03", "ball04", "ball05")
    assert "2 cases of training patients" in caplog.text and "is not used" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert len(choose_cases(Pairs(), trained_on("ball00", test_list=Path("a.txt")), "test")) == 4
    assert "its --test_list a.txt is not used: pass it" in caplog.text
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


class Scattered(BallSource):
    """ball00 is stored as LPS, ball01 without directions, ball02 damaged, the others as RAS."""

    def grid(self, case_id: str) -> Grid:
        if case_id == "ball02":
            raise ValueError("damaged")
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) if case_id == "ball00" else np.eye(4)
        return Grid((4, 4, 4), affine, oriented=case_id != "ball01")


def test_axes_of_other_data_are_named_to_a_network_that_takes_them_as_stored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_once.cache_clear()
    stored, turned = (SimpleNamespace(orientation=orientation) for orientation in ("stored", "ras"))
    elsewhere, here = TrainingSplit(("gone",), (), ()), TrainingSplit(("ball03",), (), ())
    nowhere = SimpleNamespace(dataset_path=None)
    source, ids = Scattered(), ["ball00", "ball01", "ball02", "ball04"]
    warn_of_stored_axes(source, ids, SimpleNamespace(preprocess=turned, split=elsewhere, config=nowhere))
    warn_of_stored_axes(
        source, ids, SimpleNamespace(preprocess=stored, split=here, config=nowhere)
    )  # the data of the training
    assert not caplog.text
    warn_of_stored_axes(source, ids, SimpleNamespace(preprocess=stored, split=elsewhere, config=nowhere))
    assert "takes axes as stored, here LPS, RAS, without directions: in each scan" in caplog.text


def test_an_evaluation_names_the_axes_of_other_data_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warn_once.cache_clear()
    cohort, other = write_cohort(tmp_path / "balls"), write_cohort(tmp_path / "b", cases=1, labeled=1, prefix="other")
    run = ["--checkpoint", str(trained_run(cohort, tmp_path / "run", method="supervised", orientation="stored"))]
    assert evaluate_3d.main(run) == 0
    assert "as stored" not in capsys.readouterr().err
    assert evaluate_3d.main([*run, "--dataset_path", str(other)]) == 0
    assert "takes axes as stored, here RAS" in capsys.readouterr().err


def test_an_evaluation_does_not_replace_that_of_a_run_of_the_same_name_or_of_another_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, out = write_cohort(tmp_path / "balls"), ["--output_dir", str(tmp_path / "out")]
    folds = [
        str(trained_run(cohort, tmp_path / fold / "run", method="supervised", labelnum=labelnum))
        for fold, labelnum in (("one", 1), ("two", 2))
    ]
    assert evaluate_3d.main(["--checkpoint", folds[0], *out]) == 0
    for flags in (["--checkpoint", folds[1]], ["--checkpoint", folds[0], "--split", "all"]):
        with pytest.raises(SystemExit):
            evaluate_3d.main([*flags, *out])
        assert f"{tmp_path / 'out'} holds the results of" in capsys.readouterr().err
    assert evaluate_3d.main(["--checkpoint", folds[0], *out]) == 0


def test_the_pattern_of_the_training_finds_its_patients_in_other_data_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By its digits one of the others is a patient of the training."""
    checkpoint = trained_run(write_cohort(tmp_path / "balls"), tmp_path / "run", labelnum=3, patient_pattern=r"\d+$")
    other = write_cohort(tmp_path / "clinic", cases=3, labeled=2, prefix="other")
    flags = evaluate_3d.EvaluateFlags(checkpoint=(checkpoint,), dataset_path=other, output_dir=tmp_path / "out")
    assert len(evaluate_3d.prepare(flags).case_ids) == 1
    assert evaluate_3d.prepare(dataclasses.replace(flags, patient_pattern="")).case_ids == ("other00", "other01")
    evaluate_3d.prepare(dataclasses.replace(flags, patient_pattern="ball"))
    assert "patient of its own, for --patient_pattern finds none in them: 'other00', 'other01'" in caplog.text
