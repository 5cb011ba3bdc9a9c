"""Train a 3D segmentation network on few labelled and many unlabelled volumes.

The embedded demo, with the supervised-only baseline beside it (about 5 minutes on two CPU cores)::

    python train_cov_dfp_3d.py

The left atrium of the UA-MT / SS-Net release, 8 of 80 training cases labelled::

    python train_cov_dfp_3d.py --dataset_name LA --dataset_path DATA --labelnum 8 --exp la8

Go on after an interruption, and two processes on one or more machines::

    python train_cov_dfp_3d.py --exp la8 --resume
    torchrun --nproc_per_node=2 train_cov_dfp_3d.py --dataset_name LA --dataset_path DATA

``--help`` lists all flags.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dataloaders.base import CaseSource
from dataloaders.splits import make_test_ids, make_training_split
from myutils.build import DataFacts, build_source, resolve_config
from myutils.checkpoint import RunState, read_checkpoint
from myutils.config import RunConfig
from myutils.distributed import RankInfo, barrier, broadcast_object, start_process_group, stop_process_group
from myutils.evaluation import format_table
from myutils.flags import SuggestingParser, add_flags, given_flags
from myutils.report import draw_run, evaluate_run, result_checkpoint
from myutils.run_log import setup_logging
from myutils.trainer import NonFiniteLossError, Trainer, TrainingInterrupted

logger = logging.getLogger("train")

RESUME_FLAGS = {"resume", "exp", "output_dir", "gpu", "num_workers", "evaluate", "baseline"}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, train, evaluate; returns the exit code (0 done, 1 failed, 2 wrong flags, 130 interrupted)."""
    parser = SuggestingParser(prog="train_cov_dfp_3d.py", description=__doc__.splitlines()[0])
    add_flags(parser, RunConfig)
    given = given_flags(parser, argv)
    setup_logging(is_main=True)
    try:
        config = RunConfig(**given)
    except ValueError as error:
        parser.error(str(error))
    try:
        ranks, device = start_process_group(config.gpu)
        setup_logging(is_main=ranks.is_main)
        run(config, given, ranks, device)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except (NonFiniteLossError, OSError) as error:
        logger.error("%s", error)
        return 1
    except TrainingInterrupted as stop:
        logger.info("%s", stop)
        return 130
    finally:
        stop_process_group()
    return 0


def run(config: RunConfig, given: dict[str, Any], ranks: RankInfo, device: torch.device) -> None:
    """The whole job: train, train the baseline where asked for, evaluate both, write everything down."""
    trainer, source = resume_run(config, given, ranks, device) if config.resume else start_run(config, ranks, device)
    config = trainer.state.config
    describe(trainer, source)
    trained = {config.method: fit(trainer)}
    if config.baseline and config.method != "supervised":
        trained["supervised"] = fit(baseline_trainer(trainer, source))
    if config.evaluate and ranks.is_main:
        evaluate(trained, config, source, device)
    barrier()


def start_run(config: RunConfig, ranks: RankInfo, device: torch.device) -> tuple[Trainer, CaseSource]:
    """A new run in a new folder; nothing of an older run is touched."""
    if ranks.is_main:
        build_source(config)  # what a source makes once is made by one process
    barrier()
    source = build_source(config)
    resolved = resolve_config(config, source)
    split = make_training_split(source, resolved.split_request())
    state = RunState(resolved, DataFacts.of(source), split)
    folder = resolved.output_dir / str(resolved.exp)
    if ranks.is_main:
        folder = free_folder(folder, chosen=config.exp is not None)
    folder = broadcast_object(folder)
    state.config = dataclasses.replace(resolved, exp=folder.name)
    trainer = Trainer(state, source, folder, ranks, device)
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", state.config.to_dict())
        write_json(folder / "split.json", split.to_dict())
    barrier()
    return trainer, source


def resume_run(
    config: RunConfig, given: dict[str, Any], ranks: RankInfo, device: torch.device
) -> tuple[Trainer, CaseSource]:
    """Go on with a run of before, with the settings stored in its checkpoint."""
    if config.exp is None:
        raise ValueError("--resume: name the run with --exp (a folder name in --output_dir)")
    folder = config.output_dir / config.exp
    state, _ = read_checkpoint(folder / "last.pt", torch.device("cpu"))
    changed = [
        name for name, value in given.items() if name not in RESUME_FLAGS and value != getattr(state.config, name)
    ]
    if changed:
        raise ValueError(
            f"--resume: {', '.join('--' + name for name in changed)} differ from the stored run's; a resumed run keeps "
            "its settings, start a new --exp to change them"
        )
    source = build_source(state.config)
    if DataFacts.of(source) != state.facts:
        raise ValueError(f"--resume: the data set has changed since {folder} was trained: {DataFacts.of(source)}")
    trainer = Trainer.resume(source, folder, ranks, device)
    kept = {name: given[name] for name in ("num_workers", "evaluate", "baseline") if name in given}
    trainer.state.config = dataclasses.replace(trainer.state.config, **kept)
    return trainer, source


