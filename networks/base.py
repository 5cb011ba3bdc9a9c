"""The network contract: any input size in, logits and last decoder features of the same size out.

A network is an encoder and a branch (decoder and classifier), so that a method may add branches or change what the
encoder hands over, with any network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from myutils.registry import Registry
from networks.checkpointing import checkpoint_blocks, is_checkpointed
from networks.layers import mend_layers


class SegmentationOutput(NamedTuple):
    """Logits (B, K, X, Y, Z) and last decoder features (B, E, X, Y, Z)."""

    logits: Tensor
    features: Tensor

    def patches(self, chosen: slice) -> SegmentationOutput:
        """The outputs of some patches of the batch."""
        return SegmentationOutput(self.logits[chosen], self.features[chosen])

    def repeat(self, times: int) -> SegmentationOutput:
        """The outputs of the whole batch, that many times after each other."""
        return self if times == 1 else SegmentationOutput(*(value.repeat(times, 1, 1, 1, 1) for value in self))

    def detach(self) -> SegmentationOutput:
        """The same values without a graph."""
        return SegmentationOutput(self.logits.detach(), self.features.detach())


class Branch(nn.Module):
    """Decoder and classifier: what turns an encoder's features into a segmentation.

    Args:
        decoder: Maps encoder features, the finest first, to the last decoder features (B, E, X, Y, Z).
        classifier: Maps these to logits (B, K, X, Y, Z), voxel by voxel.
    """

    def __init__(self, decoder: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.classifier = classifier

    def forward(self, encoded: list[Tensor]) -> SegmentationOutput:
        """Logits and last decoder features."""
        features = self.decoder(encoded)
        return SegmentationOutput(self.classifier(features), features)


class SegmentationNetwork(nn.Module, ABC):
    """Base of all networks: pads the input to what the network divides by, runs it, and crops the output.

    Attributes:
        in_channels: Number of image channels C.
        num_classes: Number of classes K, the background included.
        feature_dim: Width E of the last decoder features.
        stride: The network's total downsampling per axis; inputs are padded to a multiple of it.
        branch: The network's own decoder and classifier.
    """

    feature_dim: int
    stride: tuple[int, int, int]
    branch: Branch

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
    def encode(self, images: Tensor) -> list[Tensor]:
        """Encoder features of images (B, C, X, Y, Z) whose sizes ``stride`` divides, the finest first."""

    def fresh_copy(self) -> SegmentationNetwork:
        """A network of the same kind with weights of its own, drawn from torch's global generator."""
        copy = type(self)(self.in_channels, self.num_classes)
        mend_layers(copy)
        if is_checkpointed(self):
            checkpoint_blocks(copy)
        return copy

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Segment images (B, C, X, Y, Z) of any size.

        Returns:
            Logits (B, K, X, Y, Z) and features (B, E, X, Y, Z), of the input's size.

        Raises:
            ValueError: If the input is not 5-dimensional or has the wrong number of channels.
        """
        return self.run_branches(images, [self.branch])[0]

    def run_branches(
        self,
        images: Tensor,
        branches: Sequence[Branch],
        change: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> list[SegmentationOutput]:
        """As ``forward``, for several branches on one pass of the encoder.

        Args:
            images: (B, C, X, Y, Z) of any size.
            branches: Decoders with classifiers, of this network's kind.
            change: Applied to the encoder's features before they are decoded; it may change the batch size.
        """
        if images.ndim != 5 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected (B, {self.in_channels}, X, Y, Z) for this network"
            )
        size = images.shape[2:]
        # Two strides at least: instance normalisation needs more than one voxel at the bottleneck.
        wanted = [max(2 * step, -(-n // step) * step) for n, step in zip(size, self.stride, strict=True)]
        missing = [target - n for target, n in zip(wanted, size, strict=True)]
        before = [gap // 2 for gap in missing]
        if any(missing):
            padding = [side for gap, low in zip(missing[::-1], before[::-1], strict=True) for side in (low, gap - low)]
            images = functional.pad(images, padding)
        encoded = self.encode(images)
        outputs = [branch(change(encoded) if change else encoded) for branch in branches]
        if not any(missing):
            return outputs
        x, y, z = (slice(low, low + n) for low, n in zip(before, size, strict=True))
        return [SegmentationOutput(*(part[..., x, y, z] for part in output)) for output in outputs]


NETWORKS: Registry[type[SegmentationNetwork]] = Registry("model", "networks")
