"""The prototype term: heads on decoder features and the prototype memory, for any method.

Voxels are sampled first and only they pass through the heads, so that the term costs little beside the network.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from myutils.config import RunConfig
from myutils.contrastive_prototype_manager import ContrastivePrototypeManager
from myutils.ema import make_teacher, update_teacher
from myutils.prototype_sampling import gated_pseudo_labels, pick_voxels
from myutils.schedules import ema_decay_at
from networks.base import SegmentationNetwork, SegmentationOutput
from networks.heads import FeatureHead

IGNORE = -1


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
        self.manager = ContrastivePrototypeManager(
            network.num_classes,
            config.embedding_dim,
            elements_per_class=config.elements_per_class,
            use_learned_selector=config.use_learned_selector,
            confidence_threshold=config.confidence_threshold,
            ranking=config.prototype_ranking,
            samples_per_class=config.prototype_samples,
            overwrite_with_unlabeled=config.memory_from_unlabeled,
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
        update_teacher(self.teacher_projection, self.projection, ema_decay_at(step, self.config.ema_decay))

    def labeled_losses(
        self, student: SegmentationOutput, labels: Tensor, teacher: SegmentationOutput | None, step: int
    ) -> dict[str, Tensor]:
        """Raw losses of labelled voxels; the memory is refilled afterwards where ``refills_at(step)``.

        Args:
            student: Student outputs of the labelled patches, on the graph.
            labels: True class ids (Bl, X, Y, Z).
            teacher: Teacher outputs of the same patches on refill steps, None otherwise or without a teacher.
            step: Training step.
        """
        positions, classes = self.manager.sample_positions(labels)
        filled_by = student if teacher is None else teacher
        return self._losses(
            student,
            filled_by,
            positions,
            classes=classes,
            own_features=teacher is None,
            update=self.refills_at(step),
        )

    def unlabeled_losses(
        self, student: SegmentationOutput, teacher: SegmentationOutput, sources: Tensor | None, labeled: int
    ) -> dict[str, Tensor]:
        """Raw losses of unlabelled voxels under the teacher's confident pseudo-labels.

        Args:
            student: Student outputs of the strong views, on the graph.
            teacher: Teacher outputs of the weak views.
            sources: For each voxel (Bu, X, Y, Z) of the strong views the flat index of its source in the whole batch,
                the ``labeled`` labelled patches first; None where each is its own. Pasted labelled voxels take no part.
            labeled: Number of labelled patches.
        """
        pseudo = gated_pseudo_labels(teacher.logits, self.config.confidence_threshold, IGNORE)
        if sources is not None:
            pasted = sources < labeled * pseudo[0].numel()
            pseudo = pseudo.masked_fill(pasted, IGNORE)
        positions, _ = self.manager.sample_positions(pseudo)
        return self._losses(student, teacher, positions, classes=None, own_features=False, update=True)

    def _losses(
        self,
        student: SegmentationOutput,
        filled_by: SegmentationOutput,
        positions: Tensor,
        *,
        classes: Tensor | None,
        own_features: bool,
        update: bool,
    ) -> dict[str, Tensor]:
        with torch.autocast(student.logits.device.type, enabled=False):
            projected = self.projection(pick_voxels(student.features, positions).float())  # (S, E)
            memory_features = projected.detach()
            if not own_features:
                with torch.no_grad():
                    memory_features = self.teacher_projection(pick_voxels(filled_by.features, positions).float())
            config = self.config
            _, losses = self.manager.update_and_compute_loss(
                self.prediction(projected),
                pick_voxels(filled_by.logits.detach(), positions).float(),
                labels=classes,
                is_labeled=classes is not None,
                contrastive_weight=config.contrastive_weight,
                intra_weight=config.intra_weight,
                inter_weight=config.inter_weight,
                memory_features=memory_features,
                update=update,
            )
        return losses
