"""Bidirectional copy-paste: labelled and unlabelled patches are pasted into each other, both ways.

Source: Bai et al. 2023, arXiv:2305.00673. M is 0 in a random box of 2/3 of each axis and 1 outside. First phase
(``--warmup_iteration`` steps), labelled patches only: ``x = a M + b (1 - M)`` with the labels mixed alike. Second
phase, the teacher starting from the student: with y_u the teacher's labels, reduced to the largest component of each
class::

    inward  = labelled * M + unlabelled * (1 - M),    outward = unlabelled * M + labelled * (1 - M)
    L = sum over both mixes of loss(true region) + 1/2 loss(pseudo region)
    loss = (Dice + cross-entropy) / 2, each averaged over its region

Deviations: every pair of the batch is mixed both ways, so that with equal halves a step sees as many patches as any
other method's (the published one splits its labelled and unlabelled halves once more, with a batch of 8); where one
half is smaller, its patches are used again, and the student sees twice the larger half; one box per pair (published:
per batch); the learning rate has one schedule over both phases; the second phase starts from the end of the first
(published: from its best checkpoint); the teacher segments (published: the student). ``--consistency`` is the weight
1/2, which the published code does not ramp up.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from dataloaders.patches import Batch
from myutils.components import largest_component
from myutils.config import required
from myutils.losses.segmentation import dice_ce_loss, region_losses
from myutils.methods.averaged_teacher import TeacherMethod
from myutils.methods.base import METHODS, LossTerm, StepOutput
from myutils.prototype_term import IGNORE
from myutils.pseudo_labels import most_probable, random_boxes
from myutils.rank_batch import fetch_rows, rank_count

_BOX_SIDE = 2 / 3


def paste_masks(count: int, size: torch.Size, device: torch.device) -> Tensor:
    """Masks (count, X, Y, Z), bool: False in a random box of two thirds of each axis."""
    return ~random_boxes(torch.full((count,), _BOX_SIDE, device=device), size)


def largest_components(labels: Tensor) -> Tensor:
    """Label maps (B, X, Y, Z) with all but the largest 26-connected component of each foreground class removed."""
    every = range(1, int(labels.max()) + 1)
    kept = [torch.from_numpy(largest_component(found, every)) for found in labels.cpu().numpy()]
    return torch.stack(kept).to(labels.device)


def paired(batch: Batch) -> Batch:
    """The batch with as many labelled as unlabelled patches: those of the smaller half are used again, in turn."""
    labeled, unlabeled = len(batch.image_l), len(batch.image_u)
    turns = torch.arange(max(labeled, unlabeled), device=batch.image_l.device)
    first, second = turns % labeled, turns % unlabeled
    return replace(batch, image_l=batch.image_l[first], label_l=batch.label_l[first], image_u=batch.image_u[second])


@METHODS.register("bcp")
class BidirectionalCopyPaste(TeacherMethod):
    """Two phases on one schedule; the prototype term sees the unpasted voxels of each patch."""

    ramps = False
    on_host = True  # connected components of pseudo-labels, as published
    defaults = MappingProxyType({"consistency": 0.5, "warmup_share": 0.2})

    def after_step(self, step: int) -> None:
        """Move the teacher; at the end of the first phase it becomes the student."""
        super().after_step(step)
        if step + 1 == self.config.warmup_iteration:
            self.teacher.load_state_dict(self.student.state_dict())

    def supervised_losses(self, batch: Batch, step: int) -> StepOutput:
        """The first phase: each labelled patch with a box of the one before."""
        images, labels = batch.image_l, batch.label_l
        masks = paste_masks(len(images), images.shape[2:], images.device)
        before = torch.arange(len(images) * rank_count()).roll(1)
        mixed = images.where(masks.unsqueeze(1), fetch_rows(images, before))
        target = labels.where(masks, fetch_rows(labels, before))
        student = self.student(mixed)
        terms = {"supervised": LossTerm(dice_ce_loss(student.logits, target), 1.0)}
        terms |= self.coarse_terms(student, target)
        terms |= self.prototype_terms(student, target, step)
        return StepOutput(terms, {}, None, student.logits.detach(), target, mixed)

    def losses(self, batch: Batch, step: int) -> StepOutput:
        """The second phase: pairs of labelled and unlabelled patches, mixed inward and outward."""
        pairs = paired(batch)
        count = len(pairs.image_l)
        teacher_l, teacher_u = self.teach(pairs, pairs.image_u, with_labeled=self.refills_at(step))
        label_u = largest_components(most_probable(teacher_u.logits))
        mask = paste_masks(count, pairs.image_l.shape[2:], pairs.image_l.device)
        true = torch.cat([mask, ~mask])  # where the mixes, inward and outward, are labelled
        images = pairs.image_l.repeat(2, 1, 1, 1, 1).where(true.unsqueeze(1), pairs.image_u.repeat(2, 1, 1, 1, 1))
        labels = pairs.label_l.repeat(2, 1, 1, 1).where(true, label_u.repeat(2, 1, 1, 1))
        student = self.student(images)
        inward, outward = slice(count), slice(count, None)
        true_in, pseudo_in = region_losses(student.logits[inward], labels[inward], mask)
        pseudo_out, true_out = region_losses(student.logits[outward], labels[outward], mask)
        weight = required(self.config.consistency, "consistency")
        terms = {
            "supervised": LossTerm(true_in + true_out, 1.0),
            "consistency": LossTerm(pseudo_in + pseudo_out, weight),
        }
        terms |= self.coarse_terms(student, labels, true)
        own = pairs.label_l.masked_fill(~mask, IGNORE)
        terms |= self.prototype_terms(student, own, step, teacher_l=teacher_l, teacher_u=teacher_u, foreign=~mask)
        shown = label_u[: len(batch.image_u)]
        seen = student.logits[inward].detach(), labels[inward], images[inward]
        return StepOutput(terms, {}, shown, *seen, images_u=images[outward])
