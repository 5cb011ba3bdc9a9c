"""The teacher: an exponential moving average of a module."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def make_teacher(student: M) -> M:
    """A copy of ``student`` that takes no gradient and stays in evaluation mode."""
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher.eval()


class MovingAverage:
    """Moves a teacher toward its student: ``t = decay * t + (1 - decay) * s``, parameter by parameter.

    Rule for buffers: they are copied. The project's networks have none that matter (instance normalisation); where
    one has batch normalisation, its running statistics are averages already, and averaging them again only delays
    them behind the weights (SSL4MIS issue 77 is about teachers whose buffers were never synchronised).

    Args:
        teacher: What ``make_teacher`` gave.
        student: What it was made of.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        self._pair = (teacher, student)
        self._tensors: tuple[list[Tensor], ...] = ()
        self._moved_from = 0

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the teacher; the tensors of both are looked up once, and again where the student has moved."""
        place = next((parameter.data_ptr() for parameter in self._pair[1].parameters()), 0)
        if not self._tensors or place != self._moved_from:
            parameters = [[tensor.detach() for tensor in module.parameters()] for module in self._pair]
            self._tensors = (*parameters, *(list(module.buffers()) for module in self._pair))
            self._moved_from = place
        ours, theirs, buffers, sources = self._tensors
        if ours:
            torch._foreach_lerp_(ours, theirs, 1.0 - decay)
        for buffer, source in zip(buffers, sources, strict=True):
            buffer.copy_(source)
