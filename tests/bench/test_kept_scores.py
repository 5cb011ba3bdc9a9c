"""Kept scores: the table that they give is that of the runs, and files that do not fit together are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_runs import write_run

from benchmarks import kept_scores
from benchmarks.comparison_tables import Row, format_rows, paired_difference
from benchmarks.kept_scores import COLUMNS, KeptRow, read_rows, write_rows

HEADER = ",".join(COLUMNS)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Two rows of two seeds, one of them with a missed structure."""
    found = []
    for name, shift, hd95 in (("supervised", 0.0, 2.0), ("ours", 0.1, float("inf"))):
        dice = [{"a": [0.4 + shift, 0.5], "b": [0.5 + shift, 0.6 + seed / 10]} for seed in range(2)]
        folders = tuple(write_run(tmp_path / f"{name}{seed}", dice[seed], hd95=hd95) for seed in range(2))
        found.append(Row(name, folders))
    return found


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["kept_scores", *map(str, arguments)])
    kept_scores.main()


def test_the_table_is_that_of_the_runs_without_its_costs(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "scores.csv", [KeptRow.of(row, [0, 1]) for row in rows])
    run(monkeypatch, tmp_path / "scores.csv", "--full", "ours")
    whole = format_rows(rows, rows[0], rows[1]).splitlines()
    costs = 3  # the last columns
    cut = ["|".join(line.split("|")[: -costs - 1]) + "|" for line in whole]
    assert capsys.readouterr().out.splitlines() == cut
    assert "| 8 |" in whole[-1]  # two seeds, two cases, two classes missed


def test_seeds_may_come_from_several_files(rows: list[Row], tmp_path: Path) -> None:
    for seed in (1, 0):
        write_rows(tmp_path / f"{seed}.csv", [KeptRow.of(Row(row.name, (row.folders[seed],)), [seed]) for row in rows])
    merged = read_rows([tmp_path / "1.csv", tmp_path / "0.csv"])
    assert [row.name for row in merged] == ["supervised", "ours"]
    for ours, theirs in zip(merged, rows, strict=True):
        assert np.array_equal(ours.case_values("dice"), theirs.case_values("dice"))
    with pytest.raises(ValueError, match=r"1\.csv and .*0\.csv both have seed 0|both have seed 1 of 'supervised'"):
        write_rows(tmp_path / "again.csv", [KeptRow.of(row, [0, 1]) for row in rows])
        read_rows([tmp_path / "1.csv", tmp_path / "again.csv"])


def test_a_row_of_fewer_seeds_is_named(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "base.csv", [KeptRow.of(Row("supervised", rows[0].folders[:1]), [0])])
    write_rows(tmp_path / "ours.csv", [KeptRow.of(row, [0, 1]) for row in rows[1:]])
    run(monkeypatch, tmp_path / "base.csv", tmp_path / "ours.csv")
    assert "Rows of different numbers of seeds (1: supervised; 2: ours)" in capsys.readouterr().out.splitlines()[-1]


def test_the_patients_of_cases_are_kept(rows: list[Row], tmp_path: Path) -> None:
    rows[0].__dict__["patients"] = {"a": "one", "b": "one"}
    write_rows(tmp_path / "scores.csv", [KeptRow.of(row, [0, 1]) for row in rows])
    supervised, ours = read_rows([tmp_path / "scores.csv"])
    assert supervised.patients == {"a": "one", "b": "one"} and ours.patients == {"a": "a", "b": "b"}


def test_figures_keep_six_digits(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"a": [0.8123456, 0.5]}, hd95=12.34567)
    write_rows(tmp_path / "scores.csv", [KeptRow.of(Row("ours", (run,)), [0])])
    (row,) = read_rows([tmp_path / "scores.csv"])
    found = [row.case_values(metric).mean() for metric in ("dice", "hd95_mm")]
    assert found == [pytest.approx((0.812346 + 0.5) / 2, abs=1e-9), pytest.approx(12.3457, abs=1e-9)]


def test_the_scores_in_the_documents_can_be_compared() -> None:
    rows = read_rows([Path(__file__).resolve().parents[2] / "docs" / "scores" / "hippocampus_8.csv"])
    base, full = (next(row for row in rows if row.name == name) for name in ("supervised", "supervised, all labels"))
    assert len(base.cases()) == 40
    one, of_full = (KeptRow(row.name, (), {0: row.by_seed[0]}, {}) for row in (base, full))
    assert paired_difference(of_full, one)[0] == pytest.approx(2.26, abs=0.01)  # as in docs/results.md
    best = next(row for row in rows if row.name == "best")
    mean, low, high, p_value = paired_difference(best, base)
    assert (round(mean, 2), round(low, 2), round(high, 2)) == (1.38, 0.99, 1.81)  # as there
    assert p_value == pytest.approx(1.2e-9, rel=0.05)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("row,seed,case,class,dice,jaccard,hd95_mm\n", "no column assd_mm"),
        (f"{HEADER}\nours,0,a,1,0.9,0.8,x,1\n", "line 2: could not convert string to float: 'x'"),
        (f"{HEADER}\nours,0,a,1,0.9\n", "line 2: .*write numbers"),
        (f"{HEADER}\nours,0,a,1,0.9,0.8,1,1\nours,0,a,1,0.9,0.8,1,1\n", "line 3: a, class 1 twice"),
        (f"{HEADER}\nours,0,a,1,90,0.8,1,1\n", "line 2: Dice and Jaccard go from 0 to 1"),
        (f"{HEADER}\nours,0,a,1,nan,0.8,1,1\n", "line 2: Dice and Jaccard go from 0 to 1"),
        (f"{HEADER}\nours,0,a,1,0.9,0.8,1,-1\n", "line 2: .*distances from 0 on"),
        (f"{HEADER}\n", "no score"),
        (f"{HEADER}\nours,0,a,1,0.9,0.8,1,1\n", "no row 'supervised'; there are 'ours'"),
        (
            f"{HEADER}\nsupervised,0,a,1,0.9,0.8,1,1\nours,0,a,2,0.9,0.8,1,1\n",
            "ours and supervised were scored on different cases or classes",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scores.csv").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tmp_path / "scores.csv")


def test_any_row_can_be_the_baseline(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "scores.csv", [KeptRow.of(row, [0, 1]) for row in rows])
    run(monkeypatch, tmp_path / "scores.csv", "--baseline", "ours")
    head, _, supervised, ours = capsys.readouterr().out.splitlines()
    assert "against ours, paired over 2 cases" in head
    assert "| -5.00 (" in supervised and "| -5.00 (" not in ours  # one class of two is 10 points behind
