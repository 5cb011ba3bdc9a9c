"""Which cases an evaluation scores, and whether data and checkpoint fit: no training patient is a test patient."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from dataloaders.base import CaseSource
from dataloaders.case_lists import read_case_list, some
from dataloaders.checked_cases import readable_grids
from dataloaders.orientation import note_stored_axes, stated_axes
from dataloaders.splits import SplitRequest, TrainingSplit, make_test_ids, of_patients
from myutils.checkpoint import InferenceBundle
from myutils.evaluation_folder import SUMMARY

logger = logging.getLogger(__name__)

SPLITS = ("test", "val", "all")


def require_match(source: CaseSource, bundle: InferenceBundle) -> None:
    """Check that the data have the checkpoint's channels and classes; other names for the classes give a warning.

    Raises:
        ValueError: If a number differs.
    """
    for what, found, trained in (
        ("image channels", source.in_channels, bundle.in_channels),
        ("classes with the background", source.num_classes, bundle.num_classes),
    ):
        if found != trained:
            raise ValueError(
                f"the data have {found} {what}, the checkpoint was trained on {trained}; "
                "evaluate data of the same channels and classes"
            )
    if tuple(source.class_names) != tuple(bundle.class_names):
        logger.warning(
            "class names differ: %s in the data, %s in the checkpoint; ids are compared as they are",
            ", ".join(source.class_names),
            ", ".join(bundle.class_names),
        )


def is_training_data(source: CaseSource, bundle: InferenceBundle) -> bool:
    """Whether this is the data set of the training: all training cases are in it, or it lies where that did.

    Of the latter a scan may have gone since; as long as some are there, its lists are those of the checkpoint.
    """
    used, there = training_ids(bundle), set(source.case_ids())
    root, trained = getattr(source, "root", None), bundle.config.dataset_path
    stayed = root is not None and trained is not None and Path(root).resolve() == trained.resolve()
    return bool(used) and (used <= there or (stayed and bool(used & there)))


def warn_of_equal_ids(source: CaseSource, bundle: InferenceBundle, data: Path | None) -> None:
    """Say that a folder is taken for the data of the training, which lay elsewhere: ids alone cannot tell for sure."""
    trained = bundle.config.dataset_path
    if data is None or trained is None or data.resolve() == trained.resolve() or not is_training_data(source, bundle):
        return
    logger.warning(
        "%s has all %d cases of the training by name and is taken for its data, moved from %s: cases trained on are "
        "not scored; of another hospital's data with the same names --split all scores each",
        data,
        len(training_ids(bundle)),
        trained,
    )


def warn_of_stored_axes(source: CaseSource, case_ids: Sequence[str], bundle: InferenceBundle) -> None:
    """Name the axes of other data than the training's where the network takes them as stored, as a prediction does."""
    if bundle.preprocess.orientation != "stored" or is_training_data(source, bundle):
        return
    names = {stated_axes(grid.affine, grid.oriented) for grid in readable_grids(source, case_ids).values()}
    if names:
        note_stored_axes(", ".join(sorted(names)))


def training_ids(bundle: InferenceBundle) -> set[str]:
    """Ids that training saw, validation included."""
    return {*bundle.split.labeled, *bundle.split.unlabeled, *bundle.split.val}


def choose_cases(
    source: CaseSource,
    bundle: InferenceBundle,
    split: str,
    *,
    test_list: Path | None = None,
    val_list: Path | None = None,
) -> tuple[str, ...]:
    """Case ids to score.

    ``test``: by the checkpoint's own rules and lists on the data of its training; on other data ``test_list``, the
    data's own test list, or else all labelled cases but those of training patients. ``val``: ``val_list``, or the
    validation cases of the training. ``all``: every labelled case, with a warning where training cases are among them.

    Args:
        source: Data to score.
        bundle: Checkpoint, with the training split.
        split: One of ``SPLITS``.
        test_list: List file that replaces the checkpoint's.
        val_list: List file that replaces the checkpoint's validation cases.

    Raises:
        FileNotFoundError: If a list file is missing.
        ValueError: If no case is left, or a test or validation case is of a training case's patient.
    """
    if split == "val":
        return _validation_cases(source, bundle, val_list)
    if split == "all":
        return _all_cases(source, bundle)
    if is_training_data(source, bundle):
        request = _with_test_list(bundle.config.split_request(), test_list)
        try:
            return make_test_ids(source, request, bundle.split)
        except FileNotFoundError as error:
            hint = "" if test_list else "; the run was trained with it: put it back, or pass --test_list"
            raise FileNotFoundError(f"{error}{hint}") from error
    return _foreign_test_cases(source, bundle, test_list)


