"""Convolution blocks that the project's own networks share."""

from __future__ import annotations

from torch import nn

from networks.base import Triple


def level_kernel(level: int, flat_levels: Triple) -> Triple:
    """Size of a level's kernels, 0 for the finest: 3, or 1 along an axis where the level is flat."""
    x, y, z = (1 if level < flat else 3 for flat in flat_levels)
    return x, y, z


def level_step(level: int, flat_levels: Triple) -> Triple:
    """Downsampling from a level to the next coarser one: 2, or 1 along an axis where the level is flat."""
    x, y, z = (1 if level < flat else 2 for flat in flat_levels)
    return x, y, z


def total_stride(levels: int, flat_levels: Triple) -> Triple:
    """Downsampling from the finest of so many levels to the coarsest.

    Raises:
        ValueError: If an axis has more flat levels than there are levels, or all axes are flat on every level.
    """
    if max(flat_levels) > levels or min(flat_levels) >= levels:
        given = " ".join(map(str, flat_levels))
        raise ValueError(
            f"--flat_levels {given}: the network has {levels} levels; pass at most {levels}, not for all axes"
        )
    x, y, z = (2 ** max(0, levels - 1 - flat) for flat in flat_levels)
    return x, y, z


def same_padding(kernel: Triple) -> Triple:
    """Padding with which a convolution of stride 1 keeps the size."""
    x, y, z = (size // 2 for size in kernel)
    return x, y, z


def conv_block(in_width: int, out_width: int, kernel: Triple = (3, 3, 3), step: Triple = (1, 1, 1)) -> nn.Sequential:
    """Convolution, instance normalisation, LeakyReLU; ``step`` is the convolution's stride.

    Instance normalisation keeps no running statistics: nothing to average into a teacher, and no dependence on
    the other samples of a batch of two.
    """
    return nn.Sequential(
        nn.Conv3d(in_width, out_width, kernel, stride=step, padding=same_padding(kernel), bias=False),
        nn.InstanceNorm3d(out_width, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )


def kaiming_init(module: nn.Module) -> None:
    """Kaiming-normal weights for LeakyReLU(0.01) and zero biases; use with ``Module.apply``."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
