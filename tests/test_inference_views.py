"""Views of an image: turned ones come back to their places, and the mean over views is a mean of what they show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_runs import PointwiseNetwork
from torch import Tensor

from dataloaders.base import Volume
from dataloaders.preprocess import Preprocess
from dataloaders.transforms import affine_crop
from myutils.inference import (
    InferenceOptions,
    predict_label_map,
    predict_probabilities,
    sliding_window_probabilities,
)
from myutils.inference_views import View, make_views, seen_from, seen_places
from networks.base import SegmentationOutput

CPU = torch.device("cpu")
QUARTER_TURN = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


def smooth_image(*size: int) -> Tensor:
    grid = torch.meshgrid(*[torch.linspace(-1, 1, count) for count in size], indexing="ij")
    return (2 * grid[0] + torch.sin(2 * grid[1]) - grid[2] ** 2)[None, None]


def test_make_views_by_hand() -> None:
    assert make_views((), 0) == [View((), None)]
    assert [view.axes for view in make_views((0, 2), 0)] == [(), (0,), (2,), (0, 2)]
    views = make_views((1,), 4)
    assert [view.axes for view in views] == [(), (1,), (), (1,)]
    assert views[0].matrix is None and all(view.matrix is not None for view in views[1:])
    scales = [np.linalg.det(view.matrix) ** (1 / 3) for view in make_views((), 30)[1:]]
    assert np.exp(-0.12) <= min(scales) < 0.95 and 1.05 < max(scales) <= np.exp(0.12)
    again = make_views((1,), 4)
    assert all(np.array_equal(ours.matrix, theirs.matrix) for ours, theirs in zip(views[1:], again[1:], strict=True))


def test_a_turned_view_is_that_of_the_training_patches() -> None:
    image = smooth_image(9, 8, 7)
    matrix = make_views((), 2)[1].matrix
    seen = seen_from(View((), matrix), image)
    expected = affine_crop(image[0].numpy(), matrix, np.zeros(3), (9, 8, 7), order=1, fill=np.nan)
    known = np.isfinite(expected)
    assert known.mean() > 0.6
    np.testing.assert_allclose(seen[0].numpy()[known], expected[known], atol=1e-4)


def test_a_quarter_turn_moves_voxels_exactly() -> None:
    image = torch.randn(1, 2, 5, 5, 3)
    view = View((2,), QUARTER_TURN)
    seen = seen_from(view, image)
    torch.testing.assert_close(seen, image.rot90(-1, (2, 3)).flip(4), atol=1e-5, rtol=1e-5)
    back, inside = seen_places(view, seen, slice(0, 5))
    assert inside.all()
    torch.testing.assert_close(back, image, atol=1e-5, rtol=1e-5)


def test_a_label_map_is_seen_in_views_of_its_own_voxel_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("myutils.inference.make_views", lambda *given: asked.append(given) or make_views(*given))
    network = PointwiseNetwork(lambda x: SegmentationOutput(torch.cat([-x, x], 1), x), num_classes=2)
    volume = Volume("a", np.random.default_rng(0).normal(size=(1, 8, 8, 4)), None, np.diag([1, 1, 4, 1.0]), (1, 1, 4))
    options = InferenceOptions((8, 8, 8), views=2)
    for preprocess in (Preprocess("mr"), Preprocess("mr", spacing=(2.0, 1.0, 4.0))):
        predict_label_map(network, volume, preprocess, options, CPU)
        predict_probabilities(network, volume, preprocess, options, CPU)
    assert [spacing for _, _, spacing in asked] == [(1, 1, 4)] * 2 + [(2.0, 1.0, 4.0)] * 2


def test_rows_of_a_view_are_those_of_the_whole() -> None:
    view = make_views((0,), 2)[1]
    seen = torch.randn(1, 2, 10, 6, 5)
    whole, inside = seen_places(view, seen, slice(0, 10))
    part, inside_part = seen_places(view, seen, slice(4, 7))
    torch.testing.assert_close(part, whole[:, :, 4:7])
    assert torch.equal(inside_part, inside[4:7]) and 0.3 < inside.float().mean() < 1


@pytest.mark.parametrize("views", [2, 5])
def test_views_of_a_voxelwise_network_agree_with_the_plain_answer(views: int) -> None:
    network = PointwiseNetwork(lambda x: SegmentationOutput(torch.cat([x, -x], 1), x), num_classes=2)
    image = smooth_image(20, 18, 16)[0]
    plain = sliding_window_probabilities(network, image, InferenceOptions((16, 16, 16)), CPU)
    averaged = sliding_window_probabilities(
        network, image, InferenceOptions((16, 16, 16), flips=(0, 1), views=views), CPU
    )
    torch.testing.assert_close(averaged.sum(0), torch.ones(20, 18, 16))
    torch.testing.assert_close(averaged, plain, atol=0.02, rtol=0)  # two interpolations apart, borders included
    assert not torch.equal(averaged, plain)


def test_places_that_no_turned_view_shows_keep_the_plain_answer() -> None:
    """A network that says class 1 only where the image is turned: the corner stays with class 0."""
    calls: list[int] = []

    def answer(images: Tensor) -> SegmentationOutput:
        calls.append(1)
        value = -20.0 if len(calls) == 1 else 20.0
        ones = torch.ones_like(images)
        return SegmentationOutput(torch.cat([-value * ones, value * ones], 1), images)

    image = torch.randn(1, 16, 16, 16)
    options = InferenceOptions((16, 16, 16), views=2)
    probs = sliding_window_probabilities(PointwiseNetwork(answer, num_classes=2), image, options, CPU)
    assert probs[1, 8, 8, 8] == pytest.approx(0.5)
    _, inside = seen_places(make_views((), 2)[1], torch.zeros(1, 1, 16, 16, 16), slice(0, 16))
    assert not inside.all()
    torch.testing.assert_close(probs[1], torch.where(inside, 0.5, 0.0), atol=1e-5, rtol=0)


def test_views_turn_in_space_not_in_voxels() -> None:
    step = np.diag([0.5, 1.0, 4.0])
    for plain, thick in zip(make_views((), 3)[1:], make_views((), 3, (0.5, 1.0, 4.0))[1:], strict=True):
        np.testing.assert_allclose(step @ thick.matrix @ np.linalg.inv(step), plain.matrix, atol=1e-12)  # in mm alike
        assert not np.allclose(thick.matrix, plain.matrix, atol=0.01)
