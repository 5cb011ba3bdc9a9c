"""Splits: labelled, unlabelled, validation and test cases, disjoint and a function of the flags alone.

As in the field's protocol the first ``labelnum`` ids of a train list are the labelled ones. Validation cases come out
of the labelled ones. Training never opens a test list where there is a train list. A patient with several cases is in
training, in validation or in the test, never in two of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataloaders.base import CaseSource
from dataloaders.case_lists import order_key, read_case_list, reject_duplicates, some
from myutils.registry import closest_hint

HELD_OUT_SHARE = 5  # one labelled case in five is a test case where the data bring no lists
CLOSEST_SHOWN = 20


@dataclass(frozen=True)
class SplitRequest:
    """What the flags say about splits.

    Attributes:
        labelnum: Number of labelled cases, validation included; None for all, not used with ``labeled_list``.
        val_num: How many of them, the last ones, are for validation; not used with ``val_list``.
        seed: Orders the cases where the data bring no train list.
        train_list: File of training ids, labelled or not.
        labeled_list: File of labelled ids.
        val_list: File of validation ids.
        test_list: File of test ids.
    """

    labelnum: int | None
    val_num: int = 0
    seed: int = 0
    train_list: Path | None = None
    labeled_list: Path | None = None
    val_list: Path | None = None
    test_list: Path | None = None


@dataclass(frozen=True)
class TrainingSplit:
    """Disjoint case ids of one run: ``labeled``, ``unlabeled`` and ``val``."""

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    val: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the ids and their roles, in hex."""
        return ids_digest(asdict(self))

    def to_dict(self) -> dict[str, Any]:
        """Lists and digest, for JSON."""
        return {name: list(ids) for name, ids in asdict(self).items()} | {"digest": self.digest}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> TrainingSplit:
        """Read back what ``to_dict`` wrote.

        Raises:
            ValueError: If a list is missing, or the digest is not that of the lists.
        """
        try:
            split = cls(*(tuple(stored[name]) for name in ("labeled", "unlabeled", "val")))
        except KeyError as error:
            raise ValueError(f"stored split has no {error}; expected labeled, unlabeled, val and digest") from error
        if stored.get("digest") != split.digest:
            raise ValueError(
                f"stored split has digest {stored.get('digest')!r}, its ids give {split.digest}; restore it"
            )
        return split


def ids_digest(ids: object) -> str:
    """SHA-256, in hex, of lists or named lists of case ids."""
    return hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()


def make_training_split(source: CaseSource, request: SplitRequest) -> TrainingSplit:
    """Choose labelled, unlabelled and validation cases.

    The pool of training cases is the first of these that there is:

    1. the ids of ``--train_list``, in file order;
    2. the data's own train list;
    3. all cases in the order that ``--seed`` gives, less the test cases: those of ``--test_list`` or of the data's own
       test list, else one labelled case in five (at least one). This is the one case in which training reads a test
       list, in order to leave its cases out.

    Raises:
        FileNotFoundError: If a list file does not exist.
        ValueError: If an id is unknown, comes twice or in two lists, has no label where it needs one or is not in the
            data's own train list, a validation case is of a labelled case's patient, or ``labelnum`` or ``val_num``
            does not fit the pool.
    """
    labeled_list = _listed(source, request.labeled_list, needs_label=True)
    val_list = _listed(source, request.val_list, needs_label=True)
    _reject_overlap(labeled_list or (), val_list or (), f"{request.labeled_list} and {request.val_list}")
    pool = _pool(source, request, claimed={*(labeled_list or ()), *(val_list or ())})
    pool = of_other_patients(source, pool, val_list or ())
    labeled = list(labeled_list) if labeled_list is not None else _first_labeled(source, pool, request.labelnum)
    if (val := val_list) is None:
        labeled, val = _split_validation(labeled, request.val_num)
    seen_twice = of_patients(source, val, labeled)
    if seen_twice:
        raise ValueError(
            f"validation cases {some(seen_twice)} show patients that labelled cases show; pass a --val_num, or lists, "
            "that keep the cases of a patient together"
        )
    taken = {*labeled, *of_patients(source, pool, val)}
    return TrainingSplit(tuple(labeled), tuple(case_id for case_id in pool if case_id not in taken), tuple(val))


