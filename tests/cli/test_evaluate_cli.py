"""evaluate_3d.py from the command line, against a checkpoint that was trained on data on disk."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from pathlib import Path

import data_makers as make
import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_scans import trained_run, write_cohort

import evaluate_3d
from myutils import inference_flags
from myutils.checkpoint import load_for_inference


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("data") / "balls")


@pytest.fixture(scope="module")
def checkpoint(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(cohort, tmp_path_factory.mktemp("runs") / "run", labelnum=3, val_num=1)


def evaluate(checkpoint: Path, *flags: object) -> int:
    return evaluate_3d.main(["--checkpoint", str(checkpoint), *map(str, flags)])


def cases_in(folder: Path) -> list[str]:
    with (folder / "cases.csv").open(newline="") as file:
        return sorted({row["case"] for row in csv.DictReader(file)})


def refused(capsys: pytest.CaptureFixture[str], checkpoint: Path, *flags: object) -> str:
    """The one line on stderr of a refused start."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate(checkpoint, *flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def split_of(checkpoint: Path) -> dict[str, tuple[str, ...]]:
    bundle = load_for_inference(checkpoint, torch.device("cpu"))
    return {"labeled": bundle.split.labeled, "unlabeled": bundle.split.unlabeled, "val": bundle.split.val}


