"""Pseudo-labels, the mixing of patches and the perturbation of their features, for any method."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from myutils.rank_batch import draw_rows, fetch_rows, rank_count
from networks.layers import dropped_channels


class PseudoLabels(NamedTuple):
    """Class ids, int64, and their probabilities, both (Bu, X, Y, Z), or (S,) of drawn voxels."""

    labels: Tensor
    confidence: Tensor

    def gated(self, threshold: float, ignore_index: int) -> Tensor:
        """The labels where the probability exceeds ``threshold`` in [0, 1), else ``ignore_index``; NaN is below it."""
        return self.labels.where(self.confidence > threshold, ignore_index)


def top_class(scores: Tensor, axis: int = 1) -> PseudoLabels:
    """The class of the highest score along ``axis``, int64, the first of equal ones, and that score; no gradient.

    On the CPU ``max`` takes two to four times as long over a strided axis as a pass per class, and ``argmax`` more.
    """
    scores = scores.detach()
    if scores.device.type != "cpu":
        highest, labels = scores.max(axis)
        return PseudoLabels(labels, highest)
    highest = scores.amax(axis)
    before = torch.ones_like(highest, dtype=torch.bool)  # no class so far has the highest score
    count = torch.zeros_like(highest, dtype=torch.int16)  # of such classes
    for class_scores in scores.unbind(axis)[:-1]:
        before &= class_scores != highest
        count += before
    return PseudoLabels(count.long(), highest)


def most_probable(scores: Tensor, axis: int = 1) -> Tensor:
    """The labels of ``top_class``."""
    return top_class(scores, axis).labels


def pseudo_labels(logits: Tensor) -> PseudoLabels:
    """Most probable class and its probability of logits (Bu, K, X, Y, Z) or (S, K); no gradient."""
    return top_class(logits.detach().float().softmax(1))


def random_boxes(sides: Tensor, size: torch.Size) -> Tensor:
    """Boxes at random places, drawn on the device of ``sides`` without a wait for it.

    Args:
        sides: Share of each axis that a box covers (B,), in 0..1; at least one voxel.
        size: (X, Y, Z) of the patches; every valid offset is equally likely.

    Returns:
        Masks (B, X, Y, Z), bool, True inside.
    """
    inside = []
    for n in size:
        length = (sides * n).round().clamp(1, n)  # (B,)
        place = draw_rows(lambda rows: torch.rand(rows, device=sides.device), len(sides))
        start = (place * (n - length + 1)).floor()
        voxels = torch.arange(n, device=sides.device)
        inside.append((voxels >= start[:, None]) & (voxels < (start + length)[:, None]))  # (B, n)
    x, y, z = inside
    return x[:, :, None, None] & y[:, None, :, None] & z[:, None, None, :]


class Paste(NamedTuple):
    """Boxes of other patches for the unlabelled patches of a step.

    Attributes:
        partners: For each unlabelled patch of all ranks the number of the patch that it takes its box from, int64, on
            the host; the labelled and then the unlabelled patches of all ranks are counted through.
        boxes: Which voxels (B, X, Y, Z) of this rank's unlabelled patches are taken, bool.
    """

    partners: Tensor
    boxes: Tensor

    def apply(self, labeled: Tensor, unlabeled: Tensor) -> Tensor:
        """The unlabelled rows (B, C, X, Y, Z) with their boxes, from labelled rows (Bl, C, X, Y, Z) and others of them.

        With several ranks a collective call; no gradient flows through the boxes.
        """
        from_labeled = int(self.partners.max()) < len(labeled) * rank_count()
        pool = labeled if from_labeled else torch.cat([labeled, unlabeled])
        return fetch_rows(pool, self.partners).where(self.boxes.unsqueeze(1), unlabeled)


def draw_paste(labeled: int, shape: torch.Size, device: torch.device, unlabeled_share: float = 0.0) -> Paste:
    """One random box for each unlabelled patch, a quarter to a half of its volume, from another patch at its place.

    Its sides are alike in parts of the patch's; along an axis of one or two voxels they are rounded to whole ones.

    From a labelled one the student learns true labels within the unlabelled image, the mix that BCP found to carry
    most (Bai et al. 2023, arXiv:2305.00673); from the unlabelled one before it two pseudo-labels side by side (CutMix,
    Yun et al. 2019, arXiv:1905.04899, as in UniMatch, arXiv:2208.09910).

    Args:
        labeled: Number Bl of this rank's labelled patches.
        shape: (B, X, Y, Z) of its unlabelled patches.
        device: Where the boxes are used.
        unlabeled_share: Chance of a box to come from an unlabelled patch, 0..1.
    """
    batch, first = shape[0], labeled * rank_count()
    everyone = batch * rank_count()
    partners = torch.randint(0, first, (everyone,))
    if unlabeled_share:
        before = torch.arange(first, first + everyone).roll(1)
        partners = torch.where(torch.rand(everyone) < unlabeled_share, before, partners)
    share = draw_rows(lambda rows: torch.rand(rows, device=device), batch)
    return Paste(partners, random_boxes((0.25 + 0.25 * share) ** (1 / 3), shape[1:]))


def drop_channels(encoded: list[Tensor], first: int = 0) -> list[Tensor]:
    """Each channel of each level (B, C, X, Y, Z) dropped with a chance of one half, the others doubled.

    Patches before ``first`` stay as they are. The feature perturbation of UniMatch (Yang et al. 2023,
    arXiv:2208.09910).
    """
    return [torch.cat([level[:first], dropped_channels(level[first:], 0.5)]) for level in encoded]
