"""Class-to-class losses between voxel features and the prototype memory.

Contract: float32 or float64 in, raw scalars out, on the graph also where no class takes part; no loop over voxels
and no wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from myutils.prototype_memory import unit_vectors

_SMALLEST_SQUARE = 1e-12
_LEAK = 0.2
VALUES_AT_ONCE = 2**25  # of a map that grows with classes times vectors: 128 MB


def build_selector(feature_dim: int) -> nn.Sequential:
    """Network from a vector (N, E) to the logit of its score (N, 1).

    Note: The published selectors normalise with BatchNorm, which fails for a single voxel and differs between ranks;
    LayerNorm looks at one vector at a time.
    """
    return nn.Sequential(
        nn.Linear(feature_dim, feature_dim),
        nn.LayerNorm(feature_dim),
        nn.LeakyReLU(_LEAK),
        nn.Linear(feature_dim, 1),
    )


def _score(selector: nn.Module, vectors: Tensor) -> Tensor:
    """Logits (N,) in the type of ``vectors`` (N, E); the selector runs in the type of its own parameters."""
    own_type = next(selector.parameters()).dtype
    return selector(vectors.to(own_type)).squeeze(-1).to(vectors.dtype)


def stacked_logits(selectors: nn.ModuleList, vectors: Tensor) -> Tensor:
    """Logits (K, N) of vectors (K, N, E), or of (N, E) under each of the K selectors, in one go for all of them.

    For accelerators, where K small networks cost K times the launches. Types as in ``_score``.
    """
    stacks = [torch.stack(same) for same in zip(*(selector.parameters() for selector in selectors), strict=True)]
    weight, bias, gain, shift, last_weight, last_bias = stacks  # (K, E, E), four of (K, E) or (K, 1, E), (K, 1)
    hidden = vectors.to(weight.dtype) @ weight.mT + bias[:, None]
    hidden = functional.layer_norm(hidden, hidden.shape[-1:]) * gain[:, None] + shift[:, None]
    return (functional.leaky_relu(hidden, _LEAK) @ last_weight.mT).squeeze(-1).add(last_bias).to(vectors.dtype)


def own_class_logits(
    selectors: nn.ModuleList, vectors: Tensor, class_labels: Tensor, stacked: bool | None = None
) -> Tensor:
    """Logit of each vector (N, E) under the selector of its own class (N,); 0 for ids outside 0..K-1.

    On the CPU each selector sees its class only. Elsewhere that would make the host wait for the class sizes, so
    every selector sees every vector; ``stacked`` forces either way. With many classes the selectors take turns, and
    what the gradient needs is computed anew for it, so that memory grows with N alone.
    """
    if stacked is None:
        stacked = vectors.device.type != "cpu"
    logits = vectors.new_zeros(vectors.shape[0])  # (N,)
    if stacked:
        member = class_membership(class_labels, len(selectors))  # (K, N)
        at_once = max(1, VALUES_AT_ONCE // max(1, vectors.numel()))
        for first in range(0, len(selectors), at_once):
            some = selectors[first : first + at_once]
            if len(some) == len(selectors):
                answers = stacked_logits(some, vectors)
            else:
                answers = checkpoint(stacked_logits, some, vectors, use_reentrant=False, preserve_rng_state=False)
            logits = logits + answers.where(member[first : first + at_once], 0.0).sum(0)
        return logits
    for class_id, selector in enumerate(selectors):
        rows = (class_labels == class_id).nonzero().squeeze(1)
        logits = logits.index_copy(0, rows, _score(selector, vectors[rows]))
    return logits


def memory_logits(selectors: nn.ModuleList, memory: Tensor) -> Tensor:
    """Logits (K, M) of the memory (K, M, E) under each class's memory selector."""
    if memory.device.type != "cpu":
        return stacked_logits(selectors, memory)
    return torch.stack([_score(selector, rows) for selector, rows in zip(selectors, memory, strict=True)])


