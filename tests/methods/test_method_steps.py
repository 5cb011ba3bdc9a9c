"""Whole steps of the methods: each loss term against a few lines that compute it from the networks' outputs."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import BallSource
from helpers_runs import random_batch, small_method
from torch.nn import functional

from dataloaders.patches import Batch
from myutils.config import RunConfig
from myutils.losses.segmentation import dice_ce_loss
from myutils.methods.base import LossTerm, Method, StepOutput
from myutils.prototype_term import IGNORE
from myutils.pseudo_labels import PseudoLabels
from myutils.resolving import resolve_config


def value(method: Method, batch: Batch, name: str) -> float:
    return method(batch, 3).terms[name].value.item()


def test_the_total_weighs_each_term() -> None:
    output = StepOutput({"a": LossTerm(torch.tensor(2.0), 0.5), "b": LossTerm(torch.tensor(3.0), 0.1)})
    assert output.total().item() == pytest.approx(1.3)


def test_the_prototype_terms_have_their_own_weights_which_rise() -> None:
    weights = {"contrastive_loss": 0.3, "intra_loss": 0.2, "inter_loss": 0.7}
    flags = {"contrastive_weight": 0.3, "intra_weight": 0.2, "inter_weight": 0.7, "consistency_rampup": 10}
    for name in ("mean_teacher", "supervised"):
        method = small_method(name, use_contrastive_prototype=True, **flags)
        for step, share in ((0, math.exp(-5)), (5, math.exp(-5 / 4)), (10, 1.0)):
            terms = method(random_batch(), step).terms if name == "mean_teacher" else method(plain(), step).terms
            found = {term: terms[term].weight for term in weights}
            assert found == {term: pytest.approx(share * weight) for term, weight in weights.items()}


def plain() -> Batch:
    return random_batch(4, 0)


def test_supervised_training_has_no_warm_up_to_wait_for() -> None:
    method = small_method("supervised", warmup_iteration=3, max_iteration=10, consistency_rampup=4)
    assert method.warmup == 0 and method.ramp(2) == pytest.approx(math.exp(-5 / 4))


def test_a_pasted_voxel_has_no_pseudo_label_for_the_prototypes() -> None:
    method = small_method("mean_teacher", confidence_threshold=0.5)
    found = PseudoLabels(
        torch.tensor([1, 2, 1, 2]).reshape(1, 4, 1, 1), torch.tensor([0.9, 0.6, 0.5, 0.2]).reshape(1, 4, 1, 1)
    )
    foreign = torch.tensor([False, True, False, False, True, False, False, False]).reshape(2, 4, 1, 1)
    assert method.confident_labels(found, 2, None).flatten().tolist() == [1, 2, IGNORE, IGNORE] * 2
    assert method.confident_labels(found, 2, foreign).flatten().tolist() == [1, *[IGNORE] * 4, 2, IGNORE, IGNORE]


def test_the_prototypes_take_the_pseudo_labels_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    method = small_method("mean_teacher", use_contrastive_prototype=True, confidence_threshold=0.0)
    batch, seen = random_batch(), []
    monkeypatch.setattr(
        method.prototypes, "forward", lambda *_, pseudo, **__: seen.append(pseudo) or dict.fromkeys(LOSSES, 0.0)
    )
    student, teacher = method.student(torch.cat([batch.image_l, batch.image_u])), method.student(batch.image_u)
    believed = PseudoLabels(torch.full((2, 16, 16, 16), 2), torch.ones(2, 16, 16, 16))
    method.prototype_terms(student, batch.label_l, 0, teacher_u=teacher, believed=believed)
    method.prototype_terms(student, batch.label_l, 0, teacher_u=teacher)
    assert (seen[0].labels == 2).all() and torch.equal(seen[1].labels, teacher.logits.argmax(1))


LOSSES = ("contrastive_loss", "intra_loss", "inter_loss")

BEST = {
    "consistency": 0.5,
    "strong_views": 2,
    "strong_intensity": 0.0,
    "feature_perturbation": True,
    "paste_unlabeled": 0.5,
    "deep_supervision": True,
    "tta_flips": True,
    "use_contrastive_prototype": False,
    "copy_paste": True,
    "soft_labels": True,
    "teacher_flips": False,
}


def test_best_is_what_the_documents_say() -> None:
    config = resolve_config(RunConfig(method="best"), BallSource())
    assert {name: getattr(config, name) for name in BEST} == BEST


def test_ua_mt_shows_its_teacher_noisy_views() -> None:
    method, seen = small_method("ua_mt", uncertainty_passes=2), []
    method.teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = random_batch()
    method(batch, 3)
    assert len(seen) == 3  # the target, and two passes for the uncertainty
    noises = [views - batch.image_u for views in seen]
    assert all(0.05 < noise.std() < 0.15 and noise.abs().max() <= 0.2 + 1e-5 for noise in noises)
    assert not torch.equal(noises[0], noises[1]) and not torch.equal(noises[1], noises[2])


@pytest.mark.parametrize("stage", ["warm-up", "mixed"])
def test_both_networks_of_cps_learn_the_labels(stage: str) -> None:
    method = small_method("cps")
    batch = random_batch(unlabeled=0 if stage == "warm-up" else 2)
    by_hand = sum(dice_ce_loss(net(batch.image_l).logits, batch.label_l) for net in (method.student, method.second))
    assert value(method, batch, "supervised") == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("perturbed", [False, True])
def test_fixmatch_against_its_formula(monkeypatch: pytest.MonkeyPatch, perturbed: bool) -> None:
    method = small_method("fixmatch", confidence_threshold=0.5, feature_perturbation=perturbed)
    monkeypatch.setattr("myutils.methods.fixmatch.drop_channels", lambda levels: levels)  # the weak views as they are
    batch = random_batch()
    weak, strong = (method.student(images).logits for images in (batch.image_u, batch.image_u_strong))
    confidence, labels = weak.softmax(1).max(1)
    gate = confidence > 0.5
    assert 0.1 < gate.float().mean() < 0.9
    losses = [(functional.cross_entropy(each, labels, reduction="none") * gate).mean() for each in (strong, weak)]
    expected = (losses[0] + losses[1]) / 2 if perturbed else losses[0]
    assert value(method, batch, "consistency") == pytest.approx(expected.item(), rel=1e-4)


def test_mc_net_compares_each_decoder_with_every_other() -> None:
    method = small_method("mc_net", decoders=3)
    batch = random_batch()
    images = torch.cat([batch.image_l, batch.image_u])
    probs = [each.logits.softmax(1) for each in method.student.run_branches(images, method._branches())]
    sharp = [each.double().pow(10) / each.double().pow(10).sum(1, keepdim=True) for each in probs]
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    expected = sum((probs[i] - sharp[j]).square().mean() for i, j in pairs) / 6
    assert value(method, batch, "consistency") == pytest.approx(expected.item(), rel=1e-4)


def test_dtc_calls_negative_distances_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = small_method("dtc"), random_batch()
    probs = method.student(torch.cat([batch.image_l, batch.image_u])).logits.softmax(1)[:, 1:]
    for distance, inside in ((-0.01, 1.0), (0.0, 0.5), (0.01, 0.0)):
        monkeypatch.setattr(
            method, "_distances", lambda _, distance=distance: torch.full_like(probs, distance).requires_grad_()
        )
        expected = (inside - probs).square().mean().item()
        assert value(method, batch, "consistency") == pytest.approx(expected, rel=1e-4)


def test_ss_net_s_own_prediction_is_a_constant() -> None:
    method = small_method("ss_net")
    images = torch.randn(2, 1, 16, 16, 16)
    logits = method.student(images).logits.detach().requires_grad_()
    method._smoothness(images, logits).backward()
    assert logits.grad is None


def test_bcp_first_pastes_a_box_of_the_patch_before(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(4, 16, 16, 16, dtype=torch.bool)
    mask[:, 3:13, 3:13, 3:13] = False
    monkeypatch.setattr("myutils.methods.bcp.paste_masks", lambda *_: mask)
    batch = plain()
    output = small_method("bcp")(batch, 0)
    assert output.images_l is not None and output.labels_l is not None
    for patch, before in ((0, 3), (1, 0), (2, 1), (3, 2)):
        assert torch.equal(output.labels_l[patch], batch.label_l[patch].where(mask[patch], batch.label_l[before]))
        assert torch.equal(output.images_l[patch], batch.image_l[patch].where(mask[patch], batch.image_l[before]))


def test_pools_are_built_anew_in_intervals_that_count_from_the_first() -> None:
    config = {"max_iteration": 60, "dfp_start_iter": 7, "dfp_reconstruct_interval": 10, "selector_train_iter": 2}
    method = small_method("cov_dfp", **config, memory_interval=100)
    assert [step for step in range(40) if method._rebuilds_at(step)] == [7, 17, 27, 37]
    assert [method.stage(step) for step in (6, 7, 8, 9, 16, 17, 19)] == [1, 2, 2, 3, 3, 2, 3]
    assert [step for step in range(1, 20) if method.refills_at(step)] == [7, 17]


@pytest.mark.parametrize("name", ["mean_teacher", "best", "bcp"])
def test_pictures_hold_what_the_student_saw(name: str) -> None:
    method, seen = small_method(name, warmup_iteration=0), []
    run = method.student.run_branches
    method.student.run_branches = lambda images, *rest: seen.append(images) or run(images, *rest)
    method.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = random_batch(views=2)
    output = method(batch, 3)
    assert output.images_u is not None and torch.equal(output.images_u[:2], seen[-1][2:4])
    assert not torch.equal(output.images_u[0], batch.image_u[0])
    assert not torch.equal(output.images_u[0], batch.image_u_strong[0])  # boxes, or a mix


def test_equal_strong_views_of_fixmatch_are_computed_once() -> None:
    for size, count in ((0.0, 1), (0.5, 3)):
        method, seen = small_method("fixmatch", strong_views=3, strong_intensity=size), []
        method.student.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(len(inputs[0])))
        method(random_batch(views=3), 3)
        assert seen == [2, 2 + 2 * count]
