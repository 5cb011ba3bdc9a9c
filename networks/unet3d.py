"""3D U-Net with instance normalisation (Cicek et al. 2016, arXiv:1606.06650; norm as in nnU-Net)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from networks.base import NETWORKS, Branch, Decoder, SegmentationNetwork
from networks.blocks import conv_block, kaiming_init


class _Decoder(Decoder):
    """Upsample, join the skip connection, convolve twice, level by level."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.upsample = nn.ModuleList()
        self.blocks = nn.ModuleList()
        for coarse, fine in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.upsample.append(nn.ConvTranspose3d(coarse, fine, kernel_size=2, stride=2))
            self.blocks.append(nn.Sequential(conv_block(2 * fine, fine), conv_block(fine, fine)))

    def join(self, level: int, features: Tensor, skip: Tensor) -> Tensor:
        return self.blocks[level](torch.cat([self.upsample[level](features), skip], dim=1))


@NETWORKS.register("unet_3d")
class UNet3D(SegmentationNetwork):
    """Encoder of two convolutions per level, strided downsampling, transposed upsampling, skip connections.

    Args:
        in_channels: Image channels C.
        num_classes: Classes K, the background included.
        widths: Feature channels per level, the finest first; the input is padded to multiples of
            ``2 ** (len(widths) - 1)``.
    """

    def __init__(self, in_channels: int, num_classes: int, widths: Sequence[int] = (16, 32, 64, 128)) -> None:
        super().__init__(in_channels, num_classes)
        self.feature_dim, self.coarse_dims = widths[0], tuple(widths[-2:0:-1])
        self.stride = (2 ** (len(widths) - 1),) * 3
        self.encoder = nn.ModuleList()
        for level, width in enumerate(widths):
            first = conv_block(in_channels if level == 0 else widths[level - 1], width, step=1 if level == 0 else 2)
            self.encoder.append(nn.Sequential(first, conv_block(width, width)))
        self.branch = Branch(_Decoder(widths), nn.Conv3d(widths[0], num_classes, kernel_size=1))
        self.apply(kaiming_init)

    def encode(self, images: Tensor) -> list[Tensor]:
        """See the base class."""
        encoded = []
        features = images
        for block in self.encoder:
            features = block(features)
            encoded.append(features)
        return encoded
