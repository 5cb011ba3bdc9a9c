"""MONAI's DynUNet and SegResNet behind the project's contract, taken apart into encoder, decoder and classifier.

MONAI is imported where one of them is built: that takes two seconds of a start, which other networks need not wait for.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from networks.base import NETWORKS, Branch, Decoder, SegmentationNetwork, Triple
from networks.blocks import level_kernel, level_step, total_stride


class _DynDecoder(Decoder):
    """MONAI's upsampling blocks; each joins the skip connection itself."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def join(self, level: int, features: Tensor, skip: Tensor) -> Tensor:
        return self.blocks[level](features, skip)


class _ResDecoder(Decoder):
    """MONAI's upsampling layers; skip connections are added."""

    def __init__(self, upsample: nn.ModuleList, layers: nn.ModuleList) -> None:
        super().__init__()
        self.upsample = upsample
        self.layers = layers

    def join(self, level: int, features: Tensor, skip: Tensor) -> Tensor:
        return self.layers[level](self.upsample[level](features) + skip)


def _chain(blocks: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    """What each block makes of the one before, the first of the images."""
    encoded = []
    features = images
    for block in blocks:
        features = block(features)
        encoded.append(features)
    return encoded


@NETWORKS.register("dynunet")
class DynUNet3D(SegmentationNetwork):
    """MONAI DynUNet, the nnU-Net architecture (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z)."""

    takes_flat_levels = True

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        filters: tuple[int, ...] = (16, 32, 64, 128),
        flat_levels: Triple = (0, 0, 0),
    ) -> None:
        super().__init__(in_channels, num_classes, flat_levels)
        from monai.networks.nets import DynUNet

        levels = len(filters)
        self.feature_dim, self.coarse_dims = filters[0], filters[-2:0:-1]
        self.stride = total_stride(levels, flat_levels)
        steps = [level_step(level, flat_levels) for level in range(levels - 1)]
        whole = DynUNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=num_classes,
            kernel_size=[level_kernel(level, flat_levels) for level in range(levels)],
            strides=[(1, 1, 1), *steps],
            upsample_kernel_size=steps,
            filters=list(filters),
            norm_name=("INSTANCE", {"affine": True}),
        )
        self.encoder = nn.ModuleList([whole.input_block, *whole.downsamples, whole.bottleneck])
        self.branch = Branch(_DynDecoder(whole.upsamples), whole.output_block)

    def encode(self, images: Tensor) -> list[Tensor]:
        """See the base class."""
        return _chain(list(self.encoder), images)


@NETWORKS.register("segresnet")
class SegResNet3D(SegmentationNetwork):
    """MONAI SegResNet without its auto-encoder branch (Myronenko 2018, arXiv:1810.11654)."""

    def __init__(self, in_channels: int, num_classes: int, filters: int = 16) -> None:
        super().__init__(in_channels, num_classes)
        from monai.networks.nets import SegResNet

        self.feature_dim, self.coarse_dims = filters, (4 * filters, 2 * filters)
        self.stride = (8, 8, 8)
        whole = SegResNet(spatial_dims=3, init_filters=filters, in_channels=in_channels, out_channels=num_classes)
        self.stem = whole.convInit
        self.encoder = whole.down_layers
        self.branch = Branch(_ResDecoder(whole.up_samples, whole.up_layers), whole.conv_final)

    def encode(self, images: Tensor) -> list[Tensor]:
        """See the base class."""
        return _chain(list(self.encoder), self.stem(images))
