"""Bidirectional copy-paste against values worked out by hand or by a naive loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers_runs import random_batch, small_method

from myutils.methods.bcp import largest_components, paired, paste_masks


def test_paste_masks_leave_out_a_box_of_two_thirds() -> None:
    masks = paste_masks(3, torch.Size((9, 12, 6)), torch.device("cpu"))
    assert (~masks).sum(dim=(1, 2, 3)).tolist() == [6 * 8 * 4] * 3
    hole = (~masks[0]).nonzero()
    assert (hole.max(0).values - hole.min(0).values + 1).tolist() == [6, 8, 4]


def test_largest_components_drops_the_rest_of_each_class() -> None:
    labels = torch.zeros(1, 7, 1, 1, dtype=torch.int64)
    labels[0, :, 0, 0] = torch.tensor([1, 0, 1, 1, 2, 0, 2])
    assert largest_components(labels).flatten().tolist() == [0, 0, 1, 1, 2, 0, 0]
    assert largest_components(torch.zeros(2, 3, 3, 3, dtype=torch.int64)).sum() == 0


def test_bcp_phases_and_the_teacher_starts_from_the_student() -> None:
    method = small_method("bcp", warmup_iteration=2, ema_decay=0.9999)
    assert set(method(random_batch(labeled=4, unlabeled=0), 1).terms) == {"supervised"}
    with torch.no_grad():
        method.student.branch.classifier.bias.fill_(3.0)
    method.after_step(1)
    assert method.teacher.branch.classifier.bias.tolist() == [3.0] * 3
    output = method(random_batch(), 2)
    assert output.terms["consistency"].weight == 0.5


def test_bcp_second_phase_against_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    method = small_method("bcp", warmup_iteration=0)
    batch = random_batch()
    mask = torch.ones(2, 16, 16, 16, dtype=torch.bool)
    mask[:, 3:13, 3:13, 3:13] = False
    monkeypatch.setattr("myutils.methods.bcp.paste_masks", lambda *_: mask)
    output = method(batch, 2)
    pseudo = largest_components(method.teacher(batch.image_u).logits.argmax(1))
    inward = batch.image_l * mask[:, None] + batch.image_u * ~mask[:, None]
    outward = batch.image_u * mask[:, None] + batch.image_l * ~mask[:, None]
    logits = method.student(torch.cat([inward, outward])).logits
    true = sum(naive_region_loss(logits[part], batch.label_l, where) for part, where in ((IN, mask), (OUT, ~mask)))
    assert output.terms["supervised"].value.item() == pytest.approx(true, rel=1e-4)
    expected = sum(naive_region_loss(logits[part], pseudo, where) for part, where in ((IN, ~mask), (OUT, mask)))
    assert output.terms["consistency"].value.item() == pytest.approx(expected, rel=1e-4)


IN, OUT = slice(0, 2), slice(2, 4)


def naive_region_loss(logits: torch.Tensor, labels: torch.Tensor, region: torch.Tensor) -> float:
    """Cross-entropy and Dice over the voxels of a region, picked out one by one."""
    probs = logits.detach().softmax(1).movedim(1, -1)[region]  # (voxels, K)
    found = labels[region]
    cross_entropy = -probs[torch.arange(len(found)), found].log().mean()
    losses = []
    for class_id in range(1, probs.shape[1]):
        truth, ours = (found == class_id).float(), probs[:, class_id]
        if truth.any():
            losses.append(1 - (2 * (ours * truth).sum() + 1e-5) / (ours.sum() + truth.sum() + 1e-5))
    dice = torch.stack(losses).mean() if losses else torch.tensor(0.0)
    return float(0.5 * (cross_entropy + dice))


@pytest.mark.parametrize(("labeled", "unlabeled"), [(3, 1), (1, 3)])
def test_bcp_uses_every_patch_where_the_halves_differ(labeled: int, unlabeled: int) -> None:
    whole = random_batch()
    batch = replace(
        whole,
        image_l=whole.image_l[[0, 1, 0]][:labeled],
        label_l=whole.label_l[[0, 1, 0]][:labeled],
        image_u=whole.image_u[[0, 1, 0]][:unlabeled],
    )
    output = small_method("bcp", warmup_iteration=0)(batch, 2)
    assert output.logits_l is not None and len(output.logits_l) == 3
    assert output.pseudo_labels is not None and len(output.pseudo_labels) == unlabeled
    pairs = paired(batch)
    for name, count in (("image_l", labeled), ("label_l", labeled), ("image_u", unlabeled)):
        ours, theirs = getattr(pairs, name), getattr(batch, name)
        assert len(ours) == 3 and torch.equal(ours[:count], theirs)
        assert all(torch.equal(patch, theirs[0]) for patch in ours[count:])
