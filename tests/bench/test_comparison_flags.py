"""Flags of the trainer in a comparison: what the bench sets itself is refused."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.comparison_flags import OWN, OWN_IN_ROWS
from myutils.config import RunConfig


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max_iteration 7", "--max_iteration after --: .* give it before --"),
        ("--labelnum 2", "--labelnum after --: .* use --labelnum before --"),
        ("--labeled_list x.txt", "--labeled_list after --: .* use --labelnum"),
        ("--test_list x.txt", "--test_list after --: .* use --pool or --cases"),
        ("--patch_size 8 8 8 --seed=3", "--seed after --: .* use --seeds"),
        ("--exp x", "--exp after --: .* use --row"),
        ("--no-evaluate", "--evaluate after --: .* all runs are scored"),
        ("--baseline", "--baseline after --: .* use --methods supervised"),
        ("--resume", "--resume after --: .* goes on by itself"),
    ],
)
def test_what_the_bench_sets_is_refused_after_the_dashes(flags: str, message: str) -> None:
    settings = argparse.Namespace(flags=flags.split(), dataset_name="nifti", dataset_path=None, num_classes=3)
    with pytest.raises(ValueError, match=message):
        compare.asked_config(settings)


def test_other_flags_are_of_all_rows() -> None:
    flags = ["--optimizer", "adamw", "--val_num", "2"]
    settings = argparse.Namespace(flags=flags, dataset_name="nifti", dataset_path=Path("x"), num_classes=3)
    config = compare.asked_config(settings)
    assert (config.optimizer, config.val_num, config.num_classes) == ("adamw", 2, 3)


@pytest.mark.parametrize("flags", ["--seed 3", "--labelnum 4", "--test_list x", "--no-evaluate", "--exp x"])
def test_a_row_cannot_set_what_would_break_the_table(flags: str) -> None:
    settings = argparse.Namespace(methods=["supervised"], row=[f"mine=--method best {flags}"])
    with pytest.raises(ValueError, match=f"{flags.split()[0].replace('no-', '')} in --row .*the bench sets it"):
        compare.make_plans(settings, {})


def test_a_row_may_set_the_rest() -> None:
    row = "long=--method best --optimizer adamw --max_iteration 9 --labeled_list mine.txt --dataset_path other"
    settings = argparse.Namespace(methods=["supervised"], row=[row], baseline="supervised", labelnum=[2], full=False)
    assert compare.make_plans(settings, {})[1].flags[2:6] == ("--optimizer", "adamw", "--max_iteration", "9")


def test_the_bench_s_own_flags_are_flags_of_the_trainer() -> None:
    assert set(OWN) <= {field.name for field in fields(RunConfig)} and set(OWN) > OWN_IN_ROWS
