"""Pseudo-labels, the mixing of patches and the perturbation of their features, for any method."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def most_probable(scores: Tensor, axis: int = 1) -> Tensor:
    """The class of the highest score along ``axis``, int64, the first of equal ones, without gradient.

    ``argmax``, whose loop over a strided axis takes 5 to 13 times as long on the CPU.
    """
    return scores.detach().max(axis).indices


class PseudoLabels(NamedTuple):
    """Class ids and their probabilities, both (Bu, X, Y, Z)."""

    labels: Tensor
    confidence: Tensor


def pseudo_labels(logits: Tensor) -> PseudoLabels:
    """Most probable class and its probability of logits (Bu, K, X, Y, Z)."""
    confidence, labels = logits.detach().float().softmax(1).max(1)
    return PseudoLabels(labels, confidence)


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
        start = (torch.rand_like(sides) * (n - length + 1)).floor()
        voxels = torch.arange(n, device=sides.device)
        inside.append((voxels >= start[:, None]) & (voxels < (start + length)[:, None]))  # (B, n)
    x, y, z = inside
    return x[:, :, None, None] & y[:, None, :, None] & z[:, None, None, :]


def mixing_sources(labeled: int, shape: torch.Size, device: torch.device, unlabeled_share: float = 0.0) -> Tensor:
    """For each voxel of the unlabelled patches, the flat index of the voxel that takes its place in the mixed patch.

    Labelled and unlabelled patches are numbered in one batch, labelled first. Each unlabelled patch gets one random
    box, a quarter to a half of its volume, from another patch at the same place. From a labelled one the student
    learns true labels within the unlabelled image, the mix that BCP found to carry most (Bai et al. 2023,
    arXiv:2305.00673); from the unlabelled one before it two pseudo-labels side by side (CutMix, Yun et al. 2019,
    arXiv:1905.04899, as in UniMatch, arXiv:2208.09910).

    Args:
        labeled: Number Bl of labelled patches.
        shape: (Bu, X, Y, Z) of the unlabelled patches.
        device: Where the indices are used.
        unlabeled_share: Chance of a box to come from an unlabelled patch, 0..1.

    Returns:
        Indices (Bu, X, Y, Z), int64, in 0..(Bl + Bu) * X * Y * Z - 1.
    """
    batch, size = shape[0], shape[1:]
    voxels = torch.arange(size.numel(), device=device).reshape(size)
    own = torch.arange(labeled, labeled + batch, device=device)  # (Bu,)
    partners = torch.randint(0, labeled, (batch,), device=device)
    if unlabeled_share:
        partners = torch.where(torch.rand(batch, device=device) < unlabeled_share, own.roll(1), partners)
    pasted = random_boxes((0.25 + 0.25 * torch.rand(batch, device=device)) ** (1 / 3), size)
    patches = torch.where(pasted, partners.reshape(-1, 1, 1, 1), own.reshape(-1, 1, 1, 1))  # (Bu, X, Y, Z)
    return voxels + patches * voxels.numel()


def take_voxels(values: Tensor, sources: Tensor) -> Tensor:
    """Values (B, X, Y, Z) or images (B, C, X, Y, Z) of the whole batch, taken at ``sources`` (Bu, X, Y, Z)."""
    if values.ndim == sources.ndim:
        return values.reshape(-1)[sources]
    return torch.stack([take_voxels(values[:, channel], sources) for channel in range(values.shape[1])], dim=1)


def drop_channels(encoded: list[Tensor], first: int = 0) -> list[Tensor]:
    """Half of the channels of each level (B, C, X, Y, Z) dropped at random, the others doubled.

    Patches before ``first`` stay as they are. The feature perturbation of UniMatch (Yang et al. 2023,
    arXiv:2208.09910).
    """
    return [torch.cat([level[:first], functional.dropout3d(level[first:], 0.5)]) for level in encoded]
