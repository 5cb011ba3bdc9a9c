"""Train a 3D segmentation network on few labelled and many unlabelled volumes.

The embedded demo, with the supervised-only baseline beside it (about 5 minutes on two CPU cores)::

    python train_cov_dfp_3d.py

The left atrium of the UA-MT / SS-Net release, 8 of 80 training cases labelled::

    python train_cov_dfp_3d.py --dataset_name LA --dataset_path DATA --labelnum 8 --exp la8

Go on after an interruption, and two processes on one or more machines::

    python train_cov_dfp_3d.py --exp la8 --resume
    torchrun --nproc_per_node=2 train_cov_dfp_3d.py --dataset_name LA --dataset_path DATA

Where the time of a step goes, with any other flags::

    python train_cov_dfp_3d.py --profile 20

``--help`` lists all flags.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dataloaders.base import CaseSource
from dataloaders.error_text import JOB_ERRORS, message_of
from dataloaders.orientation import warn_of_unstated
from dataloaders.splits import make_test_ids, make_training_split
from myutils.announce import describe, how_to_go_on, list_files
from myutils.build import DataFacts, build_preprocess, build_source
from myutils.checkpoint import RunState, read_checkpoint
from myutils.config import RunConfig
from myutils.distributed import RankInfo, any_rank, barrier, broadcast_object, start_process_group, stop_process_group
from myutils.evaluation_cases import warn_if_moved
from myutils.finite_watch import NonFiniteLossError
from myutils.fitting import fit_to_cases, require_headers, require_sizes
from myutils.flags import SuggestingParser, add_flags, given_flags
from myutils.methods.base import METHODS
from myutils.progress import show
from myutils.rank_checks import require_equal, require_equal_states
from myutils.registry import closest_hint
from myutils.report import draw_run, evaluate_run
from myutils.resolving import resolve_config
from myutils.run_folder import claim_folder, refuse_used_name, write_json
from myutils.run_log import setup_logging
from myutils.score_table import format_table
from myutils.script_start import refusals
from myutils.step_profile import check_length, format_profile, profile_training
from myutils.stop_signals import sigterm_as_ctrl_c
from myutils.trainer import Trainer, TrainingInterrupted

logger = logging.getLogger("train")

KEPT_FROM_FLAGS = ("num_workers", "evaluate", "baseline", "dataset_path", "cache_dir", "cache_gb", "test_list")
RESUME_FLAGS = {"resume", "exp", "output_dir", "gpu", *KEPT_FROM_FLAGS}


@sigterm_as_ctrl_c()
def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, train, evaluate; exit code 0 done, 1 failed on the way, 2 refused at the start, 130 stopped."""
    description = __doc__.partition("``--help``")[0].replace("::", ":")
    parser = SuggestingParser(prog="train_cov_dfp_3d.py", usage="%(prog)s [flags]", description=description)
    add_flags(parser, RunConfig)
    given = given_flags(parser, argv)
    setup_logging(is_main=True)
    if given.get("profile"):
        if given.get("resume"):
            parser.error("--profile times a new run; leave --resume out")
        with TemporaryDirectory() as folder:
            return train(parser, given | {"output_dir": Path(folder)})
    return train(parser, given)


def train(parser: SuggestingParser, given: dict[str, Any]) -> int:
    """The job that the flags describe; exit codes as in ``main``."""
    try:
        with refusals(parser):
            trainer = prepare(given)
    except KeyboardInterrupt:
        logger.info("stopped before the first step")
        return 130
    failed = True
    try:
        run(trainer)
        failed = False
    except NonFiniteLossError as error:
        logger.error("error: %s", error)
        return 1
    except JOB_ERRORS as error:
        logger.error("error: %s\n%s", message_of(error), how_to_go_on(trainer))
        return 1
    except (TrainingInterrupted, KeyboardInterrupt) as stop:
        logger.info("%s\n%s", str(stop) or "stopped at once", how_to_go_on(trainer))
        return 130
    finally:
        stop_process_group(failed=failed)
    return 0


def prepare(given: dict[str, Any]) -> Trainer:
    """Check everything that can be checked; the run's folder is made last, so that a refused start leaves nothing."""
    config = RunConfig(**given)
    ranks, device = start_process_group(config.gpu)
    setup_logging(is_main=ranks.is_main)
    trainer = resume_run(config, given, ranks, device) if config.resume else start_run(config, ranks, device)
    if config.profile:
        check_length(trainer, config.profile)
    return trainer


