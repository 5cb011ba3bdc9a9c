"""Covariance feature pools: moments by NumPy, the ring buffer by a list, gradients that must exist, edge cases."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BallSource
from helpers_runs import random_batch, small_config, small_trainer
from torch.nn import functional

from myutils import dynamic_feature_pool
from myutils.build import DataFacts, build_method, build_optimizer
from myutils.dynamic_feature_pool import DynamicFeaturePool, correlation_consistency, leading_patterns, moments


def make_pool(**settings: Any) -> DynamicFeaturePool:
    defaults: dict[str, Any] = {"capacity": 400, "num_pools": 3, "num_anchors": 2}
    return DynamicFeaturePool(2, 5, **(defaults | settings))


def filled_pool(**settings: Any) -> DynamicFeaturePool:
    torch.manual_seed(0)
    pool = make_pool(**settings)
    labels = torch.arange(200) % 2
    features = torch.randn(200, 5) @ torch.randn(5, 5) + 2.0 * labels[:, None]
    pool.push(features, labels)
    pool.rebuild()
    return pool


def test_moments_agree_with_numpy() -> None:
    torch.manual_seed(0)
    features = torch.randn(50, 4) @ torch.randn(4, 4) + 3
    found = moments(features)
    assert np.allclose(found.correlation, np.corrcoef(features.numpy().T), atol=1e-4)
    assert np.allclose(found.deviation, features.numpy().std(0), atol=1e-4)
    kept = torch.arange(50) < 20
    assert torch.allclose(moments(features, kept).correlation, moments(features[:20]).correlation, atol=1e-4)


def test_moments_of_a_constant_channel_and_of_fewer_samples_than_channels() -> None:
    features = torch.randn(3, 6)
    features[:, 2] = 1.5
    features.requires_grad_()
    found = moments(features)
    assert found.deviation[2] == 1.0
    assert (found.correlation[2] == 0).all() and (found.correlation[:, 2] == 0).all()
    found.correlation.square().sum().backward()
    assert features.grad is not None and torch.isfinite(features.grad).all()
    assert torch.isfinite(moments(torch.zeros(0, 6)).correlation).all()


def test_leading_patterns_are_the_largest_eigenvectors() -> None:
    axes = torch.linalg.qr(torch.randn(4, 4)).Q
    matrix = axes @ torch.diag(torch.tensor([0.1, 5.0, 2.0, 1.0])) @ axes.T
    found = leading_patterns(matrix, 2)
    assert (found[0] @ axes[:, 1]).abs().item() == pytest.approx(1.0, abs=1e-4)
    assert (found[1] @ axes[:, 2]).abs().item() == pytest.approx(1.0, abs=1e-4)


def test_push_keeps_the_newest_of_each_class_like_a_list() -> None:
    pool = make_pool(capacity=14)  # seven per class
    lists: dict[int, list[float]] = {0: [], 1: []}
    rng = np.random.default_rng(0)
    number = 0.0
    for _ in range(9):
        labels = torch.from_numpy(rng.integers(-1, 2, rng.integers(0, 20)))
        features = number + torch.arange(len(labels)).float()[:, None].expand(-1, 5)
        number += len(labels)
        pool.push(features, labels)
        for value, label in zip(features[:, 0].tolist(), labels.tolist(), strict=True):
            if label >= 0:
                lists[label] = [*lists[label], value][-7:]
    features, classes = pool.stored()
    for class_id, expected in lists.items():
        assert sorted(features[classes == class_id, 0].tolist()) == expected


def test_rebuild_assigns_by_the_strongest_pattern() -> None:
    pool = filled_pool()
    features, _ = pool.stored()
    found = moments(features)
    patterns = leading_patterns(found.correlation, 3)
    standard = (features - found.mean) / found.deviation
    pools = (standard @ patterns.T).abs().argmax(1)
    assert pool.sizes.tolist() == torch.bincount(pools, minlength=3).tolist()
    for index in range(3):
        turned = [feature * torch.sign(feature @ patterns[index]) for feature in standard[pools == index]]
        assert torch.allclose(pool.centres[index], torch.stack(turned).mean(0), atol=1e-4)
        assert functional.cosine_similarity(pool.centres[index], patterns[index], dim=0) > 0.7
    assert (pool.nearest_pools(features) == pools).float().mean() > 0.9  # 0.4 with centres of unturned features


def test_pools_keep_their_numbers_and_sides_over_a_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = filled_pool()
    before, sizes = pool.centres.clone(), pool.sizes.clone()
    turned = lambda matrix, count: -leading_patterns(matrix, count).roll(1, 0)  # noqa: E731, other order, other signs
    monkeypatch.setattr(dynamic_feature_pool, "leading_patterns", turned)
    pool.rebuild()
    assert torch.equal(pool.sizes, sizes) and torch.allclose(pool.centres, before, atol=1e-5)


def test_rebuild_of_an_empty_pool_changes_nothing_and_losses_are_zero() -> None:
    pool = make_pool()
    pool.rebuild()
    assert not pool.sizes.any()
    features = torch.randn(4, 5, requires_grad=True)
    loss = pool.anchor_loss(features, torch.tensor([0, 1, 0, -1]))
    loss.backward()
    assert loss.item() == 0.0


def test_anchors_are_those_of_moments_averaged_over_rebuilds() -> None:
    torch.manual_seed(0)
    pool = make_pool(anchor_decay=0.75)
    expected: dict[int, np.ndarray] = {}
    for _ in range(6):
        pool.push(torch.randn(30, 5) * torch.tensor([3.0, 1.0, 2.0, 0.5, 1.5]) + 1.0, torch.arange(30) % 2)
        pool.rebuild()
        for class_id in (0, 1):
            fresh = second_moments(pool, class_id)
            expected[class_id] = 0.75 * expected[class_id] + 0.25 * fresh if class_id in expected else fresh
    for class_id in (0, 1):
        anchors = pool.anchors[class_id].numpy()
        assert np.allclose(anchors @ anchors.T, np.eye(len(anchors)), atol=1e-4)  # none became another
        extended = expected[class_id]  # (E + 1, E + 1), of features with a 1 behind them
        move = np.concatenate([np.eye(5), -pool.mean.numpy()[:, None]], axis=1) / pool.deviation.numpy()[:, None]
        standard = move @ extended @ move.T
        vectors = np.linalg.eigh(standard)[1][:, ::-1][:, : len(anchors)].T
        assert np.allclose(np.abs((anchors * vectors).sum(1)), 1.0, atol=1e-3)
        assert (anchors @ (move @ extended[:, -1]) >= 0).all()


def second_moments(pool: DynamicFeaturePool, class_id: int) -> np.ndarray:
    """Mean of x x^T over a class's stored features, each with a 1 behind it (E + 1, E + 1)."""
    features, labels = pool.stored()
    rows = [np.append(row, 1.0) for row in features[labels == class_id].double().numpy()]
    return np.mean([np.outer(row, row) for row in rows], axis=0)


