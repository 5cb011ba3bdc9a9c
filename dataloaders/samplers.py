"""The step sampler: which case and which random seed make each patch, as a pure function of (seed, step, rank)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from myutils.seeding import derive_seed

LABELED, UNLABELED = 0, 1


class SampleKey(NamedTuple):
    """One patch to cut: the case, whether its label is used, and the seed of its random draws."""

    case_id: str
    labeled: bool
    seed: int


@dataclass(frozen=True)
class StepPlan:
    """How steps are filled.

    Attributes:
        labeled: Ids of the labelled cases.
        unlabeled: Ids of the unlabelled cases; may be empty where ``labeled_bs`` equals ``batch_size``.
        batch_size: Patches per step, over all ranks.
        labeled_bs: Of these labelled.
        seed: The run's seed.
        warmup: First steps, of which every patch is labelled.
    """

    labeled: Sequence[str]
    unlabeled: Sequence[str]
    batch_size: int
    labeled_bs: int
    seed: int
    warmup: int = 0

    def keys(self, step: int) -> list[SampleKey]:
        """All patches of one step, labelled ones first.

        Cases come in shuffled rounds, so that each is seen equally often; round r of a pool is a permutation drawn
        from (seed, pool, r).
        """
        keys = []
        labeled_bs = self.batch_size if step < self.warmup else self.labeled_bs
        mixed_steps = max(0, step - self.warmup)
        first_labeled = min(step, self.warmup) * self.batch_size + mixed_steps * self.labeled_bs
        first_unlabeled = mixed_steps * (self.batch_size - self.labeled_bs)
        for slot in range(self.batch_size):
            is_labeled = slot < labeled_bs
            pool = self.labeled if is_labeled else self.unlabeled
            position = first_labeled + slot if is_labeled else first_unlabeled + slot - labeled_bs
            tag = LABELED if is_labeled else UNLABELED
            order = _permutation(self.seed, tag, position // len(pool), len(pool))
            seed = derive_seed(self.seed, tag, position)
            keys.append(SampleKey(pool[order[position % len(pool)]], is_labeled, seed))
        return keys


def _permutation(seed: int, tag: int, number: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, 7, tag, number]).permutation(length)


class StepSampler(Sampler[list[SampleKey]]):
    """Yields the sample keys of one step after another, from ``first_step`` to ``max_iteration - 1``.

    Each rank takes its share of the labelled and of the unlabelled patches of the same global step: the training does
    not depend on the number of ranks.

    Raises:
        ValueError: If the patches of a step cannot be shared equally by the ranks.
    """

    def __init__(
        self, plan: StepPlan, *, first_step: int, max_iteration: int, rank: int = 0, world_size: int = 1
    ) -> None:
        unlabeled_bs = plan.batch_size - plan.labeled_bs
        if plan.labeled_bs % world_size or unlabeled_bs % world_size:
            raise ValueError(
                f"--labeled_bs {plan.labeled_bs} and {unlabeled_bs} unlabelled patches cannot be shared by "
                f"{world_size} processes; make both multiples of {world_size}"
            )
        self.plan = plan
        self.steps = range(first_step, max_iteration)
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for step in self.steps:
            keys = self.plan.keys(step)
            labeled = [key for key in keys if key.labeled]
            unlabeled = [key for key in keys if not key.labeled]
            yield labeled[self._rank :: self._world_size] + unlabeled[self._rank :: self._world_size]
