"""Several trained networks as one: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

from torch import Tensor, nn

from networks.base import SegmentationOutput, Segmenter

_LEAST = 1e-30  # probability, before its logarithm


class Ensemble(Segmenter):
    """Networks of the same channels and classes, whatever their kind (Lakshminarayanan et al. 2017, arXiv:1612.01474).

    For predictions alone, not for training. Its logits are the logarithm of the members' mean probabilities, so that
    their softmax is that mean. It has no features of its own; they are the logits again.

    Args:
        members: Trained networks, at least one.
    """

    def __init__(self, members: Sequence[Segmenter]) -> None:
        super().__init__(members[0].in_channels, members[0].num_classes)
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Logits (B, K, X, Y, Z), float32, of images (B, C, X, Y, Z) of any size; errors as the members'."""
        each = (member(images).logits.float().softmax(1) for member in self.members)
        logits = log_of_mean(each, len(self.members))
        return SegmentationOutput(logits, logits)


def log_of_mean(probabilities: Iterable[Tensor], count: int) -> Tensor:
    """Logarithm of the mean of ``count`` maps of probabilities, never of 0; the first map is overwritten."""
    return reduce(Tensor.add_, probabilities).div_(count).clamp_(min=_LEAST).log_()
