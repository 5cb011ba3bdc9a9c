"""Resampling: images keep a ramp, labels neither move nor swell."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dataloaders.resampling import SplineOrder, resample, resample_labels


def naive_place(index: tuple[int, ...], old: tuple[int, ...], new: tuple[int, ...], ratio: tuple) -> np.ndarray:
    """Where a voxel of the new grid lies among the voxels of the old one."""
    at = [(o - 1) / 2 + (k - (n - 1) / 2) * step for k, o, n, step in zip(index, old, new, ratio, strict=True)]
    return np.clip(at, 0, np.array(old) - 1)


def test_same_grid_is_copied_untouched() -> None:
    array = np.random.default_rng(0).random((3, 4, 5))
    copy = resample(array, (3, 4, 5), (1.0, 1.0, 1.0), order=3)
    assert np.array_equal(copy, array) and copy is not array
    labels = np.random.default_rng(0).integers(0, 3, (3, 4, 5))
    copied = resample_labels(labels, (3, 4, 5), (1.0, 1.0, 1.0))
    assert np.array_equal(copied, labels) and copied is not labels


GRIDS = [((6, 2, 3), (0.7, 1.4, 0.7)), ((2, 6, 2), (2.0, 0.5, 1.0)), ((4, 3, 1), (1.0, 1.1, 2.0))]


@pytest.mark.parametrize(("new", "ratio"), GRIDS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_values_are_linear_between_voxels_by_a_naive_loop(new: tuple, ratio: tuple, mirrored: bool) -> None:
    old = (4, 3, 2)
    arrays = np.random.default_rng(0).random((2, *old))
    arrays = arrays[:, ::-1, :, ::-1] if mirrored else arrays
    expected = np.zeros((2, *new))
    for index in itertools.product(*map(range, new)):
        at = naive_place(index, old, new, ratio)
        for voxel in itertools.product(*map(range, old)):
            weight = np.prod(np.clip(1 - np.abs(at - voxel), 0, None))
            expected[(slice(None), *index)] += weight * arrays[(slice(None), *voxel)]
    np.testing.assert_allclose(resample(arrays, new, ratio, order=1), expected, atol=1e-12)
    band = resample(arrays, new, ratio, order=1, rows=slice(1, new[0]))
    np.testing.assert_allclose(band, expected[:, 1:], atol=1e-12)


@pytest.mark.parametrize(("order", "dtype"), [(1, np.float32), (3, np.float32), (3, np.float64)])
def test_arrays_are_resampled_one_by_one_in_their_own_type_and_range(order: SplineOrder, dtype: type) -> None:
    arrays = np.zeros((2, 1, 6, 6, 6), dtype)
    arrays[0, :, :3] = 1  # an edge, beyond which a cubic spline swings
    arrays[1, :, 3:] = 5
    both = resample(arrays, (12, 12, 12), (0.5, 0.5, 0.5), order=order)
    assert both.shape == (2, 1, 12, 12, 12) and both.dtype == dtype
    for one, alone in zip(arrays, both, strict=True):
        assert (alone.min(), alone.max()) == (0, one.max())
        assert np.array_equal(resample(one[0], (12, 12, 12), (0.5, 0.5, 0.5), order=order), alone[0])
    for rows in (slice(0, 5), slice(5, 12)):
        part = resample(arrays, (12, 12, 12), (0.5, 0.5, 0.5), order=order, rows=rows)
        np.testing.assert_allclose(part, both[:, :, rows], atol=1e-6)


@pytest.mark.parametrize(("new", "ratio"), GRIDS)
def test_labels_take_the_class_of_the_largest_linear_weight_by_a_naive_loop(new: tuple, ratio: tuple) -> None:
    old = (4, 3, 2)
    labels = np.random.default_rng(0).integers(0, 5, old).astype(np.uint8)
    sampled = resample_labels(labels, new, ratio)
    assert sampled.shape == new and sampled.dtype == np.uint8
    ties = 0
    for index in itertools.product(*map(range, new)):
        at = naive_place(index, old, new, ratio)
        weights = np.zeros(5)
        for voxel in itertools.product(*map(range, old)):
            weights[labels[voxel]] += np.prod(np.clip(1 - np.abs(at - voxel), 0, None))
        heaviest = np.flatnonzero(weights > weights.max() - 1e-6)
        ties += len(heaviest) > 1
        assert sampled[index] == (heaviest[-1] if sum(index) % 2 else heaviest[0])
    assert ties > 0 or 0.7 in ratio


@pytest.mark.parametrize("step", [0.5, 1.25, 1.5, 2.0, 3.0, 4.0])
def test_a_ball_stays_where_it_is_and_as_large(step: float) -> None:
    size, centre = (64, 64, 64), np.array([31.5, 31.5, 31.5])
    places = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    ball = (np.linalg.norm(places - centre, axis=-1) < 20.2).astype(np.uint8)
    new = (round(64 / step),) * 3
    inside = np.argwhere(resample_labels(ball, new, (step,) * 3))
    moved = (inside.mean(0) - (new[0] - 1) / 2) * step
    assert np.abs(moved).max() < 0.02
    assert len(inside) * step**3 == pytest.approx(ball.sum(), rel=0.03)


def test_a_flat_border_between_two_voxels_is_shared_by_both_classes() -> None:
    labels = np.zeros((6, 6, 6), np.int16)
    labels[3:] = 7  # the middle of three new voxels lies on the border
    sampled = resample_labels(labels, (3, 3, 3), (2.0, 2.0, 2.0))
    assert (sampled[0] == 0).all() and (sampled[2] == 7).all()
    assert sampled[1].tolist() == [[7, 0, 7], [0, 7, 0], [7, 0, 7]]
