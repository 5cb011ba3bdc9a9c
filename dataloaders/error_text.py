"""What an error says to a user: its text, and where it arose if no check of this project raised it."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch

JOB_ERRORS = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)  # end a job with their message, not a traceback
_PACKAGES = ("dataloaders", "networks", "myutils", "benchmarks")
_SCRIPTS = ("train_cov_dfp_3d.py", "evaluate_3d.py", "predict_3d.py")
_OWN = tuple(str(Path(__file__).resolve().parents[1] / name) for name in (*_PACKAGES, *_SCRIPTS))
_FRAME = re.compile(r'File "(.+)", line (\d+), in .+\n\s+(.+)')  # of a traceback that a loader process passed on


class DeviceError(OSError):
    """A GPU failed: nothing runs on it any more in this process."""


def pass_on_device_error(error: Exception) -> None:
    """Raise a ``DeviceError`` in the place of an error of the GPU itself, not where its memory is full."""
    text = str(error)
    is_full = "out of memory" in text or "ALLOC_FAILED" in text
    if isinstance(error, RuntimeError) and text.startswith("CUDA error") and not is_full:
        reason = text.partition("\n")[0]
        raise DeviceError(f"{reason}; start again, on another GPU (--gpu) if it comes back") from error


def message_of(error: Exception) -> str:
    """Its text; of one that a loader process passed on, the last line.

    An error of a library or of Python itself, which no ``raise`` of this project foresaw, gets the file and the line
    that met it: those of a new method or reader, say. Of files, memory and syntax the text tells enough.
    """
    text = str(error).strip()
    traced = traceback.extract_tb(error.__traceback__)
    frames = [(frame.filename, str(frame.lineno), frame.line or "") for frame in traced]
    if "Original Traceback" in text:
        frames, text = _FRAME.findall(text), text.splitlines()[-1]
    text = text or type(error).__name__
    own = [frame for frame in frames if frame[0].startswith(_OWN)]
    if not own or isinstance(error, (OSError, MemoryError, SyntaxError)):
        return text
    file, line, code = own[-1]
    if own[-1] == frames[-1] and code.startswith("raise"):
        return text
    return f"{text} ({type(error).__name__} at {file}, line {line})"


def unwritable(flag: str, folder: Path, error: OSError) -> OSError:
    """The error of a folder that cannot be made or written into, naming the ``flag`` that asked for it."""
    what = "write into" if folder.is_dir() else "make"
    return OSError(f"{flag}: cannot {what} {folder}: {error.strerror}; pass a folder that can be written")


def reason_of(error: Exception) -> str:
    """``message_of`` in one line."""
    return " ".join(message_of(error).split())
