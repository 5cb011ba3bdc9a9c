"""Finds the first step whose losses or gradient are not finite, without making the host wait in every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_LEAST_SCALE = 2.0**-20


class NonFiniteLossError(RuntimeError):
    """A loss or the gradient became NaN or infinite; the last checkpoint is from before."""


class _Record(NamedTuple):
    step: int
    cases: tuple[str, ...]
    names: tuple[str, ...]
    finite: Tensor  # (len(names),), bool


class FiniteWatch:
    """Keeps which values of the last steps were finite, and raises once it looks.

    Args:
        eager: Look at every record at once; free on the CPU. Otherwise only ``check`` looks, which makes the host wait
            for an accelerator: call it before anything of these steps is kept.
        advice: Says what to do, for the end of the message.
    """

    def __init__(self, *, eager: bool, advice: Callable[[], str]) -> None:
        self.eager, self._advice = eager, advice
        self._records: list[_Record] = []

    def record(self, step: int, cases: tuple[str, ...], values: Mapping[str, Tensor]) -> None:
        """Note the values (scalars, by the words that the message uses) of a step on these cases."""
        finite = torch.isfinite(torch.stack([value.detach().float() for value in values.values()]))
        self._records.append(_Record(step, cases, tuple(values), finite))
        if self.eager:
            self.check()

    def check(self) -> None:
        """Look at everything noted since the last call.

        Raises:
            NonFiniteLossError: Names the first such step, its values and its cases.
        """
        records, self._records = self._records, []
        if not records or torch.stack([record.finite.all() for record in records]).all():
            return
        bad = next(record for record in records if not record.finite.all())
        names = [name for name, fine in zip(bad.names, bad.finite.tolist(), strict=True) if not fine]
        raise NonFiniteLossError(self.message(f"{', '.join(names)} not finite", bad.step, bad.cases))

    def check_scale(self, scale: float, step: int, cases: tuple[str, ...]) -> None:
        """Look at the scale of the loss in fp16, halved after each step whose gradient overflows.

        Raises:
            NonFiniteLossError: If it is so small that overflow is no matter of scale.
        """
        if scale < _LEAST_SCALE:
            raise NonFiniteLossError(
                self.message(f"the gradient not finite in fp16 at any scale, {scale:.1e}", step, cases)
            )

    def message(self, reason: str, step: int, cases: tuple[str, ...]) -> str:
        """Where a step failed for ``reason``, and what to do."""
        return f"step {step}: {reason}; cases: {', '.join(cases)}. {self._advice()}"
