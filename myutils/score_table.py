"""The printed table of a summary of scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TABLE_COLUMNS = (
    ("Dice %", "dice", 100),
    ("Jaccard %", "jaccard", 100),
    ("HD95 mm", "hd95_mm", 1),
    ("ASSD mm", "assd_mm", 1),
)


def format_table(
    summary: Mapping[str, Any],
    baseline_summary: Mapping[str, Any] | None = None,
    *,
    name: str = "this model",
    baseline_name: str = "supervised only",
) -> str:
    """Aligned text table: a row per class and their mean; mean ± sd, cases, missed, and a baseline beside them.

    Classes that no case shows are named below it, for the mean leaves them out.

    Args:
        summary: From ``myutils.evaluation.summarise``.
        baseline_summary: The same cases by another network, shown beside with the difference in Dice; or None.
        name: Heading of the columns of ``summary``.
        baseline_name: Heading of the columns of ``baseline_summary``.
    """
    header = ["class", "n", *_headings()]
    rows = [[label, str(row["dice"]["n"]), *_cells(row)] for label, row in _rows(summary)]
    groups = [("", 2), (name, len(_headings()))]
    if baseline_summary is not None:
        header += [*_headings(), "Dice gain"]
        groups += [(baseline_name, len(_headings())), ("", 1)]
        for cells, (_, ours), (_, theirs) in zip(rows, _rows(summary), _rows(baseline_summary), strict=True):
            gain = 100 * (ours["dice"]["mean"] - theirs["dice"]["mean"])
            cells += [*_cells(theirs), f"{gain:+.2f}"]
    absent = [f"{class_id} {summary['classes'][class_id]['name']}" for class_id in summary["absent"]]
    note = f"\nno case shows {', '.join(absent)}: not in the mean" if absent else ""
    return _aligned(header, rows, groups) + note


def _headings() -> list[str]:
    return [heading for heading, _, _ in TABLE_COLUMNS] + ["missed"]


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    named = [(f"{class_id} {row['name']}", row) for class_id, row in summary["classes"].items()]
    return [*named, ("mean", summary["mean"])]


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Mean ± sd of each metric, and the number of missed objects, which all distances share."""
    cells = []
    for _, metric, scale in TABLE_COLUMNS:
        mean, sd = row[metric]["mean"], row[metric]["sd"]
        if mean is None:
            cells.append("-")
        else:
            cells.append(f"{scale * mean:.2f}" + ("" if sd is None else f" ± {scale * sd:.2f}"))
    return [*cells, str(row["hd95_mm"]["n_missed"])]


def _aligned(header: list[str], rows: list[list[str]], groups: list[tuple[str, int]]) -> str:
    """Lay out columns, the first to the left and the others to the right, with a line of group names above."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    start, above = 0, []
    for title, count in groups:
        span = sum(widths[start : start + count]) + 2 * (count - 1)
        widths[start] += max(0, len(title) - span)
        above.append(f" {title} ".center(max(span, len(title)), "-") if title else " " * span)
        start += count
    lines = ["  ".join(above).rstrip()]
    for cells in [header, ["-" * width for width in widths], *rows]:
        first, *others = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join([first, *others]).rstrip())
    lines.insert(len(lines) - 1, lines[2])
    return "\n".join(lines)
