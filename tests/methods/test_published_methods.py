"""The formulas of the published methods against values worked out by hand or by a naive loop."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import BallSource
from helpers_runs import random_batch, small_config, small_method
from torch import nn
from torch.nn import functional

from myutils.build import build_augmentation
from myutils.config import RunConfig
from myutils.methods.base import METHODS, Method
from myutils.methods.bcp import largest_components
from myutils.methods.dtc import signed_distances
from myutils.methods.fixmatch import gated_cross_entropy
from myutils.methods.mc_net import sharpen
from myutils.methods.ss_net import overlap_distance, unit_patches
from myutils.methods.ua_mt import input_noise, masked_square, predictive_entropy
from myutils.pseudo_labels import PseudoLabels, drop_channels
from myutils.resolving import resolve_config
from networks.base import SegmentationOutput


def term(method: Method, name: str, step: int = 3, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return method(random_batch(), step).terms[name].value


# ua_mt


def test_predictive_entropy_of_even_and_certain_predictions() -> None:
    even = torch.full((1, 4, 1, 1, 1), 0.25)
    certain = torch.tensor([1.0, 0.0, 0.0, 0.0]).reshape(1, 4, 1, 1, 1)
    assert predictive_entropy(even).item() == pytest.approx(math.log(4))
    assert predictive_entropy(certain).item() == 0.0


def test_masked_square_is_the_mean_over_masked_voxels_and_zero_without_any() -> None:
    student = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).reshape(1, 2, 2, 1, 1)
    teacher = torch.tensor([[0.5, 0.0], [0.5, 1.0]]).reshape(1, 2, 2, 1, 1)
    first = torch.tensor([True, False]).reshape(1, 2, 1, 1)
    assert masked_square(student, teacher, first).item() == pytest.approx(0.25)
    assert masked_square(student, teacher, torch.ones_like(first)).item() == pytest.approx(0.625)
    assert masked_square(student, teacher, torch.zeros_like(first)).item() == 0.0


def test_input_noise_is_cut() -> None:
    noise = input_noise(torch.zeros(1, 1, 32, 32, 32))
    assert noise.abs().max() == pytest.approx(0.2)
    assert noise.std() == pytest.approx(0.0954, abs=0.003)  # of a normal cut at two standard deviations


def test_ua_mt_passes_voxels_below_three_quarters_of_the_entropy_first_and_all_in_the_end() -> None:
    method = small_method("ua_mt", consistency_rampup=100)
    probs = torch.tensor([[0.8, 0.2, 0.0], [0.4, 0.35, 0.25], [0.5, 0.5, 0.0]]).T.reshape(1, 3, 3, 1, 1)
    shares = [value / math.log(3) for value in predictive_entropy(probs).flatten().tolist()]
    assert shares == pytest.approx([0.4555, 0.9835, 0.6309], abs=1e-4)
    gates = [(predictive_entropy(probs) < method.entropy_limit(step)).flatten().tolist() for step in (0, 100)]
    assert gates == [[True, False, True], [True, True, True]]
    assert method.entropy_limit(0) == pytest.approx((0.75 + 0.25 * math.exp(-5)) * math.log(3))
    method.entropy_limit = lambda step: 0.0 if step == 3 else 9.0
    assert [method(random_batch(), step).scalars["gate_share"] for step in (3, 4)] == [0.0, 1.0]


def test_ua_mt_asks_the_teacher_with_its_dropout_and_puts_it_back() -> None:
    method = small_method("ua_mt", model="vnet", patch_size=(32, 32, 32))
    active: list[bool] = []
    dropout = next(m for m in method.teacher.modules() if isinstance(m, torch.nn.Dropout3d))
    dropout.register_forward_hook(lambda module, *_: active.append(module.training))
    views = torch.randn(1, 1, 32, 32, 32)
    probs = method._mean_prediction(views)
    assert active == [True] * method.config.uncertainty_passes
    assert not dropout.training
    assert torch.allclose(probs.sum(1), torch.ones(1, 32, 32, 32), atol=1e-5)


# cps


def test_cps_networks_differ_and_learn_from_each_other() -> None:
    method = small_method("cps")
    loss = term(method, "consistency")
    torch.manual_seed(1)
    batch = random_batch()
    a, b = method.student(batch.image_u).logits, method.second(batch.image_u).logits
    by_hand = functional.cross_entropy(a, b.argmax(1)) + functional.cross_entropy(b, a.argmax(1))
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4)
    loss.backward()
    for network in (method.student, method.second):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.branch.classifier.parameters())
    assert not torch.equal(method.student.branch.classifier.weight, method.second.branch.classifier.weight)


# fixmatch


def test_gated_cross_entropy_divides_by_all_voxels() -> None:
    logits = torch.randn(1, 3, 2, 2, 1)
    target = PseudoLabels(torch.tensor([0, 1, 2, 1]).reshape(1, 2, 2, 1), torch.ones(1, 2, 2, 1))
    gate = torch.tensor([1.0, 0.0, 0.0, 1.0]).reshape(1, 2, 2, 1)
    log_probs = logits.log_softmax(1)
    by_hand = -(log_probs[0, 0, 0, 0, 0] + log_probs[0, 1, 1, 1, 0]) / 4
    assert gated_cross_entropy(logits, target, gate).item() == pytest.approx(by_hand.item())


def test_fixmatch_trains_every_weight_under_autocast() -> None:
    """Casts that autocast made without a graph must not be taken for those with one: torch 2.6 did."""
    method = small_method("fixmatch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        method(random_batch(), 3).total().backward()
    assert [name for name, weight in method.student.named_parameters() if weight.grad is None] == []


def test_fixmatch_feature_stream_changes_the_loss_and_keeps_the_mean_of_features() -> None:
    plain, perturbed = small_method("fixmatch"), small_method("fixmatch", feature_perturbation=True)
    assert term(plain, "consistency").item() != term(perturbed, "consistency").item()
    level = torch.ones(64, 64, 2, 2, 2)
    dropped = drop_channels([level])[0]
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.1)


# mc_net


def test_sharpen_by_hand_and_without_gradient() -> None:
    probs = torch.tensor([0.6, 0.4]).reshape(1, 2, 1, 1, 1).requires_grad_()
    sharp = sharpen(probs)
    assert sharp.flatten()[0].item() == pytest.approx(0.6**10 / (0.6**10 + 0.4**10), rel=1e-4)
    assert not sharp.requires_grad
    certain = sharpen(torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1, 1))
    assert certain.flatten().tolist() == pytest.approx([1.0, 0.0])


def test_mc_net_has_as_many_decoders_as_asked_for_and_they_differ() -> None:
    method = small_method("mc_net", decoders=3)
    branches = method._branches()
    assert len(branches) == 3
    weights = [branch.classifier.weight for branch in branches]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    term(method, "consistency").backward()
    assert all(branch.classifier.weight.grad.abs().sum() > 0 for branch in branches)


# dtc


def test_signed_distances_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 0]).reshape(1, 6, 1, 1)
    found = signed_distances(labels, 3)
    assert found.shape == (1, 2, 6, 1, 1)
    assert found[0, 0].flatten().tolist() == pytest.approx([1.0, 0.5, -0.5, -1.0, -0.5, 0.5])
    assert (found[0, 1] == 1.0).all()  # class 2 is absent
    assert (signed_distances(torch.ones(1, 2, 2, 2, dtype=torch.int64), 2) == -1.0).all()


def test_dtc_distance_term_moves_the_head_and_the_student() -> None:
    method = small_method("dtc")
    term(method, "distance").backward()
    assert method.distance_head.weight.grad.abs().sum() > 0
    assert next(method.student.parameters()).grad.abs().sum() > 0


# ss_net


class OneConvolution(nn.Module):
    """A student that is quick in half precision on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 3, kernel_size=3, padding=1)

    def forward(self, images: torch.Tensor) -> SegmentationOutput:
        logits = self.layer(images)
        return SegmentationOutput(logits, logits)


