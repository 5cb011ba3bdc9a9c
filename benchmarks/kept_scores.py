"""Scores of each case kept in one small file, so that a table needs neither the runs nor the data.

    python -m benchmarks.kept_scores docs/scores/hippocampus_8.csv runs/mine/scores_8.csv --baseline best

Prints the table of ``benchmarks.compare``, without its costs, over the rows of all files, each paired with the row of
``--baseline``. So a method of your own, or of another project, can be tested against rows that somebody else trained,
if it was scored on the same cases. ``benchmarks.compare`` writes such a file beside each table. Its columns are
``COLUMNS``: a line per row, seed, case and class, scores from 0 to 1 and distances in mm, ``inf`` to an empty mask; and
``patient``, which may be missing where each case is another's. A row may have some of its seeds in one file and the
rest in another.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.comparison_tables import METRICS, Row, Scores, format_rows, read_score
from myutils.metrics import CaseMetrics

COLUMNS = ("row", "seed", "case", "class", *METRICS)


@dataclass(frozen=True)
class KeptRow(Row):
    """A row whose runs are gone.

    Attributes:
        by_seed: The scores of each seed.
        stated: Whom each case shows, where the file says so.
    """

    by_seed: Mapping[int, Scores]
    stated: Mapping[str, str]

    @classmethod
    def of(cls, row: Row, seeds: Sequence[int]) -> KeptRow:
        """What is kept of a row with these seeds."""
        return cls(row.name, (), dict(zip(seeds, row.scores, strict=True)), row.patients)

    @cached_property
    def scores(self) -> list[Scores]:
        """See the base class."""
        return [self.by_seed[seed] for seed in sorted(self.by_seed)]

    @cached_property
    def patients(self) -> dict[str, str]:
        """See the base class."""
        return dict(self.stated)

    def cost(self) -> None:
        """Not kept: it is the machine's as much as the method's."""
        return


def main() -> None:
    """Read, compare and print."""
    settings = parse()
    try:
        rows = {row.name: row for row in read_rows(settings.files)}
        for name in (settings.baseline, *([settings.full] if settings.full else [])):
            if name not in rows:
                raise ValueError(f"no row {name!r}; there are {', '.join(map(repr, rows))}")
        table = format_rows(list(rows.values()), rows[settings.baseline], rows.get(settings.full))
    except (ValueError, OSError) as error:
        raise SystemExit(f"kept_scores: {error}") from error
    sys.stdout.write(f"{table}\n")


def parse() -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="CSV files, each row of any of them is shown")
    parser.add_argument("--baseline", default="supervised", help="row that every other is paired with")
    parser.add_argument("--full", help="row of full supervision, to show the share of the gap that is closed")
    return parser.parse_args()


def write_rows(path: Path, rows: Iterable[KeptRow]) -> None:
    """Write the scores of rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, "patient"])
        for row in rows:
            for seed, scores in row.by_seed.items():
                for (case, class_id), figures in scores.items():
                    cells = [f"{figure:.6g}" for figure in figures]
                    writer.writerow([row.name, seed, case, class_id, *cells, row.patients.get(case, case)])


def read_rows(paths: Sequence[Path]) -> list[KeptRow]:
    """The rows of files, in their order.

    Raises:
        ValueError: If a column is missing, a line has no scores or repeats some, or two files have a seed of a row.
    """
    found: dict[str, dict[int, dict[tuple[str, int], CaseMetrics]]] = {}
    origins: dict[tuple[str, int], Path] = {}
    patients: dict[str, dict[str, str]] = {}
    for path in paths:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            lines = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (lines.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} has no column {', '.join(missing)}; one per {', '.join(COLUMNS)} is needed")
            for line in lines:
                try:
                    name, seed, (place, figures) = line["row"], int(line["seed"]), read_score(line)
                    shares, distances = figures[:2], figures[2:]
                    if not (all(0 <= share <= 1 for share in shares) and all(length >= 0 for length in distances)):
                        raise ValueError("Dice and Jaccard go from 0 to 1, distances from 0 on")
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{path}, line {lines.line_num}: {error}; write numbers, inf for none") from error
                if origins.setdefault((name, seed), path) != path:
                    raise ValueError(f"{path} and {origins[name, seed]} both have seed {seed} of {name!r}; keep one")
                known = found.setdefault(name, {}).setdefault(seed, {})
                if known.setdefault(place, figures) is not figures:
                    case, class_id = place
                    raise ValueError(f"{path}, line {lines.line_num}: {case}, class {class_id} twice; keep one")
                if line.get("patient"):
                    patients.setdefault(name, {})[line["case"]] = line["patient"]
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no score")
    return [KeptRow(name, (), by_seed, patients.get(name, {})) for name, by_seed in found.items()]


if __name__ == "__main__":
    main()
