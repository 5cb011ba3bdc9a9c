"""Mean teacher with pseudo-labels: the teacher labels weak views, the student learns them on strong ones.

Sources: Tarvainen & Valpola 2017, arXiv:1703.01780 (the averaged teacher); Sohn et al. 2020, arXiv:2001.07685
(weak-to-strong pseudo-labels above a confidence); Bai et al. 2023, arXiv:2305.00673 (pasting labelled boxes); Yun et
al. 2019, arXiv:1905.04899 (pasting boxes of other unlabelled patches); Yang et al. 2023, arXiv:2208.09910 (dropping
encoder channels).

Note: UniMatch drops the features of weak views, in a stream of its own; here the strong views lose theirs, so that no
further pass is needed.
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from dataloaders.patches import Batch
from myutils.config import required
from myutils.losses.segmentation import dice_ce_loss, one_hot_labels, soft_label_loss
from myutils.methods.averaged_teacher import TeacherMethod
from myutils.methods.base import METHODS, LossTerm, StepOutput
from myutils.pseudo_labels import PseudoLabels, draw_paste, drop_channels, top_class
from myutils.rank_batch import rank_count
from networks.base import SegmentationOutput


class StepParts(NamedTuple):
    """What a step has at hand.

    Attributes:
        batch: The step's patches.
        student: Student outputs, labelled patches first, on the graph.
        teacher_l: Teacher outputs of the labelled patches where ``refills_at(step)``.
        believed: The teacher's pseudo-labels (Bu, X, Y, Z) of the weak views.
        foreign: Voxels (V * Bu, X, Y, Z) that were pasted into the student's strong views; None without pasting.
    """

    batch: Batch
    student: SegmentationOutput
    teacher_l: SegmentationOutput | None
    believed: PseudoLabels
    foreign: Tensor | None


CONSISTENCY = 0.5  # better than 1 on development cases of two data sets, 0.1 worse on a third (docs/search.md)


@METHODS.register("mean_teacher")
class MeanTeacher(TeacherMethod):
    """Student, its moving average, and the prototype term on both."""

    uses_strong_views = True
    reads = TeacherMethod.reads | {
        "confidence_threshold",
        "feature_perturbation",
        "soft_labels",
        "copy_paste",
        "paste_unlabeled",
        "perturbed_share",
    }
    defaults = MappingProxyType({"consistency": CONSISTENCY, "use_contrastive_prototype": True})

    def losses(self, batch: Batch, step: int) -> StepOutput:
        """See the base class."""
        labeled = len(batch.image_l)
        teacher_l, teacher_u = self.teach(batch, batch.image_u, with_labeled=self.refills_at(step))
        views = self.views_at(step)
        probs = teacher_u.logits.float().softmax(1)
        believed = top_class(probs)
        perturbed = self.perturbs_at(step)
        strong = batch.image_u_strong[: views * len(batch.image_u)]
        strong, target, foreign = self._mix(batch, strong, probs.repeat(views, 1, 1, 1, 1), boxes=perturbed)
        images = torch.cat([batch.image_l, strong])
        change = partial(drop_channels, first=labeled) if perturbed and self.config.feature_perturbation else None
        student = self.student.run_branches(images, [self.student.branch], change)[0]
        logits_l, logits_u = student.logits[:labeled], student.logits[labeled:]
        labels, confidence = top_class(target)
        gate = (confidence > self.config.confidence_threshold).float()
        if self.config.soft_labels:
            consistency = soft_label_loss(logits_u, target, gate, labels)
        else:
            consistency = dice_ce_loss(logits_u, labels, gate)
        terms = {
            "supervised": LossTerm(dice_ce_loss(logits_l, batch.label_l), 1.0),
            "consistency": LossTerm(consistency, self.unlabeled_weight(step)),
        }
        terms |= self.coarse_terms(student, batch.label_l)
        terms |= self.prototype_terms(
            student, batch.label_l, step, teacher_l=teacher_l, teacher_u=teacher_u, believed=believed, foreign=foreign
        )
        further, scalars = self.further_terms(StepParts(batch, student, teacher_l, believed, foreign), step)
        passed = (believed.confidence > self.config.confidence_threshold).float()  # pasted labels are no merit
        scalars |= {"confidence": believed.confidence.mean(), "gate_share": passed.mean()}
        return StepOutput(terms | further, scalars, believed.labels, logits_l.detach(), images_u=strong)

    def perturbs_at(self, step: int) -> bool:
        """Whether strong views get boxes and lose channels at ``step``.

        Without them at the end the student learns what it will see, as detectors do without mosaics (Ge et al. 2021,
        arXiv:2107.08430).
        """
        share = self.config.perturbed_share
        return share is None or step < share * required(self.config.max_iteration, "max_iteration")

    def views_differ_at(self, step: int) -> bool:
        """Boxes and dropped channels tell views apart too."""
        perturbed = self.perturbs_at(step) and bool(self.config.copy_paste or self.config.feature_perturbation)
        return super().views_differ_at(step) or perturbed

    def further_terms(self, parts: StepParts, step: int) -> tuple[dict[str, LossTerm], dict[str, Tensor]]:
        """Terms and logged scalars that a subclass adds to the step."""
        return {}, {}

    def _mix(self, batch: Batch, strong: Tensor, probs: Tensor, *, boxes: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Strong views with boxes of other patches, their class probabilities, and which voxels were pasted.

        Views ``strong`` (V * Bu, C, X, Y, Z) have the teacher's ``probs`` (V * Bu, K, X, Y, Z); voxels of a labelled
        patch have their true class for certain. A single unlabelled patch has no other one to take boxes from.
        """
        if not (boxes and self.config.copy_paste and len(batch.image_u)):
            return strong, probs, None
        share = (self.config.paste_unlabeled or 0.0) if len(batch.image_u) * rank_count() > 1 else 0.0
        shape = strong[:, 0].shape
        paste = draw_paste(len(batch.image_l), shape, batch.image_u.device, share)
        certain = one_hot_labels(batch.label_l, probs.shape[1])
        return paste.apply(batch.image_l, strong), paste.apply(certain, probs), paste.boxes
