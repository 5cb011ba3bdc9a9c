"""Flags of the trainer in a comparison: common ones, and what it would refuse is refused before anything is trained."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dataloaders.base import CaseSource
from myutils.build import build_source
from myutils.config import EVALUATION, RunConfig
from myutils.fitting import fit_to_cases
from myutils.flags import SuggestingParser, add_flags, flags_of, given_flags
from myutils.resolving import resolve_config

Flags = tuple[str, ...]

# What the bench decides for every training, and what to do instead.
_INSTEAD = {
    "dataset_name": "give it before --",
    "dataset_path": "give it before --",
    "num_classes": "give it before --",
    "max_iteration": "give it before --",
    "output_dir": "give it before --",
    "method": "use --methods or --row",
    "labelnum": "use --labelnum before --",
    "labeled_list": "use --labelnum before --",
    "train_list": "use --pool or --cases",
    "test_list": "use --pool or --cases",
    "seed": "use --seeds",
    "exp": "use --row, whose name is the run's",
    "resume": "the same command goes on by itself",
    "evaluate": "all runs are scored",
    "profile": "use benchmarks.step_cost",
    "baseline": "use --methods supervised",
}
OWN = {name: f"the bench sets it for every run; {instead}" for name, instead in _INSTEAD.items()}
OWN_IN_ROWS = {"output_dir", "labelnum", "test_list", "seed", "exp", "resume", "evaluate", "profile", "baseline"}

# What no row may have of its own, for the table would not tell: why, and where it stands for all rows.
_FOR_ALL = "give it after --, for every row"
_VALIDATION = f"validation decides what all rows train on and keep; {_FOR_ALL}"
ALIKE = {
    "max_iteration": "all rows are trained for as many steps; give it before --",
    "batch_size": f"a step has as many patches in all rows; {_FOR_ALL}",
    "val_num": _VALIDATION,
    "val_list": _VALIDATION,
    **dict.fromkeys(flags_of(RunConfig, EVALUATION) - OWN.keys(), f"all rows are scored alike; {_FOR_ALL}"),
}
REFUSED_IN_ROWS = ALIKE | {name: OWN[name] for name in OWN_IN_ROWS}


def refuse(given: Mapping[str, Any], refused: Mapping[str, str], where: str) -> None:
    """Raise a ValueError, with the reason, for a flag that would change what the table says, or leave none."""
    for name in given:
        if name in refused:
            raise ValueError(f"--{name} {where}: {refused[name]}")


def read_flags(words: Sequence[str], where: str) -> dict[str, Any]:
    """Settings that flags of the trainer give, by name; an unknown flag ends the program and says ``where`` it is."""
    parser = SuggestingParser(prog=f"compare: {where}")
    add_flags(parser, RunConfig)
    return given_flags(parser, words)


def asked_config(settings: argparse.Namespace) -> RunConfig:
    """What all rows have in common."""
    given = read_flags(settings.flags, "after --")
    refuse(given, OWN, "after --")
    own = {name: getattr(settings, name) for name in ("dataset_name", "dataset_path", "num_classes")}
    return RunConfig(**own, **given)


def fitted_flags(
    settings: argparse.Namespace, config: RunConfig, source: CaseSource, pool: Sequence[str]
) -> dict[str, Flags]:
    """What a training would fit to its own labelled cases, by setting: fitted once, to those that all rows have.

    No method takes part in it; whether the flags suit that of a row is for ``check_flags`` to say.
    """
    known = set(source.labeled_ids())
    labeled = [case_id for case_id in pool if case_id in known][: min(settings.labelnum)]
    fitted = fit_to_cases(replace(config, modality=config.modality or source.modality), source, labeled)
    flags = {}
    for name in ("orientation", "flat_levels", "patch_size", "ct_range"):
        value = getattr(fitted, name)
        if getattr(config, name) is None and value is not None:
            flags[name] = (f"--{name}", *([value] if isinstance(value, str) else map(str, value)))
    return flags


def check_flags(words: Sequence[str], name: str, common: RunConfig, source: CaseSource) -> None:
    """Refuse a run that the trainer would refuse for its flags; ``source`` is that of ``common``, of all rows.

    Raises:
        ValueError: If a setting is impossible, for any data or for these.
    """
    given = read_flags(words, name)
    try:
        config, common = RunConfig(**given).with_absolute_paths(), common.with_absolute_paths()
        if (config.dataset_name, config.dataset_path) != (common.dataset_name, common.dataset_path):
            source = build_source(config)
        resolve_config(config, source)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
