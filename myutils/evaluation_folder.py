"""The folder of an evaluation: its files, and whose results it holds, so that no other evaluation overwrites them."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dataloaders.base import CaseSource
from dataloaders.case_lists import some
from dataloaders.checked_cases import warn_of_odd_voxels
from dataloaders.orientation import warn_of_unstated
from myutils.checkpoint import InferenceBundle
from myutils.distributed import is_main_rank
from myutils.evaluation import METRICS, CaseResult, DamagedCasesError, evaluate_cases, summarise
from myutils.inference import InferenceOptions
from myutils.whole_files import whole_file

logger = logging.getLogger(__name__)

ABOUT = "evaluation.json"  # whose they are, written before the first of them
CASES = "cases.csv"
SUMMARY = "summary.json"  # says so too, written last, where all cases could be scored
PREDICTIONS = "predictions"
CSV_COLUMNS = ("case", "class", *METRICS, "truth_ml", "prediction_ml", "class_name", "patient")


def score_into(
    folder: Path,
    bundle: InferenceBundle,
    source: CaseSource,
    case_ids: Sequence[str],
    inference: InferenceOptions,
    device: torch.device,
    *,
    keep_largest: Collection[int],
    about: dict[str, Any],
    advice: str,
) -> tuple[list[CaseResult], dict[str, Any]]:
    """Score cases and write a folder's ``PREDICTIONS``, ``CASES`` and, in the end, ``SUMMARY``.

    Args:
        folder: Of the results; need not exist.
        bundle: The network, on ``device``, and how it was trained.
        source: Data set with labels for all of ``case_ids``.
        case_ids: Cases to score.
        inference: Windows, overlap, flips, precision.
        device: Where the network runs.
        keep_largest: Classes of which the largest connected component alone is kept.
        about: What the summary tells beside the scores.
        advice: What to do about damaged cases.

    Returns:
        Results per case and their summary, on every rank.

    Raises:
        DamagedCasesError: If cases cannot be scored; ``CASES`` then holds the others, and there is no summary.
        DeviceError: If the GPU failed.
    """
    if is_main_rank():
        warn_of_odd_voxels(source, case_ids)
        warn_of_unstated(source, case_ids, bundle.preprocess.orientation)
    try:
        results = evaluate_cases(
            bundle.network,
            source,
            case_ids,
            bundle.preprocess,
            inference,
            device,
            keep_largest=keep_largest,
            save_dir=folder / PREDICTIONS,
        )
    except DamagedCasesError as error:
        error.args = (_keep_the_others(folder, error, bundle.class_names, advice),)
        raise
    summary = summarise(results, bundle.class_names) | about
    if is_main_rank():
        write_scores(folder, results, bundle.class_names)
        write_summary_json(folder / SUMMARY, summary)
    return results, summary


def _keep_the_others(folder: Path, error: DamagedCasesError, class_names: Sequence[str], advice: str) -> str:
    """Write the scores of the cases that could be scored, without a summary; returns what is to be said of it."""
    if not error.results:
        return f"{error}; nothing was scored, and nothing in {folder} was changed"
    if is_main_rank():
        write_scores(folder, error.results, class_names)
        (folder / SUMMARY).unlink(missing_ok=True)  # that of an evaluation before
    return f"{error}; {folder / CASES} holds the others, there is no summary: {advice}"


def write_scores(folder: Path, results: Sequence[CaseResult], class_names: Sequence[str]) -> None:
    """Write ``CASES`` of a folder, and leave no label map of a case that only an evaluation before scored."""
    _drop_old_predictions(folder, results)
    write_cases_csv(folder / CASES, results, class_names)


def _drop_old_predictions(folder: Path, results: Iterable[CaseResult]) -> None:
    """Delete label maps of cases that ``CASES`` of before names and ``results`` do not.

    What no evaluation scored stays, for ``PREDICTIONS`` may hold files of the user's own.
    """
    before: set[str | None] = set()
    with suppress(OSError, UnicodeError, csv.Error), (folder / CASES).open(newline="", encoding="utf-8") as file:
        before = {row.get("case") for row in csv.DictReader(file)}
    gone = sorted(case_id for case_id in before - {result.case_id for result in results} if case_id)
    files = [path for case_id in gone if (path := folder / PREDICTIONS / f"{case_id}.nii.gz").is_file()]
    for path in files:
        path.unlink()
    if files:
        names = some([path.name for path in files])
        logger.info("%s: removed label maps of cases that are no longer scored: %s", files[0].parent, names)


def write_cases_csv(path: Path, results: Iterable[CaseResult], class_names: Sequence[str]) -> None:
    """One row per case and class, columns ``CSV_COLUMNS``; a distance to an empty mask is ``inf``."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for result in results:
            for class_id, metrics in result.metrics.items():
                figures = (*metrics, result.truth_ml[class_id], result.prediction_ml[class_id])
                cells = [f"{figure:.6g}" for figure in figures]
                writer.writerow([result.case_id, class_id, *cells, class_names[class_id], result.patient])


def write_summary_json(path: Path, summary: Mapping[str, Any]) -> None:
    """Write a summary as strict JSON; a figure that JSON cannot hold is an error."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def refuse_other_results(folder: Path, about: Mapping[str, Any]) -> None:
    """Check that the folder is empty, or of an evaluation of the same checkpoints, data and cases.

    Runs of one name are told apart by the ``split_digest`` of what they trained on. Where damaged cases ended an
    evaluation of before, other cases may follow: a list may leave the damaged ones out.

    Args:
        folder: Where the results shall go.
        about: What shall be scored, as ``ABOUT`` will hold it: ``checkpoint`` (paths, joined by commas), ``split``,
            ``split_digest``, ``cases_digest``, ``case_list`` and ``dataset_path``.

    Raises:
        ValueError: If it holds other results, or a file that does not tell whose they are.
    """
    path = next((path for name in (ABOUT, SUMMARY) if (path := folder / name).is_file()), folder / ABOUT)
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        scored = before.get("checkpoint", "")
    except (ValueError, AttributeError) as error:  # cut off by a full disk, or of another program
        raise ValueError(f"{path} cannot be read ({error}); delete it, or pass another --output_dir") from error
    if not scored:
        return
    before = {**about, **before}  # those of older versions lack some
    damaged = (folder / CASES).is_file() and not (folder / SUMMARY).is_file()
    if other := _other_results(before, about, damaged=damaged):
        raise ValueError(f"{folder} holds the results {other}; pass another --output_dir, or delete it")


def _other_results(before: Mapping[str, Any], about: Mapping[str, Any], *, damaged: bool) -> str | None:
    """Whose results ``before`` tells of, where they are not those of ``about``."""
    runs = [[Path(name).parts[-2:] for name in told["checkpoint"].split(", ")] for told in (before, about)]
    if runs[0] != runs[1] or before["split_digest"] != about["split_digest"]:  # run and file, for it may have moved
        return f"of {before['checkpoint']}"
    if before["split"] != about["split"]:
        return f"of --split {before['split']}"
    data = [told["dataset_path"] for told in (before, about)]
    if all(data) and Path(data[0]).resolve() != Path(data[1]):
        return f"on {data[0]}, not on {data[1]}"
    if not damaged and before["cases_digest"] != about["cases_digest"]:
        return f"on other cases, those of {before['case_list'] or 'the checkpoint'}"
    return None
