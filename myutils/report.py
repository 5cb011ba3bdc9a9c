"""The end of a run: scores of the test cases, files, one picture, and the table beside the baseline's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from dataloaders.base import CaseSource
from dataloaders.splits import ids_digest
from myutils.build import build_inference, kept_components
from myutils.checkpoint import load_for_inference
from myutils.distributed import resolve_amp
from myutils.evaluation import CaseResult, shown_classes
from myutils.evaluation_folder import PREDICTIONS, score_into
from myutils.overlay import OverlayCase, save_overlay
from myutils.run_log import read_metrics

logger = logging.getLogger(__name__)

_SHOWN_CASES = 3


def result_checkpoint(folder: Path) -> Path:
    """The checkpoint that counts: ``best.pt`` where validation chose one, else ``last.pt``."""
    best = folder / "best.pt"
    return best if best.exists() else folder / "last.pt"


def evaluate_run(
    folder: Path, source: CaseSource, case_ids: Sequence[str], device: torch.device
) -> tuple[list[CaseResult], dict[str, Any]]:
    """Score the run's checkpoint on ``case_ids``; writes ``test/cases.csv``, ``summary.json`` and predictions.

    Returns:
        Results per case and their summary.

    Raises:
        ValueError: If cases cannot be scored; ``cases.csv`` then holds the others, and there is no summary.
    """
    checkpoint = result_checkpoint(folder)
    bundle = load_for_inference(checkpoint, device)
    return score_into(
        folder / "test",
        bundle,
        source,
        case_ids,
        build_inference(bundle.config, resolve_amp(bundle.config.amp, device)),
        device,
        keep_largest=kept_components(bundle.config, bundle.facts),
        about={
            "checkpoint": checkpoint.name,
            "step": bundle.step,
            "split_digest": bundle.split.digest,
            "test_ids": list(case_ids),
            "test_digest": ids_digest(case_ids),
        },
        advice="mend them, or leave them out with --test_list",
    )


def draw_run(path: Path, source: CaseSource, runs: dict[str, Path], results: dict[str, list[CaseResult]]) -> None:
    """One picture of a few test cases: image, truth, each run's prediction with its Dice, and the loss curves.

    Args:
        path: PNG to write.
        source: For images, labels and the names of classes.
        runs: Folder of each run by the name to show.
        results: Scores of each run by the same names, cases in the same order.
    """
    cases = []
    first = next(iter(results.values()))
    shown = shown_classes(first)
    for index in np.unique(np.linspace(0, len(first) - 1, _SHOWN_CASES).round().astype(int)):
        case_id = first[index].case_id
        volume = source.load(case_id, with_label=True)
        maps = {"truth": np.asarray(volume.label)}
        notes = {}
        for name, folder in runs.items():
            stored: Any = nib.load(folder / "test" / PREDICTIONS / f"{case_id}.nii.gz")
            maps[name] = np.asarray(stored.dataobj).astype(np.uint8)
            dice = np.mean([results[name][index].metrics[k].dice for k in shown])
            notes[name] = f"Dice {100 * dice:.1f} %"
        cases.append(OverlayCase(case_id, volume.image[0], maps, volume.spacing, notes))
    curves = {name: read_metrics(folder, "Loss/supervised") for name, folder in runs.items()}
    save_overlay(path, cases, class_names=source.class_names, loss_curves=curves)
