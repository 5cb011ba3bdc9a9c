"""The bench's tables: statistics of made-up runs worked out by hand, and that finished runs are kept."""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import BallSource
from scipy import stats

from benchmarks import compare
from benchmarks.comparison_tables import (
    METRICS,
    Row,
    draw_rows,
    draw_sweep,
    format_rows,
    gap_share,
    paired_difference,
)
from dataloaders.base import SOURCES


def write_run(folder: Path, dice: dict[str, list[float]], hd95: float = 2.0, seconds: float = 0.5) -> Path:
    """A finished run with the given Dice per case and class."""
    (folder / "test").mkdir(parents=True)
    with (folder / "test" / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["case", "class", *METRICS])
        writer.writeheader()
        for case, values in dice.items():
            for index, value in enumerate(values, start=1):
                row = {"case": case, "class": index, "dice": value, "jaccard": value / 2}
                writer.writerow(row | {"hd95_mm": hd95, "assd_mm": 1.0})
    summary = {"mean": {"hd95_mm": {"n_missed": 1}}}
    (folder / "test" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    lines = [
        {"step": 10, "Train/seconds_per_step": seconds, "Train/peak_memory_mb": 100},
        {"step": 30, "Train/seconds_per_step": 2 * seconds, "Train/peak_memory_mb": 300},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Row, Row, Row]:
    """Baseline 0.5, ours 0.6, full 0.9 on average; two seeds of ours."""
    base = Row("supervised", (write_run(tmp_path / "s", {"a": [0.4], "b": [0.5], "c": [0.6]}),))
    seeds = (
        write_run(tmp_path / "o0", {"a": [0.4, 0.6], "b": [0.6, 0.6], "c": [0.9, 0.7]}),
        write_run(tmp_path / "o1", {"a": [0.5, 0.5], "b": [0.5, 0.5], "c": [0.5, 0.7]}),
    )
    full = Row("full", (write_run(tmp_path / "f", {"a": [0.8], "b": [0.9], "c": [1.0]}),))
    return base, Row("ours", seeds), full


def test_case_values_are_means_over_classes(rows: tuple[Row, Row, Row]) -> None:
    assert np.allclose(rows[1].case_values("dice"), [[0.5, 0.6, 0.8], [0.5, 0.5, 0.6]])


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


def test_a_row_against_itself_shows_nothing(rows: tuple[Row, Row, Row]) -> None:
    assert paired_difference(rows[0], rows[0]) == (0.0, 0.0, 0.0, 1.0)


def test_gap_share(rows: tuple[Row, Row, Row]) -> None:
    base, ours, full = rows
    assert gap_share(ours, base, full) == pytest.approx((3.5 / 6 - 0.5) / 0.4)


def test_cost_adds_up_the_logged_spans(rows: tuple[Row, Row, Row]) -> None:
    minutes, per_step, peak = rows[0].cost()
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


def test_table_and_plots(rows: tuple[Row, Row, Row], tmp_path: Path) -> None:
    base, ours, full = rows
    table = format_rows([base, ours, full], base, full)
    ours_line = next(line for line in table.splitlines() if line.startswith("| ours"))
    assert "58.33 ± 7.07" in ours_line
    assert "+8.33" in ours_line
    assert " 21% " in ours_line
    assert len({line.count("|") for line in table.splitlines()}) == 1
    draw_rows(tmp_path / "rows.png", [base, ours, full], "title")
    draw_sweep(tmp_path / "sweep.png", {"ours": {2: base, 4: ours}, "full": {8: full}}, "title")
    assert (tmp_path / "rows.png").stat().st_size > 5_000
    assert (tmp_path / "sweep.png").stat().st_size > 5_000


def make_settings(tmp_path: Path, **changes: object) -> argparse.Namespace:
    """Settings of a small comparison."""
    settings = argparse.Namespace(
        methods=["supervised", "mean_teacher"],
        row=["plain=--method mean_teacher --no-copy_paste"],
        full=True,
        baseline="supervised",
        labelnum=[2, 4],
        pool=8,
        output_dir=tmp_path,
        threads=1,
    )
    for name, value in changes.items():
        setattr(settings, name, value)
    return settings


def test_lists_split_the_cases_that_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOURCES, "get", lambda _: BallSource)
    settings = make_settings(tmp_path, dataset_name="ball", dataset_path=tmp_path, num_classes=None, cases=5, pool=4)
    train, test = compare.write_lists(settings)
    assert train.read_text(encoding="utf-8").split() == ["ball00", "ball01", "ball02", "ball03"]
    assert test.read_text(encoding="utf-8").split() == ["ball04"]
    with pytest.raises(ValueError, match="--pool 5"):
        compare.write_lists(make_settings(tmp_path, **(vars(settings) | {"pool": 5})))
    with pytest.raises(ValueError, match="--labelnum 9"):
        compare.write_lists(make_settings(tmp_path, **(vars(settings) | {"labelnum": [9]})))


def test_lists_of_trained_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOURCES, "get", lambda _: BallSource)
    settings = make_settings(tmp_path, dataset_name="ball", dataset_path=tmp_path, num_classes=None, cases=6, pool=4)
    lists = compare.write_lists(settings)
    (tmp_path / "supervised_4labels_seed0.plan.json").touch()
    assert compare.write_lists(settings) == lists
    before = lists[1].read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="use another --output_dir"):
        compare.write_lists(make_settings(tmp_path, **(vars(settings) | {"cases": 5})))
    assert lists[1].read_text(encoding="utf-8") == before