def make_test_ids(source: CaseSource, request: SplitRequest, training_split: TrainingSplit) -> tuple[str, ...]:
    """Choose the test cases; evaluation calls this, training does not.

    They are those of ``--test_list``, else of the data's own test list; else, with a train list, the labelled cases
    outside it, and without one the part that ``make_training_split`` held out.

    Raises:
        FileNotFoundError: If the list file does not exist.
        ValueError: If there is no test case, one has no label, or one, or another case of its patient, belongs to the
            training split.
    """
    used = {*training_split.labeled, *training_split.unlabeled, *training_split.val}
    test = listed = _test_list(source, request)
    if test is None:
        train = _train_list(source, request)
        if train is None:
            test = _held_out(source, request)
        else:
            test = tuple(of_other_patients(source, source.labeled_ids(), used.union(train)))
    if not test:
        why = "every labelled case is of a training case's patient" if source.labeled_ids() else "no case has a label"
        raise ValueError(
            f"there are no test cases: {why}; pass --test_list with labelled ids that are in no other list"
        )
    overlap = [case_id for case_id in test if case_id in used]
    if overlap:
        how = "" if listed else " (without lists the test follows --seed and the labelled cases)"
        raise ValueError(f"test cases {some(overlap)} are training cases of this run{how}; pass another --test_list")
    overlap = of_patients(source, test, sorted(used))
    if overlap:
        raise ValueError(
            f"test cases {some(overlap)} show patients that training cases of this run show; pass another --test_list"
        )
    _require_labels(source, test, "the test list")
    return test


def _pool(source: CaseSource, request: SplitRequest, claimed: set[str]) -> list[str]:
    """Training ids, labelled or not, in order; ``claimed`` are ids that a list names for another role."""
    train = _train_list(source, request)
    if train is not None:
        outside = sorted(claimed.difference(train))
        if outside and request.train_list is None:  # perhaps test cases, which the evaluation alone may know
            raise ValueError(
                f"the labelled or validation list names {some(outside)}, which the data's own train list does not; "
                "take them out, or pass a --train_list with all training cases"
            )
        return list(train)
    test = _test_list(source, request)
    if test is None:
        test = _held_out(source, request)
    else:
        _reject_overlap(test, sorted(claimed), "the test list and another list")
        shared = of_patients(source, sorted(claimed), test)
        if shared:
            raise ValueError(
                f"the test list and another list name cases of one patient: {some(shared)}; keep them in one of the two"
            )
    return of_other_patients(source, _ordered(source, source.case_ids(), request.seed), test)


