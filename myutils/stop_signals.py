"""Ctrl-C, SIGTERM and SIGHUP: a request to stop after the step at hand in training, an exception elsewhere."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType
from typing import Protocol

logger = logging.getLogger(__name__)

_HANGUP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()  # not on Windows


class TrainingInterrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """Ctrl-C or a signal from outside; the state has been saved."""


class Interruptible(Protocol):
    """What looks at ``interrupted`` between two steps."""

    interrupted: bool


@contextmanager
def stop_signals(job: Interruptible) -> Iterator[None]:
    """Turn Ctrl-C and signals from outside into a request to stop after the step; a second Ctrl-C stops at once."""

    def request(number: int, frame: FrameType | None) -> None:
        if not job.interrupted:
            logger.info(
                "stopping after the step or validation at hand; another Ctrl-C loses the steps since the last save"
            )
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        job.interrupted = True

    with _handled(request, signal.SIGINT, *_from_outside()):
        yield


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let what ends a job from outside end it as Ctrl-C does: files closed, with a message."""
    with _handled(signal.default_int_handler, *_from_outside()):
        yield


def leave_stops_to_parent(worker: int) -> None:
    """For the start of a loader's worker: what reaches all processes of a job does not end it before the step is done.

    It ends when its parent says so (by SIGTERM; on Linux others' are told from that), or has died.
    """
    for number in (signal.SIGINT, *_HANGUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_at_word_of, args=(os.getppid(),), daemon=True).start()


def _end_at_word_of(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _from_outside() -> list[signal.Signals]:
    """What a scheduler or ``kill`` sends, and a terminal that closes, unless it is ignored (``nohup``)."""
    return [signal.SIGTERM, *(number for number in _HANGUP if signal.getsignal(number) != signal.SIG_IGN)]


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
