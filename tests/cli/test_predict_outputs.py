"""predict_3d.py and its folder: one that cannot be written, files of before, components that are left out."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from data_makers import write_dicom
from helpers_runs import BrokenStream
from helpers_scans import trained_run, write_cohort

import predict_3d
from myutils import run_folder
from myutils.scan_inputs import Scan


def test_a_full_disk_ends_the_run_at_the_first_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, out = write_cohort(tmp_path / "balls"), tmp_path / "out"
    run = trained_run(cohort, tmp_path / "run", method="supervised")
    command = ["--checkpoint", str(run), "--input", str(cohort / "images"), "--output", str(out)]
    tried = []

    def fail(_: Any, path: Path) -> None:
        tried.append(path)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(nib, "save", fail)
    capsys.readouterr()  # of the training
    for number in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        assert predict_3d.main(command) == 1
        told = capsys.readouterr().err
        assert f"error: cannot write {out / 'ball00.nii.gz'}: {os.strerror(number)}; make room there" in told
        assert "skipped" not in told and "Traceback" not in told
    assert len(tried) == 3
    number = errno.ENAMETOOLONG  # of this scan's name alone
    assert predict_3d.main(command) == 1
    assert capsys.readouterr().err.count("skipped: ") == 8


def test_a_gpu_that_failed_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = write_cohort(tmp_path / "balls")
    run = trained_run(cohort, tmp_path / "run", method="supervised")
    command = ["--checkpoint", str(run), "--input", str(cohort / "images"), "--output", str(tmp_path / "out")]
    tried = []

    def fail(scan: Scan, _: Any) -> None:
        tried.append(scan)
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(predict_3d, "segment", fail)
    assert predict_3d.main(command) == 1
    told = capsys.readouterr().err
    assert "error: CUDA error: device-side assert triggered; start again" in told and "--existing keep does" in told
    assert len(tried) == 1


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:  # for root may write anywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    run_folder.make_folder(tmp_path, "--output")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(run_folder, "TemporaryFile", refuse)
    for flags in ({}, {"exist_ok": False}):
        with pytest.raises(OSError, match=r"--output: cannot write into .*: Permission denied; pass a folder that can"):
            run_folder.make_folder(tmp_path / str(len(flags)), "--output", **flags)


def test_kept_files_stay_where_others_of_their_scan_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, out = write_cohort(tmp_path / "balls", cases=2, labeled=2), tmp_path / "out"
    run = trained_run(cohort, tmp_path / "run", method="supervised", labelnum=1)
    command = ["--checkpoint", str(run), "--input", str(cohort / "images"), "--output", str(out)]
    assert predict_3d.main(command) == 0
    corrected = (cohort / "labels" / "ball00.nii.gz").read_bytes()
    (out / "ball00.nii.gz").write_bytes(corrected)
    (out / "ball01.nii.gz").unlink()
    assert predict_3d.main([*command, "--existing", "keep", "--probabilities"]) == 0
    assert (out / "ball00.nii.gz").read_bytes() == corrected
    assert {path.name for path in out.iterdir()} == {f"ball0{n}{end}.nii.gz" for n in (0, 1) for end in ("", "_prob")}
    assert "1 files of the others stay as they are" in capsys.readouterr().err


@pytest.mark.parametrize("left", [0, 100])
def test_a_kept_file_that_is_cut_off_is_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], left: int
) -> None:
    cohort, out = write_cohort(tmp_path / "balls", cases=2, labeled=2), tmp_path / "out"
    run = trained_run(cohort, tmp_path / "run", method="supervised", labelnum=1)
    command = ["--checkpoint", str(run), "--input", str(cohort / "images"), "--output", str(out)]
    assert predict_3d.main(command) == 0
    whole = np.asarray(nib.load(out / "ball00.nii.gz").dataobj)
    (out / "ball00.nii.gz").write_bytes((out / "ball00.nii.gz").read_bytes()[:left])
    assert predict_3d.main([*command, "--existing", "keep"]) == 0
    assert np.array_equal(np.asarray(nib.load(out / "ball00.nii.gz").dataobj), whole)
    printed = capsys.readouterr().err
    assert "cannot be read and is written anew" in printed and "1 of 2 scans are done already" in printed


def test_a_label_map_tells_of_its_checkpoint_and_is_not_mixed_with_those_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, out = write_cohort(tmp_path / "balls", cases=2, labeled=2), tmp_path / "out"
    settings = {"method": "supervised", "labelnum": 1}
    first, second = (trained_run(cohort, tmp_path / f"run{seed}", seed=seed, **settings) for seed in (1, 2))
    command = ["--input", str(cohort / "images"), "--output", str(out), "--checkpoint"]
    assert predict_3d.main([*command, str(first), "--probabilities"]) == 0
    said = f"sha256 {hashlib.sha256(first.read_bytes()).hexdigest()[:16]} [own] run1/last.pt"
    for path in out.iterdir():
        assert nib.load(path).header["descrip"].item().decode() == said
    (out / "ball01.nii.gz").unlink()
    with pytest.raises(SystemExit) as refusal:
        predict_3d.main([*command, str(second), "--existing", "keep"])
    assert refusal.value.code == 2 and not (out / "ball01.nii.gz").exists()
    assert "ball00.nii.gz, and 0 more, come from another checkpoint" in capsys.readouterr().err
    assert predict_3d.main([*command, str(first), "--existing", "keep"]) == 0
    assert predict_3d.main([*command, str(first), str(second), "--existing", "replace"]) == 0
    both = hashlib.sha256(first.read_bytes() + second.read_bytes()).hexdigest()[:16]
    for name in ("ball00", "ball01"):
        said = f"sha256 {both} [own] run1/last.pt run2/last.pt"
        assert nib.load(out / f"{name}.nii.gz").header["descrip"].item().decode() == said


def test_label_maps_of_other_flags_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cohort, out = write_cohort(tmp_path / "balls", cases=2, labeled=2), tmp_path / "out"
    run = trained_run(cohort, tmp_path / "run1", method="supervised", labelnum=1)
    command = ["--input", str(cohort / "images"), "--output", str(out), "--checkpoint", str(run)]
    flags = ["--overlap", "0.75", "--views", "3", "--no-flips", "--largest_component"]
    assert predict_3d.main([*command, *flags]) == 0
    said = f"{hashlib.sha256(run.read_bytes()).hexdigest()[:16]} [overlap=0.75,views=3,largest=all] run1/last.pt"
    for path in out.iterdir():
        assert nib.load(path).header["descrip"].item().decode() == f"sha256 {said}"
    (out / "ball01.nii.gz").unlink()
    for other in ([], flags[2:], ["--overlap", "0.75"]):
        with pytest.raises(SystemExit) as refusal:
            predict_3d.main([*command, *other, "--existing", "keep"])
        assert refusal.value.code == 2 and not (out / "ball01.nii.gz").exists()
        assert (
            f"ball00.nii.gz, and 0 more, come from another checkpoint or other flags: the header says sha256 {said}"
            in (capsys.readouterr().err)
        )
    moved = shutil.move(run, tmp_path / "moved.pt")  # a checkpoint's name is not compared
    assert predict_3d.main([*command[:-1], str(moved), *flags, "--existing", "keep"]) == 0
    assert "1 of 2 scans are done already" in capsys.readouterr().err and (out / "ball01.nii.gz").exists()


def test_what_lies_in_the_folder_is_not_taken_for_another_scans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, out = write_cohort(tmp_path / "balls", cases=2, labeled=2), tmp_path / "out"
    run = trained_run(cohort, tmp_path / "run", method="supervised", labelnum=1)
    command = ["--checkpoint", str(run), "--output", str(out), "--existing", "keep", "--input"]
    assert predict_3d.main([*command, str(cohort / "images")]) == 0
    image: Any = nib.load(cohort / "images" / "ball00.nii.gz")
    (tmp_path / "other").mkdir()
    for voxels, affine in ((np.asarray(image.dataobj)[:-2], image.affine), (image.dataobj, 2 * image.affine)):
        nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "other" / "ball00.nii.gz")
        capsys.readouterr()
        with pytest.raises(SystemExit) as refusal:
            predict_3d.main([*command, str(tmp_path / "other")])
        assert refusal.value.code == 2
        assert "ball00.nii.gz has another shape or place than" in capsys.readouterr().err
    damaged = bytearray((out / "ball00.nii.gz").read_bytes())
    (out / "ball00.nii.gz").write_bytes(damaged[:20])  # says nothing, as the next one
    header = nib.load(out / "ball01.nii.gz").header.copy()
    header["datatype"] = 9999
    (out / "ball01.nii.gz").unlink()
    (out / "ball01.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(4)))
    assert predict_3d.main([*command, str(cohort / "images")]) == 0
    printed = capsys.readouterr().err
    assert "cannot be read and is written anew" in printed and "2 of 2 scans segmented" in printed
    (tmp_path / "other" / "ball00.nii.gz").write_bytes(b"rubbish")  # a scan that cannot be read is named in its turn
    assert predict_3d.main([*command[:-1], "--probabilities", "--input", str(tmp_path / "other")]) == 1
    assert "ball00.nii.gz: skipped" in capsys.readouterr().err


def test_probabilities_go_with_the_label_map_that_they_belong_to(tmp_path: Path) -> None:
    cohort, out = write_cohort(tmp_path / "balls", cases=2, labeled=2), tmp_path / "out"
    run = trained_run(cohort, tmp_path / "run", method="supervised", labelnum=1)
    command = ["--checkpoint", str(run), "--input", str(cohort / "images"), "--output", str(out)]
    assert predict_3d.main([*command, "--probabilities"]) == 0
    (out / "ball01_prob.nii.gz").write_bytes(b"the user's own")
    assert predict_3d.main([*command, "--existing", "replace"]) == 0
    assert {path.name for path in out.iterdir()} == {"ball00.nii.gz", "ball01.nii.gz", "ball01_prob.nii.gz"}
    assert predict_3d.main([*command, "--probabilities", "--existing", "replace"]) == 0
    shutil.copy(out / "ball00.nii.gz", out / "ball01_prob.nii.gz")  # the label map of a scan of that name
    for name in ("ball00.nii.gz", "ball01.nii.gz"):
        (out / name).unlink()
    assert predict_3d.main(command) == 0  # replaces nothing, and takes nothing away
    assert predict_3d.main([*command, "--existing", "replace"]) == 0
    assert {path.name for path in out.iterdir()} == {"ball00.nii.gz", "ball01.nii.gz", "ball01_prob.nii.gz"}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["load_together", "segment"])
def test_a_stopped_prediction_ends_with_130(
    stop: signal.Signals,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cohort, out = write_cohort(tmp_path / "balls", cases=2, labeled=2), tmp_path / "out"
    run = trained_run(cohort, tmp_path / "run", method="supervised", labelnum=1)

    def killed(*_: object) -> None:
        os.kill(os.getpid(), stop)
        time.sleep(5)  # the signal is seen at once

    monkeypatch.setattr(predict_3d, place, killed)
    command = ["--checkpoint", str(run), "--input", str(cohort / "images"), "--output", str(out)]
    try:
        code = predict_3d.main(command)
    except SystemExit as refusal:
        code = refusal.code
    assert code == 130
    assert ("stopped before the first case" if place == "load_together" else "stopped; the label maps in") in (
        capsys.readouterr().err
    )


def test_a_label_map_of_another_dicom_series_is_not_taken_for_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained_run(write_cohort(tmp_path / "balls", labeled=2), tmp_path / "run", method="supervised", labelnum=1)
    voxels = np.random.default_rng(0).integers(0, 99, (16, 16, 16))
    command = ["--checkpoint", str(run), "--output", str(tmp_path / "out"), "--existing", "keep", "--input"]
    write_dicom(tmp_path / "one" / "p1", voxels)
    write_dicom(tmp_path / "two" / "p1", voxels, origin=(300.0, 20.0, 30.0))
    for _ in range(2):
        assert predict_3d.main([*command, str(tmp_path / "one")]) == 0
    assert "1 of 1 scans are done already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refusal:
        predict_3d.main([*command, str(tmp_path / "two")])
    assert refusal.value.code == 2 and "p1.nii.gz has another shape or place than" in capsys.readouterr().err


def test_scans_are_segmented_without_an_error_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = write_cohort(tmp_path / "balls", cases=2, labeled=2)
    run = trained_run(cohort, tmp_path / "run", method="supervised", labelnum=1)
    command = ["--checkpoint", str(run), "--output", str(tmp_path / "out"), "--input", str(cohort / "images")]
    monkeypatch.setattr(sys, "stderr", BrokenStream(errno.ENOSPC))
    assert predict_3d.main(command) == 0
    assert len([*(tmp_path / "out").iterdir()]) == 2
