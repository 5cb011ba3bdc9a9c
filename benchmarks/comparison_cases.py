"""Which cases a comparison trains on and scores: list files that all its runs share."""

from __future__ import annotations

import argparse
from pathlib import Path

from dataloaders.base import CaseSource
from dataloaders.splits import of_patients


def write_lists(settings: argparse.Namespace, source: CaseSource) -> tuple[Path, Path]:
    """Two list files in the output folder: the first ``--pool`` cases and the rest.

    Fills ``settings.pool`` where no flag gives it, and ``settings.labels``, how many cases of the pool have a label.

    Raises:
        ValueError: If no case is left for the test, ``--labelnum`` exceeds the labels, a cut parts the cases of a
            patient, or runs of other cases lie in the output folder.
    """
    ids = list(source.official_train() or source.labeled_ids())
    first = {source.patient(case_id): place for place, case_id in reversed(list(enumerate(ids)))}
    ids.sort(key=lambda case_id: first[source.patient(case_id)])  # a patient's cases follow each other
    _require_whole_patients(source, ids, settings.cases, "--cases")
    ids = ids[: settings.cases]
    if settings.pool is None:
        official = source.official_test() if settings.cases is None else None
        settings.pool = len(ids) if official else _whole_patients(source, ids, len(ids) * 4 // 5)
        ids += official or ()
    if not 0 < settings.pool < len(ids):
        raise ValueError(f"--pool {settings.pool}: the data set has {len(ids)} cases; leave some for the test")
    _require_whole_patients(source, ids, settings.pool, "--pool")
    settings.labels = len(set(ids[: settings.pool]) & set(source.labeled_ids()))
    if max(settings.labelnum) > settings.labels:
        raise ValueError(f"--labelnum {max(settings.labelnum)}: the pool has {settings.labels} labelled cases")
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    paths = settings.output_dir / "train.txt", settings.output_dir / "test.txt"
    trained = any(settings.output_dir.glob("*.plan.json"))
    for path, part in zip(paths, (ids[: settings.pool], ids[settings.pool :]), strict=True):
        content = "\n".join(part) + "\n"
        if trained and (not path.exists() or path.read_text(encoding="utf-8") != content):
            raise ValueError(
                f"the runs in {settings.output_dir} have other cases than {path}; use another --output_dir"
            )
        path.write_text(content, encoding="utf-8")
    return paths


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
