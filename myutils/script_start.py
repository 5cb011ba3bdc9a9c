"""The start of a script: what is wrong with its flags or data ends it with one message, before anything is written."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from dataloaders.error_text import JOB_ERRORS, message_of
from myutils.distributed import stop_process_group


@contextmanager
def refusals(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Prepare a job inside: an error ends the process with code 2 and the parser's message; Ctrl-C passes on."""
    try:
        yield
    except JOB_ERRORS as error:
        try:
            parser.error(message_of(error))
        finally:  # said first: the other ranks may wait elsewhere
            stop_process_group(failed=True)
    except KeyboardInterrupt:
        stop_process_group()
        raise
