"""Prepared cases: each is read and preprocessed once, then kept in memory and, where wanted, on the disk.

Contract: an entry on the disk is a function of the files it came from (path, size, time of change), the code that reads
and prepares them, and its settings; entries appear whole or not at all: any number of processes may share a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.base import CaseSource, Volume
from dataloaders.checked_cases import load_case
from dataloaders.error_text import unwritable
from dataloaders.preprocess import Preprocess
from dataloaders.say_once import warn_once

logger = logging.getLogger(__name__)

_TARGETS_PER_CLASS = 2000
_LARGEST_MAPPED = 128  # files of one process: each map holds one open, and some systems allow 256 of these
_UNFINISHED = ".new-"  # first letters of an entry's name until it is whole
_ABANDONED_AFTER = 3600.0  # seconds without a change
_FORMAT = 5  # of an entry; a change makes old entries unreadable


@dataclass(frozen=True)
class PreparedCase:
    """A preprocessed case, and what a crop needs to know of the whole volume without reading it again.

    Attributes:
        volume: Image and, where it was asked for, label.
        targets: Voxels (n, 3) of each class from which crops may be centred; empty without a label.
        outside: The least value of each channel (C,), for what lies outside.
    """

    volume: Volume
    targets: tuple[np.ndarray, ...]
    outside: np.ndarray

    @property
    def memory_bytes(self) -> int:
        """Bytes of this process's memory; voxels mapped from the disk take none."""
        return sum(array.nbytes for array in (*self.volume.arrays, *self.targets) if not isinstance(array, np.memmap))

    @property
    def mapped_files(self) -> int:
        """Files with voxels that this process holds open."""
        return sum(isinstance(array, np.memmap) for array in self.volume.arrays)


class CaseCache:
    """Preprocessed cases, in memory up to ``limit_bytes`` (the least recently used give way), and in a ``store``.

    Once a case that gave way is wanted again, a warning says how many fit and what would keep them all.
    """

    def __init__(
        self, source: CaseSource, preprocess: Preprocess, limit_bytes: int = 4 << 30, store: CaseStore | None = None
    ) -> None:
        self._source, self._preprocess, self._limit, self._store = source, preprocess, limit_bytes, store
        self._cases: OrderedDict[tuple[str, bool], PreparedCase] = OrderedDict()
        self._bytes, self._mapped = 0, 0
        self._dropped: set[tuple[str, bool]] = set()
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Without the cases: what is sent to a loader's worker would be a copy of its own, maps of files included."""
        empty = {"_cases": OrderedDict(), "_bytes": 0, "_mapped": 0, "_dropped": set()}
        return {**vars(self), **empty}

    def get(self, case_id: str, *, with_label: bool) -> PreparedCase:
        """The prepared case; its label file is opened only if ``with_label``."""
        key = (case_id, with_label)
        if key in self._cases:
            self._cases.move_to_end(key)
            return self._cases[key]
        if key in self._dropped and not self._warned:
            self._warn_of_rereading()
        case = self._prepared(case_id, with_label)
        self._cases[key] = case
        self._count(case, 1)
        while (self._bytes > self._limit or self._mapped > _LARGEST_MAPPED) and len(self._cases) > 1:
            if self._bytes > self._limit:
                self._dropped.add(next(iter(self._cases)))
            self._count(self._cases.popitem(last=False)[1], -1)
        return case

    def _warn_of_rereading(self) -> None:
        self._warned = True
        wanted = len(self._source.case_ids()) * self._bytes / len(self._cases) / 2**30
        logger.warning(
            "%d prepared cases fill the %.3g GB that a process keeps; the others are read from their files again at "
            "each use: --cache_gb %d keeps all on the disk, uncompressed",
            len(self._cases),
            self._limit / 2**30,
            math.ceil(1.1 * wanted),
        )

    def _count(self, case: PreparedCase, sign: int) -> None:
        self._bytes += sign * case.memory_bytes
        self._mapped += sign * case.mapped_files

    def _prepared(self, case_id: str, with_label: bool) -> PreparedCase:
        """From the store where it has the case, else from its files; then the store gets it."""
        files = () if self._store is None else self._source.case_files(case_id, with_label=with_label)
        if self._store is None or not files:
            return self._read(case_id, with_label)
        name = entry_name(files, self._source, self._preprocess, with_label)
        found = self._store.read(name, case_id)
        return found or self._store.write(name, self._read(case_id, with_label))

    def _read(self, case_id: str, with_label: bool) -> PreparedCase:
        volume = self._preprocess(load_case(self._source, case_id, with_label=with_label))
        targets = _targets(volume.label) if volume.label is not None else ()
        return PreparedCase(volume, targets, volume.image.min((1, 2, 3)))


