"""Activation checkpointing: time for memory, with any network.

Blocks forget what they computed inside and compute it again in the backward pass (Chen et al. 2016, arXiv:1604.06174).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class CheckpointedBlock(nn.Module):
    """Mixed into the class of a block: keeps the block's inputs alone for the backward pass."""

    def forward(self, *inputs: Any, **more: Any) -> Any:
        """The block's output; without gradients as ever."""
        if not torch.is_grad_enabled():
            return super().forward(*inputs, **more)
        return checkpoint(super().forward, *inputs, use_reentrant=False, **more)


def checkpoint_blocks(network: nn.Module) -> None:
    """Make every block of a network's module lists (encoder levels, decoder levels) a checkpointed one.

    Names, weights and state stay as they are; copies of the network are checkpointed too.
    """
    blocks = [block for module in network.modules() if isinstance(module, nn.ModuleList) for block in module]
    for block in blocks:
        if not isinstance(block, CheckpointedBlock):
            kind = type(block)
            block.__class__ = type(f"Checkpointed{kind.__name__}", (CheckpointedBlock, kind), {})


def is_checkpointed(network: nn.Module) -> bool:
    """Whether ``checkpoint_blocks`` was applied."""
    return any(isinstance(module, CheckpointedBlock) for module in network.modules())