@pytest.mark.parametrize(("asked", "last"), [([], "--no-tta_flips"), (["--tta_flips"], "--tta_flips")])
def test_rows_are_mirrored_at_test_time_all_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str], last: str
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(compare, "train", lambda _, name, flags: (seen.append(flags), tmp_path / name)[1])
    more = {"dataset_name": "ball", "dataset_path": tmp_path, "num_classes": None, "max_iteration": 1, "flags": asked}
    settings = make_settings(tmp_path, methods=["supervised", "best"], row=[], jobs=1, seeds=[0], **more)
    compare.train_all(settings, compare.make_plans(settings), (tmp_path / "train.txt", tmp_path / "test.txt"))
    assert len(seen) == 5
    assert all([flag for flag in flags if "tta_flips" in flag][-1] == last for flags in seen)


def test_ctrl_c_starts_no_further_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def stop(_: object, name: str, __: object) -> Path:
        begun.append(name)
        time.sleep(0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "train", stop)
    more = {"dataset_name": "ball", "dataset_path": tmp_path, "num_classes": None, "max_iteration": 1, "flags": []}
    settings = make_settings(tmp_path, jobs=1, seeds=[0, 1], **more)
    with pytest.raises(KeyboardInterrupt):
        compare.train_all(settings, compare.make_plans(settings), (tmp_path / "train.txt", tmp_path / "test.txt"))
    assert len(begun) <= 2  # of 14


def parsed(monkeypatch: pytest.MonkeyPatch, labelnum: str) -> argparse.Namespace:
    flags = [
        "--dataset_name",
        "ball",
        "--dataset_path",
        "x",
        "--pool",
        "8",
        "--max_iteration",
        "1",
        "--output_dir",
        "y",
    ]
    monkeypatch.setattr("sys.argv", ["compare", *flags, "--labelnum", labelnum])
    return compare.parse()


def test_all_labels_are_the_ceiling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = parsed(monkeypatch, "2,4,all")
    assert settings.full and settings.labelnum == [2, 4]
    assert not parsed(monkeypatch, "2").full
    for wrong, message in (("all", "name a number of labels too"), ("2,some", "write numbers or all")):
        with pytest.raises(SystemExit):
            parsed(monkeypatch, wrong)
        assert message in capsys.readouterr().err


def test_plans_hold_every_row_once_and_the_ceiling_first(tmp_path: Path) -> None:
    plans = compare.make_plans(make_settings(tmp_path))
    assert [(plan.name, plan.labelnum) for plan in plans] == [
        (compare.FULL, 8),
        *((name, count) for count in (2, 4) for name in ("supervised", "mean_teacher", "plain")),
    ]
    assert plans[3].flags == ("--method", "mean_teacher", "--no-copy_paste")
    assert len({plan.folder_name(0) for plan in plans}) == len(plans)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "nope"}, "no such row"),
        ({"row": ["no equals sign"]}, "NAME=FLAGS"),
        ({"row": ["supervised=--method x"]}, "already"),
    ],
)
def test_impossible_rows_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare.make_plans(make_settings(tmp_path, **changes))


def test_finished_runs_are_kept_and_other_flags_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def fake_run(command: list[str], **_: object) -> argparse.Namespace:
        calls.append(command)
        folder = tmp_path / command[command.index("--exp") + 1]
        if "--resume" in command:
            write_run(folder, {"a": [0.5]})
        else:  # killed after its first checkpoint
            folder.mkdir()
            (folder / "last.pt").touch()
        return argparse.Namespace(returncode=0 if "--resume" in command else 9)

    monkeypatch.setattr(compare.subprocess, "run", fake_run)
    monkeypatch.setattr(compare, "code_digest", lambda: "first")
    settings = make_settings(tmp_path)
    with pytest.raises(RuntimeError, match="exit code 9"):
        compare.train(settings, "weight_0.5", ["--seed", "0"])
    monkeypatch.setattr(compare, "code_digest", lambda: "second")
    compare.train(settings, "weight_0.5", ["--seed", "0"])
    compare.train(settings, "weight_0.5", ["--seed", "0"])
    assert len(calls) == 2
    assert "--seed" not in calls[1]
    monkeypatch.setattr(compare, "code_digest", lambda: "other")  # a finished run keeps the codes that trained it
    compare.train(settings, "weight_0.5", ["--seed", "0"])
    assert json.loads((tmp_path / "weight_0.5.plan.json").read_text(encoding="utf-8"))["code"] == "first+second"
    assert (tmp_path / "weight_0.5.log").exists()
    with pytest.raises(ValueError, match="other flags"):
        compare.train(settings, "weight_0.5", ["--seed", "1"])


def test_rows_of_different_code_are_named(rows: tuple[Row, Row, Row]) -> None:
    base, ours, _ = rows
    for folder, code in zip((*base.folders, *ours.folders), ("aaaa", "aaaa", "bbbb"), strict=True):
        compare.beside(folder, ".plan.json").write_text(json.dumps({"flags": [], "code": code}), encoding="utf-8")
    assert compare.code_note([base]) == ""
    assert "aaaa: ours, supervised; bbbb: ours" in compare.code_note([base, ours])


def test_the_code_is_that_of_every_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    (tmp_path / "networks" / "blocks").mkdir(parents=True)
    (tmp_path / "train_cov_dfp_3d.py").write_text("1", encoding="utf-8")
    first = compare.code_digest()
    (tmp_path / "networks" / "blocks" / "new.py").write_text("2", encoding="utf-8")
    assert compare.code_digest() != first
