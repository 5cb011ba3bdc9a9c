"""Prototype memory: the best-ranked vectors of each class, equal on every rank, and how candidates are ranked.

Contract: what goes in is detached; a write replaces a class's vectors or leaves them alone, never mixes old and new.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from myutils.distributed import concat_ranks
from myutils.prototype_checks import NonFiniteFeaturesError

RANKINGS = ("highest", "lowest", "random", "confidence")
_EMPTY = float("-inf")
_SMALLEST_NORM = 1e-6


def unit_vectors(vectors: Tensor) -> Tensor:
    """L2-normalise the last axis; vectors shorter than 1e-6 become zero, with a zero gradient instead of a huge one."""
    squares = (vectors * vectors).sum(-1, keepdim=True)
    return vectors * squares.where(squares > _SMALLEST_NORM**2, torch.inf).rsqrt()


def non_finite_message(features: Tensor, class_labels: Tensor) -> str | None:
    """Name the classes with NaN or infinite vectors, or ``None``. Waits for the device: for error handling.

    Args:
        features: (N, E).
        class_labels: Class ids (N,).
    """
    if math.isfinite(features.detach().sum()):
        return None  # the common case in one pass; a sum that overflows is looked at below
    bad = ~torch.isfinite(features.detach()).all(dim=1)  # (N,)
    if not bad.any():
        return None
    parts = [
        f"class {class_id}: {int((bad & (class_labels == class_id)).sum())} of {int((class_labels == class_id).sum())}"
        for class_id in sorted(set(class_labels[bad].tolist()))
    ]
    return (
        f"features are not finite ({', '.join(parts)} vectors have NaN or infinity); "
        "lower the learning rate or turn fp16 autocast off"
    )


@torch.no_grad()
def best_per_class(vectors: Tensor, class_labels: Tensor, keys: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The M vectors with the highest keys of each class, without a wait for the device.

    Args:
        vectors: (N, E).
        class_labels: Class ids (N,); ids outside 0..K-1 are left out.
        keys: Rank of each vector (N,), higher is better; ``-inf`` is left out.
        shape: The memory's shape (K, M, E).

    Returns:
        Candidates (K, M, E) and their keys (K, M), ``-inf`` in unused slots.
    """
    num_classes, slots, _ = shape
    member = class_labels == torch.arange(num_classes, device=class_labels.device)[:, None]  # (K, N)
    ranked = keys.where(member, _EMPTY)  # (K, N)
    best, rows = ranked.topk(min(slots, ranked.shape[1]), dim=1)  # (K, <= M)
    candidates = vectors.new_zeros(shape)
    candidates[:, : rows.shape[1]] = vectors[rows]
    padded = keys.new_full((num_classes, slots), _EMPTY)
    padded[:, : rows.shape[1]] = best
    return candidates, padded


