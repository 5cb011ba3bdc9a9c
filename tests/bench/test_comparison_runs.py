"""The runs of a comparison: which are refused, trained, resumed and kept. The trainer itself is a stand-in."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any, TextIO

import pytest
from conftest import BallSource
from helpers_runs import write_run

from benchmarks import compare, comparison_runs
from benchmarks.comparison_runs import ALL_PARTS, Run, check, train
from benchmarks.kept_scores import read_rows
from myutils.run_folder import hold

COMMAND = ["--dataset_name", "nifti", "--cases", "6", "--pool", "4", "--labelnum", "2", "--jobs", "1"]


class Bench:
    """Runs ``python -m benchmarks.compare`` on balls; every training notes its command and writes a finished run."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.commands: list[list[str]] = []
        self.exit_codes: dict[str, int] = {}
        self.said = ""
        monkeypatch.setattr(compare, "build_source", lambda _: BallSource())
        stand_in = argparse.Namespace(run=self.trainer, STDOUT=subprocess.STDOUT)
        monkeypatch.setattr(comparison_runs, "subprocess", stand_in)  # the module's own: others call it too

    def trainer(self, command: list[str], stdout: TextIO, **_: Any) -> argparse.Namespace:
        self.commands.append(command)
        stdout.write(self.said)
        name = command[command.index("--exp") + 1]
        code = self.exit_codes.get(name, 0)
        if code == 0:  # a resumed one too
            write_run(self.folder / name, {"ball04": [0.5], "ball05": [0.6]})
        if code in (1, 9):  # out of memory at the first step; killed after the first checkpoint
            (self.folder / name).mkdir()
        if code == 9:
            (self.folder / name / "last.pt").touch()
        return argparse.Namespace(returncode=code)

    def __call__(self, *flags: str) -> None:
        words = ["compare", *COMMAND, "--output_dir", str(self.folder), *flags]
        self.monkeypatch.setattr("sys.argv", words)
        compare.main()

    def files(self) -> dict[str, bytes]:
        found = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path / "runs", monkeypatch)


