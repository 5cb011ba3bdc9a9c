"""Freed memory stays with the process, so that the next step finds its pages in place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from myutils.host_memory import keep_freed_blocks

ROOT = Path(__file__).resolve().parents[1]
COUNT_FAULTS = """
import resource, sys
import torch
from myutils.host_memory import keep_freed_blocks
if sys.argv[1] == "kept" and not keep_freed_blocks():
    raise SystemExit("not done")
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    blocks = [torch.ones(12_000_000) for _ in range(3)]  # 48 MB each
for _ in range(10):
    step()  # the heap finds its size
before = faults()
for _ in range(3):
    step()
print(faults() - before)
"""


def page_faults(mode: str) -> int:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", COUNT_FAULTS, mode]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if "not done" in done.stderr:
        pytest.skip("this C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_kept_blocks_cause_no_page_faults() -> None:
    assert page_faults("kept") < 2000  # 9 blocks of 11,700 pages would be 105,000


def test_a_configured_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_blocks()


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_blocks()
