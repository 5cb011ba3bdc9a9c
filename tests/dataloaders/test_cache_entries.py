"""What an entry of the cache is named after: files, roles, the reader with its settings, and all code that prepares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_makers import corner_label, counting_image, write_la_case, write_nifti

from dataloaders import case_cache
from dataloaders.case_cache import code_digest, entry_name
from dataloaders.la_h5 import LeftAtriumH5
from dataloaders.nifti_folder import NiftiFolder
from dataloaders.preprocess import Preprocess

MR = Preprocess("mr")


class OtherFolder(NiftiFolder):
    """A reader of one's own."""


def test_one_file_with_image_and_label_has_an_entry_for_each_role(tmp_path: Path) -> None:
    file = write_la_case(tmp_path, "a", counting_image(), corner_label())
    source = LeftAtriumH5(tmp_path, voxel_size=(1.0, 1.0, 1.0))
    names = {entry_name((file,), source, MR, with_label) for with_label in (True, False)}
    assert len(names) == 2


def test_an_entry_is_of_one_reader_and_its_settings(tmp_path: Path) -> None:
    write_nifti(tmp_path / "data" / "images" / "c0.nii.gz", counting_image())
    names = set()
    for kind, voxel in ((NiftiFolder, 1.0), (NiftiFolder, 2.0), (OtherFolder, 1.0)):
        source: Any = kind(tmp_path / "data", num_classes=2)
        source.voxel = (voxel, 1.0, 1.0)
        names.add(entry_name(source.case_files("c0", with_label=False), source, MR, False))
    assert len(names) == 3


def test_an_entry_is_of_the_code_that_reads_and_prepares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read, before = Path.read_bytes, code_digest.__wrapped__(NiftiFolder)
    for changed in ("preprocess.py", "geometry.py", "file_source.py", "nifti_folder.py"):
        more = {changed: b"# mended"}
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda self, more=more: read(self) + more.get(self.name, b""))
            assert code_digest.__wrapped__(NiftiFolder) != before, changed


def test_an_entry_is_of_the_file_of_ones_own_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    read, before = Path.read_bytes, code_digest.__wrapped__(OtherFolder)
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b"# mended" * (self == Path(__file__)))
    assert code_digest.__wrapped__(OtherFolder) != before != code_digest.__wrapped__(NiftiFolder)


def test_the_name_of_an_entry_has_the_code_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nifti(tmp_path / "images" / "c0.nii.gz", counting_image())
    source, names = NiftiFolder(tmp_path, num_classes=2), set()
    for code in ("before", "after"):
        monkeypatch.setattr(case_cache, "code_digest", lambda kind, code=code: code)
        names.add(entry_name(source.case_files("c0", with_label=False), source, MR, False))
    assert len(names) == 2


def test_a_reader_without_a_file_is_named() -> None:
    made = type("Typed", (NiftiFolder,), {"__module__": "__nowhere__"})
    with pytest.raises(ValueError, match=r"--cache_gb: Typed has no file .*; write it into a module"):
        code_digest.__wrapped__(made)
