"""Label maps on the disk: whole under their final names, whatever happens while they are written."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from myutils.label_files import is_of_others, origin_of, save_label_map, save_volume


def test_two_jobs_in_one_folder_write_into_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, target = nib.save, tmp_path / "a.nii.gz"

    def write_beside_another_job(image: nib.Nifti1Image, path: Path) -> None:
        write(image, path)
        before = path.read_bytes()
        with monkeypatch.context() as patch:  # which is at the same case, and is killed half-way
            patch.setattr(os, "getpid", lambda: 1)
            patch.setattr(nib, "save", lambda _, partial: Path(partial).write_bytes(b"half") and 1 / 0)
            with pytest.raises(ZeroDivisionError):
                save_label_map(target, np.zeros((3, 4, 5)), np.eye(4))
        assert path.read_bytes() == before

    monkeypatch.setattr(nib, "save", write_beside_another_job)
    save_label_map(target, np.ones((3, 4, 5)), np.eye(4))
    np.testing.assert_array_equal(np.asarray(nib.load(target).dataobj), 1)
    assert list(tmp_path.iterdir()) == [target]


def test_the_origin_fits_into_a_header_and_says_nothing_of_other_files(tmp_path: Path) -> None:
    checkpoints = [tmp_path / f"a very long name of a run, with umlauts: äöü {n}" / "last.pt" for n in range(3)]
    for path in checkpoints:
        path.parent.mkdir()
        path.write_bytes(path.parent.name.encode())
    origin = origin_of(checkpoints)
    assert len(origin) == 79
    mine, other, by_hand = tmp_path / "mine.nii.gz", tmp_path / "other.nii.gz", tmp_path / "by_hand.nii.gz"
    for path, text in ((mine, origin), (other, origin_of(checkpoints[:1])), (by_hand, "")):
        save_volume(path, np.zeros((3, 4, 5), np.uint8), np.eye(4), text)
    (tmp_path / "no_image.nii.gz").write_bytes(b"text")
    assert [path.name for path in sorted(tmp_path.glob("*.nii.gz")) if is_of_others(path, origin)] == ["other.nii.gz"]
