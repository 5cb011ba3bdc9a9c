"""Ctrl-C and SIGTERM as a request to stop after the step at hand."""

from __future__ import annotations

import signal
from collections.abc import Iterator
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

    try:
        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # signals can be caught in the main thread only
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
