"""The runs of a comparison: which are refused, trained, resumed and kept. The trainer itself is a stand-in."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

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
        monkeypatch.setattr(compare, "build_source", lambda _: BallSource())
        stand_in = argparse.Namespace(run=self.trainer, STDOUT=subprocess.STDOUT)
        monkeypatch.setattr(comparison_runs, "subprocess", stand_in)  # the module's own: others call it too

    def trainer(self, command: list[str], **_: object) -> argparse.Namespace:
        self.commands.append(command)
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
        ("--batch_size 0", "--batch_size 0: must be at least 1"),
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


@pytest.mark.parametrize("code", [1, 2])
def test_a_row_of_which_nothing_was_trained_may_take_new_flags(bench: Bench, code: int) -> None:
    asked = ["--max_iteration", "9", "--seeds", "0", "--row"]
    bench.exit_codes = {"big_2labels_seed0": code}
    with pytest.raises(SystemExit, match=f"exit code {code}"):
        bench(*asked, "big=--batch_size 64")
    bench.exit_codes = {}
    bench(*asked, "big=--batch_size 8")
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


def test_the_code_is_that_of_every_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_runs, "ROOT", tmp_path)
    (tmp_path / "networks" / "blocks").mkdir(parents=True)
    (tmp_path / "train_cov_dfp_3d.py").write_text("1", encoding="utf-8")
    first = comparison_runs.code_digest()
    (tmp_path / "networks" / "blocks" / "new.py").write_text("2", encoding="utf-8")
    assert comparison_runs.code_digest() != first
