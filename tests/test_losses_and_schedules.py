"""Losses, ramps and the moving average against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from myutils.ema import MovingAverage, make_teacher
from myutils.losses.segmentation import dice_ce_loss, one_hot_labels, region_losses, soft_dice_loss, soft_label_loss
from myutils.methods.base import batch_dice
from myutils.schedules import ema_decay_at, fraction_rampup, poly_lr, sigmoid_rampup


def volume(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).reshape(1, 1, 1, -1)


def test_one_hot_labels() -> None:
    hot = one_hot_labels(volume([0, 2]).long(), 3)
    assert hot[0, :, 0, 0].T.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_soft_dice_loss_by_hand() -> None:
    foreground = volume([0.8, 0.4])
    probs = torch.stack([1 - foreground, foreground], dim=1)  # (1, 2, 1, 1, 2)
    expected = 1 - 2 * 0.8 / (0.8 + 0.4 + 1)
    assert soft_dice_loss(probs, volume([1, 0]).long()).item() == pytest.approx(expected, abs=1e-4)


def test_soft_dice_loss_masked_voxels_do_not_count() -> None:
    foreground = volume([0.8, 0.4])
    probs = torch.stack([1 - foreground, foreground], dim=1)
    loss = soft_dice_loss(probs, volume([1, 0]).long(), volume([1.0, 0.0]))
    assert loss.item() == pytest.approx(1 - 2 * 0.8 / (0.8 + 1), abs=1e-4)


def test_soft_dice_loss_leaves_out_absent_classes() -> None:
    probs = torch.full((1, 3, 1, 1, 2), 1 / 3)
    with_one = soft_dice_loss(probs, volume([1, 1]).long())
    assert with_one.item() == pytest.approx(1 - 2 * (2 / 3) / (2 / 3 + 2), abs=1e-4)
    assert soft_dice_loss(probs, volume([0, 0]).long()).item() == 0


def test_soft_dice_loss_is_the_mean_over_present_classes() -> None:
    probs = one_hot_labels(volume([1, 0, 0]).long(), 4).float()  # class 1 as it is, class 2 missed, class 3 nowhere
    assert soft_dice_loss(probs, volume([1, 2, 0]).long()).item() == pytest.approx(0.5, abs=1e-4)


def test_dice_ce_loss_is_the_mean_of_both() -> None:
    logits = torch.zeros(1, 2, 1, 1, 2, requires_grad=True)
    labels = volume([1, 0]).long()
    expected = 0.5 * (math.log(2) + 1 - 2 * 0.5 / (1 + 1))
    loss = dice_ce_loss(logits, labels)
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    loss.backward()
    assert logits.grad.abs().sum() > 0


def test_losses_of_half_precision_logits_are_computed_in_float32() -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(1, 3, 4, 4, 4)).to(torch.bfloat16)
    labels, ones = torch.randint(0, 3, (1, 4, 4, 4)), torch.ones(1, 4, 4, 4)
    for loss in (
        lambda given: dice_ce_loss(given, labels),
        lambda given: soft_label_loss(given, one_hot_labels(labels, 3), ones),
        lambda given: torch.stack(region_losses(given, labels, ones.bool())),
    ):
        assert torch.equal(loss(logits), loss(logits.float())) and loss(logits).dtype == torch.float32


def test_dice_ce_loss_averages_cross_entropy_over_unreliable_voxels_too() -> None:
    logits = torch.zeros(1, 2, 1, 1, 2)
    loss = dice_ce_loss(logits, volume([0, 0]).long(), volume([1.0, 0.0]))
    assert loss.item() == pytest.approx(0.5 * math.log(2) / 2, abs=1e-5)


def test_dice_ce_loss_of_nothing_stays_on_the_graph() -> None:
    logits = torch.zeros(0, 2, 4, 4, 4, requires_grad=True)
    loss = dice_ce_loss(logits, torch.zeros(0, 4, 4, 4, dtype=torch.int64))
    assert loss.item() == 0 and loss.requires_grad


def test_dice_ce_loss_of_half_precision_is_float32() -> None:
    loss = dice_ce_loss(torch.randn(1, 2, 4, 4, 4).bfloat16(), torch.ones(1, 4, 4, 4, dtype=torch.int64))
    assert loss.dtype == torch.float32


def test_batch_dice_by_hand() -> None:
    logits = one_hot_labels(volume([1, 1, 0, 2]).long(), 3)
    assert batch_dice(logits, volume([1, 0, 0, 2]).long()).item() == pytest.approx((2 / 3 + 1) / 2)


def test_poly_lr_by_hand() -> None:
    assert poly_lr(0.1, 0, 100) == 0.1
    assert poly_lr(0.1, 50, 100) == pytest.approx(0.1 * 0.5**0.9)
    assert poly_lr(0.1, 100, 100) == 0


def test_sigmoid_rampup_by_hand() -> None:
    assert sigmoid_rampup(0, 10) == pytest.approx(math.exp(-5))
    assert sigmoid_rampup(5, 10) == pytest.approx(math.exp(-5 / 4))
    assert sigmoid_rampup(10, 10) == sigmoid_rampup(99, 10) == 1
    assert sigmoid_rampup(0, 0) == 1


def test_fraction_rampup() -> None:
    assert fraction_rampup(None, 1000) == 300
    assert fraction_rampup(0, 1000) == 0


def test_teacher_starts_as_a_plain_average_and_then_forgets() -> None:
    assert ema_decay_at(0, 0.99) == 0
    assert ema_decay_at(1, 0.99) == 0.5
    assert ema_decay_at(10**6, 0.99) == 0.99


def test_update_teacher_by_hand() -> None:
    student = nn.BatchNorm1d(1)
    teacher = make_teacher(student)
    nn.init.constant_(student.weight, 3.0)
    student.running_mean.fill_(5.0)
    MovingAverage(teacher, student).update(0.9)
    assert teacher.weight.item() == pytest.approx(0.9 * 1 + 0.1 * 3)
    assert teacher.running_mean.item() == 5  # buffers are copied
    assert not teacher.weight.requires_grad and not teacher.training


def test_moving_average_follows_modules_that_moved() -> None:
    student = nn.Linear(1, 1, bias=False)
    teacher = make_teacher(student)
    average = MovingAverage(teacher, student)
    average.update(0.5)
    student.double(), teacher.double()
    nn.init.constant_(student.weight, 3.0), nn.init.constant_(teacher.weight, 1.0)
    average.update(0.5)
    assert teacher.weight.item() == 2.0


def test_soft_label_loss_of_one_hot_targets_is_dice_ce() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 4, 4, 4))
    ones = torch.ones(2, 4, 4, 4)
    soft = soft_label_loss(logits, one_hot_labels(labels, 3), ones)
    assert soft.item() == pytest.approx(dice_ce_loss(logits, labels).item(), rel=1e-6)


def test_soft_label_cross_entropy_rests_where_the_prediction_is_the_target() -> None:
    logits = torch.tensor([0.3, -0.4]).reshape(1, 2, 1, 1, 1).requires_grad_()
    targets = logits.detach().softmax(1)
    soft_label_loss(logits, targets, torch.zeros(1, 1, 1, 1)).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max().item() == pytest.approx(0.0, abs=1e-7)


def test_soft_label_loss_by_hand() -> None:
    logits = torch.zeros(1, 2, 1, 1, 2)
    targets = torch.tensor([[0.25, 1.0], [0.75, 0.0]]).reshape(1, 2, 1, 1, 2)
    mask = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    dice = 1 - (2 * 0.5 + 1e-5) / (0.5 + 1.0 + 1e-5)  # the first voxel alone: probability 1/2, label 1
    expected = 0.5 * (math.log(2) + dice)
    assert soft_label_loss(logits, targets, mask).item() == pytest.approx(expected, rel=1e-4)
    assert soft_label_loss(logits[:0], targets[:0], mask[:0]).item() == 0.0
