"""Several trained networks as one: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from networks.base import SegmentationNetwork, SegmentationOutput

_LEAST = 1e-30  # probability, before its logarithm


class Ensemble(SegmentationNetwork):
    """Networks of the same channels and classes, whatever their kind (Lakshminarayanan et al. 2017, arXiv:1612.01474).

    Its logits are the logarithm of the members' mean probabilities, so that their softmax is that mean. It has no
    features of its own; they are the logits again.

    Args:
        members: Trained networks, at least one.
    """

    def __init__(self, members: Sequence[SegmentationNetwork]) -> None:
        super().__init__(members[0].in_channels, members[0].num_classes)
        self.members = nn.ModuleList(members)
        self.feature_dim = self.num_classes

    def encode(self, images: Tensor) -> list[Tensor]:
        """An ensemble has no encoder; it is for whole passes alone."""
        raise NotImplementedError("an ensemble has no encoder of its own; call it, or one of its members")

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Logits (B, K, X, Y, Z), float32, of images (B, C, X, Y, Z) of any size; errors as the members'."""
        mean = torch.stack([member(images).logits.float().softmax(1) for member in self.members]).mean(0)
        logits = mean.clamp(min=_LEAST).log()
        return SegmentationOutput(logits, logits)
