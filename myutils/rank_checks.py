"""Ranks that would train or score different things: what they bring together would be wrong, in silence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dataloaders.case_lists import some
from myutils.checkpoint import RunState
from myutils.distributed import join_shares

_OWN = {"exp", "num_workers", "cache_gb"}  # may differ between machines, as folders may


def require_equal_states(state: RunState) -> None:
    """Check that all ranks have the same settings, cases and step; errors as in ``require_equal``."""
    config = state.config.to_dict()
    own = _OWN | {field.name for field in dataclasses.fields(state.config) if "Path" in str(field.type)}
    told = {f"--{name}": value for name, value in config.items() if name not in own}
    require_equal(told | dataclasses.asdict(state.facts) | state.split.to_dict() | {"step": state.step})


def require_equal(told: Mapping[str, Any]) -> None:
    """Check that all ranks tell the same values under the same names; a collective call.

    Raises:
        ValueError: On every rank, naming the first difference.
    """
    first, *others = join_shares([dict(told)])
    for rank, other in enumerate(others, start=1):
        for name in {**first, **other}:
            ours, theirs = first.get(name), other.get(name)
            if ours != theirs:
                raise ValueError(
                    f"process {rank} has {name} {_shown(theirs, ours)}, process 0 {_shown(ours, theirs)}; start all "
                    "with the same flags, version and data"
                )


def _shown(value: Any, other: Any) -> str:
    """A value for a message, of a long list what the other lacks."""
    if not isinstance(value, list | tuple) or not isinstance(other, list | tuple):
        return str(value)
    further = [str(item) for item in value if item not in other]
    return f"with {some(further)}" if further else f"of {len(value)}"