def test_a_refused_go_trains_nothing_and_leaves_the_first_to_go_on(bench: Bench) -> None:
    first = ["--max_iteration", "60", "--seeds", "0"]
    bench.exit_codes = {"mean_teacher_2labels_seed0": 9}
    with pytest.raises(SystemExit, match="exit code 9"):
        bench(*first)
    before = bench.files()
    with pytest.raises(SystemExit, match="other flags"):
        bench("--max_iteration", "50", "--seeds", "1,0")  # nothing of seed 1 is there yet
    assert bench.files() == before and len(bench.commands) == 2
    bench.exit_codes = {}
    bench(*first)
    assert "--resume" in bench.commands[2]
    title = (bench.folder / "table_2.md").read_text("utf-8").splitlines()[0]
    assert title == "nifti: 2 of 4 labelled, 2 test cases, 60 steps"
    assert {row.name: list(row.by_seed) for row in read_rows([bench.folder / "scores_2.csv"])} == {
        "supervised": [0],
        "mean_teacher": [0],
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method best --modle unet_3d", "did you mean --model"),
        ("--model unet_4d", "unet_4d"),
        ("--method supervised --strong_views 2", "has no use for strong views"),
        ("--labeled_bs 0", "--labeled_bs 0: must be at least 1"),
    ],
)
def test_a_row_that_the_trainer_would_refuse_is_refused_first(
    bench: Bench, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        bench("--max_iteration", "9", "--seeds", "0", "--row", f"bad={flags}")
    assert message in str(error.value) + capsys.readouterr().err
    assert not bench.commands


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--methods", "nonsense"]])
def test_a_file_of_the_user_is_not_overwritten(bench: Bench, flags: list[str]) -> None:
    bench.folder.mkdir()
    (bench.folder / "test.txt").write_bytes(b"\xe4 my own notes")
    before = bench.files()
    with pytest.raises(SystemExit, match="use another --output_dir"):
        bench("--max_iteration", "9", *flags)
    assert bench.files() == before


def test_a_refused_command_writes_nothing(bench: Bench) -> None:
    with pytest.raises(SystemExit, match="nonsense"):
        bench("--max_iteration", "9", "--methods", "supervised,nonsense")
    assert not bench.folder.exists()


FAILED = "12 cases\nerror: step 3: the loss is nan\nNothing was saved: start again\n"
THREE_ROWS = ["--max_iteration", "9", "--seeds", "0,1", "--row", "bad=--method bcp --base_lr 10"]


def test_a_failed_row_costs_only_itself(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.exit_codes, bench.said = {"bad_2labels_seed0": 1}, FAILED
    with pytest.raises(SystemExit) as end:
        bench(*THREE_ROWS)
    reason = "bad_2labels_seed0 ended with exit code 1: error: step 3: the loss is nan; see "
    assert isinstance(end.value.code, str) and "1 of 3 rows failed" in end.value.code and reason in end.value.code
    assert len(bench.commands) == 6
    table = (bench.folder / "table_2.md").read_text("utf-8")
    named = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert named == ["| row", "| supervised", "| mean_teacher"]  # bad has one of two seeds
    assert reason in table.split("| mean_teacher")[1] and table in capsys.readouterr().out
    assert [row.name for row in read_rows([bench.folder / "scores_2.csv"])] == ["supervised", "mean_teacher"]
    bench.exit_codes = {}
    bench(*THREE_ROWS)
    assert len(bench.commands) == 7
    table = (bench.folder / "table_2.md").read_text("utf-8")
    assert "| bad |" in table and "exit code" not in table


def test_a_failed_baseline_leaves_no_table(bench: Bench) -> None:
    bench.exit_codes, bench.said = {"supervised_2labels_seed1": 2}, FAILED
    with pytest.raises(SystemExit, match=r"no table without the baseline.*\n.*seed1 .* code 2: error: step"):
        bench(*THREE_ROWS)
    assert len(bench.commands) == 6 and not (bench.folder / "table_2.md").exists()


def test_a_failed_ceiling_is_named_below_every_table(bench: Bench) -> None:
    bench.exit_codes = {f"supervised_all_labels_4labels_seed{seed}": 1 for seed in (0, 1)}
    with pytest.raises(SystemExit, match=r"seed0 ended with exit code 1; see .*seed1 ended with"):
        bench("--max_iteration", "9", "--seeds", "0,1", "--labelnum", "1,2,all")
    tables = [(bench.folder / f"table_{count}.md").read_text("utf-8") for count in (1, 2)]
    assert all("- supervised, all labels: " in table and "| supervised, all" not in table for table in tables)
    assert (bench.folder / "sweep.png").exists()


def test_the_reason_is_that_of_the_last_attempt(bench: Bench) -> None:
    run = Run(bench.folder / "x", ())
    bench.folder.mkdir()
    bench.exit_codes = {"x": 2}
    for bench.said, reason in (
        ("error: old\n", "2: error: old; see"),
        ("step 1\rstep 2\nKilled\n\n", "2: Killed; see"),
        ("Traceback\nValueError: why\n", "2: ValueError: why; see"),
        ("", "2; see"),
    ):
        with pytest.raises(RuntimeError, match=f"x ended with exit code {reason}"):
            train(run, threads=1)


@pytest.mark.parametrize("code", [1, 2])
def test_a_row_of_which_nothing_was_trained_may_take_new_flags(bench: Bench, code: int) -> None:
    asked = ["--max_iteration", "9", "--seeds", "0", "--row"]
    bench.exit_codes = {"big_2labels_seed0": code}
    with pytest.raises(SystemExit, match=f"exit code {code}"):
        bench(*asked, "big=--uncertainty_passes 64")
    bench.exit_codes = {}
    bench(*asked, "big=--uncertainty_passes 8")
    assert json.loads((bench.folder / "big_2labels_seed0.plan.json").read_text("utf-8"))["flags"].count("8") == 1


def test_a_run_without_a_checkpoint_may_be_at_work(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    run = Run(tmp_path / "x", ("--seed", "0"))
    with pytest.raises(ValueError, match="delete it if nothing runs in it"):
        check(run)
    (tmp_path / "x.plan.json").write_text("{}", encoding="utf-8")
    for act in (check, lambda run: train(run, threads=1)):
        with hold(run.folder), pytest.raises(ValueError, match="another process trains in"):
            act(run)
    check(run)


@pytest.mark.parametrize("trained", ["last.pt", "test/summary.json"])
def test_a_run_without_a_plan_is_none_of_ours(tmp_path: Path, trained: str) -> None:
    path = tmp_path / "x" / trained
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(ValueError, match=r"settings are not known, for there is no x\.plan\.json beside it; delete it"):
        check(Run(tmp_path / "x", ("--seed", "0")))


def test_a_training_killed_before_its_first_checkpoint_starts_again(bench: Bench) -> None:
    asked = ["--max_iteration", "60", "--seeds", "0", "--methods", "supervised"]
    bench.exit_codes = {"supervised_2labels_seed0": 1}
    with pytest.raises(SystemExit, match="exit code 1"):
        bench(*asked)
    (bench.folder / "supervised_2labels_seed0" / "half_written.json").touch()
    bench.exit_codes = {}
    bench(*asked)
    assert "--resume" not in bench.commands[1]
    assert not (bench.folder / "supervised_2labels_seed0" / "half_written.json").exists()


def test_finished_runs_are_kept_and_other_flags_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.folder.mkdir()
    run = Run(bench.folder / "weight_0.5", ("--seed", "0"))
    bench.exit_codes = {"weight_0.5": 9}
    monkeypatch.setattr(comparison_runs, "code_digest", lambda: "first")
    with pytest.raises(RuntimeError, match="exit code 9"):
        train(run, threads=1)
    bench.exit_codes = {}
    monkeypatch.setattr(comparison_runs, "code_digest", lambda: "second")
    train(run, threads=1)
    train(run, threads=1)
    assert len(bench.commands) == 2
    assert "--resume" in bench.commands[1] and "--seed" not in bench.commands[1]
    monkeypatch.setattr(comparison_runs, "code_digest", lambda: "other")  # a finished run keeps the codes of its own
    train(run, threads=1)
    assert json.loads((bench.folder / "weight_0.5.plan.json").read_text("utf-8"))["code"] == "first+second"
    assert (bench.folder / "weight_0.5.log").exists()
    check(run)
    check(Run(run.folder, (ALL_PARTS, "--seed", "0")))  # what was the rule before it was a flag
    with pytest.raises(ValueError, match="other flags"):
        check(Run(run.folder, ("--seed", "1")))


def test_what_a_resume_may_change_makes_no_other_run(tmp_path: Path) -> None:
    old, new, link = (tmp_path / name for name in ("old", "new", "link"))
    old.mkdir()
    new.mkdir()
    link.symlink_to(old)
    run = Run(write_run(tmp_path / "x", {"a": [0.5]}), ("--dataset_path", str(old), "--seed", "0", "--cache_gb", "1"))
    comparison_runs.remember(run)
    check(Run(run.folder, ("--seed", "0", "--num_workers", "1", "--dataset_path", str(link))))
    with pytest.raises(ValueError, match=r"other flags \(--seed, --base_lr; see .*x\.plan\.json"):
        check(Run(run.folder, ("--dataset_path", str(old), "--seed", "1", "--base_lr", "0.1")))
    moved = Run(run.folder, ("--dataset_path", str(new), "--seed", "0"))
    with pytest.raises(ValueError, match=r"other flags \(--dataset_path; see"):  # both are there
        check(moved)
    old.rmdir()
    check(moved)


def test_a_resumed_run_finds_moved_data(bench: Bench) -> None:
    run = Run(bench.folder / "x", ("--dataset_path", "old", "--seed", "0"))
    bench.folder.mkdir()
    bench.exit_codes = {"x": 9}
    with pytest.raises(RuntimeError, match="exit code 9"):
        train(run, threads=1)
    bench.exit_codes = {}
    train(Run(run.folder, ("--dataset_path", "new", "--num_workers", "2", "--seed", "0")), threads=1)
    assert bench.commands[1][-5:] == ["--resume", "--dataset_path", "new", "--num_workers", "2"]


def test_the_code_is_that_of_every_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_runs, "ROOT", tmp_path)
    (tmp_path / "networks" / "blocks").mkdir(parents=True)
    (tmp_path / "train_cov_dfp_3d.py").write_text("1", encoding="utf-8")
    first = comparison_runs.code_digest()
    (tmp_path / "networks" / "blocks" / "new.py").write_text("2", encoding="utf-8")
    assert comparison_runs.code_digest() != first
