"""What a method returns for a step, and what a new one may get wrong about it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dataloaders.case_lists import some
from dataloaders.patches import Batch

logger = logging.getLogger(__name__)

_TAKEN_TERMS = {"total", "total_prototype_loss"}  # what the trainer logs itself, as Loss/ and Train/
_TAKEN_SCALARS = {"lr", "dice", "loss_scale", "seconds_per_step", "peak_memory_mb"}


@dataclass
class LossTerm:
    """A raw loss and the weight with which it enters the total."""

    value: Tensor
    weight: float


@dataclass
class StepOutput:
    """What a method returns: loss terms by name, scalars to log, and label maps to show.

    Attributes:
        terms: Weighted losses.
        scalars: Zero-dimensional tensors to log, without gradient.
        pseudo_labels: Pseudo-labels (Bu, X, Y, Z) of the weak views, for pictures; None where there are none.
        logits_l: Logits (Bl, K, X, Y, Z) of the labelled patches, detached, for pictures and the training Dice.
        labels_l: What they are compared with (Bl, X, Y, Z), where it is not the batch's labels.
        images_l: What the network saw (Bl, C, X, Y, Z), where it is not the batch's labelled patches.
        images_u: What the student saw (at least one patch) of the unlabelled ones, where it is not their strong views.
    """

    terms: dict[str, LossTerm]
    scalars: dict[str, Tensor] = field(default_factory=dict)
    pseudo_labels: Tensor | None = None
    logits_l: Tensor | None = None
    labels_l: Tensor | None = None
    images_l: Tensor | None = None
    images_u: Tensor | None = None

    def truth(self, batch: Batch) -> Tensor:
        """Class ids (Bl, X, Y, Z) that ``logits_l`` are compared with."""
        return batch.label_l if self.labels_l is None else self.labels_l

    def total(self) -> Tensor:
        """The loss to minimise; the only place where weight times value happens."""
        values = [term.weight * term.value for term in self.terms.values()]
        return torch.stack(values).sum()


def require_terms(output: object, method: str) -> None:
    """Refuse what is no ``StepOutput`` of scalars with gradients; ``method`` is its name, for the message.

    Raises:
        ValueError: Names the term, what it is and what to return.
    """
    if not isinstance(output, StepOutput) or not isinstance(output.terms, dict) or not output.terms:
        what = "no loss term" if isinstance(output, StepOutput) else f"a {type(output).__name__}"
        raise ValueError(f"--method {method}: a step gave {what}; return StepOutput({{name: LossTerm(value, weight)}})")
    if taken := sorted(_TAKEN_TERMS & set(output.terms)) + sorted(_TAKEN_SCALARS & set(output.scalars)):
        raise ValueError(f"--method {method}: {some(taken)}: the log has values of this name; choose another")
    for name, term in output.terms.items():
        if fault := _fault_of(term):
            raise ValueError(f"--method {method}: loss term {name!r} {fault}")
    for name, scalar in output.scalars.items():
        if shape := tuple(torch.as_tensor(scalar).shape):
            raise ValueError(f"--method {method}: scalar {name!r} has shape {shape}; return one number, its mean say")


def require_pictures(output: StepOutput, batch: Batch, method: str) -> None:
    """Refuse what cannot be drawn or compared: now, not at the first picture.

    Raises:
        ValueError: Names what has which shape, and the one to return.
    """
    logits, pseudo = output.logits_l, output.pseudo_labels
    if logits is not None and (len(logits), *logits.shape[2:]) != (truth := tuple(output.truth(batch).shape)):
        raise ValueError(
            f"--method {method}: logits_l {tuple(logits.shape)} beside labels {truth}; return (Bl, K, X, Y, Z), and "
            "labels_l (Bl, X, Y, Z) where they are not the batch's"
        )
    if pseudo is not None and tuple(pseudo.shape) != (wanted := (len(batch.image_u), *batch.image_u.shape[2:])):
        raise ValueError(f"--method {method}: pseudo_labels {tuple(pseudo.shape)}; return {wanted}, of the weak views")


def _fault_of(term: object) -> str | None:
    if not isinstance(term, LossTerm) or not isinstance(term.value, Tensor):
        return f"is a {type(getattr(term, 'value', term)).__name__}; return LossTerm(tensor, weight)"
    if term.value.ndim:
        return f"has shape {tuple(term.value.shape)}; return a scalar, such as its mean"
    if not isinstance(term.weight, (int, float)) or not math.isfinite(term.weight):
        return f"has the weight {term.weight!r}; return a finite number"
    if torch.is_grad_enabled() and not term.value.requires_grad:
        return "has no gradient; compute it from the student's outputs, neither detached nor under no_grad"
    return None


def require_gradients(method: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Refuse a method of which a trainable parameter did not take part in the step whose gradients are there.

    Args:
        method: After a backward pass past the warm-up.
        trained: What its optimizer has.

    Raises:
        ValueError: Names such parameters.
    """
    known = {id(parameter) for parameter in trained}
    idle = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or id(p) not in known)]
    if idle:
        raise ValueError(
            f"{type(method).__name__} does not train {some(idle)}: a parameter is built in the constructor and takes "
            "part in every step; requires_grad_(False), or make_teacher, for what is not to be trained"
        )


def fingerprint(network: nn.Module) -> Tensor:
    """A number that changes with the weights of a network, without a wait for the device."""
    return torch.stack([parameter.detach().double().abs().sum() for parameter in network.parameters()]).sum()


def warn_if_still(network: nn.Module, before: Tensor) -> None:
    """Warn of a network that segments after a training with the weights that it had before."""
    if torch.equal(fingerprint(network), before):
        logger.warning(
            "the network that segments has not moved in this training: it is no part of what is trained, or an "
            "after_step does not call super().after_step(step)"
        )
