"""What methods with a moving-average teacher share; no method by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from dataloaders.patches import Batch
from myutils.config import RunConfig
from myutils.ema import MovingAverage, make_teacher
from myutils.methods.base import Method
from myutils.schedules import ema_decay_at
from networks.base import SegmentationNetwork, SegmentationOutput

_SMALLEST = 1e-8  # probability, before its logarithm


class TeacherMethod(Method):
    """Student and its moving average, which segments after training (Tarvainen & Valpola 2017, arXiv:1703.01780).

    Note:
        Buffers are copied to the teacher, which stays in evaluation mode (see ``myutils.ema``).
    """

    reads = frozenset({"ema_decay", "teacher_flips"})

    def __init__(self, network: SegmentationNetwork, config: RunConfig) -> None:
        super().__init__(network, config)
        self.teacher = make_teacher(network)
        self._average = MovingAverage(self.teacher, network)

    def train(self, mode: bool = True) -> TeacherMethod:
        """Training mode for the student; the teacher always evaluates."""
        super().train(mode)
        self.teacher.eval()
        return self

    def refills_at(self, step: int) -> bool:
        """Whether the prototype memory needs the teacher's features of the labelled patches at ``step``."""
        return self.prototypes is not None and self.prototypes.refills_at(step)

    @torch.no_grad()
    def teach(
        self, batch: Batch, views: Tensor, *, with_labeled: bool
    ) -> tuple[SegmentationOutput | None, SegmentationOutput]:
        """Teacher outputs of the labelled patches, where asked for, and of ``views`` (B, C, X, Y, Z), in one pass.

        With ``--teacher_flips`` the probabilities of the views are averaged with those of the views mirrored along one
        random axis of ``--flip_axes``; the logits are the logarithms of the mean. Coarse features are handed out where
        ``teacher.branch.keeps_coarse`` is set, those of the views as they are.
        """
        count, size, axis = len(batch.image_l) if with_labeled else 0, len(views), self._mirror_axis()
        images = [batch.image_l] * with_labeled + [views] + ([] if axis is None else [views.flip(axis)])
        outputs = self.teacher(torch.cat(images))
        teacher_l = outputs.patches(slice(count)) if with_labeled else None
        teacher_u = outputs.patches(slice(count, count + size))
        if axis is not None:
            mirrored = outputs.logits[count + size :].float().softmax(1).flip(axis)
            mean = 0.5 * (teacher_u.logits.float().softmax(1) + mirrored)
            teacher_u = teacher_u._replace(logits=mean.clamp(min=_SMALLEST).log())
        return teacher_l, teacher_u

    def _mirror_axis(self) -> int | None:
        """Tensor axis that this step mirrors the teacher's views along, None for no mirroring."""
        axes = self.config.flip_axes or ()
        if not (self.config.teacher_flips and axes):
            return None
        return 2 + axes[int(torch.randint(0, len(axes), ()))]

    def after_step(self, step: int) -> None:
        """Move the teacher toward the student."""
        super().after_step(step)
        self._average.update(ema_decay_at(step, self.config.ema_decay))

    def inference_network(self) -> SegmentationNetwork:
        """The teacher."""
        return self.teacher
