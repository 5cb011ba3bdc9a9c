"""``cov_dfp``: its stages, what its terms reach, and when its selector moves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BallSource
from helpers_runs import random_batch, small_config, small_trainer

from dataloaders.say_once import warn_once
from myutils.build import DataFacts, build_method, build_optimizer


def method(**changes: Any) -> Any:
    torch.manual_seed(0)
    source = BallSource()
    settings = {"method": "cov_dfp", "dfp_start_iter": 2, "selector_train_iter": 1, "dfp_reconstruct_interval": 3}
    config = small_config(source, **(settings | {"confidence_threshold": 0.0} | changes))
    return build_method(config, DataFacts.of(source)).train()


def test_cov_dfp_stages_follow_the_step() -> None:
    assert [method().stage(step) for step in range(9)] == [1, 1, 2, 3, 3, 2, 3, 3, 2]


def test_cov_dfp_weights_follow_the_stage_and_the_pool_fills() -> None:
    built = method()
    seen = [built(random_batch(), step) for step in range(4)]
    weights = [{name: term.weight for name, term in output.terms.items()} for output in seen]
    assert [w["dfp_selector"] for w in weights] == [0.0, 0.0, 1.0, 0.0]
    assert [w["dfp_anchor"] > 0 for w in weights] == [False, False, False, True]
    assert built.pool.sizes.any() and built.pool.count.sum() > 0
    assert int(built.pool.sizes.sum()) == int(built.pool.count.sum())
    assert method(use_dfp=False)(random_batch(), 3).terms["dfp_anchor"].weight == 0.0
    assert ["dfp_selector_accuracy" in output.scalars for output in seen] == [False, False, True, True]
    assert [output.scalars["dfp_stage"].item() for output in seen] == [1, 1, 2, 3]
    assert [seen[-1].scalars[f"dfp_pool_{index}"].item() for index in range(8)] == built.pool.sizes.tolist()


def test_cov_dfp_without_pools_pulls_and_pushes_nothing() -> None:
    built = method(confidence_threshold=0.9999)  # nothing is reliable, nothing is stored
    terms = built(random_batch(), 3).terms
    for name in ("dfp_anchor", "dfp_compact", "dfp_separation"):
        assert terms[name].weight > 0 and terms[name].value.item() == 0.0
        terms[name].value.backward(retain_graph=True)
    assert not built.pool.sizes.any()
    assert not any(p.grad is not None and p.grad.any() for p in built.student.parameters())


def test_cov_dfp_takes_patches_thinner_than_its_regions() -> None:
    thin, batch = method(patch_size=(16, 16, 2), flat_levels=(0, 0, 3)), random_batch()
    parts = {name: getattr(batch, name)[..., :2] for name in ("image_l", "label_l", "image_u", "image_u_strong")}
    terms = thin(dataclasses.replace(batch, **parts), 3).terms
    assert all(torch.isfinite(term.value) for term in terms.values())


def test_cov_dfp_regions_cover_every_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    thin, batch, seen = method(patch_size=(16, 16, 10)), random_batch(), []
    nearest = thin.pool.nearest_pools
    monkeypatch.setattr(thin.pool, "nearest_pools", lambda regions: seen.append(len(regions)) or nearest(regions))
    parts = {name: getattr(batch, name)[..., :10] for name in ("image_l", "label_l", "image_u", "image_u_strong")}
    thin(dataclasses.replace(batch, **parts), 3)
    assert seen == [(len(batch.image_l) + len(batch.image_u_strong)) * 4 * 4 * 3]


def test_cov_dfp_selector_learns_the_nearest_pool() -> None:
    built = method(model="unet_3d", selector_train_iter=100, dfp_reconstruct_interval=1000)
    optimizer = torch.optim.Adam(built.selector.parameters(), 0.01)
    torch.manual_seed(1)
    batch = random_batch()
    losses = []
    for step in range(2, 60):
        optimizer.zero_grad()
        loss = built(batch, step).terms["dfp_selector"].value
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selector_train_iter": 20, "dfp_reconstruct_interval": 20}, "--selector_train_iter 20"),
        ({"dfp_start_iter": 4, "max_iteration": 4}, "--dfp_start_iter 4"),
        ({"selector_train_iter": 0}, "selector_train_iter"),
    ],
)
def test_settings_that_never_reach_the_student_are_refused(changes: dict[str, Any], message: str) -> None:
    source = BallSource()
    with pytest.raises(ValueError, match=message):
        build_method(small_config(source, method="cov_dfp", **changes), DataFacts.of(source))


@pytest.mark.parametrize(("steps", "idle"), [(5, True), (6, False)])
def test_pools_that_never_act_are_named(steps: int, idle: bool, caplog: pytest.LogCaptureFixture) -> None:
    method(max_iteration=steps, selector_train_iter=3, dfp_reconstruct_interval=4)
    assert ("nothing in 5 steps" in caplog.text and "built at 2" in caplog.text) == idle


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_selector_moves_in_stage_2_alone(tmp_path: Path, optimizer: str) -> None:
    settings = {"dfp_start_iter": 1, "dfp_reconstruct_interval": 9, "selector_train_iter": 2, "max_iteration": 6}
    trainer = small_trainer(BallSource(), tmp_path, method="cov_dfp", optimizer=optimizer, **settings)
    moved, stages = [], []
    for step in range(6):
        before = [parameter.clone() for parameter in trainer.method.selector.parameters()]
        trainer.train_step(trainer.method, random_batch(), step)
        after = trainer.method.selector.parameters()
        moved.append(not all(torch.equal(old, new) for old, new in zip(before, after, strict=True)))
        stages.append(trainer.method.stage(step))
    assert stages == [1, 2, 2, 3, 3, 3] and moved == [stage == 2 for stage in stages]


def test_pools_are_first_built_after_the_warm_up() -> None:
    source = BallSource()
    config = small_config(source, method="cov_dfp", max_iteration=40, dfp_start_iter=4, warmup_iteration=8)
    method = build_method(config, DataFacts.of(source))
    assert [method.stage(step) for step in (4, 7, 8)] == [1, 1, 2]
    assert method.refills_at(8)


def test_by_default_pools_collect_for_a_fifth_of_the_steps_after_the_warm_up() -> None:
    for warmup, start in ((None, 8), (20, 24)):
        config = small_config(BallSource(), method="cov_dfp", max_iteration=40, warmup_iteration=warmup)
        assert build_method(config, DataFacts.of(BallSource())).start == start


def test_a_build_without_a_reliable_voxel_is_named(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    built = method(confidence_threshold=0.9999)
    for step in range(6):
        built.losses(random_batch(), step)
    text = "no voxel has been reliable (--confidence_threshold): pools are built at step 5 at the earliest"
    assert text in caplog.text and not built.pool.sizes.any()
    term = built(random_batch(), 5).terms["dfp_selector"]
    assert built.stage(5) == 2 and term.weight == 1 and term.value == 0 and term.value.requires_grad  # none to name
    caplog.clear()
    built = method()
    for step in range(6):
        built.losses(random_batch(), step)
    assert "reliable" not in caplog.text and built.pool.sizes.any()


def test_selector_stays_as_it_is_without_a_gradient() -> None:
    source = BallSource()
    config = small_config(source, method="cov_dfp", max_iteration=40, dfp_start_iter=39)
    method = build_method(config, DataFacts.of(source))
    optimizer = build_optimizer(config, method)
    before = [parameter.clone() for parameter in method.selector.parameters()]
    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(20):
        optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, method.selector.parameters(), strict=True))
    everything = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in method.parameters() if p.requires_grad)
