"""Which cases the steps of a training see, on any number of ranks."""

from __future__ import annotations

import pytest

from dataloaders.samplers import StepPlan, StepSampler

PLAN = StepPlan(labeled=["a", "b", "c"], unlabeled=["u", "v", "w", "x", "y"], batch_size=4, labeled_bs=2, seed=5)


def test_step_plan_is_a_function_of_seed_and_step() -> None:
    again = StepPlan(PLAN.labeled, PLAN.unlabeled, 4, 2, seed=5)
    assert PLAN.keys(17) == again.keys(17)
    assert PLAN.keys(17) != StepPlan(PLAN.labeled, PLAN.unlabeled, 4, 2, seed=6).keys(17)
    assert len({key.seed for step in range(50) for key in PLAN.keys(step)}) == 200


def test_step_plan_warms_up_on_labelled_patches_and_goes_on_in_order() -> None:
    warm = StepPlan(PLAN.labeled, PLAN.unlabeled, 4, 2, seed=5, warmup=3)
    keys = [warm.keys(step) for step in range(8)]
    assert [sum(key.labeled for key in step) for step in keys] == [4, 4, 4, 2, 2, 2, 2, 2]
    labeled = [key.case_id for step in keys for key in step if key.labeled]
    unlabeled = [key for step in keys for key in step if not key.labeled]
    assert [labeled.count(case) for case in PLAN.labeled] in ([8, 7, 7], [7, 8, 7], [7, 7, 8])
    assert len({key.seed for step in keys for key in step}) == 3 * 4 + 5 * 4  # no patch comes twice
    assert unlabeled == [key for step in range(5) for key in PLAN.keys(step) if not key.labeled]


def test_step_plan_sees_every_case_equally_often() -> None:
    keys = [key for step in range(15) for key in PLAN.keys(step)]
    labeled = [key.case_id for key in keys if key.labeled]
    unlabeled = [key.case_id for key in keys if not key.labeled]
    assert {case: labeled.count(case) for case in PLAN.labeled} == dict.fromkeys(PLAN.labeled, 10)
    assert {case: unlabeled.count(case) for case in PLAN.unlabeled} == dict.fromkeys(PLAN.unlabeled, 6)


def test_step_sampler_shares_the_same_step_between_ranks() -> None:
    whole = list(StepSampler(PLAN, first_step=3, max_iteration=6))
    parts = [list(StepSampler(PLAN, first_step=3, max_iteration=6, rank=r, world_size=2)) for r in (0, 1)]
    for step, keys in enumerate(whole):
        assert sorted(keys) == sorted(parts[0][step] + parts[1][step])
        assert [key.labeled for key in parts[0][step]] == [True, False]


def test_step_sampler_refuses_an_uneven_share() -> None:
    with pytest.raises(ValueError, match="--labeled_bs 2 and 2 unlabelled patches cannot be shared by 3 processes"):
        StepSampler(PLAN, first_step=0, max_iteration=1, world_size=3)


def test_step_plan_orders_every_round_anew() -> None:
    seen = [key.case_id for step in range(30) for key in PLAN.keys(step) if not key.labeled]
    rounds = [tuple(seen[start : start + 5]) for start in range(0, 60, 5)]
    assert all(sorted(cases) == PLAN.unlabeled for cases in rounds) and len(set(rounds)) > 6
