"""Layers that take the place of torch's where these are wrong or slow; ``mend_layers`` puts them in.

Wrong: in torch 2.13 on CPUs with AVX-512 bf16, the weight gradient of a 3x3x3 convolution under autocast is garbage, up
to 1e35 and different in each call, where the input has exactly two voxels along its first spatial axis (oneDNN reads
memory that it has not written). Deep levels of a network reach that size at ordinary patches. Such convolutions run in
float32 here; they are the smallest of the network, so that it costs nothing that can be measured.

Slow: torch's instance normalisation of 3D maps takes up to four times as long in bf16 on the CPU as a group
normalisation with one channel per group, which is the same function; on an H100 it takes 1.6 times as long for
full-size patches, and about as long for small ones. Without AVX-512, convolutions of float32 maps that have their
channels first take up to twice as long as of those that have them last, above all the weights' gradient; the group
normalisation's gradient is the other way round, eight times as long (whole steps: ``benchmarks/layout_speed.py``).

Different on any other number of ranks: torch's dropout of channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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


class ChannelsLastConv3d(GuardedConv3d):
    """``GuardedConv3d`` that lays float32 maps on the CPU out with their channels last."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, X, Y, Z); where the weights, their channels first, are larger than the maps, these turn."""
        if input.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            large = input[:1].numel() > self.weight.numel()
            input = input.contiguous(memory_format=torch.channels_last_3d if large else torch.contiguous_format)
        return super().forward(input)


class _ChannelsLastNorm(torch.autograd.Function):
    """Instance normalisation of maps with channels last, patch by patch: of one it is a batch normalisation.

    That one's gradient is fast in either layout, and its variances are those of differences from the mean: the group
    normalisation takes them from sums of squares, which loses all digits where the mean is large.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        normalised, mean, scale = torch.empty_like(maps), maps.new_empty(maps.shape[:2]), maps.new_empty(maps.shape[:2])
        for index in range(len(maps)):
            patch = slice(index, index + 1)
            out = normalised[patch], mean[index], scale[index]
            torch.native_batch_norm(maps[patch], weight, bias, None, None, True, 0.0, eps, out=out)
        ctx.save_for_backward(maps, weight, mean, scale)
        ctx.eps = eps
        return normalised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, mean, scale = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        settings = True, ctx.eps, [True, weight is not None, weight is not None]
        of_maps, others = torch.empty_like(maps), []
        for index in range(len(maps)):
            patch = slice(index, index + 1)
            part = gradient[patch], maps[patch], weight, None, None, mean[index], scale[index]
            of_maps[patch], *of_patch = torch.ops.aten.native_batch_norm_backward(*part, *settings)
            others.append(of_patch)
        if weight is None:
            return of_maps, None, None, None
        of_weight, of_bias = (torch.stack(each).sum(0) for each in zip(*others, strict=True))
        return of_maps, of_weight, of_bias, None


class GroupedInstanceNorm3d(nn.InstanceNorm3d):
    """``nn.InstanceNorm3d`` without running statistics, computed as a group normalisation."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel of each patch of (B, C, X, Y, Z); the output has the input's type and layout."""
        if input.device.type == "cpu":
            if has_channels_last(input) and input.dtype != torch.bfloat16:
                return _ChannelsLastNorm.apply(input, self.weight, self.bias, self.eps)
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


def has_channels_last(maps: Tensor) -> bool:
    """Whether the channels of a voxel of (B, C, X, Y, Z) lie together in memory, and not the voxels of a channel."""
    return maps.is_contiguous(memory_format=torch.channels_last_3d) and not maps.is_contiguous()


def channels_last_pays(network: nn.Module) -> bool:
    """Whether training is faster on this CPU with channels last: without AVX-512, and with no other normalisation."""
    others = any(isinstance(module, nn.GroupNorm) for module in network.modules())
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and not others


def mend_layers(network: nn.Module, channels_last: bool | None = None) -> None:
    """Exchange the layers of a network, MONAI's included; names, weights and state stay as they are.

    ``channels_last`` lays out the maps of float32 trainings on the CPU, by default where it pays.
    """
    last = channels_last_pays(network) if channels_last is None else channels_last
    for module in network.modules():
        if type(module) in (nn.Conv3d, GuardedConv3d, ChannelsLastConv3d):
            module.__class__ = ChannelsLastConv3d if last else GuardedConv3d
        elif type(module) is nn.InstanceNorm3d and not module.track_running_stats:
            module.__class__ = GroupedInstanceNorm3d
        elif type(module) is nn.Dropout3d and not module.inplace:
            module.__class__ = SharedDropout3d
