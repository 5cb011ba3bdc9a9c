"""The network contract: any input size in, logits and last decoder features of the same size out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from myutils.registry import Registry


class SegmentationOutput(NamedTuple):
    """Logits (B, K, X, Y, Z) and last decoder features (B, E, X, Y, Z)."""

    logits: Tensor
    features: Tensor


class SegmentationNetwork(nn.Module, ABC):
    """Base of all networks: pads the input to what the network divides by, runs it, and crops the output.

    Attributes:
        in_channels: Number of image channels C.
        num_classes: Number of classes K, the background included.
        feature_dim: Width E of the last decoder features.
        stride: The network's total downsampling per axis; inputs are padded to a multiple of it.
    """

    feature_dim: int
    stride: tuple[int, int, int]

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 2:
            raise ValueError(
                f"in_channels {in_channels} and num_classes {num_classes}: need at least 1 channel and 2 classes "
                "(background and one structure)"
            )
        self.in_channels = in_channels
        self.num_classes = num_classes

    @abstractmethod
    def forward_padded(self, images: Tensor) -> SegmentationOutput:
        """Run on images (B, C, X, Y, Z) whose sizes are multiples of ``stride``."""

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Segment images (B, C, X, Y, Z) of any size.

        Raises:
            ValueError: If the input is not 5-dimensional or has the wrong number of channels.
        """
        if images.ndim != 5 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected (B, {self.in_channels}, X, Y, Z) for this network"
            )
        size = images.shape[2:]
        # Two strides at least: instance normalisation needs more than one voxel at the bottleneck.
        wanted = [max(2 * step, -(-n // step) * step) for n, step in zip(size, self.stride, strict=True)]
        missing = [target - n for target, n in zip(wanted, size, strict=True)]
        if not any(missing):
            return self.forward_padded(images)
        before = [gap // 2 for gap in missing]
        padding = [side for gap, low in zip(missing[::-1], before[::-1], strict=True) for side in (low, gap - low)]
        logits, features = self.forward_padded(functional.pad(images, padding))
        x, y, z = (slice(low, low + n) for low, n in zip(before, size, strict=True))
        return SegmentationOutput(logits[..., x, y, z], features[..., x, y, z])


NETWORKS: Registry[type[SegmentationNetwork]] = Registry("model", "networks")
