"""The method contract: a module that turns a batch into weighted loss terms, once a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dataloaders.patches import Batch
from myutils.config import DFP, METHOD, PROTOTYPES, RunConfig, required
from myutils.distributed import sum_over_ranks
from myutils.flags import flags_of
from myutils.losses.deep_supervision import DeepSupervision
from myutils.losses.segmentation import dice_ce_loss, one_hot_labels
from myutils.methods.step_output import LossTerm, StepOutput, require_pictures, require_terms
from myutils.prototype_term import IGNORE, PrototypeTerm, PseudoVoxels
from myutils.pseudo_labels import PseudoLabels, most_probable, pseudo_labels
from myutils.registry import Registry
from myutils.schedules import fraction_rampup, sigmoid_rampup
from networks.base import SegmentationNetwork, SegmentationOutput

# Settings that a method may choose itself; those that are left None in a configuration take the method's value.
COMMON_DEFAULTS: Mapping[str, Any] = {
    "consistency": 1.0,
    "use_contrastive_prototype": False,
    "deep_supervision": False,
    "prototype_loss": "ssnet",
    "tta_flips": False,
    "strong_views": 1,
    "strong_intensity": 1.0,
    "feature_perturbation": False,
    "paste_unlabeled": 0.0,
    "perturbed_share": 1.0,
    "warmup_share": 0.0,  # of the training; fills warmup_iteration
}


class Method(nn.Module, ABC):
    """Student, teacher, heads and memory of one training method.

    Attributes:
        uses_unlabeled: Whether steps hold unlabelled patches; if not, all patches of a step are labelled.
        uses_strong_views: Whether it learns from ``image_u_strong``.
        deepens: Whether it has one decoder, whose coarse levels can learn the labels (``--deep_supervision``).
        ramps: Whether the weight of its loss on unlabelled patches rises at the start (``--consistency_rampup``).
        on_host: Whether its steps compute on the host (components, distances), so that it waits for the device.
        probes: Names of loss terms that train a head on detached features, and not the student.
        reads: Flags of the groups METHOD, PROTOTYPES and DFP that it reads itself; a run says which others do nothing.
        defaults: Settings that differ from ``COMMON_DEFAULTS`` when no flag says so.
    """

    uses_unlabeled: bool = True
    uses_strong_views: bool = False
    deepens: bool = True
    ramps: bool = True
    on_host: bool = False
    probes: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, network: SegmentationNetwork, config: RunConfig) -> None:
        super().__init__()
        self.student = network
        self.config = config
        self.warmup = (config.warmup_iteration or 0) if self.uses_unlabeled else 0
        left = required(config.max_iteration, "max_iteration") - self.warmup
        self.rampup = fraction_rampup(config.consistency_rampup, left)
        self.prototypes = PrototypeTerm(network, config) if config.use_contrastive_prototype else None
        self.deep = DeepSupervision(network.coarse_dims, network.num_classes) if config.deep_supervision else None

    def forward(self, batch: Batch, step: int) -> StepOutput:
        """Loss terms of one batch at ``step``; a batch of labelled patches alone is a supervised step.

        Raises:
            ValueError: If the output is not as ``StepOutput`` says, or deep supervision or the prototype term is on and
                its loss is missing.
        """
        output = self.losses(batch, step) if len(batch.image_u) else self.supervised_losses(batch, step)
        require_terms(output, self.config.method)
        require_pictures(output, batch, self.config.method)
        switches = (
            ("deep_supervision", self.deep, "deep_supervision", "coarse_terms"),
            ("use_contrastive_prototype", self.prototypes, "contrastive_loss", "prototype_terms"),
        )
        for flag, part, term, source in switches:
            if part is not None and term not in output.terms:
                raise ValueError(
                    f"--{flag}: {self.config.method} returns no term {term!r}; add {source}(...) to its losses, or "
                    f"use --no-{flag}"
                )
        return output

    @abstractmethod
    def losses(self, batch: Batch, step: int) -> StepOutput:
        """Loss terms of a batch with labelled and unlabelled patches."""

    def supervised_losses(self, batch: Batch, step: int) -> StepOutput:
        """Loss terms of a batch of labelled patches: Dice + cross-entropy, and the prototype term where it is on."""
        output = self.student(batch.image_l)
        terms = {"supervised": LossTerm(dice_ce_loss(output.logits, batch.label_l), 1.0)}
        terms |= self.coarse_terms(output, batch.label_l)
        terms |= self.prototype_terms(output, batch.label_l, step)
        return StepOutput(terms, logits_l=output.logits.detach())

    def inference_network(self) -> SegmentationNetwork:
        """The network that segments after training: the student, where a method knows none better."""
        return self.student

    def before_update(self, step: int) -> None:
        """Called with the gradients of a step, before the optimizer takes them."""

    def after_step(self, step: int) -> None:
        """Called after each optimizer step."""
        if self.prototypes is not None:
            self.prototypes.after_step(step)

    def ramp(self, step: int) -> float:
        """Ramp-up factor of everything that rests on the model's own predictions; it starts after the warm-up."""
        return sigmoid_rampup(step - self.warmup, self.rampup)

    def unlabeled_weight(self, step: int) -> float:
        """Weight of the method's loss on unlabelled patches: ``--consistency`` after its ramp-up."""
        return self.ramp(step) * required(self.config.consistency, "consistency")

    def views_at(self, step: int) -> int:
        """Strong views to compute at ``step``: one where nothing tells them apart."""
        return required(self.config.strong_views, "strong_views") if self.views_differ_at(step) else 1

    def views_differ_at(self, step: int) -> bool:
        """Whether anything tells the strong views of a patch apart at ``step``: changes of their intensities do."""
        return self.config.augment and self.config.strong_intensity != 0

    def coarse_terms(
        self, student: SegmentationOutput, labels: Tensor, mask: Tensor | None = None
    ) -> dict[str, LossTerm]:
        """The loss of the decoder's coarse levels; nothing without ``--deep_supervision``.

        Args:
            student: Student outputs of the whole batch, labelled patches first, on the graph.
            labels: Class ids (Bl, X, Y, Z) of the labelled patches.
            mask: Voxels (Bl, X, Y, Z) whose label is true; None for all.
        """
        if self.deep is None:
            return {}
        targets = one_hot_labels(labels, self.student.num_classes)
        if mask is not None:
            targets = targets * mask.unsqueeze(1)
        levels = student.patches(slice(len(labels))).coarse
        return {"deep_supervision": LossTerm(self.deep(levels, self.student.pad(targets)), 1.0)}

    def prototype_terms(
        self,
        student: SegmentationOutput,
        labels: Tensor,
        step: int,
        *,
        teacher_l: SegmentationOutput | None = None,
        teacher_u: SegmentationOutput | None = None,
        believed: PseudoLabels | None = None,
        foreign: Tensor | None = None,
    ) -> dict[str, LossTerm]:
        """The prototype term's raw parts with their ramped weights; nothing without ``--use_contrastive_prototype``.

        Args:
            student: Student outputs of the whole batch, labelled patches first, on the graph.
            labels: Class ids (Bl, X, Y, Z) of the labelled patches; ``IGNORE`` where a voxel is not theirs.
            step: Training step.
            teacher_l: Teacher outputs of the labelled patches where the memory refills; None for the student's own.
            teacher_u: Outputs of Bu views that give the student's V * Bu unlabelled patches their pseudo-labels and
                memory features, teacher's or student's; no gradient flows into them. None leaves these patches out.
            believed: The pseudo-labels (Bu, X, Y, Z) of ``teacher_u``, where they are at hand.
            foreign: Voxels (V * Bu, X, Y, Z) of the student's unlabelled patches that belong to another patch.
        """
        if self.prototypes is None:
            return {}
        pseudo = None
        if teacher_u is not None:
            views = (len(student.logits) - len(labels)) // len(teacher_u.logits)
            found = pseudo_labels(teacher_u.logits) if believed is None else believed
            pseudo = PseudoVoxels(self.confident_labels(found, views, foreign), teacher_u.detach().repeat(views))
        losses = self.prototypes(student, labels, step, teacher_l=teacher_l, pseudo=pseudo)
        config, ramp = self.config, self.ramp(step)
        return {
            "contrastive_loss": LossTerm(losses["contrastive_loss"], ramp * config.contrastive_weight),
            "intra_loss": LossTerm(losses["intra_loss"], ramp * config.intra_weight),
            "inter_loss": LossTerm(losses["inter_loss"], ramp * config.inter_weight),
        }

    def confident_labels(self, found: PseudoLabels, views: int, foreign: Tensor | None) -> Tensor:
        """Class ids (V * Bu, X, Y, Z) of the student's V views of each unlabelled patch.

        ``IGNORE`` where the pseudo-label (Bu, X, Y, Z) is below ``--confidence_threshold`` or the voxel is ``foreign``.
        """
        labels = found.gated(self.config.confidence_threshold, IGNORE).repeat(views, 1, 1, 1)
        return labels if foreign is None else labels.where(~foreign, IGNORE)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Everything trainable: one group of all that ``further_groups`` leaves, then those.

        ``lr_scale`` is kept in each group, so that a schedule can set the rates.
        """
        further = self.further_groups(lr)
        taken = {id(parameter) for group in further for parameter in group["params"]}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in taken]
        return [{"params": rest, "lr": lr, "lr_scale": 1.0}, *further]

    def further_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups with settings of their own: the prototypes' selectors learn at a tenth of the rate."""
        selectors = [] if self.prototypes is None else self.prototypes.selector_parameters()
        return [{"params": selectors, "lr": 0.1 * lr, "lr_scale": 0.1}] if selectors else []