def flatten_classes(
    features: Mapping[int, Tensor], confidences: Mapping[int, Tensor], falling: bool, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors (N, E), class ids (N,) and confidences (N,) of a mapping, on the device of ``like`` (K, M, E).

    Classes without confidences get falling numbers in the given order, or rising ones.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    empty = like.new_zeros(0, dtype=dtype)
    rows, ids, ranks = [like.new_zeros(0, like.shape[2], dtype=dtype)], [empty.long()], [empty]
    for class_id, vectors in features.items():
        order = torch.arange(vectors.shape[0], device=like.device)
        given = confidences.get(class_id, -order if falling else order)
        rows.append(vectors.to(like.device, dtype))
        ids.append(torch.full_like(order, class_id))
        ranks.append(given.to(like.device, dtype))
    return torch.cat(rows), torch.cat(ids), torch.cat(ranks)


def best_of_ranks(vectors: Tensor, class_labels: Tensor, keys: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """``best_per_class`` of all ranks' rows together, equal on every rank; a collective call."""
    return merge_ranks(*best_per_class(vectors, class_labels, keys, shape))


@torch.no_grad()
def merge_ranks(candidates: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Select the best M candidates per class among all ranks; every rank ends with the same ones.

    One all-gather of fixed size, whatever each rank found: every rank must call this equally often. The keys
    travel too, so that random ranking agrees as well.

    Args:
        candidates: (K, M, E).
        keys: (K, M), ``-inf`` in unused slots.

    Returns:
        As the arguments, sorted by falling key.
    """
    slots = keys.shape[1]
    everything = concat_ranks(torch.cat([candidates, keys.to(candidates)[..., None]], dim=2), dim=1)
    candidates, keys = everything[..., :-1], everything[..., -1]  # (K, world * M, E) and (K, world * M)
    keys, order = keys.sort(dim=1, descending=True, stable=True)
    keys, order = keys[:, :slots], order[:, :slots]
    return candidates.gather(1, order[..., None].expand(-1, -1, candidates.shape[2])), keys


class Candidates(NamedTuple):
    """What a batch offers to the memory.

    Attributes:
        vectors: (K, M, E), detached, best first.
        keys: Their ranks (K, M), falling; ``-inf`` in unused slots.
        from_labeled: Whether true labels told the classes.
    """

    vectors: Tensor
    keys: Tensor
    from_labeled: bool


class PrototypeMemory(nn.Module):
    """Buffers of up to M vectors for each of K classes.

    Attributes:
        memory: Vectors (K, M, E) as given (not normalised), filled from slot 0; zeros beyond ``memory_count``.
        memory_count: Filled slots (K,), int64.
        memory_from_labeled: Whether the class was last written from labelled voxels (K,), bool.
    """

    memory: Tensor
    memory_count: Tensor
    memory_from_labeled: Tensor

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        elements_per_class: int,
        overwrite_with_unlabeled: bool,
        check_finite: bool | None,
    ) -> None:
        super().__init__()
        self.check_finite = check_finite
        self.overwrite_with_unlabeled = overwrite_with_unlabeled
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.elements_per_class = elements_per_class
        self.register_buffer("memory", torch.zeros(num_classes, elements_per_class, feature_dim))
        self.register_buffer("memory_count", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("memory_from_labeled", torch.zeros(num_classes, dtype=torch.bool))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}memory")
        if stored is not None and stored.shape != self.memory.shape:
            (classes, slots, width), ours = stored.shape, tuple(self.memory.shape)
            rest[-1].append(  # error_msgs
                f"the stored memory has num_classes {classes}, elements_per_class {slots} and feature_dim {width}, "
                f"this manager {ours}: build it with the stored numbers"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def compute_dtype(self) -> torch.dtype:
        """Type of all arithmetic: float32, or float64 after ``.double()``; never half precision."""
        return torch.promote_types(self.memory.dtype, torch.float32)

    def known_rows(self, features: Tensor, class_labels: Tensor) -> Tensor:
        """Features (N, E) as float32, zero where the voxel has no class; refuses non-finite ones where it may look."""
        vectors = features.to(self.compute_dtype())
        known = (class_labels >= 0) & (class_labels < self.num_classes)
        on_host = features.device.type == "cpu"
        if not (on_host and known.all()):
            vectors = vectors.where(known[:, None], 0.0)
        looks = on_host if self.check_finite is None else self.check_finite
        message = non_finite_message(vectors, class_labels) if looks else None
        if message:
            raise NonFiniteFeaturesError(message)
        return vectors

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """Copy of the memory (K, M, E), so that a later write leaves a loss's graph alone, and used slots (K, M)."""
        slots = torch.arange(self.elements_per_class, device=self.memory.device)
        return self.memory.to(self.compute_dtype(), copy=True), slots < self.memory_count[:, None]

    @torch.no_grad()
    def store(self, found: Candidates, only_empty: bool = False) -> None:
        """Replace the vectors of each class that has candidates, of empty classes alone with ``only_empty``.

        Pseudo-labelled candidates leave a class that came from true labels alone, unless ``overwrite_with_unlabeled``.
        """
        used = found.keys > _EMPTY  # (K, M), falling keys: used slots come first
        replaced = used.any(dim=1)  # (K,)
        if only_empty:
            replaced = replaced & (self.memory_count == 0)
        if not (found.from_labeled or self.overwrite_with_unlabeled):
            replaced = replaced & ~self.memory_from_labeled
        fresh = found.vectors.where(used[..., None], 0.0).to(self.memory)
        self.memory.copy_(fresh.where(replaced[:, None, None], self.memory))
        self.memory_count.copy_(used.sum(dim=1).where(replaced, self.memory_count))
        source = torch.full_like(self.memory_from_labeled, found.from_labeled)
        self.memory_from_labeled.copy_(source.where(replaced, self.memory_from_labeled))

    def prototypes(self) -> tuple[Tensor, Tensor]:
        """Unit-length mean direction of each class's memory (K, E), zero where empty, and filled classes (K,)."""
        vectors, used = self.snapshot()
        sums = (unit_vectors(vectors) * used[..., None]).sum(dim=1)  # (K, E)
        return unit_vectors(sums / self.memory_count.clamp(min=1)[:, None]), self.memory_count > 0

    @torch.no_grad()
    def get_memory_info(self) -> dict[str, object]:
        """State of the memory in Python numbers, for the log; waits for the device, so not for every step.

        Returns:
            ``count`` and ``from_labeled`` per class, ``filled_classes``, ``fill`` (share of slots in use),
            ``mean_norm`` per class (0 where empty), and ``mean_prototype_similarity``: the mean cosine between the
            prototypes of filled classes (0 with fewer than two; 1 means that they collapsed).
        """
        vectors, used = self.snapshot()
        norms = (vectors.norm(dim=2) * used).sum(dim=1) / self.memory_count.clamp(min=1)  # (K,)
        prototypes, filled = self.prototypes()
        kept = prototypes[filled]
        pairs = torch.triu(kept @ kept.T, diagonal=1).sum() / max(len(kept) * (len(kept) - 1) // 2, 1)
        return {
            "count": self.memory_count.tolist(),
            "from_labeled": self.memory_from_labeled.tolist(),
            "filled_classes": int(filled.sum()),
            "fill": float(used.float().mean()),
            "mean_norm": norms.tolist(),
            "mean_prototype_similarity": float(pairs),
            "elements_per_class": self.elements_per_class,
        }
