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
    taken: list[torch.Tensor] = []
    draw = term.manager._draw

    def spy(*arguments: object) -> object:
        voxels = draw(*arguments)
        taken.append(voxels.class_labels[voxels.class_labels >= 0])
        return voxels

    monkeypatch.setattr(term.manager, "_draw", spy)
    logits = torch.zeros(2, 3, SIZE, SIZE, SIZE)
    logits[:, 1] = 10.0  # the teacher is sure of class 1 everywhere
    features = torch.randn(2, network.feature_dim, SIZE, SIZE, SIZE, requires_grad=True)
    labels = torch.zeros(1, SIZE, SIZE, SIZE, dtype=torch.int64)
    confident = torch.full((1, SIZE, SIZE, SIZE), IGNORE)
    confident[0, 0, 0, :5] = 1  # but five voxels alone were not pasted
    teacher = SegmentationOutput(logits[1:], features[1:].detach())
    losses = term(SegmentationOutput(logits, features), labels, 0, pseudo=PseudoVoxels(confident, teacher))
    assert [ids.tolist() for ids in taken[1:]] == [[1] * 5]
    losses["contrastive_loss"].backward()
    outside = torch.ones(SIZE, SIZE, SIZE, dtype=torch.bool)
    outside[0, 0, :5] = False
    assert features.grad is not None and torch.isfinite(features.grad).all()
    assert features.grad[1][:, outside].abs().sum() == 0