def score_weights(logits: Tensor, member: Tensor) -> Tensor:
    """Scores sigmoid(logit) divided by their sum over the last axis: mean-1 weights, divided by their number.

    Computed as the softmax of log-sigmoid, which is the same and cannot divide by zero.

    Args:
        logits: (..., N), or broadcastable to it.
        member: Which entries take part (..., N), bool.

    Returns:
        Weights (..., N) that sum to 1 over the members; zeros in a row without any.
    """
    lowest = torch.finfo(logits.dtype).min
    return functional.logsigmoid(logits).where(member, lowest).softmax(dim=-1) * member


def class_membership(class_labels: Tensor, num_classes: int) -> Tensor:
    """Rows of voxels per class (K, N), bool, of class ids (N,); ids outside 0..K-1 belong to none."""
    return class_labels == torch.arange(num_classes, device=class_labels.device)[:, None]


def mean_over(values: Tensor, taking_part: Tensor) -> Tensor:
    """Mean over the last axis of the values where ``taking_part`` (same shape, bool), summed over parts before it.

    A part in which nothing takes part adds 0, still on the graph.
    """
    return ((values * taking_part).sum(-1) / taking_part.sum(-1).clamp(min=1)).sum()


def class_to_class_loss(
    units: Tensor, feature_weights: Tensor, memory: Tensor, memory_weights: Tensor, taking_part: Tensor
) -> Tensor:
    """Weighted mean of 1 - cosine over all pairs of a feature and a memory vector, averaged over classes.

    With unit vectors f, m and weights w, v that each sum to 1, the mean over the N x M pairs is
    ``sum_ij w_i v_j (1 - <f_i, m_j>) = 1 - <sum_i w_i f_i, sum_j v_j m_j>``: linear in N + M.

    Args:
        units: Features of length 1 (N, E).
        feature_weights: (P, K, N), rows sum to 1 or are zero.
        memory: (K, M, E).
        memory_weights: (K, M), rows sum to 1 or are zero.
        taking_part: Classes (P, K) with both features and memory, bool.
    """
    feature_means = feature_weights @ units  # (P, K, E)
    memory_means = (memory_weights[..., None] * unit_vectors(memory)).sum(dim=1)  # (K, E)
    return mean_over(1.0 - (feature_means * memory_means).sum(dim=-1), taking_part)


def intra_class_loss(units: Tensor, prototypes: Tensor, member: Tensor, filled: Tensor) -> Tensor:
    """Spread of each class around its prototype: the mean over classes of the mean of (1 - cosine)^2.

    The contrastive term is linear in every feature, and so it sees a class only through its weighted mean. The
    square here pulls the voxels far from the prototype hardest, leaves the near ones alone, and knows no selector
    weights, so that a selector cannot excuse a far voxel.

    Args:
        units: Features of length 1 (N, E).
        prototypes: Unit vectors (K, E), constants.
        member: (P, K, N), bool.
        filled: Classes with a prototype (K,), bool.
    """
    spread = (1.0 - prototypes @ units.mT).square()  # (K, N)
    counts = member.sum(dim=-1)  # (P, K)
    return mean_over((spread * member).sum(dim=-1) / counts.clamp(min=1), filled & (counts > 0))


def inter_class_loss(units: Tensor, member: Tensor, margin: float) -> Tensor:
    """Push class means apart: the mean over pairs of classes present of relu(margin - distance)^2.

    The means are those of the unit features, themselves scaled to length 1, and the distance is Euclidean, in
    [0, 2]; margin 1 is an angle of 60 degrees. Zero for fewer than two classes. Means that coincide exactly offer
    no direction to part in and get no gradient.

    Args:
        units: Features of length 1 (N, E).
        member: (P, K, N), bool.
        margin: Distance beyond which a pair is left alone.
    """
    counts = member.sum(dim=-1)  # (P, K)
    means = unit_vectors((member.to(units) @ units) / counts.clamp(min=1)[..., None])  # (P, K, E)
    squares = (means[..., :, None, :] - means[..., None, :, :]).square().sum(dim=-1)  # (P, K, K)
    distances = squares.clamp(min=_SMALLEST_SQUARE).sqrt()
    present = counts > 0
    pairs = torch.triu(present[..., :, None] & present[..., None, :], diagonal=1)  # (P, K, K)
    return mean_over(functional.relu(margin - distances).square().flatten(-2), pairs.flatten(-2))
