"""The trainer in a process of its own, as the timing scripts start it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

TRAINER = str(Path(__file__).resolve().parents[1] / "train_cov_dfp_3d.py")


def run_to_end(who: str, command: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
    """Run a command without its output, with further environment variables.

    Raises:
        SystemExit: If it fails: ``who`` ended, its exit code and the end of what it wrote to its error stream.
    """
    environment = os.environ | dict(variables or {})
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise SystemExit(f"{who} ended with exit code {done.returncode}\n{done.stderr[-2000:]}")
