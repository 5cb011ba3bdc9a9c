"""infonce and multiproto against naive loops, their gradients, and their edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from myutils import prototype_losses
from myutils.contrastive_prototype_manager import ContrastivePrototypeManager
from myutils.prototype_forms import (
    ABSENT,
    class_contrast,
    infonce_similarities,
    memory_clusters,
    multiproto_similarities,
)


def manager(form: str, **settings: object) -> ContrastivePrototypeManager:
    torch.manual_seed(0)
    built = ContrastivePrototypeManager(3, 8, elements_per_class=6, prototype_loss=form, **settings)  # type: ignore[arg-type]
    built.update_memory({0: torch.randn(6, 8), 1: torch.randn(4, 8), 2: torch.randn(6, 8)})
    return built


def test_infonce_equals_the_naive_loop() -> None:
    torch.manual_seed(1)
    memory, units = torch.randn(2, 3, 4), functional.normalize(torch.randn(5, 4), dim=1)
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.5, 0.0]])
    found = infonce_similarities(units, memory, weights)
    for n in range(5):
        for k in range(2):
            total = 0.0
            for m in range(3):
                cosine = float(units[n] @ memory[k, m] / memory[k, m].norm())
                total += float(weights[k, m]) * math.exp(cosine / 0.1)
            assert found[n, k].item() == pytest.approx(math.log(total), rel=1e-4)


def test_infonce_of_many_classes_takes_turns_and_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    memory, weights = torch.randn(2, 3, 4), torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.5, 0.0]], requires_grad=True)
    units = functional.normalize(torch.randn(5, 4), dim=1).requires_grad_()

    def learned() -> tuple[list[torch.Tensor], int]:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, lambda v: v):
            found = infonce_similarities(units, memory, weights)
        return [found, *torch.autograd.grad(found[:, 0].square().sum(), (units, weights))], max(kept)

    whole, kept = learned()
    monkeypatch.setattr(prototype_losses, "VALUES_AT_ONCE", 2 * 2 * 3)
    in_turns, kept_in_turns = learned()
    torch.testing.assert_close(in_turns, whole)
    assert (kept, kept_in_turns) == (5 * 2 * 3, 2 * 3 * 4)  # the scores; no more than the memory


def test_multiproto_takes_the_nearest_of_the_centres() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.98, 0.02], [0.0, 1.0], [0.02, 0.98], [-1.0, 0.0], [-0.7, -0.7]])
    weights = torch.tensor([[0.1, 0.1, 0.3, 0.1, 0.2, 0.2]], requires_grad=True)
    clusters = memory_clusters(functional.normalize(vectors, dim=1)[None], weights > 0)
    assert sorted(tuple(cluster.nonzero().flatten().tolist()) for cluster in clusters[0].T) == [
        (0, 1),
        (2, 3),
        (4,),
        (5,),
    ]
    similarities = multiproto_similarities(torch.tensor([[0.0, 1.0]]), vectors[None], weights)
    last = vectors[3] / vectors[3].norm()
    centre = 0.3 * vectors[2] + 0.1 * last  # the cluster that looks up, the third three times as much as the fourth
    assert similarities.item() == pytest.approx(float(centre[1] / centre.norm()) / 0.1)
    (gradient,) = torch.autograd.grad(similarities, weights)
    assert gradient[0, 2] > 0 > gradient[0, 3], "the voxel would have more of the one that looks straight up"
    assert gradient[0, [0, 1, 4, 5]].tolist() == [0.0] * 4


def test_clusters_of_fewer_vectors_than_asked_for() -> None:
    memory = torch.zeros(2, 6, 3)
    memory[0, :2] = torch.eye(3)[:2]
    weights = torch.zeros(2, 6)
    weights[0, :2] = 0.5
    clusters = memory_clusters(memory, weights > 0)
    assert clusters.sum(1).tolist() == [[1, 1, 0, 0], [0] * 4]
    similarities = multiproto_similarities(torch.eye(3), memory, weights)
    assert similarities[:, 0].tolist() == pytest.approx([10.0, 10.0, 0.0])
    assert (similarities[:, 1] == ABSENT).all()


def test_contrast_equals_the_naive_loop_and_leaves_out_what_takes_no_part() -> None:
    similarities = torch.tensor([[2.0, 1.0, ABSENT], [0.5, 3.0, ABSENT], [1.0, 1.0, ABSENT], [0.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 2, -1])
    weights = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]])
    taking_part = torch.tensor([True, True, False])
    by_hand = (math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(-2.5))) / 2
    assert class_contrast(similarities, labels, weights, taking_part).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("form", ["infonce", "multiproto"])
def test_form_pulls_a_feature_to_its_own_class(form: str) -> None:
    built = manager(form)
    features = torch.randn(30, 8, requires_grad=True)
    labels = torch.arange(30) % 3
    before = built.contrastive_class_to_class_learned_memory(features, labels)
    before.backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()
    assert (features.grad.abs().sum(1) > 0).all()
    after = built.contrastive_class_to_class_learned_memory(features.detach() - features.grad * 5, labels)
    assert after < before


@pytest.mark.parametrize("form", ["infonce", "multiproto"])
def test_form_trains_the_selectors(form: str) -> None:
    built = manager(form, use_learned_selector=True)
    selectors, memory_selectors = built.get_selectors()
    assert selectors is not None and memory_selectors is not None
    built.contrastive_class_to_class_learned_memory(torch.randn(30, 8), torch.arange(30) % 3).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in selectors.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in memory_selectors.parameters())


@pytest.mark.parametrize("form", ["infonce", "multiproto"])
def test_form_is_zero_on_the_graph_without_a_class_in_both(form: str) -> None:
    built = ContrastivePrototypeManager(3, 8, prototype_loss=form)
    features = torch.randn(4, 8, requires_grad=True)
    loss = built.contrastive_class_to_class_learned_memory(features, torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert loss.item() == 0.0
    assert features.grad is not None and torch.isfinite(features.grad).all()


@pytest.mark.parametrize("form", ["infonce", "multiproto"])
def test_form_ignores_rows_without_a_class(form: str) -> None:
    built = manager(form)
    features, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, -1, -1, 0])
    kept = labels >= 0
    whole = built.contrastive_class_to_class_learned_memory(features, labels)
    part = built.contrastive_class_to_class_learned_memory(features[kept], labels[kept])
    assert whole.item() == pytest.approx(part.item(), rel=1e-5)


def test_a_mean_is_not_all_that_counts() -> None:
    """Two memories with the same mean direction: ssnet cannot tell them apart, infonce and multiproto can."""
    tight, wide = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.6, -0.8]])
    other = torch.tensor([[-1.0, 0.0], [-1.0, 0.0]])
    features, labels = torch.tensor([[0.0, 1.0]]), torch.tensor([0])
    losses: dict[str, list[float]] = {}
    for form in ("ssnet", "infonce", "multiproto"):
        for own in (tight, wide):
            built = ContrastivePrototypeManager(2, 2, elements_per_class=2, prototype_loss=form)
            built.update_memory({0: own, 1: other})
            losses.setdefault(form, []).append(built.contrastive_class_to_class_learned_memory(features, labels).item())
    assert losses["ssnet"][0] == pytest.approx(losses["ssnet"][1])
    assert losses["infonce"][0] > losses["infonce"][1] + 0.1
    assert losses["multiproto"][0] > losses["multiproto"][1] + 0.1


def test_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="ssnet, infonce, multiproto"):
        ContrastivePrototypeManager(3, 8, prototype_loss="cosine")


@pytest.mark.parametrize("form", ["ssnet", "infonce", "multiproto"])
def test_parts_cost_what_each_costs_alone(form: str) -> None:
    """Two sets of voxels in one go: the same losses and gradients as two calls, also where a class is absent."""
    prototypes = manager(form, use_learned_selector=True)
    features = torch.randn(12, 8, requires_grad=True)
    groups = torch.tensor([0, 0, 1, 2, -1, 2, 3, 3, 3, -1, 5, 5])  # the second part has no voxel of class 1
    together = sum(prototypes.losses_by_part(features, groups, 2).values())
    (expected_gradient,) = torch.autograd.grad(together, features)
    logits, alone = torch.zeros(12, 3), []
    for rows in (slice(0, 6), slice(6, 12)):
        labels = torch.where(groups[rows] < 0, groups[rows], groups[rows] % 3)
        _, losses = prototypes.update_and_compute_loss(features[rows], logits[rows], labels, update=False)
        alone += [loss for name, loss in losses.items() if name != "total_prototype_loss"]
    (gradient,) = torch.autograd.grad(sum(alone), features)
    torch.testing.assert_close(sum(alone), together)
    torch.testing.assert_close(gradient, expected_gradient)
