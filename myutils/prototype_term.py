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
from myutils.prototype_sampling import pick_voxels
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
        """Raw losses of the labelled voxels, plus those of the unlabelled ones; the memory is refilled afterwards.

        All sampled voxels are read from the student's features in one go: each read costs a gradient map of the size
        of the features.

        Args:
            student: Student outputs of the whole batch, labelled patches first, on the graph.
            labels: True class ids (Bl, X, Y, Z) of the labelled patches.
            step: Training step; labelled features enter the memory where ``refills_at(step)``.
            teacher_l: Teacher outputs of the labelled patches on refill steps; None for the student's own features.
            pseudo: The unlabelled patches; None without any.
        """
        quota = self.manager.samples_per_class  # of a class in the whole batch; both halves get as much
        if pseudo is not None:
            quota = max(1, quota // 2)
        positions, classes = self.manager.sample_positions(labels, quota)
        rows, count = [positions], len(positions)
        if pseudo is not None:
            positions_u, drawn = self.manager.sample_positions(pseudo.labels, quota)
            rows.append(positions_u + labels.numel())
        with torch.autocast(labels.device.type, enabled=False):
            projected = self.projection(pick_voxels(student.features, torch.cat(rows)).float())  # (S, E)
            predicted = self.prediction(projected)
            if teacher_l is None:
                stored, logits = projected[:count].detach(), student.logits.detach()
            else:
                stored, logits = self._teacher_embeddings(teacher_l, positions), teacher_l.logits
            seen = pick_voxels(logits, positions).float()
            losses = self._compare(predicted[:count], seen, stored, classes, update=self.refills_at(step))
            if pseudo is not None:
                stored = self._teacher_embeddings(pseudo.teacher, positions_u)
                seen = pick_voxels(pseudo.teacher.logits, positions_u).float()
                # On an accelerator unused slots point at any voxel, pasted ones too: NaN is below every gate.
                seen = seen.masked_fill((drawn == IGNORE)[:, None], float("nan"))
                extra = self._compare(predicted[count:], seen, stored, None, update=True)
                losses = {name: losses[name] + extra[name] for name in losses}
        return losses

    @torch.no_grad()
    def _teacher_embeddings(self, teacher: SegmentationOutput, positions: Tensor) -> Tensor:
        """What enters the memory: teacher features (S, F) through the averaged projection, (S, E)."""
        return self.teacher_projection(pick_voxels(teacher.features, positions).float())

    def _compare(
        self, features: Tensor, logits: Tensor, stored: Tensor, classes: Tensor | None, *, update: bool
    ) -> dict[str, Tensor]:
        """The manager's losses of sampled voxels: features (S, E), logits (S, K), true classes (S,) or None."""
        config = self.config
        _, losses = self.manager.update_and_compute_loss(
            features,
            logits,
            labels=classes,
            is_labeled=classes is not None,
            contrastive_weight=config.contrastive_weight,
            intra_weight=config.intra_weight,
            inter_weight=config.inter_weight,
            memory_features=stored,
            update=update,
        )
        return losses
