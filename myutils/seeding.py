"""Random seeds: set once for a run, and derived for every step and sample."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from whole numbers >= 0, well mixed, the same on every machine and Python version."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed Python, NumPy and torch; ``deterministic`` also asks for deterministic kernels where there are any."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party code may draw from it
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs for deterministic matrix products
    # Filling fresh memory takes 13 % of a CPU step; the one kernel that reads memory before it is written is avoided
    # in networks/layers.py (filling would not cure it).
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
