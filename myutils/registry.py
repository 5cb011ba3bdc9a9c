"""Registries: one decorator makes a class reachable under its command-line name."""

from __future__ import annotations

import difflib
import importlib
import logging
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Generic, TypeVar

from dataloaders.error_text import reason_of

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to classes, filled by importing every module of a package.

    A new data set, network or method is one new file in its package: the file is found and imported on the
    first look-up, and its ``@REGISTRY.register("name")`` adds it. One that cannot be imported is a warning: it takes
    none of the others away.

    Args:
        kind: What is registered, for error messages ("method").
        package: Dotted name of the package whose modules register themselves.
        base: What every class is derived from.
    """

    def __init__(self, kind: str, package: str, base: type) -> None:
        self.kind = kind
        self._package, self._base = package, base
        self._entries: dict[str, T] = {}
        self._loaded = False
        self._faults: list[str] = []

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator that files the class under ``name``.

        Raises:
            ValueError: If the name is taken, or the class is not derived from the base or leaves a part of it out.
        """

        def add(entry: T) -> T:
            if fault := self._fault_of(name, entry):
                raise ValueError(f"{self.kind} {name!r} {fault}")
            self._entries[name] = entry
            return entry

        return add

    def _fault_of(self, name: str, entry: T) -> str | None:
        if name in self._entries:
            return "is registered twice; choose another name"
        if not (isinstance(entry, type) and issubclass(entry, self._base)):
            return f"is no {self._base.__name__}; derive its class from this one"
        if absent := sorted(getattr(entry, "__abstractmethods__", ())):
            return f"is {entry.__name__} without {', '.join(absent)}; write each as in {self._base.__name__}"
        return None

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package: ModuleType = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            name = f"{self._package}.{module.name}"
            try:
                importlib.import_module(name)
            except Exception as error:  # whatever a file of somebody's may raise
                self._faults.append(f"{name} cannot be imported: {reason_of(error)}")
                logger.warning("%s", self._faults[-1])

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """The class registered as ``name``.

        Raises:
            ValueError: If the name is unknown; the message lists the known names and the closest one.
        """
        self._load()
        if name in self._entries:
            return self._entries[name]
        raise ValueError("; ".join([f"unknown {self.kind} {name!r}", *self._faults, closest_hint(name, self.names())]))


def closest_hint(name: str, known: list[str]) -> str:
    """A sentence for error messages: the closest known name, if any, and the whole list."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
