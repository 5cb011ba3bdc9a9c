"""Impossible starts: exit code 2, one line that names the flag and the fix, and no run folder."""

from __future__ import annotations

from pathlib import Path

import data_makers as make
import numpy as np
import pytest
from train_job import assert_refused, job, nifti_job, one_thread, resume, set_label, write_list  # noqa: F401

import train_cov_dfp_3d as train

pytestmark = pytest.mark.usefixtures("one_thread")
Capture = pytest.CaptureFixture[str]

REFUSALS = {
    "labelnum": ({"labelnum": "7"}, "--labelnum 7: ", "pass a value in 1..5"),
    "no_labels": ({"labelnum": "0"}, "--labelnum 0: must be at least 1"),
    "val_num": ({"val_num": "2"}, "--val_num 2: ", "pass a value in 0..1"),
    "labeled_bs": ({"labeled_bs": "4"}, "--labeled_bs 4: must be below --batch_size 4"),
    "patch": ({"patch_size": "16 16 4"}, "--patch_size 16 16 4: unet_3d divides the axes by 8 4 8"),
    "patch_zero": ({"patch_size": "16 0 16"}, "--patch_size 16 0 16: every value must be finite and above 0"),
    "spacing": (
        {"spacing": "900 900 900"},
        "--spacing of 900 x 900 x 900 mm makes 1 x 1 x 1 voxels out of 20 x 18 x 16",
    ),
    "small": ({"spacing": "1e-3 1e-3 1e-3"}, "makes 20000 x 36000 x 16000 voxels", "train with a larger one"),
    "dataset": ({"dataset_name": "nifty"}, "unknown data set 'nifty'; did you mean 'nifti'?"),
    "model": ({"model": "unet3d"}, "unknown model 'unet3d'; did you mean 'unet_3d'?"),
    "method": ({"method": "meanteacher"}, "unknown method 'meanteacher'; did you mean 'mean_teacher'?"),
    "path": ({"dataset_path": "nowhere"}, "--dataset_path nowhere: there is no such folder"),
    "no_path": ({"dataset_path": ""}, "--dataset_path"),
    "classes": ({"num_classes": "2"}, "class id 2 is outside 0..1; pass --num_classes 3"),
    "no_classes": ({"num_classes": ""}, "--num_classes"),
    "fp16": ({"amp": "fp16"}, "--amp fp16: needs a CUDA device"),
    "gpu": ({"gpu": "9"}, "--gpu 9: this machine has"),
    "number": ({"labelnum": "four"}, "argument --labelnum: invalid int value: 'four'"),
    "choice": ({"amp": "fp8"}, "argument --amp: invalid choice: 'fp8'"),
    "exp": ({"exp": "a/b"}, "--exp 'a/b': a plain folder name"),
    "train_list": ({"train_list": "none.txt"}, "list file none.txt does not exist"),
    "test_list": ({"test_list": "none.txt"}, "none.txt"),
    "typo": ({"labelnun": "4"}, "unrecognized argument --labelnun; did you mean --labelnum?"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_start_is_refused(name: str, folder: Path, capsys: Capture) -> None:
    changes, *parts = REFUSALS[name]
    argv = job(folder, **changes)
    gone = [number for number, word in enumerate(argv) if word == "" or argv[number : number + 2][-1] == ""]
    assert_refused([word for number, word in enumerate(argv) if number not in gone], capsys, *parts)
    assert not (folder / "runs").exists()


def test_missing_test_list_is_refused_before_training_though_training_does_not_read_it(
    folder: Path, capsys: Capture
) -> None:
    lists = {"train_list": write_list(folder / "train.txt", *range(5)), "test_list": str(folder / "none.txt")}
    assert_refused(job(folder, **lists), capsys, "--test_list", "there is no such file")
    assert train.main(job(folder, "--no-evaluate", **lists, max_iteration="1")) == 0


@pytest.mark.parametrize("role", ["labeled", "val"])
def test_class_id_of_a_case_with_a_role_is_refused(role: str, folder: Path, capsys: Capture) -> None:
    lists = {"labeled_list": write_list(folder / "l.txt", 0, 1), "val_list": write_list(folder / "v.txt", 2)}
    set_label(folder / "data", "ball01" if role == "labeled" else "ball02", 3)
    assert_refused(job(folder, **lists), capsys, "class id 3 is outside 0..2", "--num_classes 4")
    assert not (folder / "runs").exists()


def test_damaged_label_of_a_labelled_case_is_refused(folder: Path, capsys: Capture) -> None:
    lists = {"labeled_list": write_list(folder / "l.txt", 0, 1)}
    (folder / "data" / "labels" / "ball01.nii.gz").write_bytes(b"not a NIfTI file")
    assert_refused(job(folder, **lists), capsys, "ball01.nii.gz")
    assert not (folder / "runs").exists()


def test_unlabelled_scans_that_cannot_be_used_are_refused_at_the_start(folder: Path, capsys: Capture) -> None:
    images = folder / "data" / "images"
    (images / "ball06.nii.gz").write_bytes(b"not a NIfTI file")
    make.write_nifti(images / "ball07.nii.gz", make.counting_image((20, 18, 16, 2)))
    told = (
        "training cases cannot be used; mend them, or leave them out: ",
        "ball06.nii.gz",
        "ball07: 2 channels",
    )
    assert_refused(job(folder), capsys, *told)
    assert not (folder / "runs").exists()


def test_unlabelled_scans_that_a_spacing_flattens_are_refused_at_the_start(folder: Path, capsys: Capture) -> None:
    slab = np.diag([4.0, 4.0, 0.25, 1.0])
    make.write_nifti(folder / "data" / "images" / "ball07.nii.gz", make.counting_image((20, 18, 8)), slab)
    told = ("1 of ", "case ball07: --spacing of 1 x 1 x 1 mm makes 80 x 72 x 2 voxels out of 20 x 18 x 8")
    assert_refused(job(folder, "--spacing", "1", "1", "1"), capsys, *told)
    assert not (folder / "runs").exists()


def test_second_use_of_a_name_is_refused(folder: Path, capsys: Capture) -> None:
    assert train.main(job(folder, "--no-evaluate", exp="a", max_iteration="1")) == 0
    before = (folder / "runs" / "a" / "last.pt").stat().st_mtime_ns
    assert_refused(job(folder, exp="a"), capsys, "--exp a: ", "holds a run already; add --resume")
    assert (folder / "runs" / "a" / "last.pt").stat().st_mtime_ns == before


def test_folder_of_a_run_that_never_began_is_not_taken(folder: Path, capsys: Capture) -> None:
    (folder / "runs" / "a").mkdir(parents=True)
    (folder / "runs" / "a" / "config.json").write_text("{}")
    assert_refused(job(folder, exp="a"), capsys, "has not reached its first checkpoint")


def test_output_dir_that_is_a_file_is_refused(folder: Path, capsys: Capture) -> None:
    (folder / "runs").write_text("a file")
    assert_refused(job(folder), capsys, "--output_dir: cannot make", "Not a directory; pass a folder that can be")


def test_folders_that_no_file_system_makes_are_refused(folder: Path, capsys: Capture) -> None:
    assert_refused(job(folder, exp="é" * 128), capsys, "--exp: a name of 256 bytes, folders have at most 255; choose")
    (folder / "file").write_text("a file")
    told = "--cache_dir: cannot make", "Not a directory; pass a folder that can be written"
    assert_refused(job(folder, cache_dir=str(folder / "file" / "cache"), cache_gb="1"), capsys, *told)
    assert_refused(["--cache_dir", str(folder / "file" / "demo")], capsys, *told)  # where the demo is kept


def test_resume_needs_the_name_of_a_run(folder: Path, capsys: Capture) -> None:
    assert_refused(["--resume"], capsys, "--resume: name the run with --exp")
    assert_refused(resume(folder, "a"), capsys, "holds no last.pt", "no run in")
    assert train.main(job(folder, "--no-evaluate", exp="balls8", max_iteration="1")) == 0
    assert_refused(resume(folder, "balls9"), capsys, "holds no last.pt", "did you mean 'balls8'?")
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["balls8"]


def test_resume_keeps_the_settings_of_the_run(folder: Path, capsys: Capture) -> None:
    assert train.main(job(folder, "--no-evaluate", exp="a", max_iteration="1")) == 0
    assert_refused(resume(folder, "a", "--seed", "1", "--base_lr", "0.5"), capsys, "--seed 0, --base_lr 0.003")
    damaged = folder / "runs" / "a" / "last.pt"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    assert_refused(resume(folder, "a"), capsys, "last.pt is damaged")


def test_resume_on_other_data_is_refused(folder: Path, capsys: Capture) -> None:
    assert train.main(job(folder, "--no-evaluate", exp="a", max_iteration="1")) == 0
    (folder / "data" / "classes.txt").write_text("background\nleft\nright\n")
    assert_refused(resume(folder, "a"), capsys, "was trained on 1 channels and background, class 1", "left, right")
    (folder / "data" / "classes.txt").unlink()
    for path in (folder / "data").glob("*/ball0[678].nii.gz"):
        path.unlink()
    assert_refused(resume(folder, "a"), capsys, "3 training cases of", "the first is 'ball06'")
