"""Scores of a network on labelled cases, on each case's own grid, and their summary with counts."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataloaders.base import CaseSource, Volume
from dataloaders.case_lists import some
from dataloaders.checked_cases import KeptCases
from dataloaders.error_text import pass_on_device_error, reason_of
from dataloaders.orientation import axis_directions
from dataloaders.preprocess import Preprocess
from dataloaders.say_once import warn_once
from myutils.components import largest_component
from myutils.distributed import is_main_rank, join_shares, own_share
from myutils.inference import SCAN_ERRORS, InferenceOptions, predict_label_map
from myutils.label_files import is_default_place, save_label_map
from myutils.metrics import CaseMetrics, segmentation_metrics
from myutils.progress import ProgressBar
from networks.base import Segmenter

logger = logging.getLogger(__name__)

LARGEST_SHEAR = 1.0  # degrees off right angles that distances may ignore
METRICS = CaseMetrics._fields


@dataclass(frozen=True)
class CaseResult:
    """Figures of one case; the keys of the three tables are the foreground class ids.

    Attributes:
        case_id: Name of the case.
        metrics: Overlap and distances per class.
        truth_ml: Reference volume per class in millilitres.
        prediction_ml: Predicted volume per class in millilitres.
        patient: Whom the case shows; its own id where no other case shows the same.
    """

    case_id: str
    metrics: dict[int, CaseMetrics]
    truth_ml: dict[int, float]
    prediction_ml: dict[int, float]
    patient: str


class DamagedCasesError(ValueError):
    """Some cases could not be scored; ``results`` holds those that could."""

    def __init__(self, reasons: Mapping[str, str], results: list[CaseResult]) -> None:
        alike: dict[str, list[str]] = {}
        for case_id, reason in reasons.items():
            alike.setdefault(reason.removeprefix(f"case {case_id}: "), []).append(case_id)
        named = {reason: f"case {ids[0]}" if len(ids) == 1 else f"cases {some(ids)}" for reason, ids in alike.items()}
        shown = "; ".join(f"{who}: {reason}" for reason, who in named.items())
        super().__init__(f"{len(reasons)} of {len(reasons) + len(results)} cases cannot be scored: {shown}")
        self.results = results


def evaluate_cases(
    network: Segmenter,
    source: CaseSource | KeptCases,
    case_ids: Sequence[str],
    preprocess: Preprocess,
    inference: InferenceOptions,
    device: torch.device,
    *,
    keep_largest: Collection[int] = (),
    save_dir: Path | None = None,
    progress: bool = True,
) -> list[CaseResult]:
    """Predict and score cases one after another; labels are read here and nowhere else.

    Several ranks share the cases out: each must call this, and each gets the results of all.

    Args:
        network: On ``device``; its training mode is restored after each case.
        source: Data set with labels for all of ``case_ids``.
        case_ids: Cases to score, in the order of the result.
        preprocess: What the network saw in training; predictions return to the case's own grid before scoring.
        inference: Windows, overlap, flips, precision.
        device: Where the network runs.
        keep_largest: Classes of which the largest connected component alone is kept.
        save_dir: Folder for ``<case>.nii.gz``; None to save nothing.
        progress: Show a progress bar.

    Raises:
        ValueError: If no case is given.
        DeviceError: If the GPU failed.
        DamagedCasesError: If a file is missing or damaged, a case too large for the memory, or a prediction not
            finite; names every such case, after all others are scored. On every rank.
    """
    if not case_ids:
        raise ValueError("no case to evaluate; the split is empty")
    cases = source if isinstance(source, KeptCases) else KeptCases(source, limit_bytes=0)
    outcomes: list[CaseResult | str] = []  # or why the case cannot be scored
    hidden = not (progress and is_main_rank())
    for case_id in ProgressBar(own_share(case_ids), desc="evaluate", unit="case", disable=hidden):
        try:
            volume = cases.load(case_id)
            label_map = predict_label_map(network, volume, preprocess, inference, device)
            label_map = largest_component(label_map, keep_largest)
            outcomes.append(score_case(volume, label_map, network.num_classes, cases.patient(case_id)))
        except SCAN_ERRORS as error:
            pass_on_device_error(error)
            outcomes.append(reason_of(error))
            continue
        if save_dir is not None:
            # a header is read again only where it may state nothing
            placed = not is_default_place(volume.affine, label_map.shape) or cases.states_orientation(case_id)
            save_label_map(save_dir / f"{case_id}.nii.gz", label_map, volume.affine, placed=placed)
    joined = list(zip(case_ids, join_shares(outcomes), strict=True))
    results = [outcome for _, outcome in joined if isinstance(outcome, CaseResult)]
    reasons = {case_id: outcome for case_id, outcome in joined if isinstance(outcome, str)}
    if reasons:
        raise DamagedCasesError(reasons, results)
    return results


def score_case(volume: Volume, label_map: np.ndarray, num_classes: int, patient: str) -> CaseResult:
    """Compare a label map (X, Y, Z) with the label of ``volume``, spacing and voxel volume from the volume itself.

    Note:
        Distances take the axes for perpendicular, with a warning where they are not.
    """
    if volume.label is None:
        raise ValueError(f"case {volume.case_id} has no label; only labelled cases can be evaluated")
    metrics = segmentation_metrics(label_map, volume.label, num_classes=num_classes, spacing=volume.spacing)
    directions = axis_directions(volume.affine)
    shear = math.degrees(math.asin(min(1.0, np.abs(directions.T @ directions - np.eye(3)).max())))
    if shear > LARGEST_SHEAR:
        warn_once(
            logger,
            f"case {volume.case_id}: its axes are {shear:.0f} degrees off right angles, as of a tilted gantry, which "
            "distances in mm ignore; resample it to perpendicular axes",
        )
    voxel_ml = math.prod(volume.spacing) * abs(float(np.linalg.det(directions))) / 1000.0
    truth, prediction = (np.bincount(ids.ravel(), minlength=num_classes) for ids in (volume.label, label_map))
    return CaseResult(
        case_id=volume.case_id,
        metrics=metrics,
        truth_ml={class_id: float(truth[class_id] * voxel_ml) for class_id in metrics},
        prediction_ml={class_id: float(prediction[class_id] * voxel_ml) for class_id in metrics},
        patient=patient,
    )


def summarise(results: Sequence[CaseResult], class_names: Sequence[str]) -> dict[str, Any]:
    """Mean, sd, n and n_missed of every metric, per class and over the classes; valid JSON without inf and nan.

    Returns:
        ``{"n_cases": N, "classes": {"1": {"name": ..., "dice": S, ...}, ...}, "mean": {"dice": S, ...}, "absent":
        ["3", ...]}`` with ``S = {"mean", "sd", "n", "n_missed"}``. The mean is that of the ``n`` finite values, None if
        there are none; sd is that of a sample (n - 1), None below two values; ``n_missed`` counts the infinite
        distances. ``"mean"`` first averages each case over its finite classes, then over the cases; its ``n_missed``
        counts pairs of case and class. It leaves the ``"absent"`` classes out, which no case shows: their figures say
        nothing, 1 where none is predicted and 0 where one voxel is.
    """
    if not results:
        raise ValueError("no result to summarise; evaluate at least one case")
    classes: dict[str, Any] = {}
    for class_id in results[0].metrics:
        rows = [result.metrics[class_id] for result in results]
        figures = {metric: _statistics([getattr(row, metric) for row in rows]) for metric in METRICS}
        classes[str(class_id)] = {"name": class_names[class_id], **figures}
    mean, shown = {}, shown_classes(results)
    for metric in METRICS:
        per_case = [[getattr(result.metrics[class_id], metric) for class_id in shown] for result in results]
        finite = [[value for value in values if math.isfinite(value)] for values in per_case]
        mean[metric] = _statistics([float(np.mean(values)) for values in finite if values])
        mean[metric]["n_missed"] = sum(len(a) - len(b) for a, b in zip(per_case, finite, strict=True))
    absent = [str(class_id) for class_id in results[0].metrics if class_id not in shown]
    return {"n_cases": len(results), "classes": classes, "mean": mean, "absent": absent}


def shown_classes(results: Sequence[CaseResult]) -> list[int]:
    """The classes that a reference shows in any of the cases; all of them where none is shown."""
    classes = list(results[0].metrics)
    return [k for k in classes if any(result.truth_ml[k] > 0 for result in results)] or classes


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    finite = [value for value in values if math.isfinite(value)]
    return {
        "mean": float(np.mean(finite)) if finite else None,
        "sd": float(np.std(finite, ddof=1)) if len(finite) > 1 else None,
        "n": len(finite),
        "n_missed": len(values) - len(finite),
    }
