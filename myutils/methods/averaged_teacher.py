"""What methods with a moving-average teacher share; no method by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from dataloaders.patches import Batch
from myutils.config import RunConfig
from myutils.ema import make_teacher, update_teacher
from myutils.methods.base import Method
from myutils.schedules import ema_decay_at
from networks.base import SegmentationNetwork, SegmentationOutput


class TeacherMethod(Method):
    """Student and its moving average, which segments after training (Tarvainen & Valpola 2017, arXiv:1703.01780).

    Note:
        Buffers are copied to the teacher, which stays in evaluation mode (see ``myutils.ema``).
    """

    def __init__(self, network: SegmentationNetwork, config: RunConfig) -> None:
        super().__init__(network, config)
        self.teacher = make_teacher(network)

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
        """Teacher outputs of the labelled patches, where asked for, and of ``views`` (B, C, X, Y, Z), in one pass."""
        if not with_labeled:
            return None, self.teacher(views)
        count = len(batch.image_l)
        both = self.teacher(torch.cat([batch.image_l, views]))
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