def run(trainer: Trainer) -> None:
    """The whole job: train, train the baseline where asked for, evaluate both, write everything down."""
    config = trainer.state.config
    describe(trainer)
    if config.profile:
        parts = profile_training(trainer, config.profile)
        if trainer.ranks.is_main:
            sys.stdout.write(f"\n{config.profile} steps\n{format_profile(parts)}\n")
        return
    trained = {config.method: fit(trainer)}
    if config.baseline and config.method != "supervised":
        trained["supervised"] = fit(baseline_trainer(trainer))
    barrier()
    if any_rank(not (trainer.folder / "last.pt").exists(), trainer.device):
        stop_process_group()  # machines without a common folder: rank 0 evaluates alone
        if not trainer.ranks.is_main:
            return
    if config.evaluate:
        evaluate(trained, trainer)
    if trainer.ranks.is_main:
        list_files(trainer.folder)


def start_run(config: RunConfig, ranks: RankInfo, device: torch.device) -> Trainer:
    """A new run in a new folder; nothing of an older run is touched."""
    if config.exp is not None and ranks.is_main:
        refuse_used_name(config.output_dir / config.exp)
    require_test_list(config)
    source = build_source(config) if ranks.is_main else None  # what a source makes once is made by one process
    barrier()
    source = source or build_source(config)
    resolved = resolve_config(config, source)
    split = make_training_split(source, resolved.split_request())
    case_ids = (*split.labeled, *split.val, *split.unlabeled)
    require_headers(source, case_ids)
    resolved = fit_to_cases(resolved, source, split.labeled)
    require_sizes(source, case_ids, build_preprocess(resolved))
    if ranks.is_main:
        warn_of_unstated(source, case_ids, str(resolved.orientation))
    state = RunState(resolved, DataFacts.of(source), split)
    trainer = Trainer(state, source, resolved.output_dir / str(resolved.exp), ranks, device)
    trainer.read_labels()
    require_equal_states(state)
    if ranks.is_main:
        trainer.folder = claim_folder(trainer.folder, chosen=config.exp is not None)
    trainer.folder = broadcast_object(trainer.folder)
    state.config = dataclasses.replace(resolved, exp=trainer.folder.name).with_absolute_paths()
    if ranks.is_main:
        write_json(trainer.folder / "config.json", state.config.to_dict())
        write_json(trainer.folder / "split.json", split.to_dict())
    barrier()
    return trainer


def resume_run(config: RunConfig, given: dict[str, Any], ranks: RankInfo, device: torch.device) -> Trainer:
    """Go on with a run of before, with the settings stored in its checkpoint."""
    if config.exp is None:
        raise ValueError("--resume: name the run with --exp (a folder name in --output_dir)")
    folder = config.output_dir / config.exp
    if not (folder / "last.pt").is_file():
        known = sorted(path.parent.name for path in config.output_dir.glob("*/last.pt"))
        hint = closest_hint(config.exp, known) if known else f"no run in {config.output_dir} has one"
        raise FileNotFoundError(f"--resume: {folder} holds no last.pt to go on from; {hint}")
    state, tensors = read_checkpoint(folder / "last.pt")
    asked, before = config.with_absolute_paths(), state.config.with_absolute_paths()
    changed = [name for name in given if name not in RESUME_FLAGS and getattr(asked, name) != getattr(before, name)]
    if changed:
        raise ValueError(
            f"--resume: the run has {', '.join(f'--{name} {getattr(before, name)}' for name in changed)}, and keeps "
            "that; leave the flags out, or start a new --exp to change them"
        )
    taken = {name: getattr(asked, name) for name in KEPT_FROM_FLAGS if name in given}
    stored = dataclasses.replace(state.config, **taken)
    require_test_list(stored)
    source = build_source(stored)
    trained = state.facts
    require_data_of(folder, state, source)
    trainer = Trainer.resume((state, tensors), source, folder, ranks, device)
    trainer.state.config = stored
    trainer.read_labels()
    require_equal_states(trainer.state)
    if trainer.state.facts != trained and ranks.is_main:
        logger.warning(
            "the labels have changed since this run began: what they say now counts for the largest components, and "
            "best.pt was chosen by those of before; start a new --exp if it matters"
        )
    return trainer


