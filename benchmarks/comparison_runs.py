"""Runs of a comparison: the ``.plan.json`` beside a run's folder holds what was asked of it, and binds once trained."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison_flags import read_flags
from benchmarks.comparison_tables import Row
from myutils.evaluation_folder import SUMMARY
from myutils.run_folder import hold
from train_cov_dfp_3d import KEPT_FROM_FLAGS, RESUME_FLAGS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dataloaders", "myutils", "networks")
ALL_PARTS = "--no-largest_component"


@dataclass(frozen=True)
class Run:
    """One training: its folder and the flags that it starts with."""

    folder: Path
    flags: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether it is trained and scored."""
        return (self.folder / "test" / SUMMARY).exists()

    @property
    def resumable(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return (self.folder / "last.pt").exists()


def check(run: Run) -> None:
    """Refuse a run whose folder holds another one; a plan of which nothing was trained does not bind.

    What a resume may change, such as ``--num_workers`` or the path of data that have moved, makes no other run.

    Raises:
        ValueError: If another process trains there, or what is there has other flags or is no comparison's.
    """
    if not run.folder.exists():
        return
    remembered, started = beside(run.folder, ".plan.json"), run.finished or run.resumable
    if not remembered.exists():
        what = "whose settings are not known" if started else "that has not reached its first checkpoint"
        raise ValueError(
            f"{run.folder} holds a run {what}, for there is no {remembered.name} beside it; delete it if nothing runs "
            "in it, or use another --output_dir"
        )
    if not started:
        hold(run.folder).close()
        return
    if changed := _changed(run, remembered):
        named = ", ".join(f"--{name}" for name in changed)
        raise ValueError(
            f"{run.folder} was trained with other flags ({named}; see {remembered}); use another --output_dir"
        )


def _changed(run: Run, remembered: Path) -> list[str]:
    """The flags that decide what is trained or scored and are others than in the plan."""
    flags = json.loads(remembered.read_text("utf-8"))["flags"]
    if flags == list(run.flags):
        return []
    once = {"largest_component": False}  # ALL_PARTS was the rule before it was a flag
    old, new = once | read_flags(flags, remembered.name), once | read_flags(run.flags, run.folder.name)
    changed = [name for name in old | new if name not in RESUME_FLAGS and old.get(name) != new.get(name)]
    return changed + (["dataset_path"] if _other_data(old.get("dataset_path"), new.get("dataset_path")) else [])


def _other_data(before: Path | None, now: Path | None) -> bool:
    """Whether two paths lead to different folders; where the first leads nowhere any more, its data have moved."""
    if before is None or now is None:
        return before is not now
    return before.exists() and before.resolve() != now.resolve()


def train(run: Run, threads: int) -> Path:
    """Run, resume or skip one training; returns its folder. ``check`` again: another comparison may have begun it."""
    folder, log = run.folder, beside(run.folder, ".log")
    check(run)
    if run.finished:
        return folder
    if not run.resumable:  # the start of a training that was killed before its first checkpoint
        shutil.rmtree(folder, ignore_errors=True)
    remember(run)
    command = [sys.executable, str(ROOT / "train_cov_dfp_3d.py"), "--output_dir", str(folder.parent)]
    command += ["--exp", folder.name, "--no-baseline", *(_resuming(run) if run.resumable else run.flags)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    before = log.stat().st_size if log.exists() else 0
    with log.open("a") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code != 0:
        raise RuntimeError(f"{folder.name} ended with exit code {code}{_reason(log, before)}; see {log}")
    return folder


def _resuming(run: Run) -> list[str]:
    """Flags that go on with a run: its own are stored, but for those that may be others now."""
    given = read_flags(run.flags, run.folder.name)
    given = {name: str(value) for name, value in given.items() if name in KEPT_FROM_FLAGS}
    return ["--resume", *(word for name, value in given.items() for word in (f"--{name}", value))]


def _reason(log: Path, start: int) -> str:
    """The last error that a log names from byte ``start`` on, or its last line, after a colon."""
    text = log.read_bytes()[start:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search("error:", line, re.IGNORECASE)]
    return "".join(f": {line}" for line in (errors or lines)[-1:])


def remember(run: Run) -> None:
    """Write down the flags of a training that starts, and its code: one that others resumed has several."""
    path = beside(run.folder, ".plan.json")
    plan: dict[str, Any] = {"flags": list(run.flags), "code": ""}
    if run.resumable and path.exists():
        plan = json.loads(path.read_text("utf-8"))
    codes = dict.fromkeys([*plan["code"].split("+"), code_digest()])
    path.write_text(json.dumps(plan | {"code": "+".join(filter(None, codes))}), encoding="utf-8")


def beside(folder: Path, ending: str) -> Path:
    """The file of a run that lies beside its folder; names of rows may hold dots."""
    return folder.with_name(folder.name + ending)


def code_digest() -> str:
    """Short hash of the source files that train and score."""
    files = [path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))]
    content = hashlib.sha256()
    for path in [ROOT / "train_cov_dfp_3d.py", *files]:
        content.update(path.read_bytes())
    return content.hexdigest()[:8]


def code_note(rows: Sequence[Row]) -> str:
    """A line for below the table that names the rows of each code; empty if all runs were started by the same."""
    names_by_code: dict[str, set[str]] = {}
    for row in rows:
        for folder in row.folders:
            code = json.loads(beside(folder, ".plan.json").read_text("utf-8"))["code"]
            names_by_code.setdefault(code, set()).add(row.name)
    if len(names_by_code) < 2:
        return ""
    found = "; ".join(f"{code}: {', '.join(sorted(names))}" for code, names in names_by_code.items())
    return f"\nTrained by different code ({found}); delete a run's folder and .plan.json to train it again.\n"
