"""A guard against wrong bfloat16 gradients of small convolutions on the CPU.

In torch 2.13 on CPUs with AVX-512 bf16, the weight gradient of a 3x3x3 convolution under autocast is garbage, up to
1e35 and different in each call, where the input has exactly two voxels along its first spatial axis (oneDNN reads
memory that it has not written). Deep levels of a network reach that size at ordinary patches. Such convolutions run in
float32 here; they are the smallest of the network, so that it costs nothing that can be measured.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GuardedConv3d(nn.Conv3d):
    """``nn.Conv3d`` that leaves CPU autocast for inputs with two voxels along X."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, X, Y, Z)."""
        if input.device.type == "cpu" and input.shape[2] == 2 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return super().forward(input.float())
        return super().forward(input)


def guard_convolutions(network: nn.Module) -> None:
    """Turn every plain ``nn.Conv3d`` of a network, MONAI's included, into a guarded one; weights stay in place."""
    for module in network.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = GuardedConv3d
