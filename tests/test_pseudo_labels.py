"""The most probable class against torch's maximum, ties included."""

from __future__ import annotations

import pytest
import torch

from myutils.pseudo_labels import most_probable, top_class


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 2, 7])
@pytest.mark.parametrize("axis", [0, 1])
def test_top_class_is_the_first_maximum(axis: int, classes: int, dtype: torch.dtype) -> None:
    size = [3, 5, 4, 2]
    size[axis] = classes
    scores = torch.randint(0, 3, size).to(dtype)  # many ties
    labels, highest = top_class(scores, axis)
    expected = [
        max(range(classes), key=column.__getitem__) for column in scores.movedim(axis, -1).reshape(-1, classes).tolist()
    ]
    assert labels.dtype == torch.int64
    assert labels.flatten().tolist() == expected
    assert torch.equal(highest, scores.max(axis).values)


def test_top_class_has_no_gradient_and_a_gate_leaves_nan_out() -> None:
    scores = torch.randn(1, 3, 2, 2, 2, requires_grad=True)
    assert not top_class(scores).confidence.requires_grad and not most_probable(scores).requires_grad
    probs = torch.tensor([[0.1, 0.9], [float("nan"), 0.95], [0.4, 0.6]])
    assert top_class(probs).gated(0.8, -1).tolist() == [1, -1, -1]
