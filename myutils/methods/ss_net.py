"""SS-Net: predictions that an adversarial perturbation barely moves, and features pulled to class prototypes.

Source: Wu et al. 2022, arXiv:2203.01324; the perturbation from Miyato et al. 2018, arXiv:1704.03976. With p the
student's own prediction, q that of a perturbed image, and D(p, q) = 1 - mean_v sum_k p_vk q_vk::

    d = unit(grad_d D(p, f(x + 10 d))) from a random unit d,    L_s = D(p, f(x + 10 d))      on all patches

The published distance is kept: D(p, p) is not 0 but falls with confidence, so that the term minimises entropy under
perturbation as well. Both weights follow the same ramp-up (published: lambda and 0.1 lambda).

Deviations: the supervised loss is Dice + cross-entropy as everywhere here (published: Dice); the prototype term is
this project's manager fed by the student (background has a memory, pseudo-labels are gated; docs/methods.md).
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from dataloaders.patches import Batch
from myutils.losses.segmentation import dice_ce_loss
from myutils.methods.base import METHODS, LossTerm, Method, StepOutput
from myutils.pseudo_labels import most_probable
from myutils.rank_batch import draw_rows

_PROBE, _RADIUS = 10.0, 10.0  # lengths (L2, per patch) of the probing and of the final perturbation


def overlap_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 - mean over voxels of the inner product of two class distributions (B, K, X, Y, Z)."""
    return 1.0 - (first * second).sum(1).mean()


def unit_patches(images: Tensor) -> Tensor:
    """Each image of (B, C, X, Y, Z) divided by its L2 norm; a zero image stays zero."""
    norms = images.flatten(1).norm(dim=1).clamp(min=1e-8)
    return images / norms.reshape(-1, 1, 1, 1, 1)


@METHODS.register("ss_net")
class SSNet(Method):
    """One student, two further passes for the perturbation, prototypes from the student."""

    defaults = MappingProxyType({"use_contrastive_prototype": True})

    def losses(self, batch: Batch, step: int) -> StepOutput:
        """See the base class."""
        labeled = len(batch.image_l)
        images = torch.cat([batch.image_l, batch.image_u])
        student = self.student(images)
        logits_l = student.logits[:labeled]
        terms = {
            "supervised": LossTerm(dice_ce_loss(logits_l, batch.label_l), 1.0),
            "consistency": LossTerm(self._smoothness(images, student.logits), self.unlabeled_weight(step)),
        }
        own = student.patches(slice(labeled, None))
        terms |= self.coarse_terms(student, batch.label_l)
        terms |= self.prototype_terms(student, batch.label_l, step, teacher_u=own)
        return StepOutput(terms, {}, most_probable(own.logits), logits_l.detach())

    def _smoothness(self, images: Tensor, logits: Tensor) -> Tensor:
        """Distance between the prediction and that of the worst nearby image."""
        target = logits.detach().float().softmax(1)
        noise = draw_rows(lambda rows: torch.rand(rows, *images.shape[1:], device=images.device), len(images))
        direction = unit_patches(noise - 0.5).requires_grad_()
        with torch.enable_grad():
            probed = self.student(images + _PROBE * direction).logits.float().softmax(1)
            scaled = overlap_distance(probed, target) * probed[:, 0].numel()  # a sum: a mean's slope is 0 in fp16
            (slope,) = torch.autograd.grad(scaled, direction)
        moved = self.student(images + _RADIUS * unit_patches(slope)).logits.float().softmax(1)
        return overlap_distance(moved, target)
