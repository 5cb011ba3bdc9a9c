"""Mean teacher with gated pseudo-labels: the teacher labels weak views, the student learns them on strong ones.

Sources: Tarvainen & Valpola 2017, arXiv:1703.01780 (the averaged teacher); Sohn et al. 2020, arXiv:2001.07685
(weak-to-strong pseudo-labels above a confidence); French et al. 2020, arXiv:1906.01916 (CutMix for segmentation).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dataloaders.patches import Batch
from myutils.config import RunConfig
from myutils.ema import make_teacher, update_teacher
from myutils.losses.segmentation import dice_ce_loss
from myutils.methods.base import METHODS, LossTerm, Method, StepOutput
from myutils.schedules import ema_decay_at
from networks.base import SegmentationNetwork, SegmentationOutput


class PseudoLabels(NamedTuple):
    """Class ids and their probabilities, both (Bu, X, Y, Z)."""

    labels: Tensor
    confidence: Tensor


def pseudo_labels(logits: Tensor) -> PseudoLabels:
    """Most probable class and its probability of teacher logits (Bu, K, X, Y, Z)."""
    confidence, labels = logits.detach().float().softmax(1).max(1)
    return PseudoLabels(labels, confidence)


def cutmix_sources(images: Tensor) -> Tensor:
    """For each voxel of a batch (B, C, X, Y, Z), the flat index (B, X, Y, Z) of the voxel that takes its place.

    One random box, a quarter to a half of the volume, is taken from the previous sample of the batch, the same box for
    all samples; a batch of one is left as it is.
    """
    batch, _, *size = images.shape
    voxels = torch.arange(batch * size[0] * size[1] * size[2], device=images.device).reshape(batch, *size)
    if batch < 2:
        return voxels
    share = (0.25 + 0.25 * torch.rand(()).item()) ** (1 / 3)
    box = [max(1, round(share * n)) for n in size]
    start = [int(torch.randint(0, n - side + 1, ())) for n, side in zip(size, box, strict=True)]
    inner = (slice(None), *(slice(a, a + side) for a, side in zip(start, box, strict=True)))
    mixed = voxels.clone()
    mixed[inner] = voxels.roll(1, 0)[inner]
    return mixed


def gather_voxels(values: Tensor, sources: Tensor) -> Tensor:
    """Values (B, X, Y, Z) or images (B, C, X, Y, Z) with every voxel taken from its source (B, X, Y, Z)."""
    if values.ndim == sources.ndim:
        return values.reshape(-1)[sources]
    return torch.stack([gather_voxels(values[:, channel], sources) for channel in range(values.shape[1])], dim=1)


@METHODS.register("mean_teacher")
class MeanTeacher(Method):
    """Student, its moving average, and the prototype term on both.

    Note:
        Buffers are copied to the teacher, which stays in evaluation mode (see ``myutils.ema``).
    """

    prototypes_by_default = True

    def __init__(self, network: SegmentationNetwork, config: RunConfig) -> None:
        super().__init__(network, config)
        self.teacher = make_teacher(network)

    def train(self, mode: bool = True) -> MeanTeacher:
        """Training mode for the student; the teacher always evaluates."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """See the base class."""
        labeled = len(batch.image_l)
        refill = self.prototypes is not None and self.prototypes.refills_at(step)
        teacher_l, teacher_u = self._teach(batch, with_labeled=refill)
        pseudo = pseudo_labels(teacher_u.logits)
        strong, sources = batch.image_u_strong, None
        if self.config.cutmix:
            sources = cutmix_sources(strong)
            strong = gather_voxels(strong, sources)
        student = self.student(torch.cat([batch.image_l, strong]))
        student_l = SegmentationOutput(student.logits[:labeled], student.features[:labeled])
        student_u = SegmentationOutput(student.logits[labeled:], student.features[labeled:])
        target = pseudo if sources is None else PseudoLabels(*(gather_voxels(part, sources) for part in pseudo))
        gate = target.confidence > self.config.confidence_threshold
        terms = {
            "supervised": LossTerm(dice_ce_loss(student_l.logits, batch.label_l), 1.0),
            "consistency": LossTerm(
                dice_ce_loss(student_u.logits, target.labels, gate.float()), self.ramp(step) * self.config.consistency
            ),
        }
        if self.prototypes is not None:
            losses = self.prototypes.labeled_losses(student_l, batch.label_l, teacher=teacher_l, step=step)
            unlabeled = self.prototypes.unlabeled_losses(student_u, teacher_u, sources)
            terms |= self.prototype_loss_terms({name: losses[name] + unlabeled[name] for name in losses}, step)
        scalars = {"confidence": pseudo.confidence.mean(), "gate_share": gate.float().mean()}
        return StepOutput(terms, scalars, pseudo.labels, student_l.logits.detach())

    @torch.no_grad()
    def _teach(self, batch: Batch, *, with_labeled: bool) -> tuple[SegmentationOutput | None, SegmentationOutput]:
        """Teacher outputs of the labelled patches, where asked for, and of the weak views, in one pass."""
        if not with_labeled:
            return None, self.teacher(batch.image_u)
        count = len(batch.image_l)
        both = self.teacher(torch.cat([batch.image_l, batch.image_u]))
        return SegmentationOutput(*(part[:count] for part in both)), SegmentationOutput(*(part[count:] for part in both))

    def after_step(self, step: int) -> None:
        """Move the teacher toward the student."""
        super().after_step(step)
        update_teacher(self.teacher, self.student, ema_decay_at(step, self.config.ema_decay))

    def inference_network(self) -> SegmentationNetwork:
        """The teacher."""
        return self.teacher
