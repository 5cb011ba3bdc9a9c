"""Memory of the host: the C library's habits, which decide a good part of a step on the CPU, and what to do without."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dataloaders.error_text import pass_on_device_error

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # glibc's malloc.h
_LARGEST_KEPT = 1 << 30  # bytes; a larger block is mapped on its own and given back when it is freed


def keep_freed_blocks() -> bool:
    """Let glibc keep freed blocks for the next step instead of giving them back to the system.

    As it comes, glibc maps each block above 32 MB anew and gives the top of the heap back whenever a step frees its
    activations. The system then clears every page again: half a million page faults and 40 % of the time of a step
    with six patches of 64x64x48. Kept blocks raise the process's memory by up to a fifth.

    Returns:
        Whether it was done: not where the environment configures malloc already, nor with another C library.
    """
    configured = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if configured or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl and others
        return False
    # Older versions refuse a threshold above 32 MB: there no block is mapped on its own.
    kept = mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) or mallopt(_MMAP_MAX, 0)
    return bool(kept and mallopt(_TRIM_THRESHOLD, -1))


@contextmanager
def named_shortages() -> Iterator[None]:
    """Say what to do where a GPU failed or memory ran out, its own, this process's or a loader's worker's.

    Torch notices either anywhere.

    Raises:
        ChildProcessError, MemoryError, DeviceError: In the place of torch's RuntimeErrors.
    """
    try:
        yield
    except RuntimeError as error:
        pass_on_device_error(error)
        reason = str(error).strip()
        if "DataLoader worker" in reason:
            raise ChildProcessError(
                f"{reason} The memory, or the shared memory (/dev/shm; docker run --shm-size 8g), may be full: pass "
                "fewer --num_workers, or --cache_gb for one copy of the cases in all of them"
            ) from error
        if "DefaultCPUAllocator" in reason or isinstance(error, torch.OutOfMemoryError):
            raise MemoryError(
                f"{reason}; a resume needs as much: a smaller --patch_size or --batch_size in a new --exp takes less, "
                "and so does --checkpoint_activations"
            ) from error
        raise
