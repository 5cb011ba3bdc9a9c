"""The folder of a run: a used one is refused, a free one is claimed, and one process at a time trains in it."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from dataloaders.error_text import unwritable
from myutils.whole_files import unfinished_files

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


_OF_A_RUN = ("baseline", "test", "evaluation", "metrics.jsonl", "tensorboard")  # would pass for the new run's


def refuse_used_name(folder: Path) -> None:
    """Raise a ValueError if the user's choice of a folder holds a run already, or what is left of one."""
    if (folder / "last.pt").exists():
        raise ValueError(
            f"--exp {folder.name}: {folder} holds a run already; add --resume to go on with it, or choose another name"
        )
    if (folder / "best.pt").exists():
        raise ValueError(
            f"--exp {folder.name}: {folder} holds best.pt of a run whose last.pt is gone; evaluate_3d.py and "
            "predict_3d.py take it, but no training goes on from it; choose another name"
        )
    if (folder / "config.json").exists():
        raise ValueError(
            f"--exp {folder.name}: {folder} holds a run that has not reached its first checkpoint; "
            "choose another name, or delete the folder if nothing runs in it"
        )
    if left := [name for name in _OF_A_RUN if (folder / name).exists()]:
        raise ValueError(
            f"--exp {folder.name}: {folder} holds {', '.join(left)} of another run; choose another name, or delete the "
            "folder"
        )


def claim_folder(folder: Path, *, chosen: bool) -> Path:
    """Make the run's folder, with an empty ``config.json``: of two runs that start at once, one alone gets it.

    A name that the user did not choose gets a free number; one that was ``chosen`` and is taken is refused.
    """
    number, candidate = 1, folder
    while True:
        try:
            make_folder(candidate, "--output_dir", exist_ok=chosen)
            (candidate / "config.json").touch(exist_ok=False)
        except FileExistsError:
            if chosen:
                refuse_used_name(candidate)
            number += 1
            candidate = folder.with_name(f"{folder.name}_{number}")
        else:
            return candidate


def make_folder(folder: Path, flag: str, *, exist_ok: bool = True) -> None:
    """Make a folder and those above it, and see that it can be written.

    Raises:
        FileExistsError: If there is one, without ``exist_ok``.
        OSError: If it cannot be made or written, naming the ``flag`` that asked for it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        if not exist_ok and isinstance(error, FileExistsError) and folder.is_dir():
            raise
        raise unwritable(flag, folder, error) from error


def hold(folder: Path) -> IO[str]:
    """Keep other processes from training in the folder until the file that this returns is closed.

    Raises:
        ValueError: If another process holds it.
    """
    lock = (folder / ".lock").open("w")
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _close_in_children(lock)
            for checkpoint in unfinished_files(folder, ".pt"):
                checkpoint.unlink()
    except BlockingIOError:
        lock.close()
        raise ValueError(f"another process trains in {folder}; wait for its end, or stop it first") from None
    except OSError:  # a file system without locks
        pass
    return lock


def _close_in_children(file: IO[str]) -> None:
    """A forked worker that outlives a killed trainer must not hold its lock."""
    held = weakref.ref(file)

    def close() -> None:
        if (copy := held()) is not None:
            copy.close()

    os.register_at_fork(after_in_child=close)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
