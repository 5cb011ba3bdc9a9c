"""Pseudo-labels and the mixing of labelled with unlabelled patches, for any method."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PseudoLabels(NamedTuple):
    """Class ids and their probabilities, both (Bu, X, Y, Z)."""

    labels: Tensor
    confidence: Tensor


def pseudo_labels(logits: Tensor) -> PseudoLabels:
    """Most probable class and its probability of logits (Bu, K, X, Y, Z)."""
    confidence, labels = logits.detach().float().softmax(1).max(1)
    return PseudoLabels(labels, confidence)


def random_box(size: tuple[int, ...] | torch.Size, side: float) -> tuple[slice, ...]:
    """A box of ``side`` (0..1) of each axis of ``size``, at a random place, from torch's global generator."""
    sides = [max(1, round(side * n)) for n in size]
    start = [int(torch.randint(0, n - length + 1, ())) for n, length in zip(size, sides, strict=True)]
    return tuple(slice(a, a + length) for a, length in zip(start, sides, strict=True))


def mixing_sources(labeled: int, shape: torch.Size, device: torch.device) -> Tensor:
    """For each voxel of the unlabelled patches, the flat index of the voxel that takes its place in the mixed patch.

    Labelled and unlabelled patches are numbered in one batch, labelled first. Each unlabelled patch gets one random
    box, a quarter to a half of its volume, from a labelled patch at the same place: in the box the student learns true
    labels within the unlabelled image, the mix that BCP found to carry most (Bai et al. 2023, arXiv:2305.00673).

    Args:
        labeled: Number Bl of labelled patches.
        shape: (Bu, X, Y, Z) of the unlabelled patches.
        device: Where the indices are used.

    Returns:
        Indices (Bu, X, Y, Z), int64, in 0..(Bl + Bu) * X * Y * Z - 1.
    """
    batch, size = shape[0], shape[1:]
    voxels = torch.arange(size[0] * size[1] * size[2], device=device).reshape(size)
    first_of = torch.arange(labeled, labeled + batch, device=device) * voxels.numel()
    sources = voxels + first_of.reshape(-1, 1, 1, 1)  # (Bu, X, Y, Z): every voxel is its own source
    for index in range(batch):
        x, y, z = random_box(size, float(0.25 + 0.25 * torch.rand(())) ** (1 / 3))
        partner = int(torch.randint(0, labeled, ()))
        sources[index, x, y, z] = voxels[x, y, z] + partner * voxels.numel()
    return sources


def take_voxels(values: Tensor, sources: Tensor) -> Tensor:
    """Values (B, X, Y, Z) or images (B, C, X, Y, Z) of the whole batch, taken at ``sources`` (Bu, X, Y, Z)."""
    if values.ndim == sources.ndim:
        return values.reshape(-1)[sources]
    return torch.stack([take_voxels(values[:, channel], sources) for channel in range(values.shape[1])], dim=1)