@pytest.mark.parametrize("size", [16, 48])
def test_ss_net_finds_its_direction_in_half_precision(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    slopes = []

    def keep(patches: torch.Tensor) -> torch.Tensor:
        slopes.append(patches.detach())
        return unit_patches(patches)

    monkeypatch.setattr("myutils.methods.ss_net.unit_patches", keep)
    images = torch.randn(2, 1, size, size, size)
    for half in (False, True):
        torch.manual_seed(1)
        method = small_method("ss_net")
        method.student = OneConvolution()  # what underflows is the slope of the distance, whatever the network
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            method._smoothness(images, method.student(images).logits)
    exact, found = slopes[1].flatten().double(), slopes[3].flatten().double()
    assert (found == 0).double().mean() < 0.01
    assert functional.cosine_similarity(exact, found, dim=0) > 0.95


def test_overlap_distance_falls_with_confidence() -> None:
    even = torch.full((1, 2, 1, 1, 1), 0.5)
    certain = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1, 1)
    assert overlap_distance(even, even).item() == pytest.approx(0.5)
    assert overlap_distance(certain, certain).item() == 0.0
    assert overlap_distance(certain, 1 - certain).item() == 1.0


def test_unit_patches_have_length_one_each() -> None:
    images = torch.randn(2, 1, 4, 4, 4)
    images[1] = 0.0
    lengths = unit_patches(images).flatten(1).norm(dim=1)
    assert lengths.tolist() == pytest.approx([1.0, 0.0])


