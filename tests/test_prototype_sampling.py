"""Voxel sampling: uniform, capped, without replacement, seeded."""

from __future__ import annotations

import pytest
import torch
from prototype_cases import make_manager


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


def test_sampling_follows_the_global_seed() -> None:
    manager, labels = make_manager(samples_per_class=10), torch.zeros(5000, dtype=torch.int64)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(manager.sample_positions(labels)[0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
