"""Covariance dynamic feature pools: how the channels of reliable features vary together, and losses built on it.

Contract: everything in float32, but for the moments of classes, which are float64; statistics are sums over the stored
features, so no N x N matrix is ever made; what the pool stores is detached, and every loss here has a gradient into the
features it is given.

Source: the trainer's original design (covariance dynamic feature pool); the correlation consistency is CORN's,
arXiv:2410.15916.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from myutils.distributed import concat_ranks
from myutils.prototype_losses import class_membership, inter_class_loss, mean_over
from myutils.prototype_memory import unit_vectors

_SMALLEST_DEVIATION = 1e-6
_NOTHING = 1e-4  # of what lies along a class's first pattern, and is rounding


class Moments(NamedTuple):
    """Mean (E,), standard deviation (E,), 1 where a channel is constant, and correlation matrix (E, E)."""

    mean: Tensor
    deviation: Tensor
    correlation: Tensor


def moments(features: Tensor, weights: Tensor | None = None) -> Moments:
    """Moments of features (N, E), of which those with weight 1 count (N,); safe for constant channels and small N.

    The correlation matrix is ``R = A^-1 Sigma A^-1`` with A the diagonal of standard deviations; a constant channel
    correlates with nothing, itself included. On the graph of the features.
    """
    weights = torch.ones_like(features[:, 0]) if weights is None else weights.to(features)
    total = weights.sum().clamp(min=1)
    nearly = (weights @ features.detach()) / total  # (E,), but for rounding, which would make constants vary
    shifted = features - nearly
    rest = (weights @ shifted) / total
    mean, centred = nearly + rest, (shifted - rest) * weights.sqrt()[:, None]  # (E,), (N, E)
    covariance = centred.T @ centred / total  # (E, E)
    variance = covariance.diagonal()
    varies = variance > (_SMALLEST_DEVIATION * (1 + mean.abs())).square()  # of less float32 shows but its rounding
    deviation = variance.where(varies, 1.0).sqrt()  # the root of a constant channel's 0 would have no gradient
    both = varies[:, None] & varies
    correlation = (covariance / (deviation[:, None] * deviation)).where(both, 0.0)
    return Moments(mean, deviation, correlation)


def leading_patterns(symmetric: Tensor, count: int) -> Tensor:
    """The ``count`` eigenvectors (count, E) with the largest eigenvalues of a symmetric matrix (E, E), no gradient."""
    _, vectors = torch.linalg.eigh(symmetric.detach().float())  # rising eigenvalues, columns
    return vectors.flip(1)[:, :count].T.contiguous()


def side_of(projections: Tensor) -> Tensor:
    """-1 where a projection is negative, else 1, of the same shape."""
    return torch.where(projections < 0, -1.0, 1.0)


def in_old_order(patterns: Tensor, centres: Tensor) -> Tensor:
    """Patterns (J, E) with the numbers and the sides of the earlier centres (J, E) that they are most like.

    An eigenvector's sign is arbitrary, and its place changes with its eigenvalue: what has learned to name pools by
    their number must find them there after a rebuild.
    """
    cosines = unit_vectors(centres) @ unit_vectors(patterns).T  # (J, J)
    rows, columns = linear_sum_assignment(cosines.abs().cpu().numpy(), maximize=True)
    return patterns[columns] * side_of(cosines[rows, columns])[:, None]


class DynamicFeaturePool(nn.Module):
    """A ring buffer of reliable features per class, and what is derived from it when it is rebuilt.

    Args:
        num_classes: Classes K.
        feature_dim: Channels E.
        capacity: Features kept over all classes; each class gets an equal part.
        num_pools: Patterns of co-variation, and pools, J <= E.
        num_anchors: Leading patterns per class, A <= E.
        anchor_decay: Share of a class's old moments that a rebuild keeps for its anchors, 0..1.

    Attributes:
        store: Features (K, P + 1, E); the last slot takes what is not kept.
        count: Features held per class (K,).
        cursor: Slot that the next feature of a class takes (K,).
        centres: Centre of each pool (J, E), of standardised features turned to its pattern's side.
        anchors: Leading patterns per class (K, A, E), orthonormal, pointing to the class's side; zero beyond as many as
            its features span.
        class_mean: Mean of each class's features (K, E), averaged over rebuilds, float64.
        class_second: Their second moments (K, E, E), averaged over rebuilds, float64.
        sizes: Features that each pool got when it was built (J,).
    """

    store: Tensor
    count: Tensor
    cursor: Tensor
    mean: Tensor
    deviation: Tensor
    centres: Tensor
    anchors: Tensor
    class_mean: Tensor
    class_second: Tensor
    sizes: Tensor

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        capacity: int = 50_000,
        num_pools: int = 8,
        num_anchors: int = 8,
        anchor_decay: float = 0.9,
    ) -> None:
        super().__init__()
        for name, value in (("--num_dfp", num_pools), ("--num_eigenvectors", num_anchors)):
            if not 1 <= value <= feature_dim:
                raise ValueError(
                    f"{name} {value}: the network has {feature_dim} feature channels; pass 1..{feature_dim}"
                )
        slots = capacity // num_classes
        if slots < 2:
            raise ValueError(f"--max_global_features {capacity}: at least {2 * num_classes}, two per class")
        self.num_classes = num_classes
        self.anchor_decay = anchor_decay
        self.register_buffer("store", torch.zeros(num_classes, slots + 1, feature_dim))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("cursor", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("deviation", torch.ones(feature_dim))
        self.register_buffer("centres", torch.zeros(num_pools, feature_dim))
        self.register_buffer("anchors", torch.zeros(num_classes, num_anchors, feature_dim))
        self.register_buffer("class_mean", torch.zeros(num_classes, feature_dim, dtype=torch.float64))
        second = torch.zeros(num_classes, feature_dim, feature_dim, dtype=torch.float64)
        self.register_buffer("class_second", second)
        self.register_buffer("sizes", torch.zeros(num_pools, dtype=torch.int64))

    @torch.no_grad()
    def push(self, features: Tensor, class_labels: Tensor) -> None:
        """Store features (N, E) of class ids (N,), the oldest of a class giving way; other ids are left out.

        With several ranks a collective call: N must be equal on all, and all store the features of all.
        """
        packed = concat_ranks(torch.cat([features.detach().float(), class_labels[:, None].float()], dim=1))
        features, class_labels = packed[:, :-1], packed[:, -1].long()
        slots = self.store.shape[1] - 1
        member = class_membership(class_labels, self.num_classes)  # (K, N)
        added = member.sum(1)  # (K,)
        classes = class_labels.clamp(0, self.num_classes - 1)
        rank = (member.cumsum(1) - 1).gather(0, classes[None]).squeeze(0)  # (N,): how many of the class came before
        newest = member.any(0) & (rank >= (added - slots)[classes])
        # Rows to leave out go to the slot behind the last: choosing rows would make the host wait for their number.
        self.store[classes, ((self.cursor[classes] + rank) % slots).where(newest, slots)] = features
        self.cursor.copy_((self.cursor + added) % slots)
        self.count.copy_((self.count + added).clamp(max=slots))

    def stored(self) -> tuple[Tensor, Tensor]:
        """Used slots: features (N, E) and their class ids (N,)."""
        used = torch.arange(self.store.shape[1], device=self.store.device) < self.count[:, None]  # (K, P)
        classes, slots = used.nonzero(as_tuple=True)
        return self.store[classes, slots], classes

    @torch.no_grad()
    def rebuild(self) -> bool:
        """Derive patterns, pools, centres and anchors from what is stored; False, and no change, while it is empty."""
        features, class_labels = self.stored()
        if not len(features):
            return False
        found = moments(features)
        self.mean.copy_(found.mean)
        self.deviation.copy_(found.deviation)
        standard = self.standardise(features)  # (N, E)
        patterns = leading_patterns(found.correlation, len(self.centres))  # (J, E)
        if self.sizes.any():
            patterns = in_old_order(patterns, self.centres)
        along = standard @ patterns.T  # (N, J)
        pools = along.abs().argmax(1)  # (N,)
        member = class_membership(pools, len(patterns)).to(standard)  # (J, N)
        self.sizes.copy_(member.sum(1).long())
        # Both ends of a pattern belong to its pool; without their signs they would cancel. An empty pool keeps its
        # pattern as centre, so that it can win features later.
        means = (member * side_of(along).T) @ standard / member.sum(1, keepdim=True).clamp(min=1)
        self.centres.copy_(means.where(member.any(1, keepdim=True), patterns))
        for class_id in range(self.num_classes):
            self._rebuild_anchors(class_id, features[class_labels == class_id].double())
        return True

    def _rebuild_anchors(self, class_id: int, features: Tensor) -> None:
        """Leading directions of one class's second moment in today's coordinates, signed to its side.

        The moments of the raw features (n, E) are averaged with those of earlier rebuilds, not the directions: an
        eigenvector's sign, order and coordinates change from one rebuild to the next. In float64: a channel's spread is
        a difference of moments.
        """
        if not len(features):
            return
        mean, second = features.mean(0), features.T @ features / len(features)
        if self.class_second[class_id].any():
            keep = self.anchor_decay
            mean = keep * self.class_mean[class_id] + (1 - keep) * mean
            second = keep * self.class_second[class_id] + (1 - keep) * second
        self.class_mean[class_id], self.class_second[class_id] = mean, second
        centre, deviation = self.mean.double(), self.deviation.double()
        crossed = mean[:, None] * centre
        moved = second - crossed - crossed.T + centre[:, None] * centre  # about the mean of all classes
        standard = (moved / (deviation[:, None] * deviation)).float()
        anchors = leading_patterns(standard, self.anchors.shape[1])  # (A, E)
        along = ((anchors @ standard) * anchors).sum(1)  # (A,): none where fewer features span fewer directions
        sides = side_of(anchors @ self.standardise(mean)) * (along > _NOTHING * along.amax())
        self.anchors[class_id] = anchors * sides[:, None]

    def standardise(self, features: Tensor) -> Tensor:
        """Features (N, E) in the coordinates of patterns, centres and anchors."""
        return (features.float() - self.mean) / self.deviation

    def nearest_pools(self, features: Tensor) -> Tensor:
        """Index (N,) of the centre that each feature (N, E) lies along, by the highest ``|cosine|``; no gradient."""
        standard = unit_vectors(self.standardise(features.detach()))
        return (standard @ unit_vectors(self.centres).T).abs().argmax(1)

    def anchor_loss(self, features: Tensor, class_labels: Tensor) -> Tensor:
        """1 - cosine of features (N, E) to the nearest anchor of their class (N,): mean over classes of class means."""
        units = unit_vectors(self.standardise(features))
        member = class_membership(class_labels, self.num_classes)  # (K, N)
        known = class_labels.clamp(0, self.num_classes - 1)
        cosines = torch.einsum("ne,nae->na", units, self.anchors[known])  # (N, A)
        nearest = cosines.where(self.anchors.any(2)[known], -1.0).amax(1)  # (N,)
        counts = member.sum(1)
        means = member.to(nearest) @ (1.0 - nearest) / counts.clamp(min=1)  # (K,)
        return mean_over(means, (counts > 0) & self.anchors.any(2).any(1))

    def pool_losses(self, regions: Tensor, pools: Tensor, margin: float = 1.0) -> tuple[Tensor, Tensor]:
        """Compactness and separation of region features (R, E) that a selector assigned to pools (R,).

        Compactness: mean of 1 - |cosine| to the pool's centre. Separation: ``inter_class_loss`` between the pools, of
        regions turned to their centre's side. Both are 0, on the graph, until there are pools.
        """
        units = unit_vectors(self.standardise(regions))
        along = (units * unit_vectors(self.centres)[pools]).sum(1)  # (R,)
        compact = (1.0 - along.abs()).mean() if len(units) else 0.0 * units.sum()
        member = class_membership(pools, len(self.centres))  # (J, R)
        separation = inter_class_loss(units * side_of(along)[:, None], member, margin)
        built = self.sizes.any()
        return compact * built, separation * built


def correlation_consistency(features_l: Tensor, features_u: Tensor, known_l: Tensor, known_u: Tensor) -> Tensor:
    """Mean squared difference of the correlation matrices of labelled (N, E) and unlabelled features (M, E).

    CORN's consistency (arXiv:2410.15916): unlabelled features must vary together as labelled ones do. The labelled
    side is the reference and gets no gradient. Rows count where ``known_l`` (N,) and ``known_u`` (M,) say so; 0 on
    the graph where either side has fewer than two.
    """
    reference = moments(features_l.detach().float(), known_l).correlation
    gap = (moments(features_u.float(), known_u).correlation - reference).square().mean()
    return gap * ((known_l.sum() > 1) & (known_u.sum() > 1))
