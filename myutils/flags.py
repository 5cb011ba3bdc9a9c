"""Command-line flags from a dataclass: one field, one flag, grouped help, and "did you mean" for a typo.

Our own, since a field's limits must hold for flags, for settings from Python and for runs that are resumed, with one
message: the parsers that read dataclasses look at the command line alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

METAVARS = {int: "N", float: "VALUE", str: "NAME", Path: "PATH"}


def option(
    default: Any,
    help: str,
    *,
    group: str = "options",
    choices: Sequence[str] | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> Any:
    """A dataclass field that becomes ``--name``; ``help`` states the meaning and the unit.

    What follows ``; else`` in the help of a field with default None is shown as its default. ``low`` and ``high`` are
    the least and the largest number allowed; the help shows them, ``check_limits`` refuses others.
    """
    metadata = {"help": help, "group": group, "choices": choices, "limits": (low, high)}
    return dataclasses.field(default=default, metadata=metadata)


def flags_of(config: type, *groups: str) -> frozenset[str]:
    """The names of all options of the dataclass ``config`` that stand in one of the groups."""
    return frozenset(field.name for field in dataclasses.fields(config) if field.metadata["group"] in groups)


def check_limits(settings: Any) -> None:
    """Refuse numbers of a dataclass of options beyond their limits, naming the flag, the value and the limit."""
    for field in dataclasses.fields(settings):
        value, (low, high), limits = getattr(settings, field.name), field.metadata["limits"], _limits(field)
        if limits and value is not None and not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"--{field.name} {value}: must be {limits}")


def _limits(field: dataclasses.Field[Any]) -> str:
    low, high = field.metadata["limits"]
    if (low, high) == (-math.inf, math.inf):
        return ""
    return f"at least {low}" if high == math.inf else f"in {low}..{high}"


_MEANT = {  # what other programs call some flags
    **dict.fromkeys(("epochs", "max_epoch", "steps", "num_steps", "iterations", "max_iterations"), "max_iteration"),
    **dict.fromkeys(("lr", "learning_rate"), "base_lr"),
    **dict.fromkeys(("device", "cuda"), "gpu"),
    "dataset": "dataset_name",
    "data": "dataset_path",
    "root_path": "dataset_path",
    "weights": "checkpoint",
}


class SuggestingParser(argparse.ArgumentParser):
    """Argument parser that answers an unknown flag with the one that is meant, or the closest one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=FlagHelp, **settings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what is not a flag."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._describe_unknown(unknown[0]))
        return parsed

    def _describe_unknown(self, word: str) -> str:
        known = list(self._option_string_actions)
        asked = word.split("=")[0].replace("-", "_").replace("__", "--", 1)
        meant = f"--{_MEANT.get(asked.removeprefix('--'))}"
        close = [meant] if meant in known else difflib.get_close_matches(asked, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; --help lists the flags"
        return f"unrecognized argument {word}{hint}"

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


class FlagHelp(argparse.RawDescriptionHelpFormatter):
    """Shows a switch as ``--name, --no-name`` and leaves the description's lines as they are."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, UnderscoreBoolean):
            return ", ".join(action.option_strings[:2])
        return super()._format_action_invocation(action)


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add one flag per field of the dataclass ``config``; absent flags leave no trace in the namespace."""
    hints = typing.get_type_hints(config)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        settings = _flag_settings(hints[field.name])
        meaning, shown = field.metadata["help"], _shown(field.default)
        if field.default is None:
            meaning, _, stated = meaning.partition("; else ")
            shown = stated or "chosen from the data"
        limits = _limits(field)
        settings["help"] = f"{meaning} ({limits and limits + ', '}default: {shown})".replace("%", "%%")
        if field.metadata["choices"] is not None:
            settings["choices"] = list(field.metadata["choices"])
            settings["metavar"] = "|".join(settings["choices"])
        groups[title].add_argument(f"--{field.name}", default=argparse.SUPPRESS, **settings)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def _flag_settings(hint: Any) -> dict[str, Any]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if hint is bool:
        return {"action": UnderscoreBoolean, "nargs": 0}
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if inner[-1] is Ellipsis:
            return {"nargs": "*", "type": inner[0], "metavar": METAVARS[inner[0]]}
        return {"nargs": len(inner), "type": inner[0], "metavar": {2: ("LOW", "HIGH"), 3: ("X", "Y", "Z")}[len(inner)]}
    return {"type": hint, "metavar": METAVARS[hint]}


class UnderscoreBoolean(argparse.Action):
    """``--name`` and ``--no-name`` (``--no_name`` too)."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        name = option_strings[0][2:]
        super().__init__([f"--{name}", f"--no-{name}", f"--no_{name}"], dest, **settings)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, not str(option_string).startswith(("--no-", "--no_")))


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Only the flags that stand on the command line, as {name: value}; lists become tuples."""
    namespace = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(namespace).items()}