def _targets(label: np.ndarray) -> tuple[np.ndarray, ...]:
    """Voxels of each foreground class that occurs, at most a few thousand, evenly spread over the class."""
    targets = []
    for class_id in np.unique(label[label > 0]):
        flat = np.flatnonzero(label == class_id)
        step = max(1, len(flat) // _TARGETS_PER_CLASS)
        targets.append(np.stack(np.unravel_index(flat[::step], label.shape), axis=1).astype(np.int32))
    return tuple(targets)


def entry_name(files: tuple[Path, ...], source: CaseSource, preprocess: Preprocess, with_label: bool) -> str:
    """Name of a case's entry: a hash of its files' paths, sizes and times of change, and of how they are read.

    That is the class of the source and the code of it and of this package, its public settings (numbers, words and
    tuples of these), and the preprocessing.
    """
    found = [(path, path.stat()) for path in files]
    states = [(str(path.absolute()), state.st_size, state.st_mtime_ns) for path, state in found]
    public = ((name, value) for name, value in vars(source).items() if not name.startswith("_"))
    settings = {name: value for name, value in public if isinstance(value, (int, float, str, tuple))}
    reading = [type(source).__name__, code_digest(type(source)), source.num_classes, settings, with_label]
    content = json.dumps([_FORMAT, states, reading, dataclasses.asdict(preprocess)], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


@cache
def code_digest(kind: type[CaseSource]) -> str:
    """SHA-256 of the files that read and prepare a case: those of the class and its bases, and this package's.

    Raises:
        ValueError: If a class has no file, as one of a notebook.
    """
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in sys.stdlib_module_names]
    try:
        files = {*(Path(inspect.getfile(base)) for base in bases), *Path(__file__).parent.glob("*.py")}
        code = b"".join(path.read_bytes() for path in sorted(files))
    except (OSError, TypeError) as error:
        raise ValueError(f"--cache_gb: {kind.__name__} has no file ({error}); write it into a module") from error
    return hashlib.sha256(code).hexdigest()


class CaseStore:
    """Prepared cases on the disk, uncompressed and mapped into memory: processes share one copy in the page cache.

    Args:
        folder: Where the entries lie, made if missing. They hold image data: it deserves the data's own protection.
        limit_bytes: The least recently used entries give way beyond this; the newest always stays. What others write
            is seen after every 256th of the limit at the latest, so that N processes may exceed it by N / 256.

    Raises:
        OSError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise unwritable("--cache_dir", folder, error) from error
        self.folder, self._limit = folder, limit_bytes
        self._full = False
        self._counted, self._written = limit_bytes, 0  # bytes at the last count, and written by this process since

    def read(self, name: str, case_id: str) -> PreparedCase | None:
        """The entry, mapped read-only, or None where there is none (any more)."""
        entry = self.folder / name
        try:
            about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
            image = np.load(entry / "image.npy", mmap_mode="r")
            label = np.load(entry / "label.npy", mmap_mode="r") if about["labeled"] else None
            voxels = np.load(entry / "targets.npy")
            with suppress(OSError):  # a store that others own can be read all the same
                os.utime(entry / "about.json")  # says when the entry was last used, and makes no file that has gone
        except FileNotFoundError:
            return None
        except OSError as error:  # too many open files, a disk that does not answer: the entry may be whole
            reason = error.strerror or str(error)
            warn_once(logger, f"{self.folder} cannot be read ({reason}); its cases are read from their own files")
            return None
        except (ValueError, KeyError, EOFError) as error:
            logger.warning("%s is damaged (%s) and is made anew", entry, error)
            shutil.rmtree(entry, ignore_errors=True)
            return None
        volume = Volume(case_id, image, label, np.array(about["affine"]), tuple(about["spacing"]))
        targets = tuple(np.split(voxels, np.cumsum(about["counts"])[:-1])) if len(voxels) else ()
        return PreparedCase(volume, targets, np.array(about["outside"]))

    def write(self, name: str, case: PreparedCase) -> PreparedCase:
        """Keep a case and return it mapped; where the disk has no room, warn once and return it as it is."""
        if self._full:
            return case
        fresh: Path | None = None
        try:
            fresh = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
            self._fill(fresh, case)
            self._make_room(sum(path.stat().st_size for path in fresh.iterdir()))
            if not (self.folder / name / "about.json").exists():  # half removed by a process that was killed
                shutil.rmtree(self.folder / name, ignore_errors=True)
            if not (self.folder / name).exists():
                fresh.rename(self.folder / name)
        except OSError as error:
            if not (self.folder / name).exists():  # else another process was faster
                self._full = True
                logger.warning("prepared cases stay in memory: %s cannot be written (%s)", self.folder, error)
        finally:
            if fresh is not None:
                shutil.rmtree(fresh, ignore_errors=True)
        return self.read(name, case.volume.case_id) or case

    def _fill(self, folder: Path, case: PreparedCase) -> None:
        volume = case.volume
        np.save(folder / "image.npy", np.ascontiguousarray(volume.image))
        if volume.label is not None:
            np.save(folder / "label.npy", np.ascontiguousarray(volume.label))
        np.save(folder / "targets.npy", np.concatenate(case.targets) if case.targets else np.zeros((0, 3), np.int32))
        about: dict[str, Any] = {
            "labeled": volume.label is not None,
            "affine": volume.affine.tolist(),
            "spacing": list(volume.spacing),
            "counts": [len(target) for target in case.targets],
            "outside": case.outside.tolist(),
        }
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")

    def _make_room(self, wanted: int) -> None:
        """Remove the least recently used entries until ``wanted`` bytes fit; open maps of them stay valid.

        The store is counted anew where it seems full, and after every 256th of the limit, since others write too: a
        count for each of 10,000 entries would look at all of them 10,000 times. Entries that a killed process left
        unfinished go first.
        """
        self._written += wanted
        if self._counted + self._written <= self._limit and self._written <= self._limit // 256:
            return
        self._remove_abandoned()
        sizes = {entry: _folder_bytes(entry) for entry in self.folder.iterdir()}
        total = sum(sizes.values())  # the new entry is among them, under its first name
        entries = sorted((_last_used(entry), entry) for entry in sizes if not entry.name.startswith(_UNFINISHED))
        for _, entry in entries:
            if total <= self._limit:
                break
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]
        self._counted, self._written = total, 0

    def _remove_abandoned(self) -> None:
        """Entries that were begun an hour ago and are not whole yet."""
        for entry in self.folder.glob(f"{_UNFINISHED}*"):
            with suppress(FileNotFoundError):  # another process has just finished or removed it
                if time.time() - entry.stat().st_mtime > _ABANDONED_AFTER:
                    shutil.rmtree(entry, ignore_errors=True)


def _last_used(entry: Path) -> float:
    try:
        return (entry / "about.json").stat().st_mtime
    except OSError:  # another process is removing it
        return 0.0


def _folder_bytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return 0
