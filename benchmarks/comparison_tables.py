"""Tables and plots over finished runs: spread over seeds and cases, paired differences, share of the gap, cost."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from myutils.evaluation_folder import CASES
from myutils.metrics import CaseMetrics
from myutils.run_log import read_metrics

METRICS = {"dice": ("Dice %", 100), "jaccard": ("Jaccard %", 100), "hd95_mm": ("HD95 mm", 1), "assd_mm": ("ASSD mm", 1)}
SUPERVISED = "supervised"  # the row from which the gap to full supervision is counted
_BOOTSTRAPS = 10_000
COLOURS = ("#1f6fb4", "#d1603d", "#3b8f5a", "#8661a8", "#b08a1e", "#4b4b4b", "#c2498a", "#2ba3a3", "#8c564b")


Scores = Mapping[tuple[str, int], CaseMetrics]
"""Figures of each class of each case, by case id and class id."""


def read_score(line: Mapping[str, str]) -> tuple[tuple[str, int], CaseMetrics]:
    """Case, class and figures of a line of a CSV file, by the names of its columns."""
    return (line["case"], int(line["class"])), CaseMetrics(*(float(line[metric]) for metric in METRICS))


@dataclass(frozen=True)
class Row:
    """Finished runs of one method, one folder per seed, all scored on the same cases.

    Attributes:
        name: Heading of the row.
        folders: Run folders, in the order of the seeds.
    """

    name: str
    folders: tuple[Path, ...]

    @cached_property
    def _lines(self) -> list[list[dict[str, str]]]:
        """The lines of each seed's ``cases.csv``."""
        found = []
        for folder in self.folders:
            with (folder / "test" / CASES).open(encoding="utf-8") as file:
                found.append(list(csv.DictReader(file)))
        return found

    @cached_property
    def scores(self) -> list[Scores]:
        """The scores of each seed, of the classes that any test case shows, as in ``summary.json``."""
        found: list[Scores] = []
        for lines in self._lines:
            shown = {line["class"] for line in lines if float(line["truth_ml"]) > 0}
            found.append(dict(read_score(line) for line in lines if line["class"] in shown or not shown))
        return found

    @cached_property
    def patients(self) -> dict[str, str]:
        """Whom each case shows, as far as the files say so: those of before do not."""
        return {line["case"]: line["patient"] for lines in self._lines for line in lines if "patient" in line}

    def case_values(self, metric: str) -> np.ndarray:
        """Mean over the classes (seeds, cases); infinite distances (a missed structure) are left out of it.

        Raises:
            ValueError: If the seeds were scored on different cases or classes.
        """
        if any(scores.keys() != self.scores[0].keys() for scores in self.scores):
            raise ValueError(f"{self.name}: its seeds were scored on different cases or classes; score them alike")
        found = [_case_means(scores, metric) for scores in self.scores]
        return np.array([[means[case] for case in sorted(means)] for means in found])

    def cases(self) -> list[str]:
        """Ids of the scored cases, in the order of ``case_values``."""
        return sorted({case for case, _ in self.scores[0]})

    def missed(self) -> int:
        """Structures that only the reference or only the prediction has, over all seeds and cases."""
        return sum(not np.isfinite(figures.hd95_mm) for scores in self.scores for figures in scores.values())

    def cost(self) -> tuple[float, float, float] | None:
        """Training minutes, seconds per step and peak memory in MB: medians over the seeds; None if it is not known."""
        found = []
        for folder in self.folders:
            steps, seconds = read_metrics(folder, "Train/seconds_per_step")
            memory = read_metrics(folder, "Train/peak_memory_mb")[1]
            if not steps:
                return None
            spans = np.diff([0, *steps])
            found.append((float(spans @ seconds) / 60, float(np.median(seconds)), max(memory, default=np.nan)))
        minutes, per_step, peak = np.median(found, axis=0)
        return float(minutes), float(per_step), float(peak)


