"""Class names and modality as the files beside the images state them: dataset.json, classes.txt, flags."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataloaders.base import MAX_CLASSES
from dataloaders.say_once import warn_once

logger = logging.getLogger(__name__)

MODALITIES = ("mr", "ct")
_NEW_WORD = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=\b[LR])(?=[A-Z][a-z])")  # in leftKidney and LKidney
_SHORT_SIDE = r"(?<![a-z])(lh|rh|lt|rt|l|r|sin|dex|sinister|dexter)(?![a-z])"
_SIDE = re.compile(rf"left|right|{_SHORT_SIDE}")
_SIDE_ALONE = re.compile(rf"(?<![a-z])(left|right)|{_SHORT_SIDE}(?!\d)")  # no other name tells: vertebra L1 has none


def read_dataset_json(path: Path) -> dict[str, Any]:
    """Read a ``dataset.json``.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; an MSD or nnU-Net raw folder has a dataset.json at its top")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); repair it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object with 'labels'")
    return content


def names_from_labels(labels: object, where: str) -> tuple[str, ...]:
    """Names by class id from either form: MSD ``{"0": "background"}``, nnU-Net v2 ``{"background": 0}``.

    An id that has no name is called ``class <id>``.

    Raises:
        ValueError: If it is neither form, or uses regions or an ignore label.
    """
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f"{where}: 'labels' is {labels!r}; expected names by class id, such as {{'0': 'background'}}")
    by_id: dict[int, str] = {}
    for key, value in labels.items():
        is_msd = str(key).isdigit() and isinstance(value, str) and not value.isdigit()
        class_id, name = (key, value) if is_msd else (value, key)
        if name == "ignore" or not str(class_id).isdigit():
            raise ValueError(
                f"{where}: label {key!r}: {value!r} is no single class id >= 0 (regions and ignore labels are not "
                "supported); write one id per class"
            )
        if int(class_id) in by_id:
            raise ValueError(f"{where}: class id {class_id} has two names, {by_id[int(class_id)]!r} and {name!r}")
        by_id[int(class_id)] = str(name)
    by_id.setdefault(0, "background")
    return tuple(by_id.get(k, f"class {k}") for k in range(max(by_id) + 1))


def plausible_flips(names: Sequence[str]) -> tuple[int, ...]:
    """Axes along which a case may be mirrored: left-right, but where the names of two classes differ by that alone."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(_SIDE.sub("*", _words(name)), name)
        if other.lower() != name.lower():
            warn_once(
                logger,
                f"classes {other!r} and {name!r} differ by their side, so that no case is mirrored from left to right; "
                "--flip_axes 0 does so all the same",
            )
            return ()
    return (0,)


def sided_names(names: Sequence[str]) -> list[str]:
    """The names that hold a side, but for letters with a number."""
    return [name for name in names if _SIDE_ALONE.search(_words(name))]


def _words(name: str) -> str:
    """A name in small letters, with spaces where capitals stood for them."""
    return _NEW_WORD.sub(" ", name).lower()


def fit_class_names(names: tuple[str, ...] | None, num_classes: int | None, where: str) -> tuple[str, ...]:
    """Reconcile the names that the data state with ``--num_classes``.

    Raises:
        ValueError: If neither is there, there are fewer than 2 or more than 256 classes, or the flag leaves named
            classes out.
    """
    if names is None and num_classes is None:
        raise ValueError(
            f"{where}: the number of classes is not stated; pass --num_classes (background included), or add a "
            "classes.txt with one name per line, background first"
        )
    known = names or ("background",)
    count = len(known) if num_classes is None else num_classes
    if count < 2 or (names is not None and count < len(names)):
        least = max(2, len(names or ()))
        raise ValueError(f"{where}: {count} classes; pass --num_classes {least} or more, the background included")
    if count > MAX_CLASSES:
        raise ValueError(f"{where}: {count} classes; pass --num_classes {MAX_CLASSES} or fewer, labels are 8-bit")
    return known + tuple(f"class {k}" for k in range(len(known), count))


def stated_class_names(root: Path) -> tuple[str, ...] | None:
    """Names from ``dataset.json`` (its ``labels``) or ``classes.txt`` (a name per line) in ``root``, else None."""
    description = root / "dataset.json"
    if description.is_file() and "labels" in (content := read_dataset_json(description)):
        return names_from_labels(content["labels"], str(description))
    listing = root / "classes.txt"
    if listing.is_file():
        names = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if len(names) < 2:
            raise ValueError(f"{listing} has {len(names)} names; write at least 2, the background first")
        return tuple(names)
    return None


def stated_modality(content: dict[str, Any]) -> str:
    """ "ct" if every channel that a dataset.json names is CT, else "mr"."""
    channels = content.get("channel_names") or content.get("modality") or {}
    names = channels.values() if isinstance(channels, dict) else [channels]
    lowered = [str(name).lower() for name in names]
    return "ct" if lowered and all(name == "ct" for name in lowered) else "mr"


def choose_modality(asked: str | None, stated: str) -> str:
    """The modality of the flag, or what the data state.

    Raises:
        ValueError: If the flag is neither "mr" nor "ct".
    """
    if asked is None:
        return stated
    if asked not in MODALITIES:
        raise ValueError(f"--modality {asked!r}: pass one of {', '.join(MODALITIES)}")
    return asked
