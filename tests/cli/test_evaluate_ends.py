"""evaluate_3d.py that ends before its time: stopped, over damaged cases, or without a list of the training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers_scans import trained_run, write_cohort

import evaluate_3d


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("data") / "balls")


@pytest.fixture(scope="module")
def checkpoint(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(cohort, tmp_path_factory.mktemp("run"), method="supervised")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("place", "told"), [("load_together", "before the first case"), ("score_into", "nothing but")])
def test_a_stopped_evaluation_ends_with_130(
    stop: signal.Signals,
    place: str,
    told: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def killed(*_: object, **__: object) -> None:
        os.kill(os.getpid(), stop)
        time.sleep(5)  # the signal is seen at once

    monkeypatch.setattr(evaluate_3d, place, killed)
    try:
        code = evaluate_3d.main(["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out")])
    except SystemExit as refusal:
        code = refusal.code
    assert code == 130 and f"stopped {told}" in capsys.readouterr().err.replace(";", "")


def test_scores_beside_damaged_cases_are_not_taken_over_by_another_checkpoint(
    cohort: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "balls", tmp_path / "out"
    shutil.copytree(cohort, data)
    damaged = data / "images" / "ball05.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    command = ["--dataset_path", str(data), "--split", "all", "--output_dir", str(out), "--checkpoint"]
    assert evaluate_3d.main([*command, str(checkpoint)]) == 1
    assert not (out / "summary.json").exists() and json.loads((out / "evaluation.json").read_text())["split"] == "all"
    before = (out / "cases.csv").read_bytes()
    other = trained_run(cohort, tmp_path / "other", method="supervised")
    with pytest.raises(SystemExit) as refusal:
        evaluate_3d.main([*command, str(other)])
    assert refusal.value.code == 2 and f"{out} holds the results of" in capsys.readouterr().err
    assert (out / "cases.csv").read_bytes() == before
    assert evaluate_3d.main([*command, str(checkpoint)]) == 1


def test_a_train_list_that_is_gone_is_named_with_the_way_on(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "train.txt"
    listed.write_text("ball00\nball01\nball02\nball06\n")
    run = trained_run(cohort, tmp_path / "run", method="supervised", train_list=listed)
    listed.unlink()
    with pytest.raises(SystemExit) as refusal:
        evaluate_3d.main(["--checkpoint", str(run)])
    assert refusal.value.code == 2
    told = capsys.readouterr().err
    assert "train.txt does not exist" in told and "put it back, or pass --test_list" in told
    (tmp_path / "test.txt").write_text("ball05\n")
    assert evaluate_3d.main(["--checkpoint", str(run), "--test_list", str(tmp_path / "test.txt")]) == 0


def test_lists_of_cases_have_folders_of_their_own(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.txt").write_text("ball00\nball01\nball02\nball06\n")
    run = trained_run(cohort, tmp_path / "run", method="supervised", train_list=tmp_path / "train.txt")
    for name, case_id in (("site_a", "ball05"), ("site_b", "ball04")):
        (tmp_path / f"{name}.txt").write_text(f"{case_id}\n")
    command = ["--checkpoint", str(run), "--test_list"]
    assert evaluate_3d.main([*command, str(tmp_path / "site_a.txt")]) == 0
    folder = run.parent / "evaluation" / "test_site_a"
    before = (folder / "summary.json").read_bytes()
    assert json.loads(before)["case_list"] == str(tmp_path / "site_a.txt")
    assert evaluate_3d.main([*command, str(tmp_path / "site_b.txt")]) == 0
    assert {path.name for path in folder.parent.iterdir()} == {"test_site_a", "test_site_b"}
    with pytest.raises(SystemExit) as refusal:
        evaluate_3d.main([*command, str(tmp_path / "site_b.txt"), "--output_dir", str(folder)])
    told = capsys.readouterr().err
    assert refusal.value.code == 2
    assert f"{folder} holds the results on other cases, those of {tmp_path / 'site_a.txt'}; pass another" in told
    assert (folder / "summary.json").read_bytes() == before
    shutil.move(tmp_path / "site_a.txt", tmp_path / "moved.txt")
    assert evaluate_3d.main([*command, str(tmp_path / "moved.txt"), "--output_dir", str(folder)]) == 0
    (folder / "summary.json").unlink()  # as after damaged cases, which a list may leave out
    assert evaluate_3d.main([*command, str(tmp_path / "site_b.txt"), "--output_dir", str(folder)]) == 0
