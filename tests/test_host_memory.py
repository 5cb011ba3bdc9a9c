"""Freed memory stays with the process, so that the next step finds its pages in place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from myutils.host_memory import keep_freed_blocks, named_shortages

ROOT = Path(__file__).resolve().parents[1]
LARGE_BLOCKS = "blocks = [torch.ones(12_000_000) for _ in range(3)]"  # 48 MB each, mapped one by one
NETWORK_STEP = "network(torch.randn(1, 1, 32, 32, 16)).logits.square().mean().backward()"  # small ones, trimmed away
COUNT_FAULTS = """
import resource, sys
import torch
from myutils.host_memory import keep_freed_blocks
from networks.unet3d import UNet3D
if sys.argv[1] == "kept" and not keep_freed_blocks():
    raise SystemExit("not done")
torch.set_num_threads(1)
network = UNet3D(1, 2)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    {step}
for _ in range(5):
    step()  # the heap finds its size
found = []
for _ in range(5):
    before = faults()
    step()
    found.append(faults() - before)
print(sorted(found)[2])  # the heap may grow once more
"""


def page_faults(mode: str, step: str) -> int:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", COUNT_FAULTS.replace("{step}", step), mode]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if "not done" in done.stderr:
        pytest.skip("this C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("step", [LARGE_BLOCKS, NETWORK_STEP])
def test_kept_blocks_cause_no_page_faults(step: str) -> None:
    plain, kept = page_faults("plain", step), page_faults("kept", step)
    assert plain > 5000 / 3
    assert kept < 0.1 * plain


def test_a_configured_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_blocks()


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_blocks()


def test_a_shortage_of_memory_is_named_with_what_to_do() -> None:
    with pytest.raises(ChildProcessError, match=r"DataLoader worker.*--num_workers"), named_shortages():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(MemoryError, match=r"allocate 4000.* bytes.*--patch_size"), named_shortages():
        torch.empty(10**15)
    with pytest.raises(MemoryError, match=r"CUDA out of memory.*a new --exp"), named_shortages():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match=r"^another$"), named_shortages():
        raise RuntimeError("another")
