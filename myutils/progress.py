"""Progress bars that no lost terminal or full log file can stop a job with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tqdm import tqdm


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
