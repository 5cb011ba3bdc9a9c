"""V-Net as the semi-supervised left-atrium papers use it (Milletari et al. 2016, arXiv:1606.04797)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from networks.base import NETWORKS, Branch, Decoder, SegmentationNetwork, Triple
from networks.blocks import kaiming_init, level_kernel, level_step, same_padding, total_stride

_CONVOLUTIONS = (1, 2, 3, 3, 3)  # per level, the finest first


def _stage(width_in: int, width: int, count: int, kernel: Triple) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(count):
        layers += [
            nn.Conv3d(width_in if index == 0 else width, width, kernel, padding=same_padding(kernel)),
            nn.InstanceNorm3d(width, affine=True),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def _resample(convolution: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(convolution, nn.InstanceNorm3d(width, affine=True), nn.ReLU(inplace=True))


class _Decoder(Decoder):
    """Upsample, add the skip connection, convolve, level by level; a dropout on the bottleneck before."""

    def __init__(self, widths: Sequence[int], dropout: float, flat_levels: Triple) -> None:
        super().__init__()
        self.dropout = nn.Dropout3d(dropout)
        self.up = nn.ModuleList()
        self.stages = nn.ModuleList()
        for level in range(len(widths) - 2, -1, -1):
            width, step = widths[level], level_step(level, flat_levels)
            self.up.append(_resample(nn.ConvTranspose3d(2 * width, width, kernel_size=step, stride=step), width))
            self.stages.append(_stage(width, width, _CONVOLUTIONS[level], level_kernel(level, flat_levels)))

    def forward(self, encoded: list[Tensor]) -> list[Tensor]:
        *skips, features = encoded
        return super().forward([*skips, self.dropout(features)])

    def join(self, level: int, features: Tensor, skip: Tensor) -> Tensor:
        return self.stages[level](self.up[level](features) + skip)


@NETWORKS.register("vnet")
class VNet(SegmentationNetwork):
    """Five levels of 1, 2, 3, 3, 3 convolutions; skips are added, not concatenated.

    Args:
        in_channels: Image channels C.
        num_classes: Classes K, the background included.
        filters: Feature channels of the finest level (the field's 16); doubled at each level.
        dropout: Probability of dropping a whole channel at the bottleneck and before the classifier, in training.
        flat_levels: First levels that neither convolve over nor downsample X, Y, Z; five make it 2D.

    Note:
        UA-MT, SS-Net and BCP use batch normalisation. Here it is instance normalisation: batches hold two or four
        patches, labelled ones mixed with unlabelled, and a moving-average teacher has no buffers to synchronise.
    """

    takes_flat_levels = True

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        filters: int = 16,
        dropout: float = 0.5,
        flat_levels: Triple = (0, 0, 0),
    ) -> None:
        super().__init__(in_channels, num_classes, flat_levels)
        widths = [filters * 2**level for level in range(len(_CONVOLUTIONS))]
        self.feature_dim, self.coarse_dims = filters, tuple(widths[-2:0:-1])
        self.stride = total_stride(len(widths), flat_levels)
        self.encoder = nn.ModuleList()
        self.down = nn.ModuleList()
        for level, (width, count) in enumerate(zip(widths, _CONVOLUTIONS, strict=True)):
            kernel, step = level_kernel(level, flat_levels), level_step(level, flat_levels)
            self.encoder.append(_stage(in_channels if level == 0 else width, width, count, kernel))
            if level + 1 < len(widths):
                self.down.append(_resample(nn.Conv3d(width, 2 * width, kernel_size=step, stride=step), 2 * width))
        classifier = nn.Sequential(nn.Dropout3d(dropout), nn.Conv3d(filters, num_classes, kernel_size=1))
        self.branch = Branch(_Decoder(widths, dropout, flat_levels), classifier)
        self.apply(kaiming_init)

    def encode(self, images: Tensor) -> list[Tensor]:
        """See the base class."""
        encoded = []
        features = images
        for level, stage in enumerate(self.encoder):
            features = stage(features)
            encoded.append(features)
            if level < len(self.down):
                features = self.down[level](features)
        return encoded
