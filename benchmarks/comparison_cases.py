"""Which cases a comparison trains on and scores, and the list files of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from dataloaders.base import CaseSource
from dataloaders.case_lists import some
from dataloaders.splits import of_other_patients, of_patients

Cases = tuple[list[str], list[str]]


def choose_cases(settings: argparse.Namespace, source: CaseSource) -> Cases:
    """The first ``--pool`` cases and the rest, for the test; without a train list these are the labelled cases.

    All others, which have no label, join the pool then, as in a training of its own. Fills ``settings.pool`` where no
    flag gives it, and ``settings.labels``, how many cases of the pool have a label.

    Raises:
        ValueError: If no case is left for the test, one of it has no label, ``--labelnum`` exceeds the labels, or a
            cut parts the cases of a patient.
    """
    official, labeled = source.official_train(), dict.fromkeys(source.labeled_ids())
    ids = list(official or labeled)
    first = {source.patient(case_id): place for place, case_id in reversed(list(enumerate(ids)))}
    ids.sort(key=lambda case_id: first[source.patient(case_id)])  # a patient's cases follow each other
    _require_whole_patients(source, ids, settings.cases, "--cases")
    ids = ids[: settings.cases]
    if settings.pool is None:
        tested = source.official_test() if settings.cases is None else None
        if tested and official is None:  # its cases are among the labelled ones
            ids = of_other_patients(source, ids, tested)
        settings.pool = len(ids) if tested else _whole_patients(source, ids, len(ids) * 4 // 5)
        ids += tested or ()
    if not 0 < settings.pool < len(ids):
        raise ValueError(f"--pool {settings.pool}: the data set has {len(ids)} cases; leave some for the test")
    _require_whole_patients(source, ids, settings.pool, "--pool")
    settings.labels = len(labeled.keys() & ids[: settings.pool])
    if max(settings.labelnum) > settings.labels:
        raise ValueError(f"--labelnum {max(settings.labelnum)}: the pool has {settings.labels} labelled cases")
    pool, test = ids[: settings.pool], ids[settings.pool :]
    unknown = [case_id for case_id in test if case_id not in labeled]
    if unknown:
        raise ValueError(f"test cases {some(unknown)} have no label; choose others with --pool and --cases")
    if official is None:
        further = [case_id for case_id in source.case_ids() if case_id not in labeled]
        pool += of_other_patients(source, further, test)
    return pool, test


def list_files(folder: Path, cases: Cases) -> dict[Path, str]:
    """The list files of the output folder, which all runs share, and their content; nothing is written yet.

    Raises:
        ValueError: If a file of that name is another one, or runs of other cases lie in the folder.
    """
    trained = any(folder.glob("*.plan.json"))
    files = {folder / name: "\n".join(ids) + "\n" for name, ids in zip(("train.txt", "test.txt"), cases, strict=True)}
    for path, content in files.items():
        there = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
        if there != content and (trained or there is not None):
            raise ValueError(f"{path} is not the list of the cases that are asked for; use another --output_dir")
    return files


def _require_whole_patients(source: CaseSource, ids: list[str], count: int | None, flag: str) -> None:
    """Raise a ValueError where a cut parts the cases of a patient."""
    whole = None if count is None else _whole_patients(source, ids, count)
    if whole != count:
        raise ValueError(f"{flag} {count} parts the cases of a patient; {whole} is the next smaller that does not")


def _whole_patients(source: CaseSource, ids: list[str], count: int) -> int:
    """The largest number of first ids, up to ``count``, after which no patient's cases go on; or 0."""
    while count and of_patients(source, ids[count:], ids[:count]):
        count -= 1
    return count
