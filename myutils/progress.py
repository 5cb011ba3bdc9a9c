"""Progress bars and results on the screen: no lost terminal or full log file can stop a job with them."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


def show(text: str) -> None:
    """Write a result, which is in a file too, to the standard output; where this cannot be, say so and go on."""
    try:
        if sys.stdout is None:  # closed before the start
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        logger.warning("standard output: %s; results are in files alone", error.strerror)
        # for good: what is left unwritten there would fail again when Python ends
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115


class ProgressBar(tqdm):
    """``tqdm``; where its stream cannot be written to any more, the job goes on without it.

    So it is with ``| tee log`` whose reader has ended, or with a log on a full disk.
    """

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What writes the bar's text to ``file``."""
        with suppress(OSError):
            return tqdm.status_printer(file)
        return lambda text: None

    def display(self, *arguments: Any, **settings: Any) -> bool | None:
        """Draw the bar, if it can be."""
        with suppress(OSError):
            return super().display(*arguments, **settings)
        return None

    def clear(self, *arguments: Any, **settings: Any) -> None:
        """Take the bar away, if it can be."""
        with suppress(OSError):
            super().clear(*arguments, **settings)

    def close(self) -> None:
        """End the bar."""
        with suppress(OSError):
            super().close()
