"""Ctrl-C and SIGTERM: a request to stop after the step at hand in training, an exception elsewhere."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol


class Interruptible(Protocol):
    """What looks at ``interrupted`` between two steps."""

    interrupted: bool


@contextmanager
def stop_signals(job: Interruptible) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into a request to stop after the step; a second Ctrl-C stops at once."""

    def request(number: int, frame: FrameType | None) -> None:
        if job.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        job.interrupted = True

    with _handled(request, signal.SIGINT, signal.SIGTERM):
        yield


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let what ends a job from outside (a scheduler, ``kill``) end it as Ctrl-C does: files closed, with a message."""
    with _handled(signal.default_int_handler, signal.SIGTERM):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], object], *numbers: int) -> Iterator[None]:
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # signals can be caught in the main thread only
        before = {}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
