"""Learning rate, ramp-up and teacher decay as pure functions of the step, so that a resume needs no state."""

from __future__ import annotations

import math


def poly_lr(base_lr: float, step: int, max_iteration: int, power: float = 0.9) -> float:
    """Polynomial decay ``base_lr * (1 - step / max_iteration) ** power``, as in nnU-Net and DeepLab."""
    return base_lr * (1.0 - min(step, max_iteration) / max_iteration) ** power


def sigmoid_rampup(step: int, length: int) -> float:
    """Weight ``exp(-5 (1 - t)^2)`` with t = step / length, 1 from ``length`` on (Laine & Aila 2017, arXiv:1610.02242).

    A ``length`` of 0 means no ramp-up: always 1.
    """
    if length <= 0:
        return 1.0
    phase = 1.0 - min(max(step, 0), length) / length
    return math.exp(-5.0 * phase * phase)


def ema_decay_at(step: int, decay: float) -> float:
    """Decay ``min(1 - 1 / (step + 1), decay)``: a plain average of the first steps, then exponential.

    Source: Tarvainen & Valpola 2017, arXiv:1703.01780.
    """
    return min(1.0 - 1.0 / (step + 1), decay)


def fraction_rampup(length: int | None, max_iteration: int, share: float = 0.3) -> int:
    """``length`` where it is given, else ``share`` of the training, in steps."""
    return length if length is not None else round(share * max_iteration)
