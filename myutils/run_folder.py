"""The folder of a run: a used one is refused, a free one is claimed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def refuse_used_name(folder: Path) -> None:
    """Raise a ValueError if the user's choice of a folder holds a run already."""
    if (folder / "last.pt").exists():
        raise ValueError(
            f"--exp {folder.name}: {folder} holds a run already; add --resume to go on with it, or choose another name"
        )
    if (folder / "config.json").exists():
        raise ValueError(
            f"--exp {folder.name}: {folder} holds a run that has not reached its first checkpoint; "
            "choose another name, or delete the folder if nothing runs in it"
        )


def claim_folder(folder: Path, *, chosen: bool) -> Path:
    """Make the run's folder; a name that the user did not choose gets a free number, also if two runs start at once."""
    number, candidate = 1, folder
    while True:
        try:
            candidate.mkdir(parents=True, exist_ok=chosen)
        except FileExistsError:
            if chosen:
                raise
            number += 1
            candidate = folder.with_name(f"{folder.name}_{number}")
        else:
            return candidate


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
