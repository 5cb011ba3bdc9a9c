"""Warnings about a case or a folder that is read many times: each is said once in a process."""

from __future__ import annotations

import logging
from functools import cache


@cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, unless this logger has said the same before."""
    logger.warning(message)
