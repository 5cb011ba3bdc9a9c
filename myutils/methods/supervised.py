"""Supervised training on the labelled cases alone: the baseline that every method is compared with."""

from __future__ import annotations

from dataloaders.patches import Batch
from myutils.losses.segmentation import dice_ce_loss
from myutils.methods.base import METHODS, LossTerm, Method, StepOutput
from networks.base import SegmentationNetwork


@METHODS.register("supervised")
class Supervised(Method):
    """Dice + cross-entropy; every patch of the batch is a labelled one, so that a step sees as much as any other."""

    uses_unlabeled = False

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """See the base class."""
        output = self.student(batch.image_l)
        terms = {"supervised": LossTerm(dice_ce_loss(output.logits, batch.label_l), 1.0)}
        terms |= self.prototype_terms(output, batch.label_l, step)
        return StepOutput(terms, logits_l=output.logits.detach())

    def inference_network(self) -> SegmentationNetwork:
        """The student."""
        return self.student
