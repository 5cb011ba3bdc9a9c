"""Ranks that would train on different things: their gradients are averaged, and no figure would show it."""

from __future__ import annotations

import dataclasses
from typing import Any

from myutils.checkpoint import RunState
from myutils.distributed import join_shares


def require_equal_ranks(state: RunState) -> None:
    """Check that all ranks have the same settings, cases and step; a collective call. Folders may differ.

    Raises:
        ValueError: On every rank, naming the first difference.
    """
    config = state.config.to_dict()
    places = {field.name for field in dataclasses.fields(state.config) if "Path" in str(field.type)} | {"exp"}
    own = {f"--{name}": value for name, value in config.items() if name not in places}
    own |= dataclasses.asdict(state.facts) | state.split.to_dict() | {"step": state.step}
    first, *others = join_shares([own])
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                raise ValueError(
                    f"process {rank} has {name} {_shown(other[name])}, process 0 {_shown(value)}; start all with the "
                    "same flags, versions and data"
                )


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
