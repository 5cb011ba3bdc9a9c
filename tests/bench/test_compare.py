"""The comparison of methods: which cases, rows and runs there are."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytest
from conftest import BallSource

from benchmarks import compare
from benchmarks.comparison_cases import choose_cases, list_files
from benchmarks.comparison_runs import Run
from dataloaders.base import TrainingDefaults


def make_settings(tmp_path: Path, **changes: object) -> argparse.Namespace:
    """Settings of a small comparison."""
    settings = argparse.Namespace(
        methods=["supervised", "mean_teacher"],
        row=["plain=--method mean_teacher --no-copy_paste"],
        full=True,
        baseline="supervised",
        labelnum=[2, 4],
        pool=8,
        labels=8,
        output_dir=tmp_path,
        threads=1,
    )
    for name, value in changes.items():
        setattr(settings, name, value)
    return settings


def parsed(monkeypatch: pytest.MonkeyPatch, *flags: str) -> argparse.Namespace:
    monkeypatch.setattr("sys.argv", ["compare", "--dataset_name", "ball", "--max_iteration", "1", *flags])
    return compare.parse()


def test_trainer_flags_without_dashes_are_told_where_to_stand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = ["--voxel_size", "1", "1", "1", "--optimizer", "adamw"]
    assert parsed(monkeypatch, "--labelnum", "4", "--", *trainer).flags == trainer
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--labelnum", "4", *trainer)
    error = capsys.readouterr().err
    assert "unrecognized arguments: --voxel_size" in error and "after --, such as: -- --optimizer adamw" in error


UNLABELED = ["ball06", "ball07"]


def test_lists_split_the_cases_that_are_used(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, dataset_name="ball", dataset_path=tmp_path, num_classes=None, cases=5, pool=4)
    train, test = choose_cases(settings, BallSource())
    assert train == ["ball00", "ball01", "ball02", "ball03", *UNLABELED]
    assert test == ["ball04"]
    with pytest.raises(ValueError, match="--pool 5"):
        choose_cases(make_settings(tmp_path, **(vars(settings) | {"pool": 5})), BallSource())
    with pytest.raises(ValueError, match="--labelnum 9"):
        choose_cases(make_settings(tmp_path, **(vars(settings) | {"labelnum": [9]})), BallSource())


def test_a_pool_that_parts_the_cases_of_a_patient_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BallSource, "patient", lambda self, case_id: str(int(case_id[-1]) // 2))
    settings = make_settings(tmp_path, dataset_name="ball", dataset_path=None, cases=6, pool=3, labelnum=[2])
    with pytest.raises(ValueError, match="--pool 3 parts the cases of a patient; 2 is the next smaller"):
        choose_cases(settings, BallSource())
    with pytest.raises(ValueError, match="--cases 5 parts the cases of a patient; 4 is the next smaller"):
        choose_cases(make_settings(tmp_path, **(vars(settings) | {"cases": 5})), BallSource())
    train, _ = choose_cases(make_settings(tmp_path, **(vars(settings) | {"cases": 4, "pool": None})), BallSource())
    assert train == ["ball00", "ball01", *UNLABELED]  # four fifths are 3


def test_four_fifths_are_the_pool_unless_told_otherwise(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, dataset_name="ball", dataset_path=None, num_classes=None, cases=6, pool=None)
    train, test = choose_cases(settings, BallSource())
    assert settings.pool == 4
    assert (len(train), len(test)) == (4 + len(UNLABELED), 2)


def test_a_test_list_of_the_data_is_the_test(tmp_path: Path) -> None:
    class Listed(BallSource):
        def official_train(self) -> tuple[str, ...]:
            return ("ball03", "ball01")

        def official_test(self) -> tuple[str, ...]:
            return ("ball02",)

    more = {"dataset_name": "ball", "dataset_path": None, "num_classes": None, "pool": None, "labelnum": [1]}
    train, test = choose_cases(make_settings(tmp_path / "all", cases=None, **more), Listed())
    assert (train, test) == (["ball03", "ball01"], ["ball02"])
    developed = choose_cases(make_settings(tmp_path / "few", cases=2, **more), Listed())  # no test case in it
    assert developed == (["ball03"], ["ball01"])


def test_a_test_of_the_data_without_a_train_list_leaves_its_patients_out_of_the_pool(tmp_path: Path) -> None:
    class Tested(BallSource):  # one visit of a test patient is among the training images
        def official_test(self) -> tuple[str, ...]:
            return ("ball04", "ball05")

        def patient(self, case_id: str) -> str:
            return {"ball01": "ball05"}.get(case_id, case_id)

    settings = make_settings(tmp_path, dataset_name="ball", cases=None, pool=None, labelnum=[2])
    pool, test = choose_cases(settings, Tested())
    assert test == ["ball04", "ball05"] and pool == ["ball00", "ball02", "ball03", *UNLABELED]
    assert (settings.pool, settings.labels) == (3, 3)


def test_a_patient_s_cases_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BallSource, "patient", lambda self, case_id: str(int(case_id[-1]) % 3))  # two visits of three
    settings = make_settings(tmp_path, dataset_name="ball", dataset_path=None, cases=None, pool=4, labelnum=[2])
    train, test = choose_cases(settings, BallSource())
    assert train == ["ball00", "ball03", "ball01", "ball04", "ball06", "ball07"]  # a third is of the test's patient
    assert test == ["ball02", "ball05"]


def test_scans_without_a_label_join_the_pool_but_for_the_patients_of_the_test(tmp_path: Path) -> None:
    class Visits(BallSource):  # the first six of eight have a label; the last one is of a test case's patient
        def patient(self, case_id: str) -> str:
            return {"ball07": "ball05"}.get(case_id, case_id)

    settings = make_settings(tmp_path, dataset_name="ball", cases=None, pool=None, labelnum=[2])
    pool, test = choose_cases(settings, Visits())
    assert test == ["ball04", "ball05"] and pool == [f"ball0{number}" for number in (0, 1, 2, 3, 6)]
    assert (settings.pool, settings.labels) == (4, 4)


def test_test_cases_without_a_label_are_refused(tmp_path: Path) -> None:
    class Listed(BallSource):
        def official_train(self) -> tuple[str, ...]:
            return ("ball00", "ball01", "ball02", "ball06", "ball07")

    settings = make_settings(tmp_path, dataset_name="ball", cases=5, pool=3, labelnum=[2])
    with pytest.raises(ValueError, match=r"test cases 'ball06', 'ball07' have no label"):
        choose_cases(settings, Listed())


def test_unlabelled_cases_of_the_pool_are_no_labels(tmp_path: Path) -> None:
    class Listed(BallSource):  # the first six of eight have a label
        def official_train(self) -> tuple[str, ...]:
            return ("ball05", "ball06", "ball04", "ball07")

        def official_test(self) -> tuple[str, ...]:
            return ("ball02",)

    settings = make_settings(tmp_path, dataset_name="ball", cases=None, pool=None, labelnum=[2])
    choose_cases(settings, Listed())
    assert (settings.pool, settings.labels) == (4, 2)
    with pytest.raises(ValueError, match="--labelnum 3: the pool has 2 labelled cases"):
        choose_cases(make_settings(tmp_path, **(vars(settings) | {"labelnum": [3], "pool": None})), Listed())


def test_only_data_labels_and_steps_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parsed(monkeypatch, "--labelnum", "8")
    assert settings.pool is None and settings.dataset_path is None
    assert settings.output_dir == Path("runs/compare_ball")


def test_list_files_are_those_of_the_cases_or_refused(tmp_path: Path) -> None:
    cases = ["a", "b"], ["c"]
    files = list_files(tmp_path, cases)
    assert files == {tmp_path / "train.txt": "a\nb\n", tmp_path / "test.txt": "c\n"}
    (tmp_path / "supervised_4labels_seed0.plan.json").touch()
    with pytest.raises(ValueError, match=r"train\.txt is not the list"):  # what the run was trained on is not known
        list_files(tmp_path, cases)
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")
    assert list_files(tmp_path, cases) == files
    with pytest.raises(ValueError, match=r"test\.txt is not the list .* use another --output_dir"):
        list_files(tmp_path, (["a", "b"], ["d"]))


@pytest.mark.parametrize(("asked", "last"), [([], "--no-tta_flips"), (["--tta_flips"], "--tta_flips")])
def test_rows_are_mirrored_at_test_time_all_or_none(tmp_path: Path, asked: list[str], last: str) -> None:
    more = {"dataset_name": "ball", "dataset_path": tmp_path, "num_classes": None, "max_iteration": 1, "flags": asked}
    settings = make_settings(tmp_path, methods=["supervised", "best"], row=[], seeds=[0], **more)
    runs = compare.make_runs(
        settings, compare.make_plans(settings, {}), (tmp_path / "train.txt", tmp_path / "test.txt")
    )
    assert len(runs) == 5
    assert all([flag for flag in run.flags if "tta_flips" in flag][-1] == last for [run] in runs.values())


def test_what_is_fitted_to_cases_is_the_same_for_all_rows(tmp_path: Path) -> None:
    class Open(BallSource):
        defaults = TrainingDefaults()

    source, pool = Open(), ["ball03", "ball00", "ball01"]
    more = {"dataset_name": "nifti", "dataset_path": tmp_path, "num_classes": None}

    def flags(*asked: str) -> list[str]:
        settings = make_settings(tmp_path, flags=list(asked), **more)
        fitted = compare.fitted_flags(settings, compare.asked_config(settings), source, pool)
        plans = compare.make_plans(settings, fitted)
        common = [flag for found in fitted.values() for flag in found]
        assert all(list(plan.flags[: len(common)]) == common for plan in plans)
        return common

    assert flags() == ["--orientation", "ras", "--flat_levels", "0", "1", "0", "--patch_size", "16", "16", "16"]
    assert not source.label_reads
    given = ("--orientation", "stored", "--flat_levels", "0", "0", "0", "--patch_size", "8", "8", "8")
    assert flags(*given) == []
    low, high = map(float, flags(*given, "--modality", "ct")[1:])
    assert 0 < low < 1 < 2 < high < 3
    assert source.label_reads == ["ball03", "ball00"]  # the fewest labelled cases of all tables
    assert flags(*given, "--modality", "ct", "--ct_range", "-1", "2") == []


def test_flags_of_one_method_are_not_held_against_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--decoders", "3", "--batch_size", "1", "--warmup_iteration", "10000"]  # mean_teacher takes none of these
    more = {"dataset_name": "nifti", "dataset_path": tmp_path, "num_classes": None, "flags": flags}
    settings = make_settings(tmp_path, methods=["supervised", "mc_net"], row=[], **more)
    compare.fitted_flags(settings, compare.asked_config(settings), BallSource(), ["ball00", "ball01"])
    assert not caplog.messages


def test_a_row_of_its_own_voxels_or_network_fits_its_own_flat_levels(tmp_path: Path) -> None:
    fitted = {"flat_levels": ("--flat_levels", "0", "0", "2"), "patch_size": ("--patch_size", "8", "8", "8")}
    rows = [
        "net=--method best --model segresnet",
        "same=--method best --model=segresnet",
        "fine=--method best --spacing 1 1 1",
        "usual=--method best --optimizer adamw",
    ]
    plans = compare.make_plans(make_settings(tmp_path, row=rows), fitted)
    without = {plan.name for plan in plans if "--flat_levels" not in plan.flags}
    assert without == {"net", "same", "fine"} and all("--patch_size" in plan.flags for plan in plans)


def test_ctrl_c_starts_no_further_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def stop(run: Run, _: int) -> Path:
        begun.append(run.folder.name)
        time.sleep(0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "train", stop)
    more = {"dataset_name": "ball", "dataset_path": tmp_path, "num_classes": None, "max_iteration": 1, "flags": []}
    settings = make_settings(tmp_path, jobs=1, seeds=[0, 1], **more)
    lists = tmp_path / "train.txt", tmp_path / "test.txt"
    with pytest.raises(KeyboardInterrupt):
        compare.train_all(settings, compare.make_runs(settings, compare.make_plans(settings, {}), lists))
    assert len(begun) <= 2  # of 14


@pytest.mark.parametrize("flags", ["--seeds 0,0", "--seeds=", "--seeds=-1", "--labelnum 0", "--labelnum 4,4"])
def test_numbers_that_give_no_table_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--labelnum", "4", *flags.split())
    assert "each once, with commas" in capsys.readouterr().err


def test_all_labels_are_the_ceiling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = parsed(monkeypatch, "--labelnum", "2,4,all")
    assert settings.full and settings.labelnum == [2, 4]
    assert not parsed(monkeypatch, "--labelnum", "2").full
    for wrong, message in (("all", "name a number of labels, such as 8"), ("2,some", "write numbers or all")):
        with pytest.raises(SystemExit):
            parsed(monkeypatch, "--labelnum", wrong)
        assert message in capsys.readouterr().err


def test_plans_hold_every_row_once_and_the_ceiling_first(tmp_path: Path) -> None:
    plans = compare.make_plans(make_settings(tmp_path), {})
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
        ({"row": ["a b=--method best", "a_b=--method bcp"]}, "'a b' has this folder already; names must differ in"),
        ({"row": ["supervised all labels=--method best"]}, "'supervised, all labels' has this folder already"),
    ],
)
def test_impossible_rows_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare.make_plans(make_settings(tmp_path, **changes), {})