def require_data_of(folder: Path, state: RunState, source: CaseSource) -> None:
    """Raise a ValueError where the data have other channels or classes than the run had, or lack a training case."""
    found, trained, split = DataFacts.of(source), state.facts, state.split
    if (found.class_names, found.in_channels) != (trained.class_names, trained.in_channels):
        raise ValueError(
            f"--resume: {folder} was trained on {trained.in_channels} channels and {', '.join(trained.class_names)}; "
            f"the data now have {found.in_channels} channels and {', '.join(found.class_names)}"
        )
    gone = sorted({*split.labeled, *split.unlabeled, *split.val} - set(source.case_ids()))
    if gone:
        raise ValueError(
            f"--resume: {len(gone)} training cases of {folder} are gone, the first is {gone[0]!r}; put them back, or "
            "start a new --exp without them"
        )


def require_test_list(config: RunConfig) -> None:
    """Raise a FileNotFoundError where the test list is missing: known now, not after hours. It is not read."""
    if config.evaluate and config.test_list is not None and not config.test_list.is_file():
        raise FileNotFoundError(f"--test_list {config.test_list}: there is no such file")


def baseline_trainer(trainer: Trainer) -> Trainer:
    """The supervised-only run on the same labels, steps and augmentation, in the folder ``baseline`` of the run.

    It is ``--method supervised`` with the run's other flags; deep supervision that the method alone brings stays away.
    """
    folder, config = trainer.folder / "baseline", trainer.state.config
    if (folder / "last.pt").exists():
        baseline = Trainer.resume(
            read_checkpoint(folder / "last.pt"), trainer.source, folder, trainer.ranks, trainer.device
        )
        before = baseline.state
        if (before.split.digest, before.config.seed) != (trainer.state.split.digest, config.seed):
            raise ValueError(f"{folder} holds the baseline of another run; move it away, and --resume trains a new one")
        kept = {name: getattr(config, name) for name in KEPT_FROM_FLAGS if name != "baseline"}
        before.config, before.facts = dataclasses.replace(before.config, **kept), trainer.state.facts
    else:
        brought = METHODS.get(config.method).defaults.get("deep_supervision", False)
        config = dataclasses.replace(
            config,
            method="supervised",
            use_contrastive_prototype=False,
            deep_supervision=bool(config.deep_supervision) and not brought,
            baseline=False,
            exp="baseline",
        )
        if trainer.ranks.is_main:
            folder.mkdir(exist_ok=True)
            write_json(folder / "config.json", config.to_dict())
            write_json(folder / "split.json", trainer.state.split.to_dict())
        state = RunState(config, trainer.state.facts, trainer.state.split)
        baseline = Trainer(state, trainer.source, folder, trainer.ranks, trainer.device)
    baseline.cache = trainer.cache
    return baseline


def fit(trainer: Trainer) -> Path:
    """Train to the end; returns the run's folder. An interruption says where it stopped."""
    try:
        trainer.fit()
    except TrainingInterrupted:
        state, steps = trainer.state, trainer.max_iteration
        raise TrainingInterrupted(f"stopped {state.config.method} at step {state.step} of {steps}, saved") from None
    return trainer.folder


def evaluate(trained: dict[str, Path], trainer: Trainer) -> None:
    """Score every trained run on the test cases; print the table, then draw the picture."""
    config, source, folder = trainer.state.config, trainer.source, trainer.folder
    try:
        test_ids = make_test_ids(source, config.split_request(), trainer.state.split)
    except (ValueError, FileNotFoundError) as error:
        if config.test_list is not None:  # the user's own list is wrong: no run may end as if it were scored
            raise ValueError(f"trained, but not scored: {error} (--resume takes a --test_list)") from error
        logger.warning("training is done; no evaluation: %s", error)
        return
    require_equal({"test cases": test_ids})
    if trainer.ranks.is_main:
        warn_if_moved(test_ids, folder)
    outcome = {name: evaluate_run(path, source, test_ids, trainer.device) for name, path in trained.items()}
    if not trainer.ranks.is_main:
        return
    baseline = outcome["supervised"][1] if len(outcome) > 1 else None
    table = format_table(outcome[config.method][1], baseline, name=config.method)
    show(f"\n{len(test_ids)} test cases, {config.max_iteration} steps, seed {config.seed}\n{table}\n\n")
    draw_run(folder / "overlay.png", source, trained, {name: cases for name, (cases, _) in outcome.items()})


if __name__ == "__main__":
    sys.exit(main())
