"""The mean teacher's parts: pseudo-labels, pasted boxes, and what the teacher sees."""

from __future__ import annotations

import dataclasses
from math import exp

import pytest
import torch
from conftest import BallSource
from helpers_runs import random_batch, small_config

from myutils.build import DataFacts, build_method
from myutils.methods.mean_teacher import MeanTeacher
from myutils.pseudo_labels import Paste, draw_paste, drop_channels, pseudo_labels

CPU = torch.device("cpu")


def make(**changes: object) -> MeanTeacher:
    torch.manual_seed(0)
    source = BallSource()
    method = build_method(small_config(source, **changes), DataFacts.of(source))
    assert isinstance(method, MeanTeacher)
    return method


def test_pseudo_labels_by_hand() -> None:
    logits = torch.tensor([0.0, 2.0]).reshape(1, 2, 1, 1, 1).requires_grad_()
    pseudo = pseudo_labels(logits)
    assert pseudo.labels.item() == 1
    assert pseudo.confidence.item() == pytest.approx(1 / (1 + torch.exp(torch.tensor(-2.0)).item()))
    assert not pseudo.confidence.requires_grad


@pytest.mark.parametrize("size", [(8, 8, 8), (16, 4, 2), (1, 5, 7)])
def test_each_unlabelled_patch_gets_one_box_of_a_labelled_one(size: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    for _ in range(20):
        paste = draw_paste(2, torch.Size((3, *size)), CPU)
        assert len(paste.partners) == 3 and int(paste.partners.min()) >= 0 and int(paste.partners.max()) < 2
        for box in paste.boxes:
            corners = box.nonzero()
            assert len(corners), "nothing is pasted"
            sides = corners.amax(0) - corners.amin(0) + 1
            assert int(sides.prod()) == int(box.sum()), "not a box"


def test_boxes_reach_the_last_offset_and_keep_the_stated_volume() -> None:
    torch.manual_seed(0)
    reached, shares = set(), []
    for _ in range(200):
        box = draw_paste(1, torch.Size((1, 8, 8, 8)), CPU).boxes[0]
        reached |= {int(box.nonzero()[:, 0].max()), int(box.nonzero()[:, 0].min())}
        shares.append(float(box.float().mean()))
    assert {0, 7} <= reached
    assert 0.2 < sum(shares) / len(shares) < 0.55


def test_boxes_take_the_unlabelled_share_from_the_patch_before() -> None:
    torch.manual_seed(0)
    partners = torch.stack([draw_paste(2, torch.Size((3, 6, 6, 6)), CPU, 0.25).partners for _ in range(200)])
    for index, drawn in enumerate(partners.T):
        assert set(drawn.tolist()) == {0, 1, 2 + (index - 1) % 3}
    assert float((partners > 1).float().mean()) == pytest.approx(0.25, abs=0.06)


def test_paste_by_hand() -> None:
    labeled = torch.tensor([[10, 11]]).reshape(1, 1, 1, 1, 2)
    unlabeled = torch.tensor([[20, 21], [30, 31]]).reshape(2, 1, 1, 1, 2)
    boxes = torch.tensor([[True, False], [False, True]]).reshape(2, 1, 1, 2)
    assert Paste(torch.tensor([0, 1]), boxes).apply(labeled, unlabeled).flatten().tolist() == [10, 21, 30, 21]


def test_feature_perturbation_spares_the_labelled_patches() -> None:
    torch.manual_seed(0)
    level = torch.ones(4, 32, 2, 2, 2)
    changed = drop_channels([level], first=1)[0]
    assert torch.equal(changed[0], level[0])
    assert set(changed[1:].unique().tolist()) == {0.0, 2.0}


def test_feature_perturbation_changes_what_unlabelled_patches_learn_and_nothing_else() -> None:
    settings = {"use_contrastive_prototype": False}
    terms = []
    batch = random_batch()
    for perturbed in (False, True):
        method = make(feature_perturbation=perturbed, **settings)
        assert method.config.feature_perturbation is perturbed
        torch.manual_seed(1)
        terms.append(method(batch, 3).terms)
    torch.testing.assert_close(terms[0]["supervised"].value, terms[1]["supervised"].value)
    assert not torch.isclose(terms[0]["consistency"].value, terms[1]["consistency"].value)


def test_a_single_unlabelled_patch_takes_its_boxes_from_labelled_ones() -> None:
    method = make(paste_unlabeled=1.0, strong_views=2)
    batch = random_batch(unlabeled=1, views=2)
    _, target, pasted = method._mix(batch, batch.image_u_strong, torch.full((2, 3, 16, 16, 16), 1 / 3), boxes=True)
    assert pasted is not None and pasted.any()
    assert (target.amax(1)[pasted] == 1).all()


@pytest.mark.parametrize("flag", ["feature_perturbation", "paste_unlabeled", "perturbed_share"])
def test_flags_of_the_mixed_patches_are_refused_where_nothing_uses_them(flag: str) -> None:
    with pytest.raises(ValueError, match=f"--{flag}"):
        make(method="bcp", **{flag: True if flag == "feature_perturbation" else 0.5})


def test_the_last_steps_have_neither_boxes_nor_dropped_channels() -> None:
    """From there on the terms are those of a method without either; before they are not."""
    settings = {"use_contrastive_prototype": False, "max_iteration": 10, "consistency_rampup": 1}
    method = make(feature_perturbation=True, perturbed_share=0.6, **settings)
    plain = make(copy_paste=False, **settings)
    batch = random_batch()
    for step in (5, 6, 9):
        torch.manual_seed(step)
        ours, theirs = (given(batch, step).terms["consistency"].value for given in (method, plain))
        assert torch.equal(ours, theirs) == (step >= 6)


def test_mix_gives_true_labels_for_certain_where_they_were_pasted() -> None:
    method = make()
    batch = random_batch()
    believed = torch.tensor([0.2, 0.3, 0.5]).reshape(1, 3, 1, 1, 1).expand(2, 3, 16, 16, 16)
    mixed, target, pasted = method._mix(batch, batch.image_u_strong, believed, boxes=True)
    assert pasted is not None
    confidence, labels = target.max(1)
    assert (confidence[pasted] == 1).all() and (confidence[~pasted] == 0.5).all()
    # A box keeps its place, so a pasted label is that of one of the labelled patches at the same voxel.
    assert ((batch.label_l[:, None] == labels).any(0) | ~pasted).all()
    assert (labels[~pasted] == 2).all()
    assert torch.equal(mixed[:, 0][~pasted], batch.image_u_strong[:, 0][~pasted])


def test_mix_of_unlabelled_patches_carries_the_other_belief_and_counts_as_foreign() -> None:
    method = make(paste_unlabeled=1.0)
    batch = random_batch()
    believed = torch.rand(2, 3, 16, 16, 16).softmax(1)
    mixed, target, pasted = method._mix(batch, batch.image_u_strong, believed, boxes=True)
    assert pasted is not None and 0 < pasted.float().mean() < 0.6
    for own, other in ((0, 1), (1, 0)):
        box = pasted[own]
        assert torch.equal(target[own][:, box], believed[other][:, box])
        assert torch.equal(mixed[own][:, box], batch.image_u_strong[other][:, box])
        assert torch.equal(target[own][:, ~box], believed[own][:, ~box])


def test_hard_labels_count_above_the_gate_only_and_soft_ones_everywhere() -> None:
    settings = {"copy_paste": False, "use_contrastive_prototype": False, "confidence_threshold": 0.9999}
    batch = random_batch()
    hard = make(soft_labels=False, **settings)(batch, 3)
    soft = make(soft_labels=True, **settings)(batch, 3)
    assert hard.terms["consistency"].value.item() == 0.0
    assert soft.terms["consistency"].value.item() > 0.1
    assert hard.scalars["gate_share"].item() == 0.0


def test_pasted_labels_are_not_counted_among_what_passes_the_gate() -> None:
    output = make(use_contrastive_prototype=False, confidence_threshold=0.9999)(random_batch(), 3)
    assert output.terms["consistency"].value.item() > 0 and output.scalars["gate_share"].item() == 0.0


def test_teacher_flips_average_the_views_with_mirrored_ones() -> None:
    method = make(teacher_flips=True, flip_axes=(1,))
    views = torch.randn(2, 1, 16, 16, 16)
    labeled, found = method.teach(random_batch(), views, with_labeled=True)
    plain, mirrored = method.teacher(views), method.teacher(views.flip(3))
    expected = 0.5 * (plain.logits.softmax(1) + mirrored.logits.softmax(1).flip(3))
    torch.testing.assert_close(found.logits.softmax(1), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.features, plain.features, atol=1e-5, rtol=1e-4)
    assert labeled is not None and len(labeled.logits) == 2


def test_the_teacher_hands_out_coarse_features_where_its_branch_keeps_them() -> None:
    method, views = make(), torch.randn(2, 1, 17, 16, 16)
    assert method.teach(random_batch(), views, with_labeled=False)[1].coarse == ()
    method.teacher.branch.keeps_coarse = True
    coarse = method.teach(random_batch(), views, with_labeled=False)[1].coarse
    for ours, theirs in zip(coarse, method.student(views).coarse, strict=True):  # equal weights so far
        torch.testing.assert_close(ours, theirs)
        assert theirs.requires_grad and not ours.requires_grad


def test_each_strong_view_learns_the_same_pseudo_label() -> None:
    """Two equal views without pasting give the loss of one; the second one alone moves it."""
    torch.manual_seed(0)
    settings = {"use_contrastive_prototype": False, "copy_paste": False}
    one, two = make(**settings), make(strong_views=2, **settings)
    two.load_state_dict(one.state_dict())
    batch = random_batch()
    twice = dataclasses.replace(batch, image_u_strong=batch.image_u_strong.repeat(2, 1, 1, 1, 1))
    expected, found = (method(given, 3) for method, given in ((one, batch), (two, twice)))
    torch.testing.assert_close(found.terms["consistency"].value, expected.terms["consistency"].value)
    torch.testing.assert_close(found.terms["supervised"].value, expected.terms["supervised"].value)
    assert found.pseudo_labels is not None and torch.equal(found.pseudo_labels, expected.pseudo_labels)
    twice.image_u_strong[2:] += 1
    assert not torch.isclose(two(twice, 3).terms["consistency"].value, expected.terms["consistency"].value)


def test_strong_views_are_refused_where_nothing_learns_from_them() -> None:
    with pytest.raises(ValueError, match="--strong_views 2: ua_mt has no use for strong views"):
        make(method="ua_mt", strong_views=2)


def test_best_mirrors_at_the_end_where_there_is_an_axis_and_no_other_view() -> None:
    assert make(method="best", flip_axes=(1,)).config.tta_flips is True
    assert make(method="best", flip_axes=()).config.tta_flips is False
    assert make(method="best", flip_axes=(1,), tta_views=4).config.tta_flips is False
    with pytest.raises(ValueError, match="together with 4 views"):
        make(tta_flips=True, tta_views=4)


@pytest.mark.parametrize("name", ["teacher_flips", "tta_flips"])
def test_mirroring_that_was_asked_for_needs_an_axis(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name}: there is no axis to mirror along"):
        make(flip_axes=(), **{name: True})


def test_consistency_weight_ramps_up_once() -> None:
    method = make(consistency=0.5, consistency_rampup=10)
    assert method(random_batch(), 10).terms["consistency"].weight == 0.5
    assert method(random_batch(), 0).terms["consistency"].weight == pytest.approx(0.5 * 0.00674, rel=1e-2)


@pytest.mark.parametrize("name", ["mean_teacher", "ua_mt", "cov_dfp"])
def test_ramp_up_starts_after_the_warm_up(name: str) -> None:
    config = small_config(BallSource(), method=name, warmup_iteration=40, max_iteration=100, consistency_rampup=None)
    method = build_method(config, DataFacts.of(BallSource()))
    assert method.rampup == 18  # 30 % of the 60 steps that are left
    assert [method.ramp(step) for step in (39, 40, 49, 58)] == pytest.approx([exp(-5), exp(-5), exp(-5 / 4), 1.0])


def test_views_that_are_all_one_are_computed_once() -> None:
    """Without changes of intensity only boxes and dropped channels tell strong views apart."""
    settings = {"strong_views": 2, "strong_intensity": 0.0, "perturbed_share": 0.5, "max_iteration": 10}
    method, seen = make(feature_perturbation=True, **settings), []
    run = method.student.run_branches
    method.student.run_branches = lambda images, *rest: seen.append(len(images)) or run(images, *rest)
    batch = random_batch()
    batch.image_u_strong = batch.image_u.repeat(2, 1, 1, 1, 1)
    for step in (4, 5):
        method(batch, step)
    few = len(batch.image_l) + len(batch.image_u)
    assert seen == [few + len(batch.image_u), few]
    assert [make(**settings | {"strong_intensity": size}).views_at(9) for size in (0.0, 0.5)] == [1, 2]


def test_teacher_sees_weak_views_in_evaluation_mode() -> None:
    method = make(use_contrastive_prototype=False)
    method.train()
    seen = []
    method.teacher.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0])))
    batch = random_batch()
    method(batch, 0)
    assert [training for training, _ in seen] == [False]
    assert torch.equal(seen[0][1], batch.image_u)


def test_teacher_runs_labelled_patches_only_when_the_memory_is_refilled() -> None:
    method = make(use_contrastive_prototype=True, memory_interval=4)
    sizes = []
    method.teacher.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for step in range(5):
        method(random_batch(), step)
    assert sizes == [4, 2, 2, 2, 4]


def test_memory_holds_teacher_features_of_labelled_voxels() -> None:
    method = make(use_contrastive_prototype=True, memory_interval=1, confidence_threshold=0.0)
    for parameter in method.prototypes.teacher_projection.parameters():
        parameter.zero_()
    method(random_batch(), 0)
    memory = method.prototypes.manager
    assert memory.memory_count.sum() > 0 and memory.memory_from_labeled[memory.memory_count > 0].all()
    assert memory.memory.abs().sum() == 0  # through the zeroed averaged projection, not the student's


def test_after_step_moves_the_teacher_toward_the_student() -> None:
    method = make(ema_decay=0.5)
    with torch.no_grad():
        method.student.branch.classifier.bias.fill_(4.0)
        method.teacher.branch.classifier.bias.fill_(0.0)
    method.after_step(100)
    assert method.teacher.branch.classifier.bias.tolist() == pytest.approx([2.0] * 3)
