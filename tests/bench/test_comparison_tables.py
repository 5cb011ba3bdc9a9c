"""The bench's tables: statistics of made-up runs worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers_runs import write_run
from matplotlib.figure import Figure
from scipy import stats

from benchmarks import comparison_tables
from benchmarks.comparison_runs import beside, code_note
from benchmarks.comparison_tables import (
    Row,
    draw_rows,
    draw_sweep,
    format_rows,
    gap_share,
    paired_difference,
)


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Row, Row, Row]:
    """Baseline 0.5, ours 0.6, full 0.9 on average; two seeds of ours."""
    base = Row("supervised", (write_run(tmp_path / "s", {"a": [0.4, 0.4], "b": [0.5, 0.5], "c": [0.6, 0.6]}),))
    seeds = (
        write_run(tmp_path / "o0", {"a": [0.4, 0.6], "b": [0.6, 0.6], "c": [0.9, 0.7]}),
        write_run(tmp_path / "o1", {"a": [0.5, 0.5], "b": [0.5, 0.5], "c": [0.5, 0.7]}),
    )
    full = Row("full", (write_run(tmp_path / "f", {"a": [0.8, 0.8], "b": [0.9, 0.9], "c": [1.0, 1.0]}),))
    return base, Row("ours", seeds), full


def test_case_values_are_means_over_classes(rows: tuple[Row, Row, Row]) -> None:
    assert np.allclose(rows[1].case_values("dice"), [[0.5, 0.6, 0.8], [0.5, 0.5, 0.6]])


def test_classes_that_no_case_shows_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", {"a": [0.4, 1.0, 0.6], "b": [0.5, 0.0, 0.7]}, absent=[2])
    assert np.allclose(Row("x", (run,)).case_values("dice"), [[0.5, 0.6]])
    nothing = write_run(tmp_path / "y", {"a": [0.4, 1.0]}, absent=[1, 2])
    assert np.allclose(Row("y", (nothing,)).case_values("dice"), [[0.7]])


def test_infinite_distances_are_left_out_of_a_case(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", {"a": [0.0]}, hd95=float("inf"))
    assert np.isnan(Row("x", (run,)).case_values("hd95_mm")).all()


def test_paired_difference_is_that_of_the_case_means(rows: tuple[Row, Row, Row]) -> None:
    base, ours, _ = rows
    by_hand = np.array([50 - 40, 55 - 50, 70 - 60])
    mean, low, high, p_value = paired_difference(ours, base)
    assert mean == pytest.approx(by_hand.mean())
    assert by_hand.min() <= low < mean < high <= by_hand.max()
    assert p_value == pytest.approx(stats.wilcoxon(by_hand).pvalue)


def test_cases_of_a_patient_count_as_one(tmp_path: Path) -> None:
    gains = {"a1": 4, "a2": 6, "b1": 3, "c1": -1, "c2": 0, "d1": 2}  # per patient 5, 3, -0.5, 2
    base = Row("base", (write_run(tmp_path / "base", {case: [0.5] for case in gains}),))
    ours = Row("ours", (write_run(tmp_path / "ours", {case: [0.5 + gain / 100] for case, gain in gains.items()}),))
    assert "paired over 6 cases" in format_rows([ours], base, None)
    base.__dict__["patients"] = {case: case[0] for case in gains}  # one that says so is enough
    mean, low, high, p_value = paired_difference(ours, base)
    assert "paired over 4 patients with 6 cases" in format_rows([ours], base, None)
    assert mean == pytest.approx(14 / 6)
    assert p_value == pytest.approx(stats.wilcoxon([5, 3, -0.5, 2]).pvalue)
    whole = {patient: [gain for case, gain in gains.items() if case[0] == patient] for patient in "abcd"}
    drawn = itertools.product(whole.values(), repeat=4)
    means = [np.mean(np.concatenate(four)) for four in drawn]
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.15)


def test_a_row_against_itself_shows_nothing(rows: tuple[Row, Row, Row]) -> None:
    assert paired_difference(rows[0], rows[0]) == (0.0, 0.0, 0.0, 1.0)


def test_gap_share(rows: tuple[Row, Row, Row]) -> None:
    base, ours, full = rows
    assert gap_share(ours, base, full) == pytest.approx((3.5 / 6 - 0.5) / 0.4)
    assert gap_share(base, base, full) is gap_share(ours, None, full) is gap_share(ours, base, None) is None
    assert gap_share(base, full, ours) is None  # full supervision that is behind leaves no gap


def test_the_gap_is_counted_from_the_supervised_row_whatever_the_baseline(rows: tuple[Row, Row, Row]) -> None:
    _, ours, full = rows
    *_, supervised, best, _ = table_lines(format_rows(rows, ours, full))
    assert [line.split(" | ")[9].split()[0] for line in (supervised, best)] == ["-", "21%"]
    assert "%" not in format_rows([ours, full], ours, full).split("---|")[-1]


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_rows_of_unequal_numbers_of_seeds_are_named(rows: tuple[Row, Row, Row]) -> None:
    base, _, full = rows
    *table, empty, note = format_rows(rows, base, full).splitlines()
    assert len(table) == 5 and empty == ""
    assert note.startswith("Rows of different numbers of seeds (1: supervised, full; 2: ours): ")
    assert format_rows([base, full], base, full).splitlines()[-1].startswith("| full |")


def test_cost_adds_up_the_logged_spans(rows: tuple[Row, Row, Row]) -> None:
    cost = rows[0].cost()
    assert cost is not None
    minutes, per_step, peak = cost
    assert minutes == pytest.approx((10 * 0.5 + 20 * 1.0) / 60)
    assert (per_step, peak) == (pytest.approx(0.75), 300)


def test_different_cases_are_refused(rows: tuple[Row, Row, Row], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", {"a": [0.5], "z": [0.5]})
    with pytest.raises(ValueError, match="different cases"):
        Row("mixed", (rows[0].folders[0], other)).case_values("dice")
    with pytest.raises(ValueError, match="different cases"):
        paired_difference(rows[0], Row("other", (other,)))
    as_many = write_run(tmp_path / "as_many", {"a": [0.5], "b": [0.5], "z": [0.5]})
    with pytest.raises(ValueError, match="different cases"):
        paired_difference(rows[0], Row("as_many", (as_many,)))
    fewer = write_run(tmp_path / "fewer", {"a": [0.5], "b": [0.5], "c": [0.5]})
    with pytest.raises(ValueError, match="different cases or classes"):
        paired_difference(rows[0], Row("fewer", (fewer,)))


def test_table_and_plots(rows: tuple[Row, Row, Row], tmp_path: Path) -> None:
    base, ours, full = rows
    table = format_rows([base, ours, full], base, full)
    ours_line = next(line for line in table.splitlines() if line.startswith("| ours"))
    assert "58.33 ± 7.07" in ours_line
    assert "+8.33" in ours_line
    assert " 21% " in ours_line
    assert "paired over 3 cases" in table.splitlines()[0]
    assert len({line.count("|") for line in table_lines(table)}) == 1
    draw_rows(tmp_path / "rows.png", [base, ours, full], "title")
    draw_sweep(tmp_path / "sweep.png", {"ours": {2: base, 4: ours}, "full": {8: full}}, "title")
    assert (tmp_path / "rows.png").stat().st_size > 5_000
    assert (tmp_path / "sweep.png").stat().st_size > 5_000


def test_a_sweep_draws_every_row(rows: tuple[Row, Row, Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(comparison_tables, "_save", lambda figure, _: figures.append(figure))
    names = [f"row {number}" for number in range(30)]
    draw_sweep(tmp_path / "sweep.png", {name: {2: rows[0], 4: rows[1]} for name in names}, "title")
    legend = figures[0].axes[0].get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == names


def test_the_value_stands_beside_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = tuple(write_run(tmp_path / str(dice), {"a": [dice]}) for dice in (0.4, 0.6))
    figures: list[Figure] = []
    monkeypatch.setattr(comparison_tables, "_save", lambda figure, _: figures.append(figure))
    draw_rows(tmp_path / "rows.png", [Row("wide", seeds)], "title")
    [axes] = figures[0].axes
    end = 50 + 20 / math.sqrt(2)  # mean + sd, beyond the better seed
    assert [text.xy[0] for text in axes.texts] == [pytest.approx(end)]
    assert axes.get_xlim()[0] < 100 - end < end < axes.get_xlim()[1]


def test_rows_of_different_code_are_named(rows: tuple[Row, Row, Row]) -> None:
    base, ours, _ = rows
    for folder, code in zip((*base.folders, *ours.folders), ("aaaa", "aaaa", "bbbb"), strict=True):
        beside(folder, ".plan.json").write_text(json.dumps({"flags": [], "code": code}), encoding="utf-8")
    assert code_note([base]) == ""
    assert "aaaa: ours, supervised; bbbb: ours" in code_note([base, ours])


def test_cells_of_a_row_by_hand(rows: tuple[Row, Row, Row]) -> None:
    base, _, full = rows
    cells = [cell.strip() for cell in table_lines(format_rows(rows, base, full))[3].split("|")[1:-1]]
    assert cells[:7] == ["ours", "58.33 ± 7.07", "29.17 ± 3.54", "2.00 ± 0.00", "1.00 ± 0.00", "0", "63.33, 53.33"]
    assert cells[7] == "10.41"  # of cases at 50, 55 and 70, each the mean of two seeds: sqrt(650 / 6)
    assert cells[10:] == ["0.4", "0.750", "300"]


def test_cases_are_paired_by_name_whatever_their_order(tmp_path: Path) -> None:
    seeds = write_run(tmp_path / "o0", {"a": [0.1], "b": [0.9]}), write_run(tmp_path / "o1", {"b": [0.7], "a": [0.3]})
    ours, base = Row("ours", seeds), Row("base", (write_run(tmp_path / "b", {"b": [0.6], "a": [0.0]}),))
    assert ours.cases() == ["a", "b"] and np.allclose(ours.case_values("dice"), [[0.1, 0.9], [0.3, 0.7]])
    mean, low, high, _ = paired_difference(ours, base)
    assert (mean, low, high) == pytest.approx((20.0, 20.0, 20.0))


def test_scores_are_means_over_seeds_and_costs_medians(tmp_path: Path) -> None:
    runs = ((0.4, 0.6), (0.5, 0.6), (0.9, 6.0))  # Dice; the last one ran on a busy machine
    row = Row("x", tuple(write_run(tmp_path / str(dice), {"a": [dice]}, seconds=seconds) for dice, seconds in runs))
    assert "| x | 60.00 ± 26.46 |" in format_rows([row], row, None)  # sqrt((20^2 + 10^2 + 30^2) / 2)
    assert row.cost() == pytest.approx((0.5, 0.9, 300))  # minutes of 10 x 0.6 + 20 x 1.2 s; of 0.6 and 1.2 s the median


def test_a_run_without_a_log_has_no_cost(rows: tuple[Row, Row, Row]) -> None:
    (rows[1].folders[1] / "metrics.jsonl").unlink()
    assert rows[1].cost() is None and rows[0].cost() is not None
    table = format_rows(rows, rows[0], rows[2]).splitlines()
    assert table[3].endswith("| - | - | - |") and "nan" not in table[3]
