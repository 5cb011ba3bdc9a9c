"""Layers that take the place of torch's where these are wrong or slow; ``mend_layers`` puts them in.

Wrong: in torch 2.13 on CPUs with AVX-512 bf16, the weight gradient of a 3x3x3 convolution under autocast is garbage, up
to 1e35 and different in each call, where the input has exactly two voxels along its first spatial axis (oneDNN reads
memory that it has not written). Deep levels of a network reach that size at ordinary patches. Such convolutions run in
float32 here; they are the smallest of the network, so that it costs nothing that can be measured.

Slow: torch's instance normalisation of 3D maps takes up to four times as long in bf16 on the CPU as a group
normalisation with one channel per group, which is the same function; on an H100 it takes 1.6 times as long for
full-size patches, and about as long for small ones.

Different on any other number of ranks: torch's dropout of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from myutils.rank_batch import draw_rows


class GuardedConv3d(nn.Conv3d):
    """``nn.Conv3d`` that leaves CPU autocast for inputs with two voxels along X."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, X, Y, Z)."""
        if input.device.type == "cpu" and input.shape[2] == 2 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return super().forward(input.float())
        return super().forward(input)


class GroupedInstanceNorm3d(nn.InstanceNorm3d):
    """``nn.InstanceNorm3d`` without running statistics, computed as a group normalisation."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel of each patch of (B, C, X, Y, Z); the output has the input's type."""
        if input.device.type == "cpu":
            return functional.group_norm(input, self.num_features, self.weight, self.bias, self.eps)
        weight, bias = (None if part is None else part.to(input.dtype) for part in (self.weight, self.bias))
        with torch.autocast(input.device.type, enabled=False):  # which would make the output float32
            return functional.group_norm(input, self.num_features, weight, bias, self.eps)


def dropped_channels(maps: Tensor, probability: float) -> Tensor:
    """Whole channels of (B, C, X, Y, Z) dropped at random, the others scaled up: ``functional.dropout3d``, to the bit.

    Which ones depends on the patch's place in the whole batch, and not on the ranks that share it out.
    """

    def keep(rows: int) -> Tensor:
        return maps.new_empty(rows, maps.shape[1], 1, 1, 1).bernoulli_(1 - probability)

    return maps * draw_rows(keep, len(maps)).div(1 - probability or 1.0)


class SharedDropout3d(nn.Dropout3d):
    """``nn.Dropout3d`` that drops the same channels on any number of ranks."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop channels of (B, C, X, Y, Z) in training mode."""
        return dropped_channels(input, self.p) if self.training and self.p else input


def mend_layers(network: nn.Module) -> None:
    """Exchange the layers of a network, MONAI's included; names, weights and state stay as they are."""
    for module in network.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = GuardedConv3d
        elif type(module) is nn.InstanceNorm3d and not module.track_running_stats:
            module.__class__ = GroupedInstanceNorm3d
        elif type(module) is nn.Dropout3d and not module.inplace:
            module.__class__ = SharedDropout3d
