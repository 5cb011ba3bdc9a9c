"""Covariance feature pools: moments by NumPy, the ring buffer by a list, gradients that must exist, edge cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from myutils import dynamic_feature_pool
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


@pytest.mark.parametrize("count", [512, 50_000])
@pytest.mark.parametrize("constant", [0.1, 0.7, -10.1])
def test_a_constant_channel_is_found_whatever_its_value(count: int, constant: float) -> None:
    torch.manual_seed(0)
    features = torch.randn(count, 4)
    features[:, 2] = constant
    found = moments(features)
    assert found.deviation[2] == 1.0 and (found.correlation[2] == 0).all()
    assert found.mean[2].item() == pytest.approx(constant, rel=1e-6)
    kept = torch.arange(count) % 3 > 0
    features[~kept, 2] = 5.0  # which do not count
    assert (moments(features, kept).correlation[:, 2] == 0).all()


def test_moments_of_a_channel_far_from_zero() -> None:
    torch.manual_seed(0)
    features = torch.randn(5000, 3, dtype=torch.float64) * torch.tensor([1e-2, 1.0, 1.0]) + torch.tensor(
        [30.0, 0.0, 2.0]
    )
    found = moments(features.float())
    assert np.allclose(found.deviation, features.numpy().std(0), rtol=1e-3)
    assert np.allclose(found.correlation, np.corrcoef(features.numpy().T), atol=1e-3)


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
    assert not pool.rebuild() and not pool.sizes.any()
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


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_anchors_do_not_depend_on_how_far_from_zero_features_lie(spread: float) -> None:
    """The spread of a channel is the difference of two moments, of which float32 leaves nothing at 1e-4 of the mean."""
    torch.manual_seed(0)
    shape = torch.randn(200, 5) * torch.tensor([3.0, 1.0, 2.0, 0.5, 1.5]) @ torch.randn(5, 5)
    labels = torch.arange(200) % 2
    anchors = []
    for offset in (0.0, 1.0):
        pool = make_pool()
        for part in shape.split(100):  # two rebuilds, whose moments are averaged
            pool.push(spread * part + offset, labels[:100])
            pool.rebuild()
        anchors.append(pool.anchors.clone())
    assert (anchors[0] * anchors[1]).sum(-1).abs().min() > 0.99


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


def test_two_features_span_two_anchors() -> None:
    """Further eigenvectors are arbitrary, and rounding would choose what features are pulled toward."""
    pool = make_pool(num_anchors=4)
    torch.manual_seed(1)
    pool.push(torch.cat([torch.randn(2, 5), 3 + torch.randn(40, 5)]), torch.tensor([0] * 2 + [1] * 40))
    pool.rebuild()
    assert pool.anchors.any(2).sum(1).tolist() == [2, 4]
    standard = pool.standardise(pool.stored()[0][:2])
    assert torch.allclose(standard @ pool.anchors[0].T @ pool.anchors[0], standard, atol=1e-4)
    away = (-pool.anchors[0].sum(0) * pool.deviation + pool.mean)[None]  # behind both: no zero anchor is nearer
    assert pool.anchor_loss(away, torch.tensor([0])).item() == pytest.approx(1 + 0.5**0.5, abs=1e-4)


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


def test_an_empty_pool_keeps_its_pattern_as_centre_and_lengths_of_centres_do_not_count() -> None:
    pool = DynamicFeaturePool(1, 2, capacity=20, num_pools=2, num_anchors=1)
    line = torch.linspace(-1, 1, 10)
    pool.push(torch.stack([line, 0.9 * line], dim=1), torch.zeros(10, dtype=torch.int64))
    pool.rebuild()
    assert sorted(pool.sizes.tolist()) == [0, 10]
    assert pool.centres[pool.sizes == 0].norm().item() == pytest.approx(1.0, abs=1e-5)
    pool.mean.zero_()
    pool.deviation.fill_(1.0)
    pool.centres.copy_(torch.tensor([[10.0, 0.0], [0.0, 1.0]]))
    assert pool.nearest_pools(torch.tensor([[0.2, 0.98], [0.98, 0.2]])).tolist() == [1, 0]
