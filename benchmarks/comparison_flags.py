"""Flags of the trainer in a comparison: what it would refuse is refused before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from benchmarks.comparison_runs import Run
from dataloaders.base import CaseSource
from myutils.build import build_source, resolve_config
from myutils.config import RunConfig
from myutils.flags import SuggestingParser, add_flags, given_flags

# What the bench decides for every training, and what to do instead.
OWN = {
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
OWN_IN_ROWS = {"output_dir", "labelnum", "test_list", "seed", "exp", "resume", "evaluate", "profile", "baseline"}


def refuse_own(given: Collection[str], own: Collection[str], where: str) -> None:
    """Raise a ValueError for a flag that the bench sets itself: it would change what the table says, or leave none."""
    for name in given:
        if name in own:
            raise ValueError(f"--{name} {where}: the bench sets it for every run; {OWN[name]}")


def read_flags(words: Sequence[str], where: str) -> dict[str, Any]:
    """Settings that flags of the trainer give, by name; an unknown flag ends the program and says ``where`` it is."""
    parser = SuggestingParser(prog=f"compare: {where}")
    add_flags(parser, RunConfig)
    return given_flags(parser, words)


def check_flags(run: Run, common: RunConfig, source: CaseSource) -> None:
    """Refuse a run that the trainer would refuse for its flags; ``source`` is that of ``common``, of all rows.

    Raises:
        ValueError: If a setting is impossible, for any data or for these.
    """
    given = read_flags(run.flags, run.folder.name)
    try:
        config, common = RunConfig(**given).with_absolute_paths(), common.with_absolute_paths()
        if (config.dataset_name, config.dataset_path) != (common.dataset_name, common.dataset_path):
            source = build_source(config)
        resolve_config(config, source)
    except ValueError as error:
        raise ValueError(f"{run.folder.name}: {error}") from error
