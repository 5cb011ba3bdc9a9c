"""MONAI's DynUNet and SegResNet behind the project's contract: their last decoder features come with the logits."""

from __future__ import annotations

from monai.networks.nets import DynUNet, SegResNet
from torch import Tensor, nn

from networks.base import NETWORKS, SegmentationNetwork, SegmentationOutput


class _InputTap(nn.Module):
    """Stands in for a final layer: keeps that layer's input for one forward pass and applies the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.seen: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        self.seen = features
        return self.layer(features)

    def take(self) -> Tensor:
        """The features of this forward pass; the reference is dropped so that nothing outlives the step."""
        features, self.seen = self.seen, None
        if features is None:
            raise RuntimeError("the network's final layer was not reached: no features to return")
        return features


@NETWORKS.register("dynunet")
class DynUNet3D(SegmentationNetwork):
    """MONAI DynUNet, the nnU-Net architecture (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z)."""

    def __init__(self, in_channels: int, num_classes: int, filters: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__(in_channels, num_classes)
        levels = len(filters)
        self.feature_dim = filters[0]
        self.stride = (2 ** (levels - 1),) * 3
        self.backbone = DynUNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=num_classes,
            kernel_size=[3] * levels,
            strides=[1] + [2] * (levels - 1),
            upsample_kernel_size=[2] * (levels - 1),
            filters=list(filters),
            norm_name=("INSTANCE", {"affine": True}),
        )
        self.tap = _InputTap(self.backbone.output_block)
        self.backbone.output_block = self.tap

    def forward_padded(self, images: Tensor) -> SegmentationOutput:
        """See the base class."""
        logits = self.backbone(images)
        return SegmentationOutput(logits, self.tap.take())


@NETWORKS.register("segresnet")
class SegResNet3D(SegmentationNetwork):
    """MONAI SegResNet without its auto-encoder branch (Myronenko 2018, arXiv:1810.11654)."""

    def __init__(self, in_channels: int, num_classes: int, filters: int = 16) -> None:
        super().__init__(in_channels, num_classes)
        self.feature_dim = filters
        self.stride = (8, 8, 8)
        self.backbone = SegResNet(
            spatial_dims=3, init_filters=filters, in_channels=in_channels, out_channels=num_classes
        )
        self.tap = _InputTap(self.backbone.conv_final)
        self.backbone.conv_final = self.tap

    def forward_padded(self, images: Tensor) -> SegmentationOutput:
        """See the base class."""
        logits = self.backbone(images)
        return SegmentationOutput(logits, self.tap.take())
