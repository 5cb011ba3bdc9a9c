"""The whole job through the command line: what it writes, prints and needs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import data_makers as make
import nibabel as nib
import numpy as np
import pytest
from train_job import (  # noqa: F401
    assert_refused,
    different,
    job,
    nifti_job,
    one_thread,
    resume,
    set_label,
    weights,
    write_list,
)

import evaluate_3d
import train_cov_dfp_3d as train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_whole_job_writes_everything_and_prints_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(job(folder, "--baseline", exp="first")) == 0
    run = folder / "runs" / "first"
    for name in ("config.json", "split.json", "metrics.jsonl", "last.pt", "overlay.png", "baseline/last.pt"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").glob("events*"))
    config = json.loads((run / "config.json").read_text())
    assert [config[name] for name in ("exp", "labelnum", "method", "baseline")] == ["first", 2, "mean_teacher", True]
    split = json.loads((run / "split.json").read_text())
    roles = [set(split[name]) for name in ("labeled", "unlabeled", "val")]
    assert [len(role) for role in roles] == [2, 6, 0] and len(set.union(*roles)) == 8

    with (run / "test" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:6] == ["case", "class", "dice", "jaccard", "hd95_mm", "assd_mm"]
    assert [row["class"] for row in rows] == ["1", "2"] and rows[0]["case"] not in set.union(*roles)
    summary = json.loads((run / "test" / "summary.json").read_text())
    assert summary["checkpoint"] == "last.pt" and summary["step"] == 3 and summary["split_digest"] == split["digest"]
    prediction = nib.load(run / "test" / "predictions" / f"{rows[0]['case']}.nii.gz")
    assert prediction.shape == (20, 18, 16)
    assert np.allclose(prediction.affine, np.diag([1.0, 2.0, 1.0, 1.0]))
    assert (run / "baseline" / "test" / "cases.csv").exists()

    printed = capsys.readouterr()
    for part in ("1 test cases, 3 steps, seed 0", "mean_teacher", "supervised only", "HD95 mm", "Dice gain"):
        assert part in printed.out
    for path in ("last.pt", "test/cases.csv", "test/summary.json", "test/predictions", "overlay.png", "tensorboard"):
        assert str(run / path) in printed.out
    assert "cases: 2 labelled, 6 unlabelled, 0 validation" in printed.err
    assert "steps: 0 to 3, batch 4 (2 labelled), patch 16x16x16" in printed.err
    assert not list((folder / "runs").glob("**/.partial_*"))


def test_what_fits_the_labelled_cases_is_printed_and_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [word for word in job(folder, "--modality", "ct", exp="ct") if word not in ("--patch_size", "16")]
    assert train.main(flags) == 0
    printed = capsys.readouterr().err
    config = json.loads((folder / "runs" / "ct" / "config.json").read_text())
    low, high = config["ct_range"]
    assert f"CT, clipped to {low:g}..{high:g}" in printed and "patch 16x16x16" in printed
    assert 0 < low < 1 < 2 < high < 3  # a ball of 1 with a core of 2, and noise
    assert evaluate_3d.main(["--checkpoint", str(folder / "runs" / "ct" / "last.pt")]) == 0
    again = (folder / "runs" / "ct" / "evaluation" / "test" / "cases.csv").read_text()
    assert again == (folder / "runs" / "ct" / "test" / "cases.csv").read_text()


def test_cases_that_may_be_mirrored_are_named_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_list, test_list = write_list(folder / "train.txt", 0, 1, 6, 7, 8), write_list(folder / "test.txt", 2, 3)
    for number in (2, 6, 8):  # a test case and two without labels
        make.forget_orientation(folder / "data" / "images" / f"ball{number:02d}.nii.gz")
    make.forget_orientation(folder / "data" / "labels" / "ball02.nii.gz")
    assert (
        train.main(job(folder, "--baseline", exp="a", max_iteration="1", train_list=train_list, test_list=test_list))
        == 0
    )
    said = [line for line in capsys.readouterr().err.splitlines() if "neither qform nor sform" in line]
    assert [line.partition(" cases ")[0] for line in said] == ["2 of 5", "1 of 2"]
    assert "'ball06', 'ball08'; write their headers" in said[0] and "'ball02'" in said[1]


def test_without_exp_a_free_folder_is_taken(folder: Path) -> None:
    for _ in range(2):
        assert train.main(job(folder, "--no-evaluate", max_iteration="1")) == 0
    names = sorted(path.name for path in (folder / "runs").iterdir())
    assert names == ["nifti_mean_teacher_2labels_seed0", "nifti_mean_teacher_2labels_seed0_2"]
    config = json.loads((folder / "runs" / names[1] / "config.json").read_text())
    assert config["exp"] == names[1]


def test_without_evaluation_the_checkpoint_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(job(folder, "--no-evaluate", exp="a", max_iteration="1")) == 0
    printed = capsys.readouterr().out
    assert str(folder / "runs" / "a" / "last.pt") in printed and "cases.csv" not in printed
    assert not (folder / "runs" / "a" / "test").exists()


def test_resume_may_turn_the_disk_cache_on(folder: Path) -> None:
    assert train.main(job(folder, "--no-evaluate", exp="a", max_iteration="1")) == 0
    given = {"resume": True, "exp": "a", "output_dir": folder / "runs", "cache_gb": 0.01, "cache_dir": folder / "cache"}
    trainer = train.prepare(given)
    assert len(list((folder / "cache" / "cases").iterdir())) == len(trainer.state.split.labeled)


def test_resume_names_a_label_that_became_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(job(folder, "--no-evaluate", exp="a")) == 0
    labeled = json.loads((folder / "runs" / "a" / "split.json").read_text())["labeled"]
    set_label(folder / "data", labeled[0], 7)
    assert_refused(resume(folder, "a"), capsys, labeled[0], "7")


def test_a_baseline_of_another_run_is_not_taken_for_this_ones(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(job(folder, "--baseline", "--no-evaluate", exp="a", max_iteration="1")) == 0
    assert train.main(job(folder, "--no-evaluate", exp="b", max_iteration="1", seed="1")) == 0
    shutil.copytree(folder / "runs" / "a" / "baseline", folder / "runs" / "b" / "baseline")
    capsys.readouterr()
    assert train.main(resume(folder, "b", "--baseline")) == 1
    assert "b/baseline holds the baseline of another run" in capsys.readouterr().err


def test_run_finds_its_files_from_another_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_list(folder / "train.txt", *range(5))
    monkeypatch.chdir(folder)
    flags = ["--no-evaluate", "--train_list", "train.txt"]
    assert train.main(job(folder, *flags, exp="a", max_iteration="1", dataset_path="data")) == 0
    assert train.main(resume(folder, "a", *flags, "--dataset_path", "data")) == 0  # the same flags, as typed before
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert evaluate_3d.main(["--checkpoint", str(folder / "runs" / "a" / "last.pt")]) == 0
    assert train.main(resume(folder, "a")) == 0


def test_supervised_needs_no_unlabelled_case(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_list = write_list(folder / "train.txt", *range(2))
    assert train.main(job(folder, exp="sup", method="supervised", train_list=train_list, max_iteration="1")) == 0
    printed = capsys.readouterr()
    assert (
        "cases: 2 labelled, 0 unlabelled" in printed.err
        and "batch 4 (4 labelled)" in printed.err
        and "4 test cases" in printed.out
    )


def test_folder_without_test_cases_trains_and_says_why_there_is_no_evaluation(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_list = write_list(folder / "train.txt", *range(9))  # every case
    assert train.main(job(folder, exp="a", train_list=train_list, max_iteration="1")) == 0
    printed = capsys.readouterr()
    assert "training is done; no evaluation: there are no test cases" in printed.err
    assert "--test_list" in printed.err and "last.pt" in printed.out


def test_wrong_test_list_fails_the_run_and_a_right_one_completes_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = {"train_list": write_list(folder / "train.txt", *range(4)), "test_list": write_list(folder / "test.txt", 3)}
    assert train.main(job(folder, exp="a", max_iteration="1", **lists)) == 1
    printed = capsys.readouterr().err
    assert "'ball03' are training cases" in printed and "--resume" in printed
    write_list(folder / "test.txt", 4)
    assert train.main(resume(folder, "a")) == 0
    assert (folder / "runs" / "a" / "test" / "cases.csv").exists()


def test_validation_chooses_the_checkpoint_that_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(job(folder, exp="a", labelnum="3", val_num="1", save_every="1", max_iteration="2")) == 0
    run = folder / "runs" / "a"
    assert str(run / "best.pt") in capsys.readouterr().out
    assert json.loads((run / "test" / "summary.json").read_text())["checkpoint"] == "best.pt"


def test_labels_of_unlabelled_cases_do_not_matter(folder: Path) -> None:
    lists = {"train_list": write_list(folder / "train.txt", *range(5))}
    assert train.main(job(folder, exp="clean", **lists)) == 0
    set_label(folder / "data", "ball02", 77)  # beyond num_classes
    (folder / "data" / "labels" / "ball03.nii.gz").write_bytes(b"not a NIfTI file")
    (folder / "data" / "labels" / "ball04.nii.gz").write_bytes(b"")
    assert train.main(job(folder, exp="corrupt", **lists)) == 0
    assert different(weights(folder, "clean"), weights(folder, "corrupt")) == []


def test_same_seed_gives_the_same_weights_and_another_does_not(folder: Path) -> None:
    lists = {"train_list": write_list(folder / "train.txt", *range(5)), "max_iteration": "2"}
    for exp, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert train.main(job(folder, "--no-evaluate", exp=exp, seed=seed, **lists)) == 0
    assert different(weights(folder, "a"), weights(folder, "b")) == []
    assert different(weights(folder, "a"), weights(folder, "c")) != []


def test_profile_prints_where_the_time_goes_and_keeps_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(job(folder, "--profile", "2", max_iteration="5")) == 0
    printed = capsys.readouterr().out
    assert "2 steps" in printed and "forward of the teacher" in printed and "whole step" in printed
    assert not (folder / "runs").exists()
    with pytest.raises(SystemExit, match="2"):
        train.main(job(folder, "--profile", "3", max_iteration="5"))
    assert "--profile 3: at most 2" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        train.main(job(folder, "--profile", "2", "--resume"))
    assert "leave --resume out" in capsys.readouterr().err
