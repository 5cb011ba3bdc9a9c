"""Supervised training on the labelled cases alone: the baseline that every method is compared with."""

from __future__ import annotations

from dataloaders.patches import Batch
from myutils.methods.base import METHODS, Method, StepOutput


@METHODS.register("supervised")
class Supervised(Method):
    """Dice + cross-entropy; every patch of the batch is a labelled one, so that a step sees as much as any other."""

    uses_unlabeled = False

    def losses(self, batch: Batch, step: int) -> StepOutput:
        """See the base class; unlabelled patches, if there are any, are left out."""
        return self.supervised_losses(batch, step)
