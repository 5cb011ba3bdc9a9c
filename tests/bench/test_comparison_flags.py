"""Flags of the trainer in a comparison: what the bench sets itself is refused."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.comparison_flags import ALIKE, OWN, OWN_IN_ROWS
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


@pytest.mark.parametrize(
    ("flags", "name", "message"),
    [
        ("--max_iteration 12", "max_iteration", "all rows are trained for as many steps; give it before --"),
        ("--batch_size 8", "batch_size", "a step has as many patches in all rows; give it after --, for every row"),
        ("--optimizer adamw --tta_flips", "tta_flips", "all rows are scored alike; give it after --, for every row"),
        ("--no-tta_flips", "tta_flips", "all rows are scored alike"),
        ("--tta_views=4", "tta_views", "all rows are scored alike"),
        ("--overlap 0", "overlap", "all rows are scored alike"),
        ("--largest_component", "largest_component", "all rows are scored alike"),
        ("--val_num 1", "val_num", "validation decides what all rows train on and keep; give it after --"),
        ("--val_list mine.txt", "val_list", "validation decides what all rows train on and keep"),
    ],
)
def test_a_row_cannot_have_steps_batch_or_scoring_of_its_own(flags: str, name: str, message: str) -> None:
    settings = argparse.Namespace(methods=["supervised"], row=[f"mine=--method best {flags}"])
    with pytest.raises(ValueError, match=f"^--{name} in --row 'mine=--method best {flags}': {message}"):
        compare.make_plans(settings, {})


def test_all_rows_may_have_another_batch_and_scoring() -> None:
    flags = ["--batch_size", "8", "--tta_flips", "--overlap", "0", "--largest_component", "--val_num", "1"]
    settings = argparse.Namespace(flags=flags, dataset_name="nifti", dataset_path=None, num_classes=3)
    config = compare.asked_config(settings)
    assert (config.batch_size, config.tta_flips, config.overlap, config.largest_component) == (8, True, 0, True)


def test_a_row_may_set_the_rest() -> None:
    row = "mine=--method best --optimizer adamw --labeled_bs 3 --labeled_list mine.txt --dataset_path other --amp no"
    settings = argparse.Namespace(methods=["supervised"], row=[row], baseline="supervised", labelnum=[2], full=False)
    assert compare.make_plans(settings, {})[1].flags[2:6] == ("--optimizer", "adamw", "--labeled_bs", "3")


def test_the_bench_s_own_flags_are_flags_of_the_trainer() -> None:
    assert set(OWN) | set(ALIKE) <= {field.name for field in fields(RunConfig)} and set(OWN) > OWN_IN_ROWS
