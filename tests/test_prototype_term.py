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
from myutils.prototype_term import IGNORE, PrototypeTerm, PseudoVoxels, rows_in_use
from networks.base import SegmentationOutput

SIZE, WIDTH = 8, 8


def make_term(**changes: object) -> PrototypeTerm:
    torch.manual_seed(0)
    source = BallSource()
    settings = {"use_contrastive_prototype": True, "confidence_threshold": 0.5, **changes}
    config = small_config(source, **settings)
    network = build_network(config, DataFacts.of(source))
    assert network.feature_dim == WIDTH
    return PrototypeTerm(network, config)


def random_halves() -> tuple[torch.Tensor, torch.Tensor]:
    """True labels and pseudo-labels (1, SIZE, SIZE, SIZE) of three classes."""
    return torch.randint(0, 3, (1, SIZE, SIZE, SIZE)), torch.randint(0, 3, (1, SIZE, SIZE, SIZE))


def output_of(labels: torch.Tensor, features: torch.Tensor) -> SegmentationOutput:
    """Outputs that are sure of ``labels`` (B, SIZE, SIZE, SIZE)."""
    logits = 10.0 * torch.nn.functional.one_hot(labels, 3).permute(0, 4, 1, 2, 3).float()
    return SegmentationOutput(logits, features)