METHODS: Registry[type[Method]] = Registry("method", "myutils.methods", Method)


def unread_flags(method: type[Method], *, prototypes: bool) -> frozenset[str]:
    """The flags that change nothing in a run with ``method``, with or without the prototype term."""
    read = {"method", "model", "flat_levels", "deep_supervision", "use_contrastive_prototype", *method.reads}
    if method.uses_unlabeled:
        read |= {"consistency", "warmup_iteration"} | ({"consistency_rampup"} if method.ramps else set())
    if method.uses_strong_views:
        read |= {"strong_views", "strong_intensity"}
    if prototypes:
        read |= {"consistency_rampup", "confidence_threshold"} | ({"ema_decay"} if method.uses_unlabeled else set())
    return flags_of(RunConfig, METHOD, DFP, *(() if prototypes else (PROTOTYPES,))) - read


@torch.no_grad()
def batch_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean hard Dice (scalar) over the foreground classes that occur in labels (B, X, Y, Z); logits (B, K, X, Y, Z).

    Of the patches of all ranks together: a collective call.
    """
    prediction = most_probable(logits)
    counts = []
    for class_id in range(1, logits.shape[1]):
        ours, truth = prediction == class_id, labels == class_id
        counts.append(torch.stack([(ours & truth).sum(), ours.sum(), truth.sum()]))
    overlap, predicted, true = sum_over_ranks(torch.stack(counts)).T  # (K - 1,) each
    present = (true > 0).float()
    return (2.0 * overlap / (predicted + true).clamp(min=1) * present).sum() / present.sum().clamp(min=1)
