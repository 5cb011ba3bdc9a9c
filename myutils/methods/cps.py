"""Cross pseudo supervision: two networks with different initial weights teach each other hard labels.

Source: Chen et al. 2021, arXiv:2106.01226. With ``y_a``, ``y_b`` the most probable classes::

    L_u = CE(p_a, y_b) + CE(p_b, y_a)      on unlabelled patches

Deviations: on unlabelled patches only, with a weight of 0.1 that ramps up, as SSL4MIS does in 3D (published: 1.5 or 6,
constant); weak views without CutMix. The first network segments.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch.nn import functional

from dataloaders.patches import Batch
from myutils.config import RunConfig
from myutils.losses.segmentation import dice_ce_loss
from myutils.methods.base import METHODS, LossTerm, Method, StepOutput
from myutils.pseudo_labels import most_probable
from networks.base import SegmentationNetwork


@METHODS.register("cps")
class CrossPseudoSupervision(Method):
    """Two students; the prototype term takes its pseudo-labels and features from the first."""

    deepens = False
    defaults = MappingProxyType({"consistency": 0.1})

    def __init__(self, network: SegmentationNetwork, config: RunConfig) -> None:
        super().__init__(network, config)
        self.second = network.fresh_copy()

    def losses(self, batch: Batch, step: int) -> StepOutput:
        """See the base class."""
        labeled = len(batch.image_l)
        images = torch.cat([batch.image_l, batch.image_u])
        student, logits_b = self.student(images), self.second(images).logits
        logits_a = student.logits
        supervised = dice_ce_loss(logits_a[:labeled], batch.label_l) + dice_ce_loss(logits_b[:labeled], batch.label_l)
        free_a, free_b = logits_a[labeled:].float(), logits_b[labeled:].float()
        labels_a, labels_b = most_probable(free_a), most_probable(free_b)
        cross = functional.cross_entropy(free_a, labels_b) + functional.cross_entropy(free_b, labels_a)
        terms = {
            "supervised": LossTerm(supervised, 1.0),
            "consistency": LossTerm(cross, self.unlabeled_weight(step)),
        }
        own = student.patches(slice(labeled, None))
        terms |= self.prototype_terms(student, batch.label_l, step, teacher_u=own)
        scalars = {"agreement": (labels_a == labels_b).float().mean()}
        return StepOutput(terms, scalars, labels_a, logits_a[:labeled].detach())

    def supervised_losses(self, batch: Batch, step: int) -> StepOutput:
        """Both networks learn the labels, else an untrained one would teach the other after the warm-up."""
        output = super().supervised_losses(batch, step)
        supervised = output.terms["supervised"]
        supervised.value = supervised.value + dice_ce_loss(self.second(batch.image_l).logits, batch.label_l)
        return output