def test_ss_net_probes_and_moves_by_a_length_of_ten() -> None:
    method, seen = small_method("ss_net"), []
    images = torch.randn(2, 1, 16, 16, 16)
    logits = method.student(images).logits
    method.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    method._smoothness(images, logits)
    lengths = [(moved - images).flatten(1).norm(dim=1).tolist() for moved in seen]
    assert lengths == [pytest.approx([10.0, 10.0], rel=1e-4)] * 2


def test_ss_net_perturbs_harder_than_chance_and_leaves_no_gradient_of_the_probe() -> None:
    method = small_method("ss_net")
    torch.manual_seed(3)
    batch = random_batch()
    images = torch.cat([batch.image_l, batch.image_u])
    logits = method.student(images).logits
    target = logits.detach().softmax(1)
    smoothness = method._smoothness(images, logits)
    assert all(parameter.grad is None for parameter in method.student.parameters())
    chance = [
        overlap_distance(method.student(images + 10 * unit_patches(torch.randn_like(images))).logits.softmax(1), target)
        for _ in range(3)
    ]
    assert smoothness.item() > max(value.item() for value in chance)


WEIGHTS = {
    "mean_teacher": 0.5,
    "best": 0.5,
    "cov_dfp": 0.5,
    "ua_mt": 0.1,
    "cps": 0.1,
    "fixmatch": 1.0,
    "mc_net": 0.1,
    "dtc": 0.1,
    "bcp": 0.5,
    "ss_net": 1.0,
}


def test_strong_views_that_nothing_reads_are_left_as_the_weak_ones() -> None:
    for name in METHODS.names():
        config = small_config(BallSource(), method=name, strong_intensity=0.7)
        assert build_augmentation(config).strong_intensity == (0.7 if METHODS.get(name).uses_strong_views else 0.0)


@pytest.mark.parametrize(("name", "weight"), WEIGHTS.items())
def test_consistency_weight_is_the_methods_own_unless_given(name: str, weight: float) -> None:
    source = BallSource()
    assert resolve_config(RunConfig(method=name), source).consistency == weight
    assert resolve_config(RunConfig(method=name, consistency=0.0), source).consistency == 0.0


def test_naive_component_sizes_agree_with_scipy_labels() -> None:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy((rng.random((1, 8, 8, 8)) < 0.1).astype(np.int64))
    kept = largest_components(labels)[0].numpy()
    seen, best = np.zeros_like(kept, dtype=bool), 0
    for start in np.argwhere(labels[0].numpy() == 1):
        stack, size = [tuple(start)], 0
        while stack:
            here = stack.pop()
            inside = all(0 <= c < 8 for c in here)
            if not inside or seen[here] or labels[0][here] == 0:
                continue
            seen[here] = True
            size += 1
            stack += [tuple(np.add(here, step)) for step in itertools.product((-1, 0, 1), repeat=3)]
        best = max(best, size)
    assert kept.sum() == best
