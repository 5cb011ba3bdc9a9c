"""The prototype term: heads on decoder features and the prototype memory, for any method.

Voxels are sampled first and only they pass through the heads, so that the term costs little beside the network.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from myutils.config import RunConfig, required
from myutils.contrastive_prototype_manager import ContrastivePrototypeManager
from myutils.ema import MovingAverage, make_teacher
from myutils.prototype_memory import Candidates
from myutils.prototype_sampling import pick_voxels, shared_keys
from myutils.rank_batch import all_rows
from myutils.schedules import ema_decay_at
from networks.base import SegmentationNetwork, SegmentationOutput
from networks.heads import FeatureHead

IGNORE = -1


class PseudoVoxels(NamedTuple):
    """Unlabelled patches for the term.

    Attributes:
        labels: Confident pseudo-labels (Bu, X, Y, Z), ``IGNORE`` elsewhere.
        teacher: Teacher outputs of the weak views, voxel by voxel the same places.
    """

    labels: Tensor
    teacher: SegmentationOutput


class _Drawn(NamedTuple):
    """Voxels of one part: flat positions among its patches (S,), class ids or ``IGNORE`` (S,), projections (S, E).

    ``keys`` (S,) are random numbers of the voxels, the same ones on any number of ranks.
    """

    positions: Tensor
    classes: Tensor
    projected: Tensor
    keys: Tensor


def rows_in_use(groups: Tensor, count: int) -> Tensor:
    """Positions (count,) of the first rows with a group, then of others without.

    Args:
        groups: Groups (N,) of the rows of all ranks, ``IGNORE`` where a slot is empty.
        count: The most that all ranks together fill (but for equal random keys), up to N.
    """
    return (groups == IGNORE).int().argsort(stable=True)[:count]


class PrototypeTerm(nn.Module):
    """Projection and prediction heads, the projection's moving average, and the memory.

    Student features pass projection and prediction and are compared with the memory; the memory is filled with
    teacher features through the averaged projection. Without a teacher (``supervised``) the student's own
    projections fill it.
    """

    def __init__(self, network: SegmentationNetwork, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        self.projection = FeatureHead(network.feature_dim, config.embedding_dim)
        self.prediction = FeatureHead(config.embedding_dim, config.embedding_dim)
        self.teacher_projection = make_teacher(self.projection)
        self._average = MovingAverage(self.teacher_projection, self.projection)
        self.manager = ContrastivePrototypeManager(
            network.num_classes,
            config.embedding_dim,
            elements_per_class=config.elements_per_class,
            use_learned_selector=config.use_learned_selector,
            confidence_threshold=config.confidence_threshold,
            ranking=config.prototype_ranking,
            samples_per_class=config.prototype_samples,
            overwrite_with_unlabeled=config.memory_from_unlabeled,
            prototype_loss=required(config.prototype_loss, "prototype_loss"),
        )

    def selector_parameters(self) -> list[nn.Parameter]:
        """Parameters of the learned selectors; empty without them."""
        pair = [selector for selector in self.manager.get_selectors() if selector is not None]
        return list(chain.from_iterable(selector.parameters() for selector in pair))

    def memory_fill(self) -> float:
        """Share of memory slots in use, 0..1; waits for the device."""
        count = self.manager.memory_count
        return float(count.float().mean()) / self.config.elements_per_class

    def quota(self, parts: int) -> int:
        """Most voxels of a class that a step draws from each of its parts, those with labels and with pseudo-labels."""
        return max(1, self.manager.samples_per_class // parts)

    def refills_at(self, step: int) -> bool:
        """Whether the memory takes new features at ``step`` (every ``--memory_interval`` steps)."""
        return step % self.config.memory_interval == 0

    def after_step(self, step: int) -> None:
        """Move the averaged projection toward the trained one."""
        self._average.update(ema_decay_at(step, self.config.ema_decay))

    def forward(
        self,
        student: SegmentationOutput,
        labels: Tensor,
        step: int,
        *,
        teacher_l: SegmentationOutput | None = None,
        pseudo: PseudoVoxels | None = None,
    ) -> dict[str, Tensor]:
        """Raw losses of the labelled voxels, plus those of the unlabelled ones, against the memory before this batch.

        Both kinds go through one sampling, one read of the student's features and one pass of the heads: each read
        costs a gradient map of the size of the features, and on an accelerator every launch counts. Several ranks draw
        from the voxels of all, and each has the losses of all that were drawn.

        Args:
            student: Student outputs of the whole batch, labelled patches first, on the graph.
            labels: True class ids (Bl, X, Y, Z) of the labelled patches.
            step: Training step; features enter the memory where ``refills_at(step)``.
            teacher_l: Teacher outputs of the labelled patches on refill steps; None for the student's own features.
            pseudo: The unlabelled patches; None without any.
        """
        manager = self.manager
        parts = 1 if pseudo is None else 2
        groups = labels.reshape(-1)
        if pseudo is not None:
            confident = pseudo.labels.reshape(-1)
            groups = torch.cat([groups, (confident + manager.num_classes).where(confident != IGNORE, IGNORE)])
        quota = self.quota(parts)
        patches = len(labels) + (0 if pseudo is None else len(pseudo.labels))
        keys = shared_keys(patches, labels[0].numel(), labels.device)
        slots = parts * manager.num_classes * min(quota, len(groups))  # where each class has as many, or is padded
        positions, groups = manager.sample_positions(groups, quota, parts, keys)
        with torch.autocast(labels.device.type, enabled=False):
            projected = self.projection(pick_voxels(student.features, positions).float())  # (S, E)
            predicted = self.prediction(projected)
            found = []
            if self.refills_at(step):
                split = len(groups) // parts if len(groups) == slots else int((groups < manager.num_classes).sum())
                first, known, drawn_keys = labels.numel(), projected.detach(), keys[positions]
                drawn = _Drawn(
                    positions[:split].clamp(max=first - 1), groups[:split], known[:split], drawn_keys[:split]
                )
                found.append(self._candidates(drawn, student, teacher_l, from_labeled=True))
                if pseudo is not None:
                    classes = (groups[split:] - manager.num_classes).clamp(min=IGNORE)
                    places = (positions[split:] - first).clamp(min=0)
                    drawn = _Drawn(places, classes, known[split:], drawn_keys[split:])
                    found.append(self._candidates(drawn, student, pseudo.teacher, from_labeled=False))
            everyone, marks = all_rows(predicted), all_rows(groups)
            most = parts * manager.num_classes * quota  # of all ranks together
            if len(marks) > most:
                used = rows_in_use(marks, most)  # what follows costs as much on any number of ranks
                everyone, marks = everyone[used], marks[used]
            return manager.compare_and_store(everyone, marks, found, parts)

    @torch.no_grad()
    def _candidates(
        self, drawn: _Drawn, student: SegmentationOutput, teacher: SegmentationOutput | None, *, from_labeled: bool
    ) -> Candidates:
        """What one part offers to the memory: the teacher's embeddings, without a teacher the student's own."""
        stored = drawn.projected if teacher is None else self._teacher_embeddings(teacher, drawn.positions)
        logits = pick_voxels((student if teacher is None else teacher).logits.detach(), drawn.positions)
        return self.manager.candidates(stored, logits, drawn.classes, from_labeled, drawn.keys)

    def _teacher_embeddings(self, teacher: SegmentationOutput, positions: Tensor) -> Tensor:
        """Teacher features (S, F) at flat positions (S,) through the averaged projection, (S, E)."""
        return self.teacher_projection(pick_voxels(teacher.features, positions).float())