def _held_out(source: CaseSource, request: SplitRequest) -> tuple[str, ...]:
    """One labelled case in five, at least one, and the others of their patients, of patients that no list claims."""
    claimed = (
        *(_listed(source, request.labeled_list, needs_label=True) or ()),
        *(_listed(source, request.val_list, needs_label=True) or ()),
    )
    ids = source.labeled_ids()
    free = of_other_patients(source, _ordered(source, ids, request.seed), claimed)
    return tuple(of_patients(source, free, free[: max(1, len(ids) // HELD_OUT_SHARE)]))


def _ordered(source: CaseSource, ids: Sequence[str], seed: int) -> list[str]:
    """The ids in an order that depends on the seed and each patient's first id alone; a patient's ids together."""
    first: dict[str, str] = {}
    for case_id in source.case_ids():
        first.setdefault(source.patient(case_id), case_id)
    return sorted(ids, key=lambda case_id: order_key(first[source.patient(case_id)], seed))


def of_patients(source: CaseSource, ids: Iterable[str], others: Iterable[str]) -> list[str]:
    """Those of ``ids`` whose patient is the patient of one of the ``others``."""
    patients = {source.patient(case_id) for case_id in others}
    return [case_id for case_id in ids if source.patient(case_id) in patients]


def of_other_patients(source: CaseSource, ids: Iterable[str], others: Iterable[str]) -> list[str]:
    """Those of ``ids`` whose patient is the patient of none of the ``others``."""
    patients = {source.patient(case_id) for case_id in others}
    return [case_id for case_id in ids if source.patient(case_id) not in patients]


def _first_labeled(source: CaseSource, pool: Sequence[str], labelnum: int | None) -> list[str]:
    """The first ``labelnum`` ids of the pool that have a label, or all."""
    known = set(source.labeled_ids())
    labeled = [case_id for case_id in pool if case_id in known]
    left = len(known) - len(labeled)
    others = f", besides {left} for the test or outside the train list" if left else ""
    if not labeled:
        how = "add labels, or name those to train on in --labeled_list, then without a test" if left else "add labels"
        if left > 1 and len({source.patient(case_id) for case_id in known}) == 1:
            how = "they all count as cases of one patient, who is in the test: see --patient_pattern, or pass lists"
        raise ValueError(f"{_name(source)} has no labelled training case{others}; {how}")
    if labelnum is not None and not 1 <= labelnum <= len(labeled):
        raise ValueError(
            f"--labelnum {labelnum}: {_name(source)} has {len(labeled)} labelled training cases{others}; "
            f"pass a value in 1..{len(labeled)}"
        )
    return labeled[:labelnum]


def _split_validation(labeled: list[str], val_num: int) -> tuple[list[str], tuple[str, ...]]:
    """The last ``val_num`` labelled cases become validation cases."""
    if not 0 <= val_num < len(labeled):
        raise ValueError(
            f"--val_num {val_num}: validation comes out of the {len(labeled)} labelled cases and leaves at least one; "
            f"pass a value in 0..{len(labeled) - 1}"
        )
    kept = len(labeled) - val_num
    return labeled[:kept], tuple(labeled[kept:])


def _train_list(source: CaseSource, request: SplitRequest) -> tuple[str, ...] | None:
    listed = _listed(source, request.train_list)
    return listed if listed is not None else _checked(source, source.official_train(), "the data's own train list")


def _test_list(source: CaseSource, request: SplitRequest) -> tuple[str, ...] | None:
    listed = _listed(source, request.test_list, needs_label=True)
    return listed if listed is not None else _checked(source, source.official_test(), "the data's own test list")


def _listed(source: CaseSource, path: Path | None, *, needs_label: bool = False) -> tuple[str, ...] | None:
    """Ids of a list file, all known to the source; None without a file."""
    if path is None:
        return None
    ids = _checked(source, read_case_list(path), str(path))
    if needs_label and ids is not None:
        _require_labels(source, ids, str(path))
    return ids


def _checked(source: CaseSource, ids: tuple[str, ...] | None, where: str) -> tuple[str, ...] | None:
    """The ids, unless one is unknown or comes twice."""
    if ids is None:
        return None
    reject_duplicates(ids, where)
    known = source.case_ids()
    unknown = sorted(set(ids) - set(known))
    if unknown:
        hint = closest_hint(unknown[0], known)
        if len(known) > CLOSEST_SHOWN:
            hint = f"{hint.split('known:')[0]}the data have {len(known)} cases, the first is {known[0]!r}"
        raise ValueError(f"{where} names {some(unknown)}, not in {_name(source)}; {hint}")
    return ids


def _require_labels(source: CaseSource, ids: Sequence[str], where: str) -> None:
    labeled = set(source.labeled_ids())
    missing = [case_id for case_id in ids if case_id not in labeled]
    if missing:
        raise ValueError(f"{where} names {some(missing)}, which have no label file; add the labels or remove the ids")


def _reject_overlap(first: Sequence[str], second: Sequence[str], where: str) -> None:
    both = [case_id for case_id in first if case_id in set(second)]
    if both:
        raise ValueError(f"{where} both name {some(both)}; a case has one role, remove it from one of them")


def _name(source: CaseSource) -> str:
    """The source's folder for messages, or its class name where it has none."""
    return str(getattr(source, "root", None) or type(source).__name__)
