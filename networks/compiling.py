"""``torch.compile`` for any network: encoders and branches, in place."""

from __future__ import annotations

import os
import shutil
import sys

import torch
from torch import nn

from networks.base import Branch, SegmentationNetwork


def compile_networks(method: nn.Module, backend: str = "inductor") -> None:
    """Compile the encoders and branches of every network inside ``method``; the first steps take a minute or more.

    Names, weights and state stay as they are. A window or a batch of another size is compiled again.

    Raises:
        ValueError: If there is no C++ compiler, which torch's own backend needs.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # what torch's backend takes
    if backend == "inductor" and shutil.which(compiler) is None:
        raise ValueError(f"--compile: no C++ compiler {compiler!r} was found; install it, set $CXX or go without")
    for module in method.modules():
        if isinstance(module, SegmentationNetwork):
            module.encode = torch.compile(module.encode, backend=backend)  # type: ignore[method-assign]
        elif isinstance(module, Branch):
            module.compile(backend=backend)
