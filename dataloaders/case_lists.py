"""Names of cases and files, and list files: one case id per line, as the field's ``train.list`` and ``test.list``."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

NIFTI_SUFFIXES = (".nii.gz", ".nii")
CHANNEL_SUFFIX = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")  # nnU-Net: one file per channel, from _0000
_COMMENT = re.compile(r"(?:^|\s)#")


def is_nifti(name: str) -> bool:
    """Whether a file is NIfTI by its name, in small letters or capitals."""
    return name.lower().endswith(NIFTI_SUFFIXES)


def strip_nifti_suffix(name: str) -> str:
    """The name without a trailing ``.nii.gz`` or ``.nii``, in small letters or capitals."""
    for suffix in NIFTI_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def refuse_broken_links(paths: Iterable[Path]) -> None:
    """Raise a FileNotFoundError that names the symbolic links to nothing, but for hidden ones."""
    broken = sorted(str(path) for path in paths if path.is_symlink() and not path.exists() and path.name[0] != ".")
    if broken:
        raise FileNotFoundError(
            f"symbolic links that lead to no file ({len(broken)}): {some(broken, 3)}; fetch their contents (as by "
            "git annex get), mount what they lead to, or remove them"
        )


def read_case_list(path: Path) -> tuple[str, ...]:
    """Read case ids in file order; blank lines, CRLF, a NIfTI suffix, and comments after a ``#`` at the start or
    after a space are tolerated.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not text, holds no id, or holds one twice.
    """
    if not path.is_file():
        fault = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"list file {path} {fault}; give a text file with one case id per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"list file {path} is not UTF-8 text; write one case id per line") from error
    ids = [strip_nifti_suffix(text) for line in lines if (text := _COMMENT.split(line, maxsplit=1)[0].strip())]
    if not ids:
        raise ValueError(f"list file {path} holds no case id; write one id per line")
    reject_duplicates(ids, str(path))
    return tuple(ids)


def reject_duplicates(ids: Sequence[str], where: str) -> None:
    """Raise a ValueError that names the ids which ``where`` holds more than once."""
    twice = [case_id for case_id, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{where} holds {some(twice)} more than once; remove the repeats")


def some(ids: Sequence[str], limit: int = 5) -> str:
    """Up to ``limit`` ids for a message, and how many more there are."""
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(repr(case_id) for case_id in ids[:limit]) + more


def order_key(case_id: str, seed: int) -> bytes:
    """Where the seed puts a case, on any machine and library version."""
    return hashlib.sha256(f"{seed}/{case_id}".encode()).digest()
