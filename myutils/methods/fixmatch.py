"""FixMatch: the student's own confident labels of weak views are its targets on strong ones.

Sources: Sohn et al. 2020, arXiv:2001.07685; with ``--feature_perturbation`` also the feature stream of UniMatch, Yang
et al. 2023, arXiv:2208.09910: the weak view is decoded a second time from encoder features of which half the channels
are dropped, with the same target::

    L_u = mean_v [c_v > threshold] CE(p_strong, y_weak)      or the mean of this and the dropped stream's

Deviations: ``--confidence_threshold`` is 0.8 for every method here (published: 0.95); the weight ramps
up (published: constant); one strong stream instead of UniMatch's two; no CutMix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dataloaders.patches import Batch
from myutils.losses.segmentation import dice_ce_loss
from myutils.methods.base import METHODS, LossTerm, Method, StepOutput
from myutils.pseudo_labels import PseudoLabels, drop_channels, pseudo_labels


@METHODS.register("fixmatch")
class FixMatch(Method):
    """One network; labels come from it without gradient."""

    uses_strong_views = True
    reads = frozenset({"confidence_threshold", "feature_perturbation"})

    def losses(self, batch: Batch, step: int) -> StepOutput:
        """See the base class."""
        labeled = len(batch.image_l)
        with torch.no_grad():
            weak = self.student(batch.image_u)
        torch.clear_autocast_cache()  # of casts without a graph: torch 2.6 takes them for the pass below too
        target = pseudo_labels(weak.logits)
        gate = (target.confidence > self.config.confidence_threshold).float()
        views = self.views_at(step)
        student = self.student(torch.cat([batch.image_l, batch.image_u_strong[: views * len(batch.image_u)]]))
        logits_l = student.logits[:labeled]
        losses = [gated_cross_entropy(logits, target, gate) for logits in student.logits[labeled:].chunk(views)]
        consistency = torch.stack(losses).mean()
        if self.config.feature_perturbation:
            dropped = self.student.run_branches(batch.image_u, [self.student.branch], drop_channels)[0]
            consistency = 0.5 * (consistency + gated_cross_entropy(dropped.logits, target, gate))
        terms = {
            "supervised": LossTerm(dice_ce_loss(logits_l, batch.label_l), 1.0),
            "consistency": LossTerm(consistency, self.unlabeled_weight(step)),
        }
        terms |= self.coarse_terms(student, batch.label_l)
        terms |= self.prototype_terms(student, batch.label_l, step, teacher_u=weak, believed=target)
        scalars = {"confidence": target.confidence.mean(), "gate_share": gate.mean()}
        return StepOutput(terms, scalars, target.labels, logits_l.detach())


def gated_cross_entropy(logits: Tensor, target: PseudoLabels, gate: Tensor) -> Tensor:
    """Cross-entropy of logits (B, K, X, Y, Z) weighted by the gate (B, X, Y, Z), averaged over all voxels."""
    return (functional.cross_entropy(logits.float(), target.labels, reduction="none") * gate).mean()