def test_anchor_loss_equals_the_naive_loop_and_moves_features() -> None:
    pool = filled_pool()
    features = torch.randn(6, 5, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 1, -1])
    loss = pool.anchor_loss(features, labels)
    means = []
    for class_id in (0, 1):
        values = []
        for feature in features[labels == class_id]:
            standard = (feature - pool.mean) / pool.deviation
            cosines = [functional.cosine_similarity(standard, anchor, dim=0) for anchor in pool.anchors[class_id]]
            values.append(1 - max(cosines))
        means.append(torch.stack(values).mean())
    assert loss.item() == pytest.approx(torch.stack(means).mean().item(), rel=1e-4)
    loss.backward()
    assert features.grad is not None
    assert (features.grad[:5].abs().sum(1) > 0).all() and (features.grad[5] == 0).all()


def test_pool_losses_by_hand() -> None:
    pool = make_pool(num_pools=2)
    pool.sizes.fill_(1)
    pool.centres.copy_(torch.eye(5)[:2])
    rows = [[-1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0], [1.0, 0, 0, 0, 0]]  # the first lies on the other side of its centre
    regions = torch.tensor(rows, requires_grad=True)
    compact, separation = pool.pool_losses(regions, torch.tensor([0, 0, 1]))
    assert compact.item() == pytest.approx((0 + 1 + 1) / 3)
    gap = float(np.linalg.norm(np.array([0.5**0.5, 0.5**0.5]) - np.array([1.0, 0.0])))
    assert separation.item() == pytest.approx(max(0.0, 1 - gap) ** 2, rel=1e-4)
    (compact + separation).backward()
    assert regions.grad is not None and torch.isfinite(regions.grad).all()


def test_correlation_consistency_is_zero_for_equal_sets_and_moves_the_unlabelled_side_only() -> None:
    features = torch.randn(30, 5)
    known = torch.ones(30, dtype=torch.bool)
    assert correlation_consistency(features, features.clone(), known, known).item() == pytest.approx(0.0, abs=1e-10)
    labeled, unlabeled = torch.randn(30, 5, requires_grad=True), torch.randn(30, 5, requires_grad=True)
    loss = correlation_consistency(labeled, unlabeled, known, known)
    gap = np.corrcoef(unlabeled.detach().numpy().T) - np.corrcoef(labeled.detach().numpy().T)
    assert loss.item() == pytest.approx(float((gap**2).mean()), rel=1e-3)
    loss.backward()
    assert labeled.grad is None and unlabeled.grad is not None and unlabeled.grad.abs().sum() > 0
    assert correlation_consistency(labeled, unlabeled, known, torch.zeros_like(known)).item() == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pools": 6}, "--num_dfp 6"),
        ({"num_anchors": 0}, "--num_eigenvectors 0"),
        ({"capacity": 3}, "--max_global_features 3"),
    ],
)
def test_impossible_sizes_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pool(**settings)


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


def test_cov_dfp_selector_learns_the_nearest_pool() -> None:
    built = method(selector_train_iter=100, dfp_reconstruct_interval=1000)
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