def test_checkpoint_alone_is_enough(cohort: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(checkpoint) == 0
    folder = checkpoint.parent / "evaluation" / "test"
    used = {case_id for ids in split_of(checkpoint).values() for case_id in ids}
    cases = cases_in(folder)
    assert len(cases) == 1 and not used & set(cases)  # one labelled case in five of six is held out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["n_cases"] == 1 and summary["step"] == 2 and summary["dataset_name"] == "nifti"
    saved, image = (
        nib.load(folder / "predictions" / f"{cases[0]}.nii.gz"),
        nib.load(cohort / "images" / f"{cases[0]}.nii.gz"),
    )
    assert saved.shape == image.shape
    np.testing.assert_array_equal(saved.affine, image.affine)
    out = capsys.readouterr().out
    assert "Dice %" in out and "1 ball" in out and "2 core" in out and str(folder / "cases.csv") in out


def test_validation_and_all_cases(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_log(monkeypatch)
    assert evaluate(checkpoint, "--split", "val", "--output_dir", tmp_path / "val") == 0
    assert cases_in(tmp_path / "val") == sorted(split_of(checkpoint)["val"])
    with caplog.at_level(logging.WARNING):
        assert evaluate(checkpoint, "--split", "all", "--output_dir", tmp_path / "all") == 0
    assert cases_in(tmp_path / "all") == [f"ball{index:02d}" for index in range(6)]
    assert "5 of 6 cases are of training patients" in caplog.text


def keep_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own set-up would take pytest's log handler away."""
    monkeypatch.setattr(inference_flags, "setup_logging", lambda **_: None)


def test_moved_data_are_still_the_training_data(cohort: Path, checkpoint: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(cohort, tmp_path / "moved")
    assert evaluate(checkpoint, "--dataset_path", moved, "--output_dir", tmp_path / "out") == 0
    assert evaluate(checkpoint, "--output_dir", tmp_path / "there") == 0
    assert cases_in(tmp_path / "out") == cases_in(tmp_path / "there")


def test_other_data_with_the_names_of_the_training_data_are_named_and_overwrite_nothing(
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keep_log(monkeypatch)
    other = write_cohort(tmp_path / "clinic")
    assert evaluate(checkpoint, "--output_dir", tmp_path / "out") == 0
    before = (tmp_path / "out" / "cases.csv").read_bytes()
    with caplog.at_level(logging.WARNING):
        told = refused(capsys, checkpoint, "--dataset_path", other, "--output_dir", tmp_path / "out")
    assert "holds the results on" in told and f"not on {other}; pass another --output_dir" in told
    assert f"{other} has all" in caplog.text and "--split all" in caplog.text
    assert (tmp_path / "out" / "cases.csv").read_bytes() == before


def test_folders_of_one_name_do_not_overwrite_each_other(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = [write_cohort(tmp_path / site / "scans", cases=2, labeled=2, prefix=site) for site in ("a", "b")]
    monkeypatch.chdir(sites[0])
    assert evaluate(checkpoint, "--dataset_path", ".") == 0
    assert cases_in(checkpoint.parent / "evaluation" / "scans_test") == ["a00", "a01"]
    assert evaluate(checkpoint, "--dataset_path", sites[0]) == 0  # the same data, named otherwise
    assert f"holds the results on {sites[0]}" in refused(capsys, checkpoint, "--dataset_path", sites[1])


def test_other_data_are_scored_whole_or_by_their_list(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_log(monkeypatch)
    other = write_cohort(tmp_path / "clinic", cases=3, labeled=2, prefix="other")
    with caplog.at_level(logging.INFO):
        assert evaluate(checkpoint, "--dataset_path", other) == 0
    folder = checkpoint.parent / "evaluation" / "clinic_test"
    assert cases_in(folder) == ["other00", "other01"] and "scoring all 2 labelled cases" in caplog.text
    (tmp_path / "list.txt").write_text("other01\n")
    flags = ("--dataset_path", other, "--test_list", tmp_path / "list.txt", "--output_dir", tmp_path / "out")
    assert evaluate(checkpoint, *flags) == 0
    assert cases_in(tmp_path / "out") == ["other01"]
    (other / "classes.txt").unlink()  # the number of classes is then the checkpoint's
    assert evaluate(checkpoint, *flags) == 0


def test_list_with_ids_of_training_cases_on_other_data_gives_a_warning(
    cohort: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_log(monkeypatch)
    part = shutil.copytree(cohort, tmp_path / "part")
    (part / "images" / f"{split_of(checkpoint)['unlabeled'][0]}.nii.gz").unlink()  # no longer the whole training set
    (tmp_path / "list.txt").write_text(f"{split_of(checkpoint)['labeled'][0]}\n")
    flags = ("--dataset_path", part, "--test_list", tmp_path / "list.txt", "--output_dir", tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        assert evaluate(checkpoint, *flags) == 0
    assert "1 of 1 cases are of training patients" in caplog.text


def test_cache_folder_of_another_machine_can_be_replaced(checkpoint: Path, tmp_path: Path) -> None:
    job = evaluate_3d.prepare(evaluate_3d.EvaluateFlags(checkpoint=(checkpoint,), output_dir=tmp_path / "out"))
    assert job.config.cache_dir != tmp_path
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_3d, "build_source", lambda config: seen.append(config.cache_dir) or job.source)
        evaluate_3d.prepare(
            evaluate_3d.EvaluateFlags(checkpoint=(checkpoint,), cache_dir=tmp_path, output_dir=tmp_path / "out")
        )
    assert seen == [tmp_path]


def test_inference_flags_reach_the_summary(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--overlap", 0.25, "--flips", "--largest_component", "--amp", "no", "--output_dir", tmp_path)
    assert evaluate(checkpoint, *flags) == 0
    used = json.loads((tmp_path / "summary.json").read_text())["inference"]
    assert used["overlap"] == 0.25 and used["flips"] and used["largest_component"] and used["amp"] == "no"
    assert evaluate(checkpoint, "--no-flips", "--output_dir", tmp_path) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["inference"]["flips"] == []
    assert evaluate(checkpoint, "--views", 3, "--output_dir", tmp_path) == 0
    used = json.loads((tmp_path / "summary.json").read_text())["inference"]
    assert used["views"] == 3 and used["flips"]


@pytest.mark.parametrize(
    ("stored", "flags", "expected"),
    [
        ({}, (), (0, True)),
        ({}, ("--no-flips",), (0, False)),
        ({}, ("--views", 3), (3, True)),
        ({"tta_views": 4}, (), (4, True)),
        ({"tta_views": 4}, ("--no-flips",), (0, False)),
        ({"tta_views": 4}, ("--flips",), (0, True)),
    ],
)
def test_flips_and_views_take_each_others_place(
    cohort: Path, tmp_path: Path, stored: dict[str, int], flags: tuple[object, ...], expected: tuple[int, bool]
) -> None:
    best = trained_run(cohort, tmp_path / "run", method="best", flip_axes=(0,), **stored)
    assert evaluate(best, *flags, "--output_dir", tmp_path / "scores") == 0
    used = json.loads((tmp_path / "scores" / "summary.json").read_text())["inference"]
    assert (used["views"], bool(used["flips"])) == expected


def test_data_that_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = write_cohort(tmp_path / "two", cases=2, labeled=2, channels=2, prefix="two")
    assert "2 image channels, the checkpoint was trained on 1" in refused(capsys, checkpoint, "--dataset_path", two)
    more = write_cohort(tmp_path / "more", cases=2, labeled=2, prefix="more")
    (more / "classes.txt").write_text("background\nball\ncore\nshell\n")
    assert "4 classes" in refused(capsys, checkpoint, "--dataset_path", more)


def test_another_format_does_not_take_the_checkpoints_folder(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "pass its folder as --dataset_path" in refused(capsys, checkpoint, "--dataset_name", "dicom")


def test_impossible_requests_are_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no checkpoint at" in refused(capsys, tmp_path / "none.pt")
    assert "gone" in refused(capsys, checkpoint, "--dataset_path", tmp_path / "gone")
    assert "--overlap 0.95" in refused(capsys, checkpoint, "--overlap", 0.95)
    assert "did you mean --split" in refused(capsys, checkpoint, "--splitt", "val")
    (tmp_path / "broken.pt").write_bytes(b"nonsense")
    assert "damaged" in refused(capsys, tmp_path / "broken.pt")
    training_case = split_of(checkpoint)["labeled"][0]
    (tmp_path / "list.txt").write_text(f"{training_case}\n")
    assert "training cases" in refused(capsys, checkpoint, "--test_list", tmp_path / "list.txt")
    assert "trained on" in refused(capsys, checkpoint, "--split", "val", "--val_list", tmp_path / "list.txt")
    assert "add --split val" in refused(capsys, checkpoint, "--val_list", tmp_path / "list.txt")
    assert "not read with --split all" in refused(
        capsys, checkpoint, "--split", "all", "--test_list", tmp_path / "list.txt"
    )
    with pytest.raises(SystemExit) as stop:
        evaluate_3d.main([])
    assert stop.value.code == 2 and "--checkpoint is required" in capsys.readouterr().err


def test_validation_without_validation_cases_names_the_flag(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = trained_run(cohort, tmp_path / "run", method="supervised", flip_axes=())
    assert "--val_num 0" in refused(capsys, plain, "--split", "val")
    assert "without mirroring" in refused(capsys, plain, "--flips")


def test_cases_that_may_be_mirrored_are_named(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained_run(cohort, tmp_path / "run", method="supervised", orientation="ras")
    other = write_cohort(tmp_path / "clinic", cases=3, labeled=3, prefix="other")
    for name in ("images/other01.nii.gz", "labels/other01.nii.gz"):
        make.forget_orientation(other / name)
    (other / "images" / "other02.nii.gz").write_bytes(b"damaged")
    assert evaluate(run, "--dataset_path", other, "--output_dir", tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert (
        "1 of 3 cases do not say how they lie in the body" in told
        and "mirrored to other scans: 'other01'; write" in told
    )
    assert "1 of 3 cases cannot be scored: case other02:" in told


def test_damaged_cases_end_with_code_1_after_all_others_are_scored(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_cohort(tmp_path / "clinic", cases=3, labeled=3, prefix="other")
    for name in ("other01", "other02"):
        path = other / "images" / f"{name}.nii.gz"
        path.write_bytes(path.read_bytes()[:200])
    assert evaluate(checkpoint, "--dataset_path", other, "--output_dir", tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert "2 of 3 cases cannot be scored: case other01:" in told and "case other02:" in told
    assert "--test_list" in told
    assert cases_in(tmp_path / "out") == ["other00"]
    assert [path.name for path in (tmp_path / "out" / "predictions").iterdir()] == ["other00.nii.gz"]
    assert not (tmp_path / "out" / "summary.json").exists()


def test_results_of_before_survive_where_nothing_can_be_scored(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = write_cohort(tmp_path / "clinic", cases=1, labeled=1, prefix="other"), tmp_path / "out"
    command = ("--dataset_path", other, "--output_dir", out)
    assert evaluate(checkpoint, *command) == 0
    before = {name: (out / name).read_bytes() for name in ("cases.csv", "summary.json")}
    (other / "labels" / "other00.nii.gz").write_bytes(b"nonsense")
    assert evaluate(checkpoint, *command) == 1
    assert "nothing was scored" in capsys.readouterr().err
    assert before == {name: (out / name).read_bytes() for name in before}


def test_results_of_another_checkpoint_are_not_replaced(
    cohort: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate(checkpoint, "--output_dir", out) == 0
    other = shutil.copy(checkpoint, checkpoint.parent / "best.pt")
    message = refused(capsys, other, "--output_dir", out)
    assert f"{out} holds the results of" in message and "another --output_dir" in message
    other.unlink()
    moved = shutil.copytree(checkpoint.parent, tmp_path / "elsewhere" / checkpoint.parent.name)
    assert evaluate(moved / "last.pt", "--output_dir", out) == 0
