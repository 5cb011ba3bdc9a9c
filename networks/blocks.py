"""Convolution blocks that the project's own networks share."""

from __future__ import annotations

from torch import nn


def conv_block(in_width: int, out_width: int, *, step: int = 1) -> nn.Sequential:
    """3x3x3 convolution, instance normalisation, LeakyReLU; ``step`` is the convolution's stride.

    Instance normalisation keeps no running statistics: nothing to average into a teacher, and no dependence on
    the other samples of a batch of two.
    """
    return nn.Sequential(
        nn.Conv3d(in_width, out_width, kernel_size=3, stride=step, padding=1, bias=False),
        nn.InstanceNorm3d(out_width, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )


def kaiming_init(module: nn.Module) -> None:
    """Kaiming-normal weights for LeakyReLU(0.01) and zero biases; use with ``Module.apply``."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
