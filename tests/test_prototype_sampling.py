"""Voxel sampling: uniform, capped, without replacement, seeded."""

from __future__ import annotations

import pytest
import torch
from prototype_cases import E, K, fill, make_manager, sure_logits
from torch import Tensor, nn

from myutils import prototype_losses
from myutils.prototype_losses import memory_logits, own_class_logits, stacked_logits
from myutils.prototype_sampling import pick_voxels, sample_per_class


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_sampling_is_uniform_capped_and_without_replacement() -> None:
    manager = make_manager(samples_per_class=10)
    labels = torch.full((2, 10, 10, 10), 0)
    labels[1, 0, 0, :4] = 1
    labels[0, 0] = -1
    hits = torch.zeros(2000)
    for _ in range(400):
        positions, classes = manager.sample_positions(labels)
        assert torch.equal(labels.reshape(-1)[positions], classes)
        assert len(set(positions.tolist())) == len(positions) == 14
        hits[positions] += 1
    background = hits[(labels == 0).reshape(-1)]
    assert hits[:100].sum() == 0 and background.sum() == 4000
    assert abs(background[:948].mean() - background[948:].mean()) < 0.25  # 2.1 expected per voxel
    assert manager.sample_positions(labels, samples_per_class=3)[0].shape == (6,)


def test_a_class_with_enough_voxels_fills_its_quota() -> None:
    labels = torch.cat([torch.zeros(50_000), torch.ones(3_000), torch.full((1_500,), 2)]).long()
    _, classes = sample_per_class(labels, 3, 2_000, -1)
    assert classes.bincount().tolist() == [2_000, 2_000, 1_500]


def test_sampling_follows_the_global_seed() -> None:
    manager, labels = make_manager(samples_per_class=10), torch.zeros(5000, dtype=torch.int64)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(manager.sample_positions(labels)[0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_sampling_nothing_gives_nothing() -> None:
    for labels in (torch.zeros(0, dtype=torch.int64), torch.full((50,), -1), torch.full((2, 3, 3, 3), -1)):
        positions, classes = make_manager(samples_per_class=4).sample_positions(labels)
        assert positions.shape == classes.shape == (0,) and positions.dtype == torch.int64


def test_fixed_size_sampling_pads_with_ignored_slots() -> None:
    labels = torch.tensor([2, 0, -1, 0, 0, 0, -1, 2])
    positions, classes = sample_per_class(labels, K, 3, -1, fixed_size=True)
    assert positions.shape == (9,) and classes.tolist() == [0, 0, 0, -1, -1, -1, 2, 2, -1]
    drawn = classes >= 0
    assert torch.equal(labels[positions[drawn]], classes[drawn]) and len(set(positions[drawn].tolist())) == 5
    assert sample_per_class(torch.full((4,), -1), K, 3, -1, fixed_size=True)[1].tolist() == [-1] * 9


def test_padded_slots_change_neither_loss_nor_memory() -> None:
    labels = torch.tensor([2, 0, -1, 0, 2])
    positions, padded = sample_per_class(labels, K, 3, -1, fixed_size=True)
    features, outcomes = torch.randn(5, E), []
    manager = fill(make_manager(use_learned_selector=True))
    for rows, classes in ((positions, padded), (positions[padded >= 0], padded[padded >= 0])):
        copy = make_manager(use_learned_selector=True)
        copy.load_state_dict(manager.state_dict())
        loss, _ = copy.update_and_compute_loss(features[rows], sure_logits(labels[rows]), classes)
        outcomes.append((loss, copy.memory))
    torch.testing.assert_close(outcomes[0], outcomes[1])


def learned_selectors() -> nn.ModuleList:
    """Selectors as after a training: no gain of 1 and no shift of 0 anywhere."""
    selectors, _ = make_manager(use_learned_selector=True).get_selectors()
    assert selectors is not None
    for parameter in selectors.parameters():
        nn.init.normal_(parameter)
    return selectors


def test_stacked_and_gathered_selector_logits_agree() -> None:
    selectors = learned_selectors()
    vectors, labels = torch.randn(9, E), torch.tensor([0, 1, 2, -1, 1, 1, 0, 5, 2])
    gathered, stacked = (own_class_logits(selectors, vectors, labels, stacked=way) for way in (False, True))
    torch.testing.assert_close(gathered, stacked)
    assert stacked[3] == stacked[7] == 0
    memory = torch.randn(K, 4, E)
    torch.testing.assert_close(stacked_logits(selectors, memory), memory_logits(selectors, memory))


def test_voxels_are_the_same_in_either_layout() -> None:
    positions = torch.tensor([0, 119, 60, 59, 60])
    upstream = torch.randn(5, E)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        torch.manual_seed(1)
        maps = torch.randn(2, E, 3, 4, 5).contiguous(memory_format=layout).requires_grad_()
        rows = pick_voxels(maps, positions)
        found.append((rows, *torch.autograd.grad(rows, maps, upstream)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    assert torch.equal(found[0][0][1], maps[1, :, 2, 3, 4])


@pytest.mark.parametrize("at_once", [1, 2])
def test_selectors_of_many_classes_take_turns_and_learn_the_same(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    selectors = learned_selectors()
    vectors, labels, seen = torch.randn(9, E), torch.tensor([0, 1, 2, -1, 1, 1, 0, 5, 2]), []

    def spy(some: nn.ModuleList, rows: Tensor) -> Tensor:
        seen.append(len(some))
        return stacked_logits(some, rows)

    def learned() -> list[Tensor]:
        rows = vectors.clone().requires_grad_()
        logits = own_class_logits(selectors, rows, labels, stacked=True)
        return [logits, *torch.autograd.grad(logits.square().sum(), [rows, *selectors.parameters()])]

    whole = learned()
    monkeypatch.setattr(prototype_losses, "VALUES_AT_ONCE", at_once * vectors.numel())
    monkeypatch.setattr(prototype_losses, "stacked_logits", spy)
    for ours, theirs in zip(learned(), whole, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert max(seen) == at_once and sum(seen) == 2 * K  # forward, and again for the gradient
