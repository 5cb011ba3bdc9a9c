"""What the methods hand on: masks and labels to the prototype term, features to the pools, weights to the terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers_runs import batch_for, random_batch, small_method
from torch.nn import functional

from myutils.ema import make_teacher
from myutils.losses.deep_supervision import DeepSupervision
from myutils.losses.segmentation import dice_ce_loss, one_hot_labels
from myutils.methods.base import METHODS
from myutils.methods.dtc import signed_distances
from myutils.methods.ss_net import overlap_distance, unit_patches
from myutils.prototype_term import IGNORE
from myutils.pseudo_labels import draw_paste, pseudo_labels

MASK = torch.ones(2, 16, 16, 16, dtype=torch.bool)
MASK[:, 3:13, 3:13, 3:13] = False

# Methods that come with the project; one that is added may name its terms, and keep its weight, as it likes.
PROJECT_S = ("mean_teacher", "best", "ua_mt", "cps", "fixmatch", "mc_net", "dtc", "bcp", "ss_net", "cov_dfp")


def spied(monkeypatch: pytest.MonkeyPatch, method: Any, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of every call of a method's function from here on."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    original: Callable[..., Any] = getattr(method, name)
    monkeypatch.setattr(method, name, lambda *a, **k: calls.append((a, k)) or original(*a, **k))
    return calls


def all_among(rows: torch.Tensor, every: torch.Tensor) -> bool:
    """Whether each of the rows (S, E) is one of the others (N, E), as far as ``cdist`` is exact."""
    return bool(torch.cdist(rows.detach(), every.detach()).amin(1).max() < 1e-2)


@pytest.mark.parametrize("name", [name for name in METHODS.names() if METHODS.get(name).uses_unlabeled])
def test_the_loss_on_unlabelled_patches_rises_to_its_weight_unless_it_is_published_constant(name: str) -> None:
    method = small_method(name, consistency=0.37, consistency_rampup=10, warmup_iteration=0, max_iteration=40)
    outputs = [method(batch_for(method), step).terms for step in (0, 5, 10)]
    assert name not in PROJECT_S or ("consistency" in outputs[-1] and method.ramps == (name != "bcp"))
    shares = [math.exp(-5), math.exp(-5 / 4), 1] if method.ramps else [1, 1, 1]
    by_weight = [key for key in outputs[-1] if outputs[-1][key].weight == pytest.approx(0.37)]
    on_unlabelled = ["consistency"] if "consistency" in outputs[-1] else by_weight
    assert on_unlabelled
    for key in on_unlabelled:
        assert [terms[key].weight for terms in outputs] == pytest.approx([0.37 * share for share in shares])


def test_bcp_gives_the_prototypes_each_patch_without_the_other_s_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("myutils.methods.bcp.paste_masks", lambda *_: MASK)
    method, batch = small_method("bcp", warmup_iteration=0), random_batch()
    ((_, labels, _), options) = spied_once(monkeypatch, method, "prototype_terms", batch)
    assert torch.equal(labels, batch.label_l.where(MASK, IGNORE)) and torch.equal(options["foreign"], ~MASK)


def spied_once(monkeypatch: pytest.MonkeyPatch, method: Any, name: str, batch: Any) -> Any:
    calls = spied(monkeypatch, method, name)
    method(batch, 3)
    assert len(calls) == 1
    return calls[0]


@pytest.mark.parametrize("name", ["prototype_terms", "coarse_terms"])
def test_bcp_first_teaches_the_labels_of_its_mixes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("myutils.methods.bcp.paste_masks", lambda *_: MASK)
    batch = random_batch(2, 0)
    (arguments, _) = spied_once(monkeypatch, small_method("bcp"), name, batch)
    assert torch.equal(arguments[1], batch.label_l.where(MASK, batch.label_l.flip(0)))


def test_the_mean_teacher_s_gate_is_open_where_true_labels_were_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = small_method("mean_teacher", confidence_threshold=0.9999), random_batch()
    boxes = ~MASK
    original = draw_paste
    monkeypatch.setattr(
        "myutils.methods.mean_teacher.draw_paste",
        lambda *a: original(*a)._replace(boxes=boxes, partners=torch.tensor([0, 1])),
    )
    seen: list[Any] = []
    monkeypatch.setattr(
        "myutils.methods.mean_teacher.soft_label_loss", lambda *given: seen.append(given) or given[0].sum() * 0
    )
    ((_, _, _), options) = spied_once(monkeypatch, method, "prototype_terms", batch)
    _, target, gate, labels = seen[0]
    assert torch.equal(gate.bool(), boxes)  # the teacher is sure of nothing, pasted labels are certain
    assert torch.equal(labels[boxes], batch.label_l[boxes]) and torch.equal(labels, target.argmax(1))
    assert torch.equal(options["foreign"], boxes)


def test_a_paste_of_boxes_has_a_quarter_to_a_half_of_the_volume() -> None:
    torch.manual_seed(0)
    shares = draw_paste(1, torch.Size((50, 24, 24, 24)), torch.device("cpu")).boxes.float().mean((1, 2, 3))
    assert 0.2 < shares.min() < 0.3 and 0.45 < shares.max() < 0.55 and shares.mean() == pytest.approx(0.375, abs=0.04)


def test_all_decoders_of_mc_net_learn_the_labels() -> None:
    method, batch = small_method("mc_net", decoders=2), random_batch()
    images = torch.cat([batch.image_l, batch.image_u])
    outputs = method.student.run_branches(images, method._branches())
    expected = sum(dice_ce_loss(output.logits[:2], batch.label_l) for output in outputs) / 2
    assert method(batch, 3).terms["supervised"].value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_fixmatch_is_the_mean_over_its_strong_views() -> None:
    method, batch = small_method("fixmatch", strong_views=2, confidence_threshold=0.0), random_batch(views=2)
    labels = pseudo_labels(method.student(batch.image_u).logits).labels
    losses = [functional.cross_entropy(method.student(view).logits, labels) for view in batch.image_u_strong.chunk(2)]
    expected = (sum(losses) / 2).item()
    assert losses[0].item() != pytest.approx(expected, rel=1e-3)
    assert method(batch, 3).terms["consistency"].value.item() == pytest.approx(expected, rel=1e-4)


def test_each_side_of_a_signed_distance_has_its_own_largest_value() -> None:
    found = signed_distances(torch.tensor([0, 0, 0, 0, 1, 1]).reshape(1, 6, 1, 1), 2)
    assert found.flatten().tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, -0.5, -1.0])
    assert small_method("dtc")(random_batch(), 0).terms["distance"].weight == 0.3


def test_ss_net_moves_up_the_slope_of_the_probe() -> None:
    method, seen = small_method("ss_net"), []
    images = torch.randn(2, 1, 16, 16, 16)
    logits = method.student(images).logits.detach()
    method.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    method._smoothness(images, logits)
    probe, moved = seen
    free = probe.clone().requires_grad_()
    overlap_distance(method.student(free).logits.softmax(1), logits.softmax(1)).backward()
    torch.testing.assert_close(moved - images, 10 * unit_patches(free.grad), atol=2e-3, rtol=1e-2)


def test_a_teacher_evaluates_and_takes_no_gradient() -> None:
    student = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)).train()
    teacher = make_teacher(student)
    assert student.training and not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_teacher_flips_take_each_axis() -> None:
    method = small_method("mean_teacher", teacher_flips=True, flip_axes=(0, 2))
    torch.manual_seed(0)
    assert {method._mirror_axis() for _ in range(30)} == {2, 4}


def test_the_teacher_averages_plainly_at_first() -> None:
    method = small_method("mean_teacher", ema_decay=0.9)
    first, last = (network.branch.classifier.bias for network in (method.student, method.teacher))
    with torch.no_grad():
        first.fill_(4.0)
        last.fill_(0.0)
    method.after_step(1)
    assert last.unique().tolist() == [2.0]  # a mean of two, not 0.9 of the first


def test_coarse_levels_learn_padded_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    method = small_method("supervised", deep_supervision=True)
    seen: list[torch.Tensor] = []
    forward = DeepSupervision.forward
    monkeypatch.setattr(DeepSupervision, "forward", lambda self, a, b: seen.append(b) or forward(self, a, b))
    batch = random_batch(4, 0, size=17)
    method(batch, 0)
    assert seen[0].shape[2:] == (24, 24, 24)
    assert torch.equal(seen[0][:, :, 3:20, 3:20, 3:20], one_hot_labels(batch.label_l, 3)) and seen[0].sum() == 4 * 17**3


def test_the_prototype_term_is_built_as_the_flags_say() -> None:
    flags = {"prototype_ranking": "lowest", "memory_from_unlabeled": True, "prototype_loss": "infonce"}
    method = small_method("mean_teacher", use_contrastive_prototype=True, confidence_threshold=0.7, **flags)
    manager = method.prototypes.manager
    assert manager.ranking == "lowest" and manager.overwrite_with_unlabeled and manager.confidence_threshold == 0.7


def test_what_is_compared_with_the_memory_went_through_both_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = small_method("supervised", use_contrastive_prototype=True), random_batch(4, 0)
    term, compared = method.prototypes, []
    original = term.manager.compare_and_store
    monkeypatch.setattr(term.manager, "compare_and_store", lambda *given: compared.append(given[0]) or original(*given))
    output = method.student(batch.image_l)
    term(output, batch.label_l, 0)
    rows = output.features.detach().movedim(1, -1).flatten(0, 3)
    every = term.prediction(term.projection(rows))
    assert all_among(compared[0], every)


COV_DFP = {"dfp_start_iter": 2, "selector_train_iter": 1, "dfp_reconstruct_interval": 50, "max_iteration": 90}


def test_terms_of_the_pools_have_their_own_weights_which_rise() -> None:
    weights = {"dfp_anchor": 0.2, "dfp_compact": 0.3, "dfp_separation": 0.4, "dfp_correlation": 0.6}
    flags = {"anchor_weight": 0.2, "compact_weight": 0.3, "separation_weight": 0.4, "consistency_o": 0.6}
    method = small_method("cov_dfp", **COV_DFP, **flags, consistency_rampup=20, ema_alpha=0.6, ema_decay=0.9)
    assert method.pool.anchor_decay == 0.6
    for step, share in ((10, math.exp(-5 / 4)), (20, 1.0)):
        terms = method(random_batch(), step).terms
        assert {name: terms[name].weight for name in weights} == {
            name: pytest.approx(share * weight) for name, weight in weights.items()
        }


def test_pools_store_what_the_teacher_is_right_and_sure_about() -> None:
    method, batch, pushed = small_method("cov_dfp", confidence_threshold=0.6, **COV_DFP), random_batch(), []
    output = method.teacher(batch.image_l)
    found = pseudo_labels(output.logits)
    reliable = (found.confidence > 0.6) & (found.labels == batch.label_l)
    assert 0 < reliable.sum() < (found.labels == batch.label_l).sum()
    method.pool.push = lambda features, classes: pushed.append((features, classes))
    method(batch, 0)
    features, classes = pushed[0]
    every = output.features.detach().movedim(1, -1)
    assert (classes >= 0).any() and all_among(features[classes >= 0], every[reliable])


def test_pools_compare_unlabelled_features_of_their_own_places(monkeypatch: pytest.MonkeyPatch) -> None:
    method = small_method("cov_dfp", **COV_DFP, copy_paste=False, confidence_threshold=0.0)
    batch, seen = random_batch(), []
    monkeypatch.setattr(
        "myutils.methods.cov_dfp.correlation_consistency", lambda *given: seen.append(given) or given[0].sum() * 0
    )
    method(batch, 5)
    output = method.student(torch.cat([batch.image_l, batch.image_u_strong]))
    rows = output.features.detach().movedim(1, -1).flatten(1, 3)
    for features, known, patches in ((seen[0][0], seen[0][2], rows[:2]), (seen[0][1], seen[0][3], rows[2:])):
        assert known.any() and all_among(features[known], patches.flatten(0, 1))


def test_pools_leave_pasted_voxels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = small_method("cov_dfp", **COV_DFP, confidence_threshold=0.0), random_batch()
    calls = spied(monkeypatch, method, "confident_labels")
    method(batch, 5)
    assert calls and all(call[0][2] is not None and call[0][2].any() for call in calls)


def test_the_selector_of_the_pools_moves_no_student() -> None:
    method = small_method("cov_dfp", **COV_DFP, confidence_threshold=0.0)
    method(random_batch(), 2)
    method(random_batch(), 3).terms["dfp_selector"].value.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in method.student.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in method.selector.parameters())


def test_full_buffers_keep_the_newest_of_one_push() -> None:
    pool = small_method("cov_dfp", **COV_DFP, max_global_features=6).pool  # two of each class
    features = torch.arange(5.0)[:, None].repeat(1, pool.store.shape[2])
    pool.push(features, torch.zeros(5, dtype=torch.int64))
    stored, classes = pool.stored()
    assert sorted(stored[:, 0].tolist()) == [3.0, 4.0] and np.array_equal(classes, [0, 0])