def warn_if_moved(case_ids: Sequence[str], folder: Path) -> None:
    """Say where the test cases are others than those that the run in ``folder`` was scored on when it ended."""
    try:
        before = json.loads((folder / "test" / SUMMARY).read_text("utf-8"))["test_ids"]
    except (OSError, ValueError, KeyError, TypeError):  # never scored, or the file is not the run's own
        return
    if set(before) != set(case_ids):
        logger.warning(
            "%d test cases, not the %d of the end of the training: without lists they follow the labelled cases, which "
            "have changed; --test_list fixes them",
            len(case_ids),
            len(before),
        )


def _with_test_list(request: SplitRequest, test_list: Path | None) -> SplitRequest:
    return request if test_list is None else dataclasses.replace(request, test_list=test_list)


def _foreign_test_cases(source: CaseSource, bundle: InferenceBundle, test_list: Path | None) -> tuple[str, ...]:
    if test_list is not None or source.official_test() is not None:
        nothing = TrainingSplit((), (), ())
        ids = make_test_ids(source, SplitRequest(labelnum=1, test_list=test_list), nothing)
        _warn_of_training_patients(source, ids, bundle)
        return ids
    labeled = source.labeled_ids()
    seen = set(of_patients(source, labeled, training_ids(bundle)))
    fresh = tuple(case_id for case_id in labeled if case_id not in seen)
    if not fresh:
        raise ValueError("all labelled cases are of training patients; pass --split all or --test_list")
    logger.info("the data have no test list; scoring all %d labelled cases", len(fresh))
    if bundle.config.test_list is not None:
        logger.warning(
            "these are taken for other data than the training's, and its --test_list %s is not used: pass it if they "
            "are the same",
            bundle.config.test_list,
        )
    if seen:
        logger.warning("%d cases of training patients, by their ids, are left out", len(seen))
    return fresh


def _validation_cases(source: CaseSource, bundle: InferenceBundle, val_list: Path | None) -> tuple[str, ...]:
    if val_list is None:
        if not bundle.split.val:
            raise ValueError(
                "--split val: the run had no validation cases (--val_num 0); pass --val_list or --split test"
            )
        ids = bundle.split.val
    else:
        ids = read_case_list(val_list)
    unknown = [case_id for case_id in ids if case_id not in set(source.labeled_ids())]
    if unknown:
        raise ValueError(f"--split val: {some(unknown)} have no label in these data; pass --val_list with labelled ids")
    seen = of_patients(source, ids, (*bundle.split.labeled, *bundle.split.unlabeled))
    if seen and val_list is not None:
        raise ValueError(
            f"--val_list names {some(seen)}, whose patients this run was trained on; remove them or pass --split all"
        )
    if seen:  # a split of before patients were kept together, or several that part them
        logger.warning("%d of %d validation cases are of training patients", len(seen), len(ids))
    return ids


def _all_cases(source: CaseSource, bundle: InferenceBundle) -> tuple[str, ...]:
    ids = tuple(source.labeled_ids())
    if not ids:
        raise ValueError("--split all: the data have no labelled case; add labels")
    _warn_of_training_patients(source, ids, bundle)
    return ids


def _warn_of_training_patients(source: CaseSource, ids: tuple[str, ...], bundle: InferenceBundle) -> None:
    seen = of_patients(source, ids, training_ids(bundle))
    if seen:
        logger.warning(
            "%d of %d cases are of training patients, by their ids: these figures are no test result",
            len(seen),
            len(ids),
        )