def baseline_trainer(trainer: Trainer, source: CaseSource) -> Trainer:
    """The supervised-only run on the same labels, steps and augmentation, in the folder ``baseline`` of the run."""
    folder = trainer.folder / "baseline"
    if (folder / "last.pt").exists():
        return Trainer.resume(source, folder, trainer.ranks, trainer.device)
    config = dataclasses.replace(
        trainer.state.config, method="supervised", use_contrastive_prototype=False, baseline=False, exp="baseline"
    )
    if trainer.ranks.is_main:
        folder.mkdir(exist_ok=True)
        write_json(folder / "config.json", config.to_dict())
    state = RunState(config, trainer.state.facts, trainer.state.split)
    return Trainer(state, source, folder, trainer.ranks, trainer.device)


def fit(trainer: Trainer) -> Path:
    """Train to the end; returns the run's folder. An interruption says how to go on."""
    try:
        trainer.fit()
    except TrainingInterrupted:
        top = trainer.folder.parent if trainer.folder.name == "baseline" else trainer.folder
        raise TrainingInterrupted(
            f"stopped at step {trainer.state.step} of {trainer.max_iteration}, saved. Go on with:\n"
            f"  python train_cov_dfp_3d.py --output_dir {top.parent} --exp {top.name} --resume"
        ) from None
    return trainer.folder


def evaluate(trained: dict[str, Path], config: RunConfig, source: CaseSource, device: torch.device) -> None:
    """Score every trained run on the test cases; print the table and the paths of all files."""
    folder = trained[config.method]
    split = read_checkpoint(result_checkpoint(folder), torch.device("cpu"))[0].split
    try:
        test_ids = make_test_ids(source, config.split_request(), split)
    except (ValueError, FileNotFoundError) as error:
        logger.warning("training is done; no evaluation: %s", error)
        return
    outcome = {name: evaluate_run(path, source, test_ids, device) for name, path in trained.items()}
    results = {name: cases for name, (cases, _) in outcome.items()}
    draw_run(folder / "overlay.png", source, trained, results, source.class_names)
    baseline = outcome["supervised"][1] if len(outcome) > 1 else None
    table = format_table(outcome[config.method][1], baseline, name=config.method)
    sys.stdout.write(f"\n{len(test_ids)} test cases, {config.max_iteration} steps, seed {config.seed}\n{table}\n\n")
    for title, path in {
        "checkpoint": result_checkpoint(folder),
        "per-case figures": folder / "test" / "cases.csv",
        "summary": folder / "test" / "summary.json",
        "predictions": folder / "test" / "predictions",
        "picture": folder / "overlay.png",
        "TensorBoard": folder / "tensorboard",
    }.items():
        sys.stdout.write(f"{title:18s}{path}\n")


def describe(trainer: Trainer, source: CaseSource) -> None:
    """Say what is about to happen."""
    state = trainer.state
    config, split = state.config, state.split
    prototypes = ", with the contrastive prototype manager" if trainer.method.prototypes is not None else ""
    logger.info("data: %s, %d classes, %s", config.dataset_name, source.num_classes, ", ".join(source.class_names[1:]))
    logger.info(
        "cases: %d labelled, %d unlabelled, %d validation (split %s)",
        len(split.labeled),
        len(split.unlabeled),
        len(split.val),
        split.digest[:12],
    )
    logger.info("method: %s on %s%s", config.method, config.model, prototypes)
    logger.info(
        "steps: %d to %d, batch %d (%d labelled), patch %s, autocast %s",
        state.step,
        trainer.max_iteration,
        config.batch_size,
        config.labeled_bs,
        "x".join(map(str, config.patch_size or ())),
        trainer.amp,
    )
    logger.info("run: %s", trainer.folder)


def free_folder(folder: Path, *, chosen: bool) -> Path:
    """``folder`` if it holds no run yet; else the next free number, or an error where the user chose the name."""
    if not (folder / "config.json").exists():
        return folder
    if chosen:
        raise ValueError(
            f"--exp {folder.name}: {folder} holds a run already; add --resume to go on with it, or choose another name"
        )
    number = 2
    while (folder.with_name(f"{folder.name}_{number}") / "config.json").exists():
        number += 1
    return folder.with_name(f"{folder.name}_{number}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
