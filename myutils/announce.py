"""What a training tells its user: what is about to happen, what it wrote, and how to go on after an error."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path

from dataloaders.case_lists import some
from dataloaders.class_names import sided_names
from myutils.build import kept_components
from myutils.components import name_kept_components
from myutils.evaluation_folder import CASES, PREDICTIONS, SUMMARY
from myutils.progress import show
from myutils.report import result_checkpoint
from myutils.trainer import Trainer

logger = logging.getLogger("train")


def list_files(folder: Path) -> None:
    """Print the path of everything that the run wrote."""
    for title, path in {
        "checkpoint": result_checkpoint(folder),
        "per-case figures": folder / "test" / CASES,
        "summary": folder / "test" / SUMMARY,
        "predictions": folder / "test" / PREDICTIONS,
        "picture": folder / "overlay.png",
        "baseline": folder / "baseline",
        "TensorBoard": folder / "tensorboard",
    }.items():
        if path.exists():
            show(f"{title:18s}{path}\n")


def describe(trainer: Trainer) -> None:
    """Say what is about to happen."""
    state, source = trainer.state, trainer.source
    config, split = state.config, state.split
    prototypes = ", with the contrastive prototype manager" if trainer.method.prototypes is not None else ""
    cases = f"{len(split.labeled)} labelled, {len(split.unlabeled)} unlabelled, {len(split.val)} validation"
    kind = f"{str(config.modality).upper()} with {source.in_channels} channel{'s' * (source.in_channels > 1)}"
    classes = f"{source.num_classes} classes, {', '.join(source.class_names[1:])}"
    logger.info("data: %s, %s, %s", config.dataset_name, kind, classes)
    logger.info("cases: %s (split %s)", cases, split.digest[:12])
    if config.ct_range is not None:
        logger.info("intensities: CT, clipped to %g..%g (--ct_range)", *config.ct_range)
    name_kept_components(kept_components(config, state.facts), source.class_names)
    levels = trainer.method.student.flat_levels
    flat = f", flat levels {' '.join(map(str, levels))}" if any(levels) else ""
    logger.info("method: %s on %s%s%s", config.method, config.model, flat, prototypes)
    if state.step == trainer.max_iteration:
        logger.info("steps: all %d are done", state.step)
    else:
        steps = f"{state.step} to {trainer.max_iteration}, batch {config.batch_size} ({trainer.labeled_bs} labelled)"
        patch = "x".join(map(str, config.patch_size or ()))
        logger.info("steps: %s, patch %s, autocast %s", steps, patch, trainer.amp)
        stored = [f"the {number} stored axis" for number in ("first", "second", "third")]
        axes = "XYZ" if config.orientation == "ras" else stored
        mirrored = " and ".join(axes[axis] for axis in config.flip_axes or ()) or "no axis"
        logger.info("patches are mirrored along %s (--flip_axes)", mirrored)
        sided = sided_names(source.class_names)
        if sided and config.orientation == "ras" and 0 in (config.flip_axes or ()):
            text = "mirrored, %s is on the other side: if scans show the one of there too, pass --flip_axes without 0"
            logger.warning(text, some(sided))
    logger.info("run: %s", trainer.folder)
    _name_limits(trainer)


def _name_limits(trainer: Trainer) -> None:
    """Warn of settings that cannot have their effect beside the others."""
    config, method = trainer.state.config, trainer.method
    views = config.strong_views or 1
    if method.uses_strong_views and views > 1 and method.views_at(0) == 1:
        text = "--strong_views %d: no intensity, box or dropped channel tells a patch's views apart; one is learned"
        logger.warning(text, views)
    drawn = None if method.prototypes is None else method.prototypes.quota(2 if method.uses_unlabeled else 1)
    if drawn is not None and config.elements_per_class > drawn:
        text = "--elements_per_class %d: never full, a step draws %d labelled voxels a class (--prototype_samples %d)"
        logger.warning(text, config.elements_per_class, drawn, config.prototype_samples)


def how_to_go_on(trainer: Trainer) -> str:
    """The command that goes on from the run's last checkpoint, be it with the training or with the evaluation."""
    if trainer.state.config.profile:
        return "A profile keeps nothing: start it again"
    if not (trainer.folder / "last.pt").exists():
        return f"Nothing was saved: delete {trainer.folder} and start again"
    words = [*_program(), "--output_dir", str(trainer.folder.parent), "--exp", trainer.folder.name, "--resume"]
    return f"Go on from the last checkpoint with:\n  {shlex.join(words)}"


def _program() -> list[str]:
    """What this process was started as: the script by its path, or the command that ``pip install`` made."""
    started = Path(sys.argv[0])
    if started.name == "covdfp-train":
        return [started.name]
    return ["python", str(started) if started.name == "train_cov_dfp_3d.py" else "train_cov_dfp_3d.py"]
