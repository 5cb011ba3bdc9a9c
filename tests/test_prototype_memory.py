"""Prototype memory: ranking, protection of labelled vectors, state, equality across ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prototype_cases import E, K, fill, make_manager, sure_logits
from torch import distributed, multiprocessing

from myutils.contrastive_prototype_manager import ContrastivePrototypeManager
from myutils.prototype_losses import intra_class_loss
from myutils.prototype_memory import unit_vectors


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("ranking", "kept"), [("highest", [4.0, 3.0]), ("lowest", [0.0, 1.0]), ("confidence", [4.0, 3.0])]
)
def test_update_memory_ranks_by_confidence_without_selectors(ranking: str, kept: list[float]) -> None:
    manager = make_manager(elements_per_class=2, ranking=ranking)
    manager.update_memory({0: torch.arange(5.0)[:, None].expand(5, E)}, {0: torch.arange(5.0) / 10})
    assert manager.memory[0, :, 0].tolist() == kept


@pytest.mark.parametrize("ranking", ["highest", "lowest", "confidence"])
def test_update_memory_without_confidences_keeps_the_given_order(ranking: str) -> None:
    manager = make_manager(elements_per_class=2, ranking=ranking)
    manager.update_memory({0: torch.arange(5.0)[:, None].expand(5, E)})
    assert manager.memory[0, :, 0].tolist() == [0.0, 1.0]


def test_update_memory_at_random_varies_and_follows_the_seed() -> None:
    draws = []
    for seed in (0, 0, 1, 2, 3):
        manager = make_manager(elements_per_class=2, ranking="random")
        torch.manual_seed(seed)
        manager.update_memory({0: torch.arange(9.0)[:, None].expand(9, E)})
        draws.append(tuple(manager.memory[0, :, 0].tolist()))
    assert draws[0] == draws[1] and len(set(draws)) > 1


def test_memory_info_is_plain_numbers() -> None:
    manager = make_manager()
    manager.update_memory({0: torch.tensor([[3.0, 4, 0, 0]]), 2: torch.tensor([[0, 0, 0, 2.0], [0, 0, 0, 4.0]])})
    info = manager.get_memory_info()
    assert info["count"] == [1, 0, 2] and info["filled_classes"] == 2 and info["elements_per_class"] == 5
    assert info["mean_norm"] == [5.0, 0.0, 3.0] and info["fill"] == pytest.approx(0.2)
    assert info["mean_prototype_similarity"] == pytest.approx(0.0)
    assert info["from_labeled"] == [True, False, True]
    assert make_manager().get_memory_info()["mean_prototype_similarity"] == 0.0


def test_two_ranks_end_with_the_same_memory(tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, args=(tmp_path.as_posix(),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for stage in ranks[0]:
        for name, value in ranks[0][stage].items():
            assert torch.equal(value, ranks[1][stage][name]), (stage, name)
    best = ranks[0]["confidence"]
    assert best["memory"][0, :, 0].tolist() == [15.0, 5.0, 14.0]  # confidences .96, .95, .86 of both ranks
    assert best["memory"][1, 0, 0] == 1.0 and best["memory_count"].tolist() == [3, 1, 0]
    assert ranks[0]["loss"]["memory_count"].tolist() == [3, 3, 3]


def test_update_memory_protects_labeled_memory_too() -> None:
    manager = make_manager()
    manager.update_memory({0: torch.ones(2, E)})
    manager.update_memory({0: torch.zeros(1, E), 1: torch.ones(1, E)}, from_labeled=False)
    assert manager.memory_count.tolist() == [2, 1, 0] and manager.memory_from_labeled.tolist() == [
        True,
        False,
        False,
    ]


def _rank(rank: int, folder: str) -> None:
    """One of two processes: several updates, each followed by a copy of the memory."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    manager = ContrastivePrototypeManager(K, E, elements_per_class=3)
    stages = {}

    def record(stage: str) -> None:
        held = ("memory", "memory_count", "memory_from_labeled")
        stages[stage] = {name: value.clone() for name, value in manager.state_dict().items() if name in held}

    vectors = (torch.arange(6.0) + 10 * rank)[:, None].expand(6, E)
    confidences = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.85, 0.95]) + 0.01 * rank
    own_only = {1: torch.ones(1, E)} if rank == 0 else {}
    manager.update_memory({0: vectors, **own_only}, {0: confidences})
    record("confidence")
    manager.update_memory({})
    record("empty")
    manager.ranking = "random"
    torch.manual_seed(rank)
    manager.update_memory({0: vectors})
    record("random")
    manager.ranking = "highest"
    labels = torch.arange(12) % K
    features = torch.randn(12, E, requires_grad=True)
    loss, _ = manager.update_and_compute_loss(features, sure_logits(labels), labels)
    loss.backward()
    record("loss")
    torch.save(stages, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


def test_update_memory_replaces_one_class_and_keeps_the_others() -> None:
    manager = fill(make_manager())
    before = manager.memory.clone()
    manager.update_memory({1: torch.ones(2, E), 2: torch.ones(0, E)})
    assert torch.equal(manager.memory[[0, 2]], before[[0, 2]])
    assert manager.memory_count.tolist() == [5, 2, 5]
    assert torch.equal(manager.memory[1], torch.cat([torch.ones(2, E), torch.zeros(3, E)]))


def test_short_vectors_are_made_unit_and_the_shortest_zero() -> None:
    vectors = torch.tensor([[3e-4, 4e-4], [0.0, 2e-6], [0.0, 5e-7], [0.0, 0.0]], requires_grad=True)
    found = unit_vectors(vectors)
    assert found.tolist() == [pytest.approx([0.6, 0.8]), [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    found.sum().backward()
    assert vectors.grad is not None and (vectors.grad[2:] == 0).all()


def test_a_class_without_a_prototype_has_no_spread() -> None:
    units = torch.eye(4)[:3]
    member = torch.tensor([[[True, False, False], [False, True, False], [False, False, False]]])
    prototypes = torch.stack([-units[0], torch.zeros(4), units[2]])
    filled = torch.tensor([True, False, True])
    assert intra_class_loss(units, prototypes, member, filled).item() == 4.0  # of class 0 alone


def test_memory_features_are_what_is_stored() -> None:
    manager, labels = make_manager(), torch.tensor([0, 1])
    teacher = torch.full((2, E), 7.0, requires_grad=True)
    manager.update_and_compute_loss(torch.randn(2, E), sure_logits(labels), labels, memory_features=teacher)
    assert torch.equal(manager.memory[:2, 0], teacher.detach())