def groups_compared(term: PrototypeTerm, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The groups of the voxels of every comparison from here on."""
    compared: list[torch.Tensor] = []
    compare = term.manager.losses_by_part

    def spy(features: torch.Tensor, groups: torch.Tensor, *settings: float) -> object:
        compared.append(groups)
        return compare(features, groups, *settings)  # type: ignore[arg-type]

    monkeypatch.setattr(term.manager, "losses_by_part", spy)
    return compared


@pytest.mark.parametrize("fixed_size", [False, True])
def test_only_drawn_pseudo_labels_take_part(monkeypatch: pytest.MonkeyPatch, fixed_size: bool) -> None:
    """With fixed-size sampling, padded slots point at voxels without a pseudo-label that the teacher is sure about."""
    monkeypatch.setattr(
        contrastive_prototype_manager, "sample_per_class", functools.partial(sample_per_class, fixed_size=fixed_size)
    )
    term = make_term()
    compared = groups_compared(term, monkeypatch)
    logits = torch.zeros(2, 3, SIZE, SIZE, SIZE)
    logits[:, 1] = 10.0  # the teacher is sure of class 1 everywhere
    features = torch.randn(2, WIDTH, SIZE, SIZE, SIZE, requires_grad=True)
    labels = torch.zeros(1, SIZE, SIZE, SIZE, dtype=torch.int64)
    confident = torch.full((1, SIZE, SIZE, SIZE), IGNORE)
    confident[0, 0, 0, :5] = 1  # but five voxels alone were not pasted
    teacher = SegmentationOutput(logits[1:], features[1:].detach())
    losses = term(SegmentationOutput(logits, features), labels, 0, pseudo=PseudoVoxels(confident, teacher))
    classes = term.manager.num_classes
    assert compared[0][compared[0] >= classes].tolist() == [classes + 1] * 5
    assert term.manager.memory_count.tolist() == [0, 4, 0]  # no labelled voxel is predicted as its label
    assert term.manager.memory_from_labeled.tolist() == [False] * 3
    losses["contrastive_loss"].backward()
    outside = torch.ones(SIZE, SIZE, SIZE, dtype=torch.bool)
    outside[0, 0, :5] = False
    assert features.grad is not None and torch.isfinite(features.grad).all()
    assert features.grad[1][:, outside].abs().sum() == 0


def test_true_labels_fill_the_memory_before_pseudo_labels_may() -> None:
    term = make_term()
    labels = torch.zeros(1, SIZE, SIZE, SIZE, dtype=torch.int64)
    confident = torch.ones_like(labels)
    confident[0, 0] = 0  # both kinds hold class 0, pseudo-labels alone hold class 1
    student = output_of(torch.cat([labels, confident]), torch.randn(2, WIDTH, SIZE, SIZE, SIZE))
    term(student, labels, 0, pseudo=PseudoVoxels(confident, student.patches(slice(1, 2))))
    assert term.manager.memory_from_labeled.tolist() == [True, False, False]
    assert (term.manager.memory_count > 0).tolist() == [True, True, False]
    before = term.manager.memory.clone()
    term(student, labels, 1, pseudo=PseudoVoxels(confident, student.patches(slice(1, 2))))
    assert torch.equal(term.manager.memory, before)  # the memory takes nothing between refills


def test_a_refill_compares_with_the_memory_as_it_stood() -> None:
    term = make_term()
    labels, confident = random_halves()
    student = output_of(torch.cat([labels, confident]), torch.randn(2, WIDTH, SIZE, SIZE, SIZE))
    pseudo = PseudoVoxels(confident, student.patches(slice(1, 2)))
    term.manager.update_memory({k: torch.randn(4, term.config.embedding_dim) for k in range(3)})
    before, losses = term.manager.memory.clone(), []
    for number in (1, 0):  # step 1 refills nothing
        torch.manual_seed(3)
        losses.append(term(student, labels, number, pseudo=pseudo))
        assert torch.equal(term.manager.memory, before) is (number == 1)
    torch.testing.assert_close(losses[1], losses[0])


class FirstChannel(torch.nn.Module):
    """A projection that shows which voxel a row came from."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :1].repeat(1, 64)


@pytest.mark.parametrize("kind", ["labelled", "pseudo"])
def test_the_memory_holds_teacher_features_of_voxels_that_the_teacher_gets_right(kind: str) -> None:
    term = make_term(embedding_dim=64)
    term.teacher_projection = FirstChannel()
    labels, confident = random_halves()
    voxels = torch.arange(SIZE**3, dtype=torch.float32).reshape(1, 1, SIZE, SIZE, SIZE).repeat(1, WIDTH, 1, 1, 1)
    right = torch.rand_like(labels, dtype=torch.float32) < 0.5
    seen = confident if kind == "pseudo" else labels.where(right, (labels + 1) % 3)
    teacher = output_of(seen, 1 + voxels)
    student = output_of(torch.zeros(2, SIZE, SIZE, SIZE, dtype=torch.int64), torch.randn(2, WIDTH, SIZE, SIZE, SIZE))
    if kind == "labelled":
        term(student, labels, 0, teacher_l=teacher)
        truth, stored = labels.flatten(), right.flatten()
    else:
        term(student, torch.full_like(labels, IGNORE), 0, teacher_l=teacher, pseudo=PseudoVoxels(confident, teacher))
        truth, stored = confident.flatten(), torch.ones(SIZE**3, dtype=torch.bool)
    for class_id in range(3):
        assert term.manager.memory_count[class_id] == term.config.elements_per_class
        places = term.manager.memory[class_id, :, 0].long() - 1
        assert (truth[places] == class_id).all() and stored[places].all()


def test_the_student_fills_the_memory_with_what_it_projects() -> None:
    term = make_term()
    labels, _ = random_halves()
    student = output_of(labels, torch.randn(1, WIDTH, SIZE, SIZE, SIZE))
    projected = term.projection(student.features.flatten(2)[0].T)
    term(student, labels, 0)
    nearest = torch.cdist(term.manager.memory.flatten(0, 1), projected).amin(1)
    assert nearest.max() < 1e-2  # and not what the prediction head makes of it


def test_the_averaged_projection_follows_the_trained_one() -> None:
    term = make_term(ema_decay=0.75)
    first, last = (next(part.parameters()) for part in (term.projection, term.teacher_projection))
    with torch.no_grad():
        first.fill_(4.0)
        last.fill_(0.0)
    term.after_step(100)
    assert last.unique().tolist() == [1.0] and not last.requires_grad


def test_both_kinds_share_the_quota_of_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    term = make_term(prototype_samples=40)
    compared = groups_compared(term, monkeypatch)
    labels, confident = random_halves()
    student = output_of(torch.cat([labels, confident]), torch.randn(2, WIDTH, SIZE, SIZE, SIZE))
    term(student, labels, 1, pseudo=PseudoVoxels(confident, student.patches(slice(1, 2))))
    term(student.patches(slice(1)), labels, 1)
    assert compared[0].bincount().tolist() == [20] * 6 and compared[1].bincount().tolist() == [40] * 3


def test_of_the_rows_of_all_ranks_those_in_use_are_kept_in_order() -> None:
    groups = torch.tensor([IGNORE, 3, 0, IGNORE, IGNORE, 3, IGNORE, IGNORE])  # of two ranks with four slots each
    assert rows_in_use(groups, 4).tolist() == [1, 2, 5, 0]
