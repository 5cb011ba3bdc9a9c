"""Whose results a folder of an evaluation holds, so that no other evaluation overwrites them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ABOUT = "evaluation.json"  # whose they are, written before the first of them
CASES = "cases.csv"
SUMMARY = "summary.json"  # says so too, written last, where all cases could be scored


def refuse_other_results(folder: Path, about: Mapping[str, Any]) -> None:
    """Check that the folder is empty, or of an evaluation of the same checkpoints, data and cases.

    Runs of one name are told apart by the ``split_digest`` of what they trained on. Where damaged cases ended an
    evaluation of before, other cases may follow: a list may leave the damaged ones out.

    Args:
        folder: Where the results shall go.
        about: What shall be scored, as ``ABOUT`` will hold it: ``checkpoint`` (paths, joined by commas), ``split``,
            ``split_digest``, ``cases_digest``, ``case_list`` and ``dataset_path``.

    Raises:
        ValueError: If it holds other results, or a file that does not tell whose they are.
    """
    path = next((path for name in (ABOUT, SUMMARY) if (path := folder / name).is_file()), folder / ABOUT)
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        scored = before.get("checkpoint", "")
    except (ValueError, AttributeError) as error:  # cut off by a full disk, or of another program
        raise ValueError(f"{path} cannot be read ({error}); delete it, or pass another --output_dir") from error
    if not scored:
        return
    before = {**about, **before}  # those of older versions lack some
    damaged = (folder / CASES).is_file() and not (folder / SUMMARY).is_file()
    if other := _other_results(before, about, damaged=damaged):
        raise ValueError(f"{folder} holds the results {other}; pass another --output_dir, or delete it")


def _other_results(before: Mapping[str, Any], about: Mapping[str, Any], *, damaged: bool) -> str | None:
    """Whose results ``before`` tells of, where they are not those of ``about``."""
    runs = [[Path(name).parts[-2:] for name in told["checkpoint"].split(", ")] for told in (before, about)]
    if runs[0] != runs[1] or before["split_digest"] != about["split_digest"]:  # run and file, for it may have moved
        return f"of {before['checkpoint']}"
    if before["split"] != about["split"]:
        return f"of --split {before['split']}"
    data = [told["dataset_path"] for told in (before, about)]
    if all(data) and Path(data[0]).resolve() != Path(data[1]):
        return f"on {data[0]}, not on {data[1]}"
    if not damaged and before["cases_digest"] != about["cases_digest"]:
        return f"on other cases, those of {before['case_list'] or 'the checkpoint'}"
    return None
