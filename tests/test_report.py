"""The end of a run: the checkpoint that counts is scored, and one picture shows every run."""

from __future__ import annotations

import csv
import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BallSource
from helpers_runs import small_trainer
from matplotlib import image as pictures

from dataloaders.base import Volume
from myutils.overlay import OverlayCase
from myutils.report import draw_run, evaluate_run, result_checkpoint

CPU = torch.device("cpu")


def test_result_checkpoint_is_the_best_where_there_is_one(tmp_path: Path) -> None:
    assert result_checkpoint(tmp_path) == tmp_path / "last.pt"
    (tmp_path / "best.pt").touch()
    assert result_checkpoint(tmp_path) == tmp_path / "best.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BallSource]:
    """A finished run and its source."""
    folder, source = tmp_path_factory.mktemp("run"), BallSource()
    small_trainer(source, folder, max_iteration=2, log_every=1).fit()
    return folder, source


def test_evaluate_run_writes_figures_that_follow_from_its_predictions(trained: tuple[Path, BallSource]) -> None:
    folder, source = trained
    results, summary = evaluate_run(folder, source, ["ball04", "ball05"], CPU)
    assert [result.case_id for result in results] == ["ball04", "ball05"]
    with (folder / "test" / "cases.csv").open(newline="") as file:
        rows = {(row["case"], row["class"]): row for row in csv.DictReader(file)}
    assert set(rows) == {(case_id, class_id) for case_id in ("ball04", "ball05") for class_id in ("1", "2")}
    for case_id in ("ball04", "ball05"):
        truth = source.load(case_id, with_label=True).label
        found = np.asarray(nib.load(folder / "test" / "predictions" / f"{case_id}.nii.gz").dataobj)
        for class_id in (1, 2):
            ours, theirs = found == class_id, truth == class_id
            dice = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
            assert float(rows[case_id, str(class_id)]["dice"]) == pytest.approx(dice, abs=1e-5)
    stored = json.loads((folder / "test" / "summary.json").read_text())
    assert stored == json.loads(json.dumps(summary))
    assert stored["n_cases"] == 2 and stored["checkpoint"] == "last.pt" and stored["step"] == 2
    assert len(stored["split_digest"]) == 64
    mean = np.mean([float(row["dice"]) for row in rows.values()])
    assert math.isclose(stored["mean"]["dice"]["mean"], mean, abs_tol=1e-5)


def test_predictions_of_cases_no_longer_scored_are_removed(
    trained: tuple[Path, BallSource], caplog: pytest.LogCaptureFixture
) -> None:
    folder, source = trained
    predictions = folder / "test" / "predictions"
    evaluate_run(folder, source, ["ball04", "ball05"], CPU)
    (predictions / "mine.nii.gz").touch()  # no evaluation wrote it
    with caplog.at_level(logging.INFO):
        evaluate_run(folder, source, ["ball05"], CPU)
    assert sorted(path.name for path in predictions.iterdir()) == ["ball05.nii.gz", "mine.nii.gz"]
    assert f"{predictions}: removed label maps of cases that are no longer scored: 'ball04.nii.gz'" in caplog.text
    (folder / "test" / "cases.csv").write_bytes(b"case,class\n\xff\x00")  # of a machine that crashed
    evaluate_run(folder, source, ["ball05"], CPU)


def test_a_damaged_test_case_does_not_take_the_others_scores(
    trained: tuple[Path, BallSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source = trained
    evaluate_run(folder, source, ["ball04", "ball05"], CPU)
    load = source.load

    def damaged(case_id: str, *, with_label: bool) -> Volume:
        if case_id == "ball04":
            raise ValueError("case ball04: damaged")
        return load(case_id, with_label=with_label)

    monkeypatch.setattr(source, "load", damaged)
    with pytest.raises(ValueError, match=r"1 of 3 cases cannot be scored: .*cases\.csv holds the others"):
        evaluate_run(folder, source, ["ball03", "ball04", "ball05"], CPU)
    with (folder / "test" / "cases.csv").open(newline="") as file:
        assert {row["case"] for row in csv.DictReader(file)} == {"ball03", "ball05"}
    assert not (folder / "test" / "summary.json").exists()
    found = {path.name for path in (folder / "test" / "predictions").glob("ball*")}
    assert found == {"ball03.nii.gz", "ball05.nii.gz"}
    monkeypatch.undo()
    evaluate_run(folder, source, ["ball04", "ball05"], CPU)  # as the tests after this one expect


def test_draw_run_shows_a_run_and_its_baseline(trained: tuple[Path, BallSource], tmp_path: Path) -> None:
    folder, source = trained
    results, _ = evaluate_run(folder, source, ["ball05"], CPU)
    runs = {"mean_teacher": folder, "supervised": folder}
    draw_run(tmp_path / "one.png", source, {"mean_teacher": folder}, {"mean_teacher": results})
    draw_run(tmp_path / "two.png", source, runs, dict.fromkeys(runs, results))
    one, two = (pictures.imread(tmp_path / name) for name in ("one.png", "two.png"))
    assert one.std() > 0.05 and two.shape[1] > one.shape[1]


def test_the_picture_s_dice_leaves_out_classes_that_no_case_shows(
    trained: tuple[Path, BallSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source = trained
    (result,), _ = evaluate_run(folder, source, ["ball05"], CPU)
    nowhere = replace(result, truth_ml={1: 2.0, 2: 0.0})
    drawn: list[OverlayCase] = []
    monkeypatch.setattr("myutils.report.save_overlay", lambda _, cases, **__: drawn.extend(cases))
    draw_run(tmp_path / "a.png", source, {"a": folder}, {"a": [nowhere]})
    assert [case.notes for case in drawn] == [{"a": f"Dice {100 * result.metrics[1].dice:.1f} %"}]


def test_draw_run_needs_no_log(trained: tuple[Path, BallSource], tmp_path: Path) -> None:
    folder, source = trained
    results, _ = evaluate_run(folder, source, ["ball05"], CPU)
    (folder / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    try:
        draw_run(tmp_path / "a.png", source, {"mean_teacher": folder}, {"mean_teacher": results})
    finally:
        (tmp_path / "metrics.jsonl").rename(folder / "metrics.jsonl")
    assert (tmp_path / "a.png").stat().st_size > 0
