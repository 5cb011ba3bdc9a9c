"""Files that are written whole or not at all, also where two processes write the same one."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = ".partial_"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden file of this process beside ``path``, with its suffix, that takes its name where nothing went wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    short = f"{zlib.crc32(os.fsencode(path.name)):08x}{path.name[-12:]}"  # a long name would be too long with a prefix
    partial = path.with_name(f"{_PREFIX}{os.getpid()}_{short}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut may leave the name without the content
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def unfinished_files(folder: Path, suffix: str) -> list[Path]:
    """What processes that were killed in a ``whole_file`` left in the folder, of files with this suffix."""
    return list(folder.glob(f"{_PREFIX}*{suffix}"))
