"""The case cache: each case is read once, entries on the disk follow their files, and a full disk loses nothing."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import BallSource
from data_makers import corner_label, counting_image, write_nifti

from dataloaders import case_cache
from dataloaders.base import Volume
from dataloaders.case_cache import CaseCache, CaseStore
from dataloaders.nifti_folder import NiftiFolder
from dataloaders.preprocess import Preprocess

OPEN_FILES = Path("/proc/self/fd")
MR = Preprocess("mr")


def test_cache_holds_at_most_its_limit() -> None:
    source = BallSource()
    cache = CaseCache(source, Preprocess("mr"), limit_bytes=60_000)  # two images of 23 kB
    for case_id in source.case_ids()[:5]:
        cache.get(case_id, with_label=False)
    assert len(cache._cases) == 2
    assert cache.get("ball04", with_label=False) is cache.get("ball04", with_label=False)


def test_cache_says_once_that_cases_are_read_again(caplog: pytest.LogCaptureFixture) -> None:
    source = BallSource()
    cache = CaseCache(source, Preprocess("mr"), limit_bytes=60_000)
    for case_id in source.case_ids()[:5]:
        cache.get(case_id, with_label=False)
    pickle.loads(pickle.dumps(cache)).get("ball00", with_label=False)  # a loader's worker reads it for the first time
    assert caplog.messages == [], "each was read once"
    for case_id in source.case_ids()[:5]:
        cache.get(case_id, with_label=False)
    (said,) = caplog.messages
    assert said.startswith("2 prepared cases fill") and "--cache_gb" in said


def test_each_channel_has_its_own_outside(tmp_path: Path) -> None:
    source = BallSource(channels=2)
    store = CaseStore(tmp_path, 1 << 30)
    case = CaseCache(source, MR).get("ball00", with_label=False)
    kept = store.write("entry", case)
    assert kept.mapped_files
    for found in (case, kept):
        assert found.outside.tolist() == case.volume.image.min((1, 2, 3)).tolist() and len(found.outside) == 2


class CountingFolder(NiftiFolder):
    """Counts reads per case."""

    reads: list[str]

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        self.reads.append(case_id)
        return super().load(case_id, with_label=with_label)


def make_source(root: Path) -> CountingFolder:
    for index in range(3):
        write_nifti(root / "images" / f"c{index}.nii.gz", counting_image() + index)
    write_nifti(root / "labels" / "c0.nii.gz", corner_label())
    return open_source(root)


def open_source(root: Path) -> CountingFolder:
    source = CountingFolder(root, num_classes=2)
    source.reads = []
    return source


def store_at(folder: Path, limit_bytes: int = 1 << 30) -> CaseStore:
    return CaseStore(folder / "store", limit_bytes)


def test_second_process_reads_no_image_file(tmp_path: Path) -> None:
    first = CaseCache(make_source(tmp_path), MR, store=store_at(tmp_path)).get("c0", with_label=True)
    source = open_source(tmp_path)
    again = CaseCache(source, MR, store=store_at(tmp_path)).get("c0", with_label=True)
    assert source.reads == []
    assert isinstance(again.volume.image, np.memmap) and again.mapped_files == 2
    plain = CaseCache(open_source(tmp_path), MR).get("c0", with_label=True)
    for case in (first, again):
        assert np.array_equal(case.volume.image, plain.volume.image)
        assert case.volume.label is not None and plain.volume.label is not None
        assert np.array_equal(case.volume.label, plain.volume.label)
        assert np.array_equal(case.volume.affine, plain.volume.affine) and case.volume.spacing == plain.volume.spacing
        assert all(np.array_equal(a, b) for a, b in zip(case.targets, plain.targets, strict=True))


def test_unlabelled_entry_holds_no_label(tmp_path: Path) -> None:
    cache = CaseCache(make_source(tmp_path), MR, store=store_at(tmp_path))
    assert cache.get("c0", with_label=False).volume.label is None
    assert not list((tmp_path / "store").rglob("label.npy"))


@pytest.mark.parametrize("changed", ["images", "labels"])
def test_changed_file_is_read_again(tmp_path: Path, changed: str) -> None:
    CaseCache(make_source(tmp_path), MR, store=store_at(tmp_path)).get("c0", with_label=True)
    path = tmp_path / changed / "c0.nii.gz"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000))
    source = open_source(tmp_path)
    CaseCache(source, MR, store=store_at(tmp_path)).get("c0", with_label=True)
    assert source.reads == ["c0"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (MR, Preprocess("ct")),
        (MR, Preprocess("mr", spacing=(1.0, 1.0, 1.0))),
        (Preprocess("mr", spacing=(1.0, 1.0, 1.0)), Preprocess("mr", spacing=(1.0, 1.0, 1.0), interpolation="cubic")),
        (Preprocess("ct"), Preprocess("ct", ct_range=(-100.0, 200.0))),
        (MR, Preprocess("mr", orientation="ras")),
    ],
)
def test_other_preprocessing_has_an_entry_of_its_own(before: Preprocess, after: Preprocess, tmp_path: Path) -> None:
    CaseCache(make_source(tmp_path), before, store=store_at(tmp_path)).get("c1", with_label=False)
    source = open_source(tmp_path)
    CaseCache(source, after, store=store_at(tmp_path)).get("c1", with_label=False)
    assert source.reads == ["c1"]


def test_an_entry_that_is_half_removed_is_made_anew(tmp_path: Path) -> None:
    CaseCache(make_source(tmp_path), MR, store=store_at(tmp_path)).get("c1", with_label=False)
    (entry,) = (tmp_path / "store").iterdir()
    (entry / "about.json").unlink()
    for expected in (["c1"], []):  # read once more, then from the store
        source = open_source(tmp_path)
        assert CaseCache(source, MR, store=store_at(tmp_path)).get("c1", with_label=False).mapped_files
        assert source.reads == expected


def test_store_drops_the_least_recently_used_beyond_its_limit(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    CaseCache(source, MR, store=store_at(tmp_path)).get("c0", with_label=False)
    entry = next((tmp_path / "store").iterdir())
    limit = round(2.5 * sum(path.stat().st_size for path in entry.iterdir()))
    os.utime(entry / "about.json", (1, 1))
    cache = CaseCache(source, MR, store=store_at(tmp_path, limit))
    cache.get("c1", with_label=False)
    cache.get("c2", with_label=False)
    assert not entry.exists()
    assert len(list((tmp_path / "store").iterdir())) == 2


def test_store_removes_what_a_killed_process_left_and_counts_what_others_write(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    CaseCache(source, MR, store=store_at(tmp_path)).get("c0", with_label=False)
    entry = next((tmp_path / "store").iterdir())
    limit = round(2.5 * sum(path.stat().st_size for path in entry.iterdir()))
    for name, age in ((".new-old", 7200.0), (".new-fresh", 0.0)):
        (tmp_path / "store" / name).mkdir()
        (tmp_path / "store" / name / "image.npy").write_bytes(bytes(limit // 2))
        os.utime(tmp_path / "store" / name, (time.time() - age, time.time() - age))
    CaseCache(source, MR, store=store_at(tmp_path, limit)).get("c1", with_label=False)
    left = {path.name for path in (tmp_path / "store").iterdir()}
    assert ".new-old" not in left and ".new-fresh" in left
    assert entry.name not in left and len(left) == 2  # the other process's bytes count


@pytest.mark.parametrize("kept", [0, 40])
def test_damaged_entry_is_made_anew_with_a_warning(kept: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    CaseCache(make_source(tmp_path), MR, store=store_at(tmp_path)).get("c0", with_label=False)
    image = next((tmp_path / "store").rglob("image.npy"))
    image.write_bytes(image.read_bytes()[:kept])
    source = open_source(tmp_path)
    with caplog.at_level(logging.WARNING):
        case = CaseCache(source, MR, store=store_at(tmp_path)).get("c0", with_label=False)
    assert source.reads == ["c0"] and "damaged" in caplog.text
    assert np.isfinite(case.volume.image).all()


def test_entry_that_cannot_be_read_just_now_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_source(tmp_path)
    for name in ("c0", "c1"):
        CaseCache(open_source(tmp_path), MR, store=store_at(tmp_path)).get(name, with_label=False)
    entries = sorted((tmp_path / "store").iterdir())

    def busy(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    source = open_source(tmp_path)
    cache = CaseCache(source, MR, store=store_at(tmp_path))
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(np, "load", busy)
        cases = [cache.get(name, with_label=False) for name in ("c0", "c1")]
    assert source.reads == ["c0", "c1"] and all(case.memory_bytes for case in cases)
    assert sorted((tmp_path / "store").iterdir()) == entries
    assert caplog.text.count("Too many open files") == 1


def test_cache_that_is_sent_to_a_worker_takes_no_cases_along(tmp_path: Path) -> None:
    """A worker that is not forked gets a pickle; a map in it would be a copy in memory that nobody counts."""
    cache = CaseCache(make_source(tmp_path), MR, store=store_at(tmp_path))
    case = cache.get("c0", with_label=True)
    sent = pickle.loads(pickle.dumps(cache))
    assert not sent._cases and (sent._bytes, sent._mapped) == (0, 0)
    again = sent.get("c0", with_label=True)
    assert again.mapped_files == 2 and np.array_equal(again.volume.image, case.volume.image)


def test_targets_count_as_memory_of_mapped_cases_too(tmp_path: Path) -> None:
    case = CaseCache(make_source(tmp_path), MR, store=store_at(tmp_path)).get("c0", with_label=True)
    assert case.memory_bytes == sum(target.nbytes for target in case.targets) > 0


def test_store_that_cannot_be_touched_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    CaseCache(make_source(tmp_path), MR, store=store_at(tmp_path)).get("c0", with_label=False)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(case_cache.os, "utime", read_only)
    source = open_source(tmp_path)
    assert CaseCache(source, MR, store=store_at(tmp_path)).get("c0", with_label=False).mapped_files
    assert source.reads == [] and not caplog.text


def test_full_disk_keeps_cases_in_memory_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CaseCache(make_source(tmp_path), MR, store=store_at(tmp_path))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with caplog.at_level(logging.WARNING):
        cases = [cache.get(name, with_label=False) for name in ("c0", "c1")]
    assert all(case.memory_bytes > 0 for case in cases)
    assert caplog.text.count("stay in memory") == 1
    assert list((tmp_path / "store").iterdir()) == []


def test_entry_that_vanishes_is_read_from_its_files(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    CaseCache(make_source(tmp_path), MR, store=store).get("c0", with_label=False)
    shutil.rmtree(next((tmp_path / "store").iterdir()))
    source = open_source(tmp_path)
    CaseCache(source, MR, store=store).get("c0", with_label=False)
    assert source.reads == ["c0"]


def test_source_without_files_stays_in_memory(tmp_path: Path) -> None:
    CaseCache(BallSource(), MR, store=store_at(tmp_path)).get("ball00", with_label=True)
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="counts open files through /proc")
def test_mapped_cases_hold_a_bounded_number_of_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_source(tmp_path)
    for index in range(12):
        write_nifti(tmp_path / "images" / f"d{index}.nii.gz", counting_image() + index)
    monkeypatch.setattr(case_cache, "_LARGEST_MAPPED", 4)
    cache = CaseCache(open_source(tmp_path), MR, store=store_at(tmp_path))
    before = len(list(OPEN_FILES.iterdir()))
    for _ in range(2):
        for index in range(12):
            assert cache.get(f"d{index}", with_label=False).mapped_files
    assert len(list(OPEN_FILES.iterdir())) - before <= 4


def test_large_store_is_not_counted_for_every_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_source(tmp_path)
    for index in range(12):
        write_nifti(tmp_path / "images" / f"d{index}.nii.gz", counting_image() + index)
    looked_at: list[Path] = []
    count = case_cache._folder_bytes
    monkeypatch.setattr(case_cache, "_folder_bytes", lambda folder: (looked_at.append(folder), count(folder))[1])
    cache = CaseCache(open_source(tmp_path), MR, store=store_at(tmp_path))
    for index in range(12):
        cache.get(f"d{index}", with_label=False)
    assert len(looked_at) == 1  # one count, of a store that held the new entry alone
    assert len(list((tmp_path / "store").iterdir())) == 12
