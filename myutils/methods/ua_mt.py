"""Uncertainty-aware mean teacher: consistency only where the teacher, asked several times, is sure of itself.

Source: Yu et al. 2019, arXiv:1907.07034. The teacher looks at ``--uncertainty_passes`` noisy copies of an unlabelled
patch with its dropout on; the entropy u of its mean prediction masks the squared error::

    L_u = sum_v [u_v < H(t)] mean_k (s_vk - t_vk)^2 / sum_v [u_v < H(t)],    H(t) = (3/4 + 1/4 r(t)) ln K

Deviations: the noise is added to the same weak view for every network of this project, and networks without dropout
get their randomness from it alone; the teacher's own target pass runs without dropout; the ramp r is that of the weight
(published: as long as the training).
"""

from __future__ import annotations

import math
from types import MappingProxyType

import torch
from torch import Tensor, nn

from dataloaders.patches import Batch
from myutils.losses.segmentation import dice_ce_loss, mean_within
from myutils.methods.averaged_teacher import TeacherMethod
from myutils.methods.base import METHODS, LossTerm, StepOutput
from myutils.pseudo_labels import pseudo_labels
from myutils.rank_batch import draw_rows

_NOISE, _LARGEST_NOISE = 0.1, 0.2  # of images with unit variance, as published


def input_noise(images: Tensor) -> Tensor:
    """Gaussian noise of standard deviation 0.1, cut at 0.2, shaped like ``images``."""
    noise = draw_rows(lambda rows: torch.randn(rows, *images.shape[1:], device=images.device), len(images))
    return (_NOISE * noise).clamp(-_LARGEST_NOISE, _LARGEST_NOISE)


def predictive_entropy(probs: Tensor) -> Tensor:
    """Entropy in nats (B, X, Y, Z) of class probabilities (B, K, X, Y, Z)."""
    return -torch.special.xlogy(probs, probs).sum(1)


def masked_square(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Squared error of probabilities (B, K, X, Y, Z): mean over classes and masked voxels (B, X, Y, Z) of all ranks."""
    return mean_within((student - teacher).square().mean(1), mask)


@METHODS.register("ua_mt")
class UncertaintyAwareMeanTeacher(TeacherMethod):
    """Dice + cross-entropy on labelled patches, masked squared error to the teacher on weak unlabelled views."""

    reads = TeacherMethod.reads | {"uncertainty_passes"}
    defaults = MappingProxyType({"consistency": 0.1})

    def losses(self, batch: Batch, step: int) -> StepOutput:
        """See the base class."""
        labeled, views = len(batch.image_l), batch.image_u
        student = self.student(torch.cat([batch.image_l, views]))
        teacher_l, teacher_u = self.teach(batch, views + input_noise(views), with_labeled=self.refills_at(step))
        entropy = predictive_entropy(self._mean_prediction(views))
        sure = entropy < self.entropy_limit(step)
        logits_l, logits_u = student.logits[:labeled], student.logits[labeled:]
        consistency = masked_square(logits_u.float().softmax(1), teacher_u.logits.float().softmax(1), sure)
        terms = {
            "supervised": LossTerm(dice_ce_loss(logits_l, batch.label_l), 1.0),
            "consistency": LossTerm(consistency, self.unlabeled_weight(step)),
        }
        terms |= self.coarse_terms(student, batch.label_l)
        terms |= self.prototype_terms(student, batch.label_l, step, teacher_l=teacher_l, teacher_u=teacher_u)
        scalars = {"uncertainty": entropy.mean(), "gate_share": sure.float().mean()}
        return StepOutput(terms, scalars, pseudo_labels(teacher_u.logits).labels, logits_l.detach())

    def entropy_limit(self, step: int) -> float:
        """H(t) in nats: at first three quarters of what an even prediction has, in the end all of it."""
        return (0.75 + 0.25 * self.ramp(step)) * math.log(self.student.num_classes)

    @torch.no_grad()
    def _mean_prediction(self, views: Tensor) -> Tensor:
        """Mean probabilities (Bu, K, X, Y, Z) of the teacher over noisy passes with dropout."""
        dropouts = [m for m in self.teacher.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        for module in dropouts:
            module.train()
        passes = self.config.uncertainty_passes
        total = sum(self.teacher(views + input_noise(views)).logits.float().softmax(1) for _ in range(passes))
        for module in dropouts:
            module.eval()
        return torch.as_tensor(total / passes)
