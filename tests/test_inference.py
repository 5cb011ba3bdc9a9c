"""Sliding windows, test-time flips, components: networks whose answer is known in advance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers_runs import PointwiseNetwork
from torch import Tensor

from dataloaders.base import Volume
from dataloaders.preprocess import Preprocess
from myutils.components import largest_component
from myutils.inference import (
    InferenceOptions,
    label_map_from,
    predict_label_map,
    predict_probabilities,
    sliding_window_probabilities,
)
from myutils.sliding_window import axis_weights, window_starts
from networks.base import SegmentationOutput

CPU = torch.device("cpu")


class VoxelwiseNetwork(PointwiseNetwork):
    """Logits (0, image) per voxel: the answer does not depend on the window. Records what it was run with."""

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__(self.segment, 2, in_channels)
        self.noise = torch.nn.Dropout(0.5)
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: set[torch.dtype] = set()
        self.product = torch.nn.Conv3d(in_channels, 1, 1, bias=False)
        torch.nn.init.ones_(self.product.weight)

    def segment(self, images: Tensor) -> SegmentationOutput:
        self.shapes.append(tuple(images.shape))
        score = self.noise(self.product(images))  # (B, 1, X, Y, Z)
        self.dtypes.add(score.dtype)
        return SegmentationOutput(torch.cat([torch.zeros_like(score), score], 1), score)


class LeftNetwork(VoxelwiseNetwork):
    """Class 1 is sure in the lower half of axis 0 of every window, whatever the image."""

    def segment(self, images: Tensor) -> SegmentationOutput:
        score = torch.full_like(images, -50.0)
        score[:, :, : images.shape[2] // 2] = 50.0
        return SegmentationOutput(torch.cat([torch.zeros_like(score), score], 1), score)


@pytest.mark.parametrize("shape", [(20, 17, 13), (5, 30, 4), (8, 8, 8), (1, 1, 1)])
def test_windows_give_the_voxelwise_answer_for_any_size(shape: tuple[int, int, int]) -> None:
    image = torch.randn(1, *shape)
    options = InferenceOptions(patch_size=(8, 8, 8), overlap=0.5, window_batch=3)
    probs = sliding_window_probabilities(VoxelwiseNetwork(), image, options, CPU)
    assert probs.shape == (2, *shape) and probs.dtype == torch.float32
    torch.testing.assert_close(probs[1], torch.sigmoid(image[0]))
    torch.testing.assert_close(probs.sum(0), torch.ones(shape))


def test_small_volume_is_padded_to_the_window_with_its_least_value() -> None:
    network = VoxelwiseNetwork()
    seen: list[float] = []
    network.product.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].min().item()))
    sliding_window_probabilities(network, torch.rand(1, 3, 4, 5) + 2.0, InferenceOptions((8, 8, 8)), CPU)
    assert network.shapes == [(1, 1, 8, 8, 8)] and seen[0] >= 2.0


def test_flips_average_over_all_subsets_of_the_axes() -> None:
    image = torch.zeros(1, 8, 8, 8)
    plain = sliding_window_probabilities(LeftNetwork(), image, InferenceOptions((8, 8, 8)), CPU)
    assert plain[1, :4].min() > 0.99 and plain[1, 4:].max() < 0.01
    flipped = sliding_window_probabilities(LeftNetwork(), image, InferenceOptions((8, 8, 8), flips=(0, 2)), CPU)
    torch.testing.assert_close(flipped, torch.full((2, 8, 8, 8), 0.5))  # half of the four subsets mirror axis 0
    network = VoxelwiseNetwork()
    image = torch.randn(1, 8, 7, 6)
    probs = sliding_window_probabilities(network, image, InferenceOptions((8, 8, 8), flips=(0, 1, 2)), CPU)
    torch.testing.assert_close(probs[1], torch.sigmoid(image[0]))
    assert len(network.shapes) == 8


class PlaceNetwork(VoxelwiseNetwork):
    """Logits that depend on the place in the window, differently along each axis."""

    def segment(self, images: Tensor) -> SegmentationOutput:
        x, y, z = (torch.arange(n, dtype=torch.float32) for n in images.shape[2:])
        score = images * (1 + x[:, None, None]) - 0.2 * y[:, None] + 0.1 * z * z
        return SegmentationOutput(torch.cat([torch.zeros_like(score), score], 1), score)


def test_mirrored_views_are_averaged_window_by_window() -> None:
    """Windows are put together by the weighted mean of the logarithms of what the views say on average."""
    network, image, window = PlaceNetwork(), torch.randn(1, 11, 6, 4), (6, 4, 4)
    starts = [window_starts(n, w, 0.5) for n, w in zip(image.shape[1:], window, strict=True)]
    weights = [axis_weights(s, w, n, 0.25) for s, w, n in zip(starts, window, image.shape[1:], strict=True)]
    expected = torch.zeros(2, 11, 6, 4)
    for i, j, k in itertools.product(*(range(len(found)) for found in starts)):
        box = tuple(slice(s[n], s[n] + w) for s, n, w in zip(starts, (i, j, k), window, strict=True))
        crop = image[(slice(None), *box)][None]
        views = [network(crop.flip(axes)).logits.softmax(1).flip(axes) for axes in ([], [2], [4], [2, 4])]
        weight = weights[0][i][:, None, None] * weights[1][j][:, None] * weights[2][k]
        expected[(slice(None), *box)] += weight * (sum(views) / 4)[0].log()
    found = sliding_window_probabilities(network, image, InferenceOptions(window, flips=(0, 2)), CPU)
    torch.testing.assert_close(found, expected.softmax(0))


def test_network_is_in_evaluation_mode_inside_and_gets_its_own_mode_back() -> None:
    network = VoxelwiseNetwork().train()
    network.noise.eval()
    image = torch.randn(1, 8, 8, 8)
    first = sliding_window_probabilities(network, image, InferenceOptions((8, 8, 8)), CPU)
    assert network.training and network.product.training and not network.noise.training
    network.noise.train()
    torch.testing.assert_close(sliding_window_probabilities(network, image, InferenceOptions((8, 8, 8)), CPU), first)
    assert network.noise.training and not first.requires_grad


def test_weights_come_back_as_they_were() -> None:
    network = VoxelwiseNetwork(in_channels=2)
    layouts: list[bool] = []
    last = torch.channels_last_3d
    network.product = torch.nn.Conv3d(2, 1, 3, padding="same", bias=False)
    weight = network.product.weight
    network.product.register_forward_pre_hook(lambda *_: layouts.append(weight.is_contiguous(memory_format=last)))
    before, storage = weight.detach().clone(), weight.data_ptr()
    sliding_window_probabilities(network, torch.randn(2, 8, 8, 8), InferenceOptions((8, 8, 8)), CPU)
    assert layouts == [True] and weight.is_contiguous() and weight.data_ptr() == storage
    assert torch.equal(weight.detach(), before)


def test_bf16_runs_in_bfloat16_and_accumulates_in_float32() -> None:
    network, image = VoxelwiseNetwork(), torch.randn(1, 8, 8, 12)
    probs = sliding_window_probabilities(network, image, InferenceOptions((8, 8, 8), amp="bf16"), CPU)
    assert network.dtypes == {torch.bfloat16} and probs.dtype == torch.float32
    torch.testing.assert_close(probs[1], torch.sigmoid(image[0]), atol=5e-3, rtol=0)


def test_damaged_weights_and_wrong_channels_are_refused() -> None:
    network = VoxelwiseNetwork()
    with pytest.raises(ValueError, match=r"\(2, 8, 8, 8\).*takes \(1, X, Y, Z\)"):
        sliding_window_probabilities(network, torch.zeros(2, 8, 8, 8), InferenceOptions((8, 8, 8)), CPU)
    torch.nn.init.constant_(network.product.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        sliding_window_probabilities(network, torch.zeros(1, 8, 8, 8), InferenceOptions((8, 8, 8)), CPU)


@pytest.mark.parametrize(
    ("patch_size", "given", "expected"),
    [((32, 32, 16), None, 4), ((112, 112, 80), None, 1), ((80, 80, 80), None, 2), ((112, 112, 80), 3, 3)],
)
def test_large_windows_run_one_by_one(patch_size: tuple[int, int, int], given: int | None, expected: int) -> None:
    assert InferenceOptions(patch_size, window_batch=given).windows_at_once() == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlap": 1.0}, r"overlap 1.0.*\[0, 1\)"),
        ({"patch_size": (8, 0, 8)}, "at least 1 voxel"),
        ({"flips": (0, 3)}, "axes 0, 1, 2"),
        ({"flips": (1, 1)}, "at most once"),
        ({"window_batch": 0}, "window_batch 0"),
        ({"sigma": 0.01}, "sigma 0.01: .* from 0.05 on"),
        ({"amp": "fp8"}, "'fp8'.*bf16"),
    ],
)
def test_impossible_options_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InferenceOptions(**{"patch_size": (8, 8, 8), **changes})


def test_prediction_returns_to_the_case_grid() -> None:
    image = np.full((1, 10, 12, 8), -1.0, np.float32)
    image[:, 2:8, 2:10, 2:6] = 1.0
    volume = Volume("case", image, None, np.diag([2.0, 1.0, 1.0, 1.0]), (2.0, 1.0, 1.0))
    preprocess = Preprocess("mr", spacing=(1.0, 1.0, 1.0))
    arguments = (VoxelwiseNetwork(), volume, preprocess, InferenceOptions((8, 8, 8)), CPU)
    probabilities = predict_probabilities(*arguments)
    assert probabilities.shape == (2, 10, 12, 8) and probabilities.dtype == np.float32
    label_map = predict_label_map(*arguments)
    assert label_map.dtype == np.uint8
    np.testing.assert_array_equal(label_map, image[0] > 0)
    np.testing.assert_array_equal(label_map, label_map_from(probabilities))


def test_label_map_is_the_most_probable_class() -> None:
    probabilities = np.zeros((3, 1, 1, 4), np.float32)
    for voxel, class_id in enumerate((0, 2, 1, 2)):
        probabilities[class_id, 0, 0, voxel] = 1.0
    label_map = label_map_from(probabilities)
    np.testing.assert_array_equal(label_map[0, 0], [0, 2, 1, 2])
    np.testing.assert_array_equal(largest_component(label_map, [2])[0, 0], [0, 2, 1, 0])
    np.testing.assert_array_equal(largest_component(label_map, [1])[0, 0], [0, 2, 1, 2])


def test_neighbouring_windows_overlap_as_asked() -> None:
    for overlap, windows in ((0.5, 2), (0.75, 3)):  # of 4 voxels, over 6: steps of 2 and of 1
        network = VoxelwiseNetwork()
        options = InferenceOptions((4, 4, 4), overlap=overlap, window_batch=1)
        sliding_window_probabilities(network, torch.rand(1, 6, 4, 4), options, CPU)
        assert len(network.shapes) == windows


@pytest.mark.parametrize("sigma", [0.25, 0.5])
def test_a_window_counts_by_the_distance_from_its_centre_over_sigma(sigma: float) -> None:
    """Voxel 2 is 0.5 from the centre of the first window of 4, which says 2 there, and 1.5 from the second's: 0."""

    def place(images: Tensor) -> SegmentationOutput:
        score = torch.zeros_like(images) + torch.arange(4.0)[:, None, None]
        return SegmentationOutput(torch.cat([torch.zeros_like(score), score], 1), score)

    network, options = PointwiseNetwork(place, num_classes=2), InferenceOptions((4, 4, 4), sigma=sigma)
    probs = sliding_window_probabilities(network, torch.zeros(1, 6, 4, 4), options, CPU)
    ratio = math.exp((0.5**2 - 1.5**2) / (2 * (4 * sigma) ** 2))  # weight of the second window over the first's
    score = 2 / (1 + ratio)
    torch.testing.assert_close(probs[1, 2], torch.full((4, 4), 1 / (1 + math.exp(-score))))


def test_rows_of_a_resampled_label_map_are_at_their_place() -> None:
    image = np.full((1, 40, 4, 4), -1.0, np.float32)  # rows are put back 16 at a time
    image[:, 34:37] = 1.0
    volume = Volume("case", image, None, np.eye(4), (1.0, 1.0, 1.0))
    preprocess = Preprocess("ct", spacing=(0.5, 1.0, 1.0), ct_range=(-1.0, 1.0))
    label_map = predict_label_map(VoxelwiseNetwork(), volume, preprocess, InferenceOptions((8, 4, 4)), CPU)
    np.testing.assert_array_equal(label_map, image[0] > 0)
