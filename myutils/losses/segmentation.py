"""Dice + cross-entropy for true labels, gated pseudo-labels and soft ones; gradients reach the logits only.

MONAI's losses know neither gates nor the patches of other ranks, and count a class that no patch of the batch has.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from myutils.distributed import sum_over_ranks
from myutils.pseudo_labels import most_probable

_SMOOTH = 1e-5


def one_hot_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Class ids (B, X, Y, Z) as float32 indicators (B, K, X, Y, Z)."""
    indicators = labels.new_zeros((labels.shape[0], num_classes, *labels.shape[1:]), dtype=torch.float32)
    return indicators.scatter_(1, labels.unsqueeze(1), 1.0)


def soft_dice_loss(probs: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - Dice, pooled over the batch of all ranks, averaged over the foreground classes that occur in it.

    A class that is absent from the whole batch takes no part: its Dice would be 0 / 0, and 1 - 0 would push down
    a class that this batch says nothing about; cross-entropy punishes false positives there.

    Args:
        probs: Class probabilities (B, K, X, Y, Z), float32.
        labels: Class ids (B, X, Y, Z), int64.
        mask: Weights (B, X, Y, Z) in 0..1; None for all ones.

    Source: Milletari et al. 2016, arXiv:1606.04797 (unsquared denominator as in nnU-Net).
    """
    truth = one_hot_labels(labels, probs.shape[1])
    if mask is not None:
        weight = mask.unsqueeze(1)
        probs, truth = probs * weight, truth * weight
    axes = (0, 2, 3, 4)
    sums = torch.stack([(probs * truth).sum(axes), probs.sum(axes), truth.sum(axes)])[:, 1:]  # (3, K - 1)
    overlap, predicted, true = sum_over_ranks(sums)
    size = predicted + true
    present = (true > 0).float()
    dice = (2 * overlap + _SMOOTH) / (size + _SMOOTH)
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


def dice_ce_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of soft Dice loss and cross-entropy, in float32.

    Args:
        logits: (B, K, X, Y, Z), any floating type.
        labels: True or pseudo class ids (B, X, Y, Z), int64.
        mask: Reliability (B, X, Y, Z) in 0..1 of pseudo-labels; cross-entropy is averaged over all voxels, reliable or
            not, so that few reliable voxels weigh little (FixMatch, Sohn et al. 2020, arXiv:2001.07685).

    Returns:
        A scalar on the graph, 0 for an empty batch.
    """
    if logits.shape[0] == 0:
        return 0.0 * logits.float().sum()
    log_probs = functional.log_softmax(logits.float(), dim=1)
    cross_entropy = functional.nll_loss(log_probs, labels, reduction="none")  # (B, X, Y, Z)
    if mask is not None:
        cross_entropy = cross_entropy * mask
    return 0.5 * (cross_entropy.mean() + soft_dice_loss(log_probs.exp(), labels, mask))


def mean_within(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` over the voxels of all ranks where ``mask``, both (B, X, Y, Z); 0 where there are none."""
    return _mean_of(values * mask, mask)


def _mean_of(weighted: Tensor, weights: Tensor) -> Tensor:
    """Mean of values, given times their weights, over all ranks; 0 where all weights are."""
    total, known = sum_over_ranks(torch.stack([weighted.sum(), weights.sum()]))
    return total / known.clamp(min=1e-6)


def region_losses(logits: Tensor, labels: Tensor, region: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of soft Dice loss and cross-entropy inside a region and outside it, in float32.

    Each is averaged over its part of all ranks' voxels.

    Args:
        logits: (B, K, X, Y, Z), any floating type.
        labels: Class ids (B, X, Y, Z), int64.
        region: Voxels (B, X, Y, Z), bool.

    Returns:
        Two scalars on the graph, 0 for an empty part. The masked loss of Bai et al. 2023, arXiv:2305.00673.
    """
    log_probs = functional.log_softmax(logits.float(), dim=1)
    cross_entropy = functional.nll_loss(log_probs, labels, reduction="none")  # (B, X, Y, Z)
    probs = log_probs.exp()

    def within(part: Tensor) -> Tensor:
        return 0.5 * (mean_within(cross_entropy, part) + soft_dice_loss(probs, labels, part))

    return within(region.float()), within((~region).float())


def soft_label_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, labels: Tensor | None = None, *, partial: bool = False
) -> Tensor:
    """Mean of the cross-entropy to class probabilities and of the soft Dice loss to their hard labels, in float32.

    Cross-entropy to probabilities needs no gate: an unsure target asks for an unsure prediction. Dice has no such
    form (its minimum is not at the target), so that it looks at the most probable class of reliable voxels.

    Args:
        logits: (B, K, X, Y, Z), any floating type.
        targets: Probabilities (B, K, X, Y, Z) that sum to 1 over K, without gradient.
        mask: Voxels (B, X, Y, Z) that take part in the Dice loss, 0..1.
        labels: The most probable classes (B, X, Y, Z) of ``targets``, where they are at hand.
        partial: ``targets`` sum to ``mask``, less than 1 where part of a voxel has no label: cross-entropy is averaged
            over the parts that have one, of all ranks.

    Returns:
        A scalar on the graph, 0 for an empty batch. For one-hot targets and a mask of ones it is ``dice_ce_loss``.
    """
    if logits.shape[0] == 0:
        return 0.0 * logits.float().sum()
    log_probs = functional.log_softmax(logits.float(), dim=1)
    voxels = -(targets * log_probs).sum(1)
    cross_entropy = _mean_of(voxels, mask) if partial else voxels.mean()
    labels = most_probable(targets) if labels is None else labels
    return 0.5 * (cross_entropy + soft_dice_loss(log_probs.exp(), labels, mask))
