"""Forms of the contrastive term that use more of the memory than its mean: other classes are negatives.

Contract: as ``myutils.prototype_losses``. Both forms are a cross-entropy over classes; they differ in how similar a
voxel is to a class.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from myutils import prototype_losses
from myutils.prototype_losses import mean_over
from myutils.prototype_memory import unit_vectors

LOSS_FORMS = ("ssnet", "infonce", "multiproto")
TEMPERATURE = 0.1
ABSENT = -1e4  # similarity to a class without memory: no share in a softmax, and no inf - inf in its gradient
_CENTRES, _LLOYD_STEPS = 4, 3


def class_similarities(form: str, units: Tensor, memory: Tensor, memory_weights: Tensor) -> Tensor:
    """Similarity (N, K) of unit features (N, E) to each class in the given form, from memory (K, M, E) and its weights.

    ``memory_weights`` (K, M) sum to 1 over a class's filled slots and are zero elsewhere.
    """
    similarities = infonce_similarities if form == "infonce" else multiproto_similarities
    return similarities(units, memory, memory_weights)


def infonce_similarities(units: Tensor, memory: Tensor, memory_weights: Tensor) -> Tensor:
    """Similarity of each voxel to each class: ``log sum_j v_cj exp(<f, m_cj> / T)``, T = 0.1.

    Source: van den Oord et al. 2018, arXiv:1807.03748, with every memory vector of a class as a positive. With many
    classes voxels take turns, and what the gradient needs is computed anew for it.

    Args:
        units: Features of length 1 (N, E).
        memory: (K, M, E).
        memory_weights: (K, M), rows sum to 1 or are zero (an empty class).

    Returns:
        (N, K), at most 10; near ``ABSENT`` for an empty class.
    """
    vectors, filled = unit_vectors(memory), memory_weights > 0
    log_weights = memory_weights.where(filled, 1.0).log().where(filled, ABSENT)
    rows = max(1, prototype_losses.VALUES_AT_ONCE // filled.numel())
    if len(units) <= rows:
        return _soft_maximum(units, vectors, log_weights)
    parts = [
        checkpoint(_soft_maximum, part, vectors, log_weights, use_reentrant=False, preserve_rng_state=False)
        for part in units.split(rows)
    ]
    return torch.cat(parts)


def _soft_maximum(units: Tensor, vectors: Tensor, log_weights: Tensor) -> Tensor:
    scores = torch.einsum("ne,kme->nkm", units, vectors) / TEMPERATURE
    return (scores + log_weights).logsumexp(2)


def multiproto_similarities(units: Tensor, memory: Tensor, memory_weights: Tensor) -> Tensor:
    """Similarity of each voxel to each class: ``max_p <f, c_kp> / T`` over a few prototypes per class, T = 0.1.

    The prototypes are the directions of the weighted sums of each cluster of the class's memory; the nearest one pulls,
    as in MPER (2025, arXiv:2503.14343).

    Args:
        units: Features of length 1 (N, E).
        memory: (K, M, E).
        memory_weights: (K, M), rows sum to 1 or are zero (an empty class), filled from slot 0.

    Returns:
        (N, K), at most 10; near ``ABSENT`` for an empty class.
    """
    vectors = unit_vectors(memory)
    members = memory_clusters(vectors.detach(), memory_weights > 0)
    centres = unit_vectors(torch.einsum("kmp,km,kme->kpe", members.to(vectors), memory_weights, vectors))
    scores = torch.einsum("ne,kpe->nkp", units, centres) / TEMPERATURE
    return scores.masked_fill(~members.any(1), ABSENT).amax(2)


@torch.no_grad()
def memory_clusters(vectors: Tensor, used: Tensor, count: int = _CENTRES) -> Tensor:
    """Spherical k-means of each class's vectors, started at the first and then the farthest ones; no random draw.

    Args:
        vectors: Of length 1 (K, M, E).
        used: (K, M), bool.
        count: Clusters P per class, fewer where the memory holds fewer vectors.

    Returns:
        Which cluster each vector that is in use belongs to (K, M, P), bool.
    """
    classes, slots, _ = vectors.shape
    count = min(count, slots)
    rows = torch.arange(classes, device=vectors.device)
    centres = vectors[:, :1]  # (K, 1, E)
    for _ in range(count - 1):
        nearest = torch.einsum("kme,kpe->kmp", vectors, centres).amax(2).masked_fill(~used, float("inf"))  # (K, M)
        centres = torch.cat([centres, vectors[rows, nearest.argmin(1)].unsqueeze(1)], dim=1)
    for _ in range(_LLOYD_STEPS):
        own = torch.einsum("kme,kpe->kmp", vectors, centres).argmax(2)  # (K, M)
        members = torch.nn.functional.one_hot(own, count).bool() & used.unsqueeze(2)  # (K, M, P)
        sums = torch.einsum("kmp,kme->kpe", members.to(vectors), vectors)
        centres = unit_vectors(sums).where(members.any(1).unsqueeze(2), centres)
    return members


def class_contrast(similarities: Tensor, class_labels: Tensor, feature_weights: Tensor, taking_part: Tensor) -> Tensor:
    """Cross-entropy over classes, weighted within each class and averaged over the classes that take part.

    Args:
        similarities: (N, K), ``ABSENT`` where a class is empty.
        class_labels: Class ids (N,).
        feature_weights: (P, K, N), rows sum to 1 or are zero.
        taking_part: Classes (P, K) with both features and memory, bool.
    """
    known = class_labels.clamp(0, similarities.shape[1] - 1)
    losses = -similarities.log_softmax(1).gather(1, known[:, None]).squeeze(1)  # (N,), finite also where empty
    return mean_over(feature_weights @ losses, taking_part)
