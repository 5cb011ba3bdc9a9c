"""Argument checks of the prototype manager: each raises ``ValueError`` naming the value, the limit and the fix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor

_ROUNDING = 1e-2  # of a sum of probabilities, in half precision


class NonFiniteFeaturesError(ValueError):
    """Features hold NaN or infinity; the message names the classes."""


def require_at_least(name: str, value: int, least: int) -> None:
    """Refuse anything but an integer of at least ``least``, NumPy's too."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} {value!r}: pass an integer of at least {least}")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a word that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value!r}: pass one of {', '.join(choices)}")


def require_gate(confidence_threshold: float, ignore_index: int, num_classes: int) -> None:
    """Refuse a threshold outside [0, 1) and an ignored label that is a class id."""
    if not 0.0 <= confidence_threshold < 1.0:
        raise ValueError(f"confidence_threshold {confidence_threshold}: pass a probability in [0, 1)")
    if 0 <= ignore_index < num_classes:
        raise ValueError(f"ignore_index {ignore_index} is a class id; pass a value outside 0..{num_classes - 1}")


def require_loss_settings(weights: Mapping[str, float], margin: float) -> None:
    """Refuse negative or non-finite weights and a margin outside (0, 2]."""
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(f"weight of {name} is {weight}: pass a finite weight >= 0")
    if not 0.0 < margin <= 2.0:
        raise ValueError(f"margin {margin}: pass a distance in (0, 2], unit vectors are at most 2 apart")


def require_rows(features: Tensor, class_labels: Tensor, feature_dim: int) -> None:
    """Refuse features other than (N, E) or class labels other than (N,)."""
    if features.ndim != 2 or features.shape[1] != feature_dim or class_labels.shape != features.shape[:1]:
        raise ValueError(
            f"features {tuple(features.shape)} and class_labels {tuple(class_labels.shape)}: "
            f"expected (N, {feature_dim}) and (N,)"
        )


def require_mappings(
    features: Mapping[int, Tensor], confidences: Mapping[int, Tensor], num_classes: int, feature_dim: int
) -> None:
    """Refuse unknown class ids, vectors other than (n, E), and confidences other than (n,)."""
    for class_id, vectors in features.items():
        if isinstance(class_id, bool) or not isinstance(class_id, int) or not 0 <= class_id < num_classes:
            raise ValueError(
                f"class id {class_id!r} is not an integer in 0..{num_classes - 1} (num_classes {num_classes})"
            )
        if vectors.ndim != 2 or vectors.shape[1] != feature_dim:
            raise ValueError(
                f"vectors of class {class_id} have shape {tuple(vectors.shape)}; expected (n, {feature_dim}), "
                "the feature_dim of this manager"
            )
    for class_id, values in confidences.items():
        if class_id not in features:
            raise ValueError(
                f"confidences name class {class_id!r}, features do not; pass vectors for it or leave it out"
            )
        if values.shape != features[class_id].shape[:1]:
            raise ValueError(
                f"confidences of class {class_id} have shape {tuple(values.shape)}; "
                f"expected ({features[class_id].shape[0]},), one for each vector"
            )


def require_batch(
    features: Tensor,
    predictions: Tensor,
    labels: Tensor | None,
    memory_features: Tensor | None,
    widths: tuple[int, int],
) -> None:
    """Refuse a batch whose shapes do not fit each other or the widths (E, K)."""
    feature_dim, num_classes = widths
    if features.ndim not in (2, 5) or features.shape[1] != feature_dim:
        raise ValueError(
            f"features have shape {tuple(features.shape)}; expected (B, {feature_dim}, X, Y, Z) or (N, {feature_dim}), "
            f"feature_dim being {feature_dim}"
        )
    voxels = (features.shape[0], *features.shape[2:])
    wanted = (voxels[0], num_classes, *voxels[1:])
    if tuple(predictions.shape) != wanted:
        raise ValueError(
            f"predictions have shape {tuple(predictions.shape)}; expected logits {wanted} for {num_classes} classes "
            f"and features {tuple(features.shape)}"
        )
    if labels is not None and tuple(labels.shape) != voxels:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; expected {voxels}, one id per voxel")
    if memory_features is not None and memory_features.shape != features.shape:
        raise ValueError(
            f"memory_features have shape {tuple(memory_features.shape)}; expected {tuple(features.shape)}, as features"
        )


def require_devices(memory: Tensor, **given: object) -> None:
    """Refuse what is no tensor on the device of the ``memory``; ``None`` is left out."""
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; pass a tensor")
        if value.device != memory.device:
            raise ValueError(
                f"{name} on {value.device}, the manager on {memory.device}: move one of them with .to(...)"
            )


def require_logits(predictions: Tensor) -> None:
    """Refuse probabilities (B, K, ...), which a softmax would flatten; on the CPU alone, where looking is free."""
    if predictions.device.type != "cpu" or not predictions.numel():
        return
    low, high = torch.aminmax(predictions.detach())
    if low >= 0 and high <= 1 and (predictions.detach().float().sum(1) - 1).abs().max() < _ROUNDING:
        raise ValueError(
            "predictions lie in 0..1 and add up to 1 in each voxel, as probabilities do; pass logits, from before the "
            "softmax"
        )


def require_label_source(labels: Tensor | None, is_labeled: bool) -> None:
    """Refuse a labelled batch without labels, and an unlabelled one with them."""
    if is_labeled and labels is None:
        raise ValueError("is_labeled=True needs labels; pass them, or is_labeled=False for pseudo-labels")
    if not is_labeled and labels is not None:
        raise ValueError(
            "labels of an unlabelled batch are never read; pass labels=None, or is_labeled=True to use them"
        )
