"""Where a training step's time goes: the parts of some steps timed, each without the parts inside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from typing import Any

import torch

from dataloaders.patches import Batch
from myutils.trainer import Trainer
from networks.base import SegmentationNetwork

WARM_UP = 3  # steps before the timed ones
OTHER = "everything else"


class PartTimer:
    """Wall time per named part; the time of a part inside another counts for the inner one alone.

    Args:
        device: What a border between two parts waits for, so that work is charged to the part that asked for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._open, self._mark = device, [OTHER], time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge what happens inside to ``name``."""
        self.charge()
        self._open.append(name)
        try:
            yield
        finally:
            self.charge()
            self._open.pop()

    def charge(self) -> None:
        """Charge the time since the last border to the innermost open part."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now

    def restart(self) -> None:
        """Forget what was charged so far."""
        self.charge()
        self.seconds.clear()

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Charge every call of a method of one object to ``name``, from now on."""
        original: Callable[..., Any] = getattr(owner, attribute)

        @wraps(original)
        def timed(*args: Any, **settings: Any) -> Any:
            with self.part(name):
                return original(*args, **settings)

        setattr(owner, attribute, timed)


def check_length(trainer: Trainer, steps: int) -> None:
    """Raise a ValueError if the training is too short to time ``steps`` of it."""
    first = trainer.method.warmup
    longest = trainer.max_iteration - first - WARM_UP
    if steps > longest:
        warmup = f" and the {first} on labelled patches alone" if first else ""
        raise ValueError(
            f"--profile {steps}: at most {longest}, the training's steps less {WARM_UP} to warm up{warmup}"
        )


def profile_training(trainer: Trainer, steps: int) -> dict[str, float]:
    """Train ``WARM_UP + steps`` steps of a new run; returns seconds per step of each part, over the last ``steps``.

    Steps on labelled patches alone, with which a method may begin, are left out. (The pools of ``cov_dfp`` come later.)
    The trainer is of no use afterwards. Parts that a method lacks (a teacher, prototypes) do not appear.
    """
    timer = PartTimer(trainer.device)
    method = trainer.method
    if not trainer.state.config.num_workers:  # a timer does not go into other processes
        timer.watch(trainer.cache, "get", "reading cases")
    timer.watch(method, "forward", "losses and mixing")
    for name, module in method.named_children():
        if isinstance(module, SegmentationNetwork):
            timer.watch(module, "run_branches", f"forward of the {name}")
        else:
            timer.watch(module, "forward", name)
    timer.watch(trainer, "backward", "backward")
    timer.watch(trainer, "update_weights", "gradient norm and optimizer")
    timer.watch(method, "after_step", "averages of teacher and heads")
    timer.watch(trainer, "finish_step", "logging")
    load = trainer.loader

    def batches(first: int) -> Iterator[Batch]:
        source = islice(load(first), WARM_UP + steps)
        for number in range(WARM_UP + steps):
            if number == WARM_UP:
                timer.restart()
            with timer.part("patches (cut, augment, or wait for workers)"):
                batch = next(source)
            yield batch

    trainer.state.step = method.warmup
    trainer.loader = batches  # type: ignore[method-assign]
    trainer.fit()
    timer.charge()
    return {name: seconds / steps for name, seconds in timer.seconds.items()}


def format_profile(parts: dict[str, float]) -> str:
    """Table of milliseconds and shares, the largest first."""
    total = sum(parts.values())
    lines = [f"{'part of a step':46s}{'ms':>9s}{'share':>9s}"]
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        lines.append(f"{name:46s}{1000 * seconds:9.1f}{seconds / total:9.1%}")
    return "\n".join([*lines, f"{'whole step':46s}{1000 * total:9.1f}{1:9.0%}"])
