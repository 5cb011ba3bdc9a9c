"""Dual-task consistency: a signed distance map, regressed beside the segmentation, must tell the same story.

Source: Luo et al. 2021, arXiv:2009.04448. A head on the decoder features predicts, per foreground class, the signed
distance z to the surface, negative inside and divided by its largest value on either side, so in [-1, 1]::

    L = supervised + 0.3 |z - z_true|^2 + r(t) w |sigmoid(-k z) - p|^2,    k = 1500

the last on labelled and unlabelled patches.

Deviations: ``w`` is 0.1 (published: 1); one distance map per foreground class instead of one; an absent class has
distance 1 (published: 0); voxels at the surface keep their distance (published: 0); the head is a 1x1x1 convolution
with tanh on any network's decoder features.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from dataloaders.patches import Batch
from myutils.config import RunConfig
from myutils.losses.segmentation import dice_ce_loss
from myutils.methods.base import METHODS, LossTerm, Method, StepOutput
from myutils.pseudo_labels import most_probable
from networks.base import SegmentationNetwork, SegmentationOutput

_STEEPNESS = 1500.0
_DISTANCE_WEIGHT = 0.3


def signed_distances(labels: Tensor, num_classes: int) -> Tensor:
    """Signed distance maps (B, K - 1, X, Y, Z) in [-1, 1], negative inside, of label maps (B, X, Y, Z), in voxels.

    Each side is divided by its own largest distance. A class that is absent is far away everywhere (1), one that
    fills the patch is inside everywhere (-1).
    """
    maps = labels.cpu().numpy()
    found = np.empty((maps.shape[0], num_classes - 1, *maps.shape[1:]), dtype=np.float32)
    for index, label in enumerate(maps):
        for class_id in range(1, num_classes):
            inside = label == class_id
            if inside.all() or not inside.any():
                found[index, class_id - 1] = -1.0 if inside.all() else 1.0
                continue
            outer, inner = ndimage.distance_transform_edt(~inside), ndimage.distance_transform_edt(inside)
            found[index, class_id - 1] = outer / outer.max() - inner / inner.max()
    return torch.from_numpy(found).to(labels.device)


@METHODS.register("dtc")
class DualTaskConsistency(Method):
    """Student with a distance head."""

    on_host = True  # distance transforms, as published
    defaults = MappingProxyType({"consistency": 0.1})

    def __init__(self, network: SegmentationNetwork, config: RunConfig) -> None:
        super().__init__(network, config)
        self.distance_head = nn.Conv3d(network.feature_dim, network.num_classes - 1, kernel_size=1)

    def losses(self, batch: Batch, step: int) -> StepOutput:
        """See the base class."""
        labeled = len(batch.image_l)
        student = self.student(torch.cat([batch.image_l, batch.image_u]))
        logits_l = student.logits[:labeled]
        distances = self._distances(student)
        probs = student.logits.float().softmax(1)[:, 1:]
        terms = {
            "supervised": LossTerm(dice_ce_loss(logits_l, batch.label_l), 1.0),
            "distance": self._distance_term(distances[:labeled], batch),
            "consistency": LossTerm(
                ((-_STEEPNESS * distances).sigmoid() - probs).square().mean(), self.unlabeled_weight(step)
            ),
        }
        own = student.patches(slice(labeled, None))
        terms |= self.coarse_terms(student, batch.label_l)
        terms |= self.prototype_terms(student, batch.label_l, step, teacher_u=own)
        return StepOutput(terms, {}, most_probable(own.logits), logits_l.detach())

    def supervised_losses(self, batch: Batch, step: int) -> StepOutput:
        """The distance head learns from the first step on."""
        student = self.student(batch.image_l)
        terms = {
            "supervised": LossTerm(dice_ce_loss(student.logits, batch.label_l), 1.0),
            "distance": self._distance_term(self._distances(student), batch),
        }
        terms |= self.coarse_terms(student, batch.label_l)
        terms |= self.prototype_terms(student, batch.label_l, step)
        return StepOutput(terms, logits_l=student.logits.detach())

    def _distances(self, output: SegmentationOutput) -> Tensor:
        """Predicted signed distances (B, K - 1, X, Y, Z)."""
        return self.distance_head(output.features).float().tanh()

    def _distance_term(self, distances: Tensor, batch: Batch) -> LossTerm:
        """Squared error of the labelled patches' distances (Bl, K - 1, X, Y, Z)."""
        truth = signed_distances(batch.label_l, self.student.num_classes)
        return LossTerm((distances - truth).square().mean(), _DISTANCE_WEIGHT)
