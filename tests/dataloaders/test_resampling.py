"""Resampling: images keep a ramp, labels neither move nor swell."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dataloaders.resampling import resample, resample_labels


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


@pytest.mark.parametrize(
    ("new", "ratio"), [((6, 2, 3), (0.7, 1.4, 0.7)), ((2, 6, 2), (2.0, 0.5, 1.0)), ((4, 3, 1), (1.0, 1.1, 2.0))]
)
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
