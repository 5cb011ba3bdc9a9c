"""Mean teacher with gated pseudo-labels: the teacher labels weak views, the student learns them on strong ones.

Sources: Tarvainen & Valpola 2017, arXiv:1703.01780 (the averaged teacher); Sohn et al. 2020, arXiv:2001.07685
(weak-to-strong pseudo-labels above a confidence); Bai et al. 2023, arXiv:2305.00673 (pasting labelled boxes).
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
from myutils.prototype_term import IGNORE, PseudoVoxels
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


def mixing_sources(labeled: int, shape: torch.Size, device: torch.device) -> Tensor:
    """For each voxel of the unlabelled patches, the flat index of the voxel that takes its place in the mixed patch.

    Labelled and unlabelled patches are numbered in one batch, labelled first. Each unlabelled patch gets one random
    box, a quarter to a half of its volume, from a labelled patch at the same place: in the box the student learns true
    labels within the unlabelled image, the mix that BCP found to carry most (Bai et al. 2023, arXiv:2305.00673).

    Args:
        labeled: Number Bl of labelled patches.
        shape: (Bu, X, Y, Z) of the unlabelled patches.
        device: Where the indices are used.

    Returns:
        Indices (Bu, X, Y, Z), int64, in 0..(Bl + Bu) * X * Y * Z - 1.
    """
    batch, *size = shape
    voxels = torch.arange(size[0] * size[1] * size[2], device=device).reshape(size)
    first_of = torch.arange(labeled, labeled + batch, device=device) * voxels.numel()
    sources = voxels + first_of.reshape(-1, 1, 1, 1)  # (Bu, X, Y, Z): every voxel is its own source
    for index in range(batch):
        share = float(0.25 + 0.25 * torch.rand(())) ** (1 / 3)
        sides = [max(1, round(share * n)) for n in size]
        start = [int(torch.randint(0, n - side + 1, ())) for n, side in zip(size, sides, strict=True)]
        x, y, z = (slice(a, a + side) for a, side in zip(start, sides, strict=True))
        partner = int(torch.randint(0, labeled, ()))
        sources[index, x, y, z] = voxels[x, y, z] + partner * voxels.numel()
    return sources


def take_voxels(values: Tensor, sources: Tensor) -> Tensor:
    """Values (B, X, Y, Z) or images (B, C, X, Y, Z) of the whole batch, taken at ``sources`` (Bu, X, Y, Z)."""
    if values.ndim == sources.ndim:
        return values.reshape(-1)[sources]
    return torch.stack([take_voxels(values[:, channel], sources) for channel in range(values.shape[1])], dim=1)


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
        strong, target, sources = self._mix(batch, pseudo)
        student = self.student(torch.cat([batch.image_l, strong]))
        logits_l, logits_u = student.logits[:labeled], student.logits[labeled:]
        gate = target.confidence > self.config.confidence_threshold
        consistency = dice_ce_loss(logits_u, target.labels, gate.float())
        terms = {
            "supervised": LossTerm(dice_ce_loss(logits_l, batch.label_l), 1.0),
            "consistency": LossTerm(consistency, self.ramp(step) * self.config.consistency),
        }
        if self.prototypes is not None:
            confident = pseudo.labels.masked_fill(pseudo.confidence <= self.config.confidence_threshold, IGNORE)
            if sources is not None:  # voxels pasted from labelled patches are no pseudo-labelled ones
                confident = confident.masked_fill(sources < batch.label_l.numel(), IGNORE)
            losses = self.prototypes(
                student, batch.label_l, step, teacher_l=teacher_l, pseudo=PseudoVoxels(confident, teacher_u)
            )
            terms |= self.prototype_loss_terms(losses, step)
        scalars = {"confidence": pseudo.confidence.mean(), "gate_share": gate.float().mean()}
        return StepOutput(terms, scalars, pseudo.labels, logits_l.detach())

    def _mix(self, batch: Batch, pseudo: PseudoLabels) -> tuple[Tensor, PseudoLabels, Tensor | None]:
        """Strong views with boxes of labelled patches, their targets, and where each voxel came from."""
        if not self.config.copy_paste or not len(batch.image_u):
            return batch.image_u_strong, pseudo, None
        sources = mixing_sources(len(batch.image_l), pseudo.labels.shape, batch.image_u.device)
        certain = torch.ones_like(batch.label_l, dtype=pseudo.confidence.dtype)
        target = PseudoLabels(
            take_voxels(torch.cat([batch.label_l, pseudo.labels]), sources),
            take_voxels(torch.cat([certain, pseudo.confidence]), sources),
        )
        return take_voxels(torch.cat([batch.image_l, batch.image_u_strong]), sources), target, sources

    @torch.no_grad()
    def _teach(self, batch: Batch, *, with_labeled: bool) -> tuple[SegmentationOutput | None, SegmentationOutput]:
        """Teacher outputs of the labelled patches, where asked for, and of the weak views, in one pass."""
        if not with_labeled:
            return None, self.teacher(batch.image_u)
        count = len(batch.image_l)
        both = self.teacher(torch.cat([batch.image_l, batch.image_u]))
        return SegmentationOutput(*(part[:count] for part in both)), SegmentationOutput(
            *(part[count:] for part in both)
        )

    def after_step(self, step: int) -> None:
        """Move the teacher toward the student."""
        super().after_step(step)
        update_teacher(self.teacher, self.student, ema_decay_at(step, self.config.ema_decay))

    def inference_network(self) -> SegmentationNetwork:
        """The teacher."""
        return self.teacher
