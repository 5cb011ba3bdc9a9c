"""The loss of a decoder's coarse levels, and where it goes."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import BallSource
from helpers_runs import batch_for, random_batch, small_config, small_method

from myutils.losses.deep_supervision import DeepSupervision
from myutils.losses.segmentation import one_hot_labels
from myutils.methods.base import METHODS
from networks.base import NETWORKS


def test_levels_learn_the_shares_of_their_voxels_with_halved_weights() -> None:
    """Class 1 has a probability of 3/4 at the coarse level, of 1/2 at the fine one, and is half of each."""
    deep = DeepSupervision([3, 5], 2)
    for parameter in deep.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        deep.classifiers[0].bias.copy_(torch.tensor([0.0, math.log(3)]))
    labels = torch.zeros(1, 4, 4, 4, dtype=torch.long)
    labels[0, :2] = 1  # 1 of 2 voxels at the coarse level 2 x 1 x 1, 32 of 64 at the fine one
    loss = deep([torch.randn(1, 3, 2, 1, 1), torch.randn(1, 5, 4, 4, 4)], one_hot_labels(labels, 2))
    coarse = 0.5 * (-0.5 * math.log(0.25 * 0.75) + 1 - 2 * 0.75 / (1.5 + 1))
    fine = 0.5 * (math.log(2) + 1 - 2 * 0.5 / (1 + 1))
    assert loss.item() == pytest.approx(0.25 * coarse + 0.5 * fine, abs=1e-4)


def test_mixed_voxels_have_soft_targets() -> None:
    deep = DeepSupervision([1], 2)
    with torch.no_grad():
        deep.classifiers[0].weight.zero_()
        deep.classifiers[0].bias.copy_(torch.tensor([0.0, math.log(3)]))  # probabilities 1/4 and 3/4
    labels = torch.tensor([1, 1, 1, 0]).reshape(1, 4, 1, 1)
    loss = deep([torch.zeros(1, 1, 1, 1, 1)], one_hot_labels(labels, 2))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert loss.item() == pytest.approx(0.5 * 0.5 * (entropy + 1 - 2 * 0.75 / 1.75), abs=1e-4)


def test_voxels_without_a_label_do_not_count() -> None:
    torch.manual_seed(0)
    deep = DeepSupervision([2], 3)
    features = torch.randn(1, 2, 4, 1, 1, requires_grad=True)
    targets = one_hot_labels(torch.tensor([1, 2, 0, 1]).reshape(1, 4, 1, 1), 3)
    deep([features], targets * torch.tensor([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 4, 1, 1)).backward()
    assert features.grad is not None
    assert (features.grad.abs().sum((0, 1, 3, 4)) > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("labelled", [8, 4, 1])
def test_the_loss_does_not_depend_on_how_much_has_a_label(labelled: int) -> None:
    deep = DeepSupervision([1], 2)
    for parameter in deep.parameters():
        torch.nn.init.zeros_(parameter)
    targets = one_hot_labels(torch.zeros(1, 8, 1, 1, dtype=torch.long), 2)
    targets[:, :, labelled:] = 0
    for coarse in (8, 4):  # of a coarse voxel all or a half has a label
        loss = deep([torch.zeros(1, 1, coarse, 1, 1)], targets)
        assert loss.item() == pytest.approx(0.5 * 0.5 * math.log(2), abs=1e-5)


def test_padding_is_that_of_the_forward_pass() -> None:
    network = NETWORKS.get("unet_3d")(1, 2)
    padded = network.pad(torch.ones(1, 1, 17, 9, 21))
    assert padded.shape[2:] == (24, 16, 24)
    assert padded[0, 0, 3:20, 3:12, 1:22].min() == 1 and padded.sum() == 17 * 9 * 21


@pytest.mark.parametrize(
    ("flag", "left_out"), [("deep_supervision", "coarse_terms"), ("use_contrastive_prototype", "prototype_terms")]
)
def test_a_method_without_the_term_of_a_flag_is_refused(
    flag: str, left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be ignored with one process, and stop DDP at the second step with several."""
    method = small_method("fixmatch", **{flag: True})
    monkeypatch.setattr(method, left_out, lambda *_, **__: {})
    for batch in (random_batch(), random_batch(4, 0)):
        with pytest.raises(ValueError, match=rf"--{flag}: fixmatch returns no term .* add {left_out}\("):
            method(batch, 0)


def test_no_unlabelled_patch_is_supervised() -> None:
    method = small_method("mean_teacher", deep_supervision=True)
    batch = batch_for(method)
    batch.image_u_strong.requires_grad_()
    method(batch, 3).terms["deep_supervision"].value.backward()
    assert batch.image_u_strong.grad is None or batch.image_u_strong.grad.abs().sum() == 0


def test_bcp_learns_true_voxels_alone() -> None:
    """Pseudo-labels, whatever they are, do not enter the loss."""
    losses = []
    for bias in (-5.0, 5.0):
        method = small_method("bcp", deep_supervision=True)
        with torch.no_grad():
            method.teacher.branch.classifier.bias[1] = bias
        torch.manual_seed(1)
        losses.append(method(random_batch(), 3).terms["deep_supervision"].value.item())
    assert losses[0] == losses[1]


def test_it_is_on_for_best_alone() -> None:
    assert small_method("best").deep is not None
    assert small_method("best", deep_supervision=False).deep is None
    assert small_method("mean_teacher").deep is None


def test_a_network_without_coarse_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="no coarser level; use --no-deep_supervision"):
        DeepSupervision((), 2)


@pytest.mark.parametrize("name", [name for name in METHODS.names() if not METHODS.get(name).deepens])
def test_methods_of_several_decoders_refuse(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"--deep_supervision: {name} has several decoders; leave it out, or use --method best"
    ):
        small_config(BallSource(), method=name, deep_supervision=True)
