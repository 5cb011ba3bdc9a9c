"""predict_3d.py where its folder cannot be written: said at once, not after every scan."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
from helpers_scans import trained_run, write_cohort

import predict_3d
from myutils import run_folder


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


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:  # for root may write anywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    run_folder.make_folder(tmp_path, "--output")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(run_folder, "TemporaryFile", refuse)
    for flags in ({}, {"exist_ok": False}):
        with pytest.raises(OSError, match=r"--output: cannot write into .*: Permission denied; pass a folder that can"):
            run_folder.make_folder(tmp_path / str(len(flags)), "--output", **flags)
