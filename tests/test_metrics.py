"""Metrics against values worked out by hand, a loop over all voxel pairs, medpy and MONAI."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from medpy.metric import binary as medpy
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from numpy.typing import ArrayLike
from scipy import ndimage

from myutils.metrics import (
    CaseMetrics,
    class_boxes,
    distances_by_transform,
    distances_by_tree,
    segmentation_metrics,
    surface,
)

ANISOTROPIC = (0.5, 1.25, 3.0)


def mask_metrics(prediction: ArrayLike, truth: ArrayLike, spacing: tuple[float, float, float]) -> CaseMetrics:
    """Figures of two masks (X, Y, Z)."""
    as_labels = [np.asarray(mask).astype(bool).astype(np.uint8) for mask in (prediction, truth)]
    return segmentation_metrics(*as_labels, num_classes=2, spacing=spacing)[1]


def blob_pair(seed: int, shape: tuple[int, int, int] = (9, 8, 7)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(shape) < 0.3, rng.random(shape) < 0.25


def brute_force(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, float, float]) -> CaseMetrics:
    """Loop over voxels and voxel pairs; nothing shared with the library code."""

    def surface_points(mask: np.ndarray) -> list[tuple[float, ...]]:
        points = []
        for index in product(*(range(n) for n in mask.shape)):
            if not mask[index]:
                continue
            neighbours = [
                tuple(int(v) for v in np.add(index, s * np.eye(3, dtype=int)[a])) for a in range(3) for s in (-1, 1)
            ]
            inside = [all(0 <= v < n for v, n in zip(p, mask.shape, strict=True)) and mask[p] for p in neighbours]
            if not all(inside):
                points.append(tuple(i * step for i, step in zip(index, spacing, strict=True)))
        return points

    first, second = surface_points(prediction), surface_points(truth)
    distances = [min(math.dist(p, q) for q in second) for p in first]
    distances += [min(math.dist(p, q) for q in first) for p in second]
    both = sum(bool(a and b) for a, b in zip(prediction.flat, truth.flat, strict=True))
    either = sum(bool(a or b) for a, b in zip(prediction.flat, truth.flat, strict=True))
    return CaseMetrics(
        2 * both / (both + either), both / either, float(np.percentile(distances, 95)), sum(distances) / len(distances)
    )


def ball(shape: tuple[int, int, int], center: tuple[float, ...], radius: float) -> np.ndarray:
    grid = np.indices(shape, dtype=float)
    return sum((axis - c) ** 2 for axis, c in zip(grid, center, strict=True)) <= radius**2


def test_single_voxels_have_the_distance_between_them() -> None:
    prediction, truth = np.zeros((6, 6, 6), bool), np.zeros((6, 6, 6), bool)
    prediction[1, 2, 3] = truth[3, 2, 4] = True
    expected = math.hypot(2 * 0.5, 1 * 3.0)  # two voxels along X, one along Z
    assert mask_metrics(prediction, truth, ANISOTROPIC) == CaseMetrics(
        0.0, 0.0, pytest.approx(expected), pytest.approx(expected)
    )


def test_shifted_slab_has_values_by_hand() -> None:
    prediction, truth = np.zeros((8, 4, 4), np.uint8), np.zeros((8, 4, 4), np.uint8)
    prediction[2:3], truth[3:4] = 1, 1  # two full planes, one voxel apart along X
    figures = segmentation_metrics(prediction, truth, num_classes=2, spacing=(2.0, 1.0, 1.0))
    assert figures == {1: CaseMetrics(0.0, 0.0, 2.0, 2.0)}
    prediction[3] = 1  # now |P| = 32, |T| = 16, overlap 16; 16 of 48 surface voxels are 2 mm away
    (found,) = segmentation_metrics(prediction, truth, num_classes=2, spacing=(2.0, 1.0, 1.0)).values()
    assert found == CaseMetrics(pytest.approx(2 / 3), pytest.approx(0.5), 2.0, pytest.approx(2 * 16 / 48))


def test_tensors_are_taken_as_arrays_are() -> None:
    prediction, truth = (blob.astype(np.uint8) for blob in blob_pair(0))
    tensors = torch.from_numpy(prediction), torch.from_numpy(truth)
    expected = segmentation_metrics(prediction, truth, num_classes=2, spacing=ANISOTROPIC)
    assert segmentation_metrics(*tensors, num_classes=2, spacing=ANISOTROPIC) == expected
    assert mask_metrics(*tensors, ANISOTROPIC) == expected[1]


def test_identical_masks_are_perfect() -> None:
    mask, _ = blob_pair(0)
    assert mask_metrics(mask, mask, ANISOTROPIC) == CaseMetrics(1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), ANISOTROPIC])
@pytest.mark.parametrize("seed", range(4))
def test_figures_equal_a_loop_over_all_voxel_pairs(seed: int, spacing: tuple[float, float, float]) -> None:
    prediction, truth = blob_pair(seed)
    assert mask_metrics(prediction, truth, spacing) == pytest.approx(brute_force(prediction, truth, spacing))


def object_pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    shape = (24, 20, 16)
    return [
        (ball(shape, (10, 10, 8), 6), ball(shape, (12, 9, 8), 5)),
        (ball(shape, (0, 0, 0), 9), ball(shape, (2, 1, 0), 7)),  # both cut by the border of the volume
        (ball(shape, (12, 10, 15), 20), ball(shape, (12, 10, 0), 5)),  # one fills most of the volume
        (np.ones(shape, bool), ball(shape, (12, 10, 8), 4)),
        blob_pair(7, shape),
    ]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), ANISOTROPIC])
@pytest.mark.parametrize("pair", object_pairs())
def test_figures_equal_medpy(pair: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float]) -> None:
    reference = (
        medpy.dc(*pair),
        medpy.jc(*pair),
        medpy.hd95(*pair, voxelspacing=spacing),
        medpy.assd(*pair, voxelspacing=spacing),
    )
    assert mask_metrics(*pair, spacing) == pytest.approx(reference)


@pytest.mark.parametrize("pair", object_pairs())
def test_assd_equals_monai_and_hd95_is_bounded_by_it(pair: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = (torch.from_numpy(mask)[None, None].float() for mask in pair)
    options = {"include_background": True, "spacing": ANISOTROPIC}
    figures = mask_metrics(*pair, ANISOTROPIC)
    assd = compute_average_surface_distance(first, second, symmetric=True, **options)
    assert figures.assd_mm == pytest.approx(assd.item(), rel=1e-5)
    directed = compute_hausdorff_distance(first, second, percentile=95, **options)
    assert figures.hd95_mm <= directed.item() + 1e-4  # MONAI: the larger of the two directed percentiles


def test_hd95_equals_monai_where_both_directions_are_alike() -> None:
    pair = (ball((20, 20, 20), (8, 10, 10), 5), ball((20, 20, 20), (11, 10, 10), 5))
    first, second = (torch.from_numpy(mask)[None, None].float() for mask in pair)
    directed = compute_hausdorff_distance(first, second, percentile=95, include_background=True, spacing=(1, 1, 1))
    assert mask_metrics(*pair, (1.0, 1.0, 1.0)).hd95_mm == pytest.approx(directed.item(), rel=1e-5)


def test_object_at_the_border_has_its_surface_there() -> None:
    full = np.ones((5, 5, 5), bool)
    inner = surface(full)
    assert inner.sum() == 125 - 27 and not inner[1:-1, 1:-1, 1:-1].any()


def test_empty_masks_follow_the_policy() -> None:
    empty, some = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    some[1, 1, 1] = 1
    missed = (0.0, 0.0, math.inf, math.inf)
    assert mask_metrics(empty, empty, (1, 1, 1)) == (1.0, 1.0, 0.0, 0.0)
    assert mask_metrics(some, empty, (1, 1, 1)) == missed
    assert mask_metrics(empty, some, (1, 1, 1)) == missed


def test_classes_are_compared_one_by_one() -> None:
    truth = np.zeros((6, 6, 6), np.int64)
    truth[1:3], truth[3:5] = 1, 2
    prediction = np.where(truth == 2, 0, truth).astype(np.uint8)
    figures = segmentation_metrics(prediction, truth, num_classes=4, spacing=(1, 1, 1))
    assert figures[1].dice == 1.0 and figures[1].hd95_mm == 0.0
    assert figures[2] == (0.0, 0.0, math.inf, math.inf)
    assert figures[3] == (1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truth": np.zeros((4, 4, 5), np.uint8)}, r"\(4, 4, 5\).*resample"),
        ({"spacing": (1.0, 0.0, 1.0)}, "positive voxel sizes"),
        ({"spacing": (1.0, 1.0)}, "three positive"),
        ({"spacing": (1.0, math.nan, 1.0)}, "positive voxel sizes"),
        ({"truth": np.full((4, 4, 4), 2, np.uint8)}, r"truth has class ids 0\.\.2"),
        ({"prediction": np.zeros((4, 4, 4), np.float32)}, "prediction has type float32"),
    ],
)
def test_bad_input_is_refused(changes: dict, message: str) -> None:
    blank = np.zeros((4, 4, 4), np.uint8)
    arguments = {"prediction": blank, "truth": blank, "spacing": (1.0, 1.0, 1.0), **changes}
    with pytest.raises(ValueError, match=message):
        segmentation_metrics(**arguments, num_classes=2)


@pytest.mark.parametrize("density", [0.002, 0.05, 0.6])
def test_tree_and_transform_give_the_same_distances(density: float) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.random((17, 12, 9)) < density for _ in range(2))
    first[3, 4, 5] = second[10, 2, 7] = first[8, 8, 8] = second[8, 8, 8] = True
    shared, spacing = first & second, np.array((0.7, 1.3, 2.0))
    by_tree = distances_by_tree(first, second, shared, spacing)
    by_transform = distances_by_transform(first, second, shared, spacing)
    for ours, theirs, mask, other in zip(by_tree, by_transform, (first, second), (second, first), strict=True):
        places = np.argwhere(other) * spacing
        by_loop = [np.sqrt(((voxel * spacing - places) ** 2).sum(1)).min() for voxel in np.argwhere(mask & ~shared)]
        assert np.allclose(ours, by_loop) and np.allclose(theirs, by_loop)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_boxes_of_classes_are_those_of_find_objects(num_classes: int) -> None:
    label_map = np.zeros((9, 8, 7), np.uint8)
    assert class_boxes(label_map, num_classes) == [None] * (num_classes - 1)
    label_map[2:5, 1:3, 6] = 1
    label_map[3:9, 0, 2:4] = num_classes - 1
    expected = ndimage.find_objects(label_map.astype(np.int32), max_label=num_classes - 1)
    assert class_boxes(label_map, num_classes) == expected
