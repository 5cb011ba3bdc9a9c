"""The teacher: an exponential moving average of a module."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def make_teacher(student: M) -> M:
    """A copy of ``student`` that takes no gradient and stays in evaluation mode."""
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher.eval()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Move the teacher's parameters toward the student's: ``t = decay * t + (1 - decay) * s``.

    Rule for buffers: they are copied. The project's networks have none that matter (instance normalisation); where
    one has batch normalisation, its running statistics are averages already, and averaging them again only delays
    them behind the weights (SSL4MIS issue 77 is about teachers whose buffers were never synchronised).
    """
    ours = [parameter.detach() for parameter in teacher.parameters()]
    theirs = [parameter.detach() for parameter in student.parameters()]
    if ours:
        torch._foreach_lerp_(ours, theirs, 1.0 - decay)
    for buffer, source in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(source)
