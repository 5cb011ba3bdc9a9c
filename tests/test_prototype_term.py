"""The prototype term: what the unlabelled call takes part with, drawn as on the CPU and as on an accelerator."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import BallSource
from helpers_runs import small_config

from myutils import contrastive_prototype_manager
from myutils.build import DataFacts, build_network
from myutils.prototype_sampling import sample_per_class
from myutils.prototype_term import IGNORE, PrototypeTerm, PseudoVoxels
from networks.base import SegmentationOutput

SIZE = 8


@pytest.mark.parametrize("fixed_size", [False, True])
def test_only_drawn_pseudo_labels_take_part(monkeypatch: pytest.MonkeyPatch, fixed_size: bool) -> None:
    """With fixed-size sampling, padded slots point at voxels without a pseudo-label that the teacher is sure about."""
    monkeypatch.setattr(
        contrastive_prototype_manager, "sample_per_class", functools.partial(sample_per_class, fixed_size=fixed_size)
    )
    torch.manual_seed(0)
    source = BallSource()
    config = small_config(source, use_contrastive_prototype=True, confidence_threshold=0.5)
    network = build_network(config, DataFacts.of(source))
    term = PrototypeTerm(network, config)
    compared: list[torch.Tensor] = []
    compare = term.manager.losses_by_part

    def spy(features: torch.Tensor, groups: torch.Tensor, parts: int) -> object:
        compared.append(groups)
        return compare(features, groups, parts)

    monkeypatch.setattr(term.manager, "losses_by_part", spy)
    logits = torch.zeros(2, 3, SIZE, SIZE, SIZE)
    logits[:, 1] = 10.0  # the teacher is sure of class 1 everywhere
    features = torch.randn(2, network.feature_dim, SIZE, SIZE, SIZE, requires_grad=True)
    labels = torch.zeros(1, SIZE, SIZE, SIZE, dtype=torch.int64)
    confident = torch.full((1, SIZE, SIZE, SIZE), IGNORE)
    confident[0, 0, 0, :5] = 1  # but five voxels alone were not pasted
    teacher = SegmentationOutput(logits[1:], features[1:].detach())
    losses = term(SegmentationOutput(logits, features), labels, 0, pseudo=PseudoVoxels(confident, teacher))
    classes = network.num_classes
    assert compared[0][compared[0] >= classes].tolist() == [classes + 1] * 5
    assert term.manager.memory_count.tolist() == [0, 4, 0]  # no labelled voxel is predicted as its label
    assert term.manager.memory_from_labeled.tolist() == [False] * 3
    losses["contrastive_loss"].backward()
    outside = torch.ones(SIZE, SIZE, SIZE, dtype=torch.bool)
    outside[0, 0, :5] = False
    assert features.grad is not None and torch.isfinite(features.grad).all()
    assert features.grad[1][:, outside].abs().sum() == 0


def test_true_labels_fill_the_memory_before_pseudo_labels_may() -> None:
    torch.manual_seed(0)
    source = BallSource()
    config = small_config(source, use_contrastive_prototype=True, confidence_threshold=0.5)
    network = build_network(config, DataFacts.of(source))
    term = PrototypeTerm(network, config)
    labels = torch.zeros(1, SIZE, SIZE, SIZE, dtype=torch.int64)
    confident = torch.ones_like(labels)
    confident[0, 0] = 0  # both kinds hold class 0, pseudo-labels alone hold class 1
    logits = 10.0 * torch.nn.functional.one_hot(torch.cat([labels, confident]), 3).permute(0, 4, 1, 2, 3).float()
    features = torch.randn(2, network.feature_dim, SIZE, SIZE, SIZE)
    student = SegmentationOutput(logits, features)
    term(student, labels, 0, pseudo=PseudoVoxels(confident, student.patches(slice(1, 2))))
    assert term.manager.memory_from_labeled.tolist() == [True, False, False]
    assert (term.manager.memory_count > 0).tolist() == [True, True, False]
    before = term.manager.memory.clone()
    term(student, labels, 1, pseudo=PseudoVoxels(confident, student.patches(slice(1, 2))))
    assert torch.equal(term.manager.memory, before)  # the memory takes nothing between refills