def _case_means(scores: Scores, metric: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for (case, _), figures in scores.items():
        values.setdefault(case, []).append(getattr(figures, metric))
    return {case: _mean(np.array(found)) for case, found in values.items()}


def _mean(values: np.ndarray) -> float:
    """Mean of the finite values, NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def paired_difference(ours: Row, base: Row) -> tuple[float, float, float, float]:
    """Dice difference in points, paired over cases (each the mean of its seeds).

    Cases of one patient, such as the two frames of ACDC, are alike: patients are drawn with all their cases, and tested
    by the mean of these.

    Returns:
        Mean over cases, both ends of its 95 % bootstrap interval, and the p value of Wilcoxon's signed-rank test.
    """
    mine, theirs = ours.case_values("dice").mean(0), base.case_values("dice").mean(0)
    if ours.scores[0].keys() != base.scores[0].keys():
        raise ValueError(f"{ours.name} and {base.name} were scored on different cases or classes; score them alike")
    difference = 100 * (mine - theirs)
    rng = np.random.default_rng(0)
    places = np.unique(_patients(ours, base), return_inverse=True)[1]
    sums, counts = np.bincount(places, difference), np.bincount(places)
    drawn = rng.integers(len(counts), size=(_BOOTSTRAPS, len(counts)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    by_patient = (sums / counts).round(8)  # ties but for the rounding of means are ties
    p_value = stats.wilcoxon(by_patient).pvalue if by_patient.any() else 1.0
    return float(difference.mean()), float(low), float(high), float(p_value)


def _patients(*rows: Row) -> list[str]:
    """Whom each of the rows' common cases shows, by what any of them says; by default the case itself."""
    known = {case: patient for row in rows for case, patient in row.patients.items()}
    return [known.get(case, case) for case in rows[0].cases()]


def gap_share(row: Row, supervised: Row | None, full: Row | None) -> float | None:
    """(row - supervised) / (full - supervised) on mean Dice: the share of the gap that is closed, None without one."""
    if supervised is None or full is None or row is supervised:
        return None
    ours, low, high = (float(each.case_values("dice").mean()) for each in (row, supervised, full))
    return (ours - low) / (high - low) if high > low else None


def format_rows(rows: Sequence[Row], base: Row, full: Row | None) -> str:
    """Markdown table; ``base`` is what every row is paired with. Unequal numbers of seeds are named below it.

    The gap that a row closes is that from the row named ``SUPERVISED`` to ``full``, whatever ``base`` is; the column
    has none without either, or where ``full`` is not ahead.
    """
    supervised = next((row for row in rows if row.name == SUPERVISED), None)
    titles = ["row", *(title for title, _ in METRICS.values()), "missed", "Dice per seed", "sd over cases"]
    patients, cases = len(set(_patients(base, *rows))), len(base.cases())
    pairs = f"{cases} cases" if patients == cases else f"{patients} patients with {cases} cases"
    titles += [f"against {base.name}, paired over {pairs}", "gap closed"]
    costs = [row.cost() for row in rows]
    titles += ["minutes", "s per step", "peak MB"] if any(costs) else []
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row, cost in zip(rows, costs, strict=True):
        dice = 100 * row.case_values("dice")
        cells = [row.name, *(_spread(scale * row.case_values(name), name) for name, (_, scale) in METRICS.items())]
        cells += [str(row.missed()), ", ".join(f"{seed:.2f}" for seed in dice.mean(1))]
        cells.append(f"{dice.mean(0).std(ddof=1):.2f}" if dice.shape[1] > 1 else "-")
        if row is base:
            cells.append("-")
        else:
            mean, low, high, p_value = paired_difference(row, base)
            cells.append(f"{mean:+.2f} ({low:+.2f} to {high:+.2f}), p = {p_value:.2g}")
        share = gap_share(row, supervised, full)
        cells.append("-" if share is None else f"{share:.0%}")
        if any(costs):
            cells += ["-"] * 3 if cost is None else [f"{cost[0]:.1f}", f"{cost[1]:.3f}", f"{cost[2]:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + _seed_note(rows)


def _seed_note(rows: Sequence[Row]) -> str:
    """A line for below the table that names the rows of each number of seeds; empty if all have as many."""
    names_by_count: dict[int, list[str]] = {}
    for row in rows:
        names_by_count.setdefault(len(row.scores), []).append(row.name)
    if len(names_by_count) < 2:
        return ""
    found = "; ".join(f"{count}: {', '.join(names)}" for count, names in sorted(names_by_count.items()))
    return (
        f"\n\nRows of different numbers of seeds ({found}): a mean of fewer seeds holds more chance, which no interval "
        "or p value shows."
    )


def _spread(values: np.ndarray, metric: str) -> str:
    """Mean ± sd over seeds of values (seeds, cases); a case without a finite value is left out."""
    seeds = np.array([_mean(seed) for seed in values])
    text = f"{seeds.mean():.2f}"
    return text + (f" ± {seeds.std(ddof=1):.2f}" if len(seeds) > 1 else "")


def draw_rows(path: Path, rows: Sequence[Row], title: str) -> None:
    """PNG: Dice of each row, the mean and one standard deviation over seeds, each seed as a point."""
    figure = Figure(figsize=(7.0, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    lows, highs = [], []
    for place, row in enumerate(rows):
        seeds = 100 * row.case_values("dice").mean(1)
        mean, spread = seeds.mean(), seeds.std(ddof=1) if len(seeds) > 1 else 0.0
        lows.append(min(seeds.min(), mean - spread))
        highs.append(max(seeds.max(), mean + spread))
        axes.errorbar(mean, place, xerr=spread, fmt="|", color="#222222", markersize=14, capsize=3)
        axes.plot(seeds, np.full(len(seeds), place), "o", color=COLOURS[0], markersize=4)
        axes.annotate(f"{mean:.2f}", (highs[-1], place), (6, -3), textcoords="offset points", fontsize=8)
    margin = max(1.0, 0.2 * (max(highs) - min(lows)))
    axes.set_xlim(min(lows) - margin, max(highs) + margin)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("Dice %, mean over cases; points: seeds, bars: mean ± sd")
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def draw_sweep(path: Path, curves: Mapping[str, Mapping[int, Row]], title: str) -> None:
    """PNG: Dice against the number of labels, a line per method with one standard deviation over seeds."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, by_count) in zip(itertools.cycle(COLOURS), curves.items(), strict=False):
        counts = sorted(by_count)
        seeds = [100 * by_count[count].case_values("dice").mean(1) for count in counts]
        spread = [values.std(ddof=1) if len(values) > 1 else 0.0 for values in seeds]
        axes.errorbar(counts, [v.mean() for v in seeds], yerr=spread, marker="o", capsize=3, label=name, color=colour)
    axes.set_xscale("log", base=2)
    ticks = sorted({count for by_count in curves.values() for count in by_count})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("labelled cases")
    axes.set_ylabel("Dice %")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
