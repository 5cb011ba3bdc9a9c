"""3D U-Net with instance normalisation (Cicek et al. 2016, arXiv:1606.06650; norm as in nnU-Net)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from networks.base import NETWORKS, Branch, Decoder, SegmentationNetwork, Triple
from networks.blocks import conv_block, kaiming_init, level_kernel, level_step, total_stride


class _Decoder(Decoder):
    """Upsample, join the skip connection, convolve twice, level by level."""

    def __init__(self, widths: Sequence[int], flat_levels: Triple) -> None:
        super().__init__()
        self.upsample = nn.ModuleList()
        self.blocks = nn.ModuleList()
        for level in range(len(widths) - 2, -1, -1):
            fine, kernel, step = widths[level], level_kernel(level, flat_levels), level_step(level, flat_levels)
            self.upsample.append(nn.ConvTranspose3d(widths[level + 1], fine, kernel_size=step, stride=step))
            self.blocks.append(nn.Sequential(conv_block(2 * fine, fine, kernel), conv_block(fine, fine, kernel)))

    def join(self, level: int, features: Tensor, skip: Tensor) -> Tensor:
        return self.blocks[level](torch.cat([self.upsample[level](features), skip], dim=1))


@NETWORKS.register("unet_3d")
class UNet3D(SegmentationNetwork):
    """Encoder of two convolutions per level, strided downsampling, transposed upsampling, skip connections.

    Args:
        in_channels: Image channels C.
        num_classes: Classes K, the background included.
        widths: Feature channels per level, the finest first.
        flat_levels: First levels that neither convolve over nor downsample X, Y, Z; as many as there are make it 2D.
    """

    takes_flat_levels = True

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int] = (16, 32, 64, 128),
        flat_levels: Triple = (0, 0, 0),
    ) -> None:
        super().__init__(in_channels, num_classes, flat_levels)
        self.feature_dim, self.coarse_dims = widths[0], tuple(widths[-2:0:-1])
        self.stride = total_stride(len(widths), flat_levels)
        self.encoder = nn.ModuleList()
        before, step = in_channels, (1, 1, 1)
        for level, width in enumerate(widths):
            kernel = level_kernel(level, flat_levels)
            self.encoder.append(
                nn.Sequential(conv_block(before, width, kernel, step), conv_block(width, width, kernel))
            )
            before, step = width, level_step(level, flat_levels)
        self.branch = Branch(_Decoder(widths, flat_levels), nn.Conv3d(widths[0], num_classes, kernel_size=1))
        self.apply(kaiming_init)

    def encode(self, images: Tensor) -> list[Tensor]:
        """See the base class."""
        encoded = []
        features = images
        for block in self.encoder:
            features = block(features)
            encoded.append(features)
        return encoded
