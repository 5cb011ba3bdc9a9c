"""Random changes of patches, one at a time: what turns, and that channels do not mix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from dataloaders import transforms
from dataloaders.transforms import (
    AugmentOptions,
    affine_crop,
    apply_gamma,
    change_intensity,
    crop,
    mirror_and_turn,
    random_affine,
)

CONTRAST, BRIGHTNESS, GAMMA, BLUR, NOISE = range(5)


class Only:
    """A generator that makes one of the changes of ``change_intensity``, of the largest size."""

    def __init__(self, change: int) -> None:
        self._draws = iter([0.0 if number == change else 0.999 for number in range(NOISE + 1)])

    def random(self) -> float:
        return next(self._draws)

    def uniform(self, low: float, high: float) -> float:
        return high


def changed(image: list, change: int, size: float = 1.0) -> np.ndarray:
    return change_intensity(np.array(image, np.float32), Only(change), chance=0.5, size=size)  # type: ignore[arg-type]


def test_contrast_and_brightness_by_hand() -> None:
    image = [[[[-1.0, 0.0, 2.0]]]]
    assert changed(image, CONTRAST).ravel().tolist() == pytest.approx([-1.4, 0.0, 2.8])
    assert changed(image, BRIGHTNESS).ravel().tolist() == pytest.approx([-0.6, 0.4, 2.4])
    assert changed(image, CONTRAST, size=0.5).ravel().tolist() == pytest.approx([-1.2, 0.0, 2.4])


def test_gamma_works_on_the_range_of_each_channel() -> None:
    small, large = changed([[[[0.0, 1.0, 4.0]]], [[[0.0, 10.0, 40.0]]]], GAMMA)
    assert small.ravel().tolist() == pytest.approx([0.0, 4 * 0.25 ** np.exp(0.6), 4.0])
    assert large == pytest.approx(10 * small)
    half = changed([[[[0.0, 1.0, 4.0]]]], GAMMA, size=0.5)
    assert half[0] == pytest.approx(apply_gamma(np.array([[[0.0, 1.0, 4.0]]]), float(np.exp(0.3))))


def test_blur_does_not_mix_channels() -> None:
    channels = np.ones((3, 4, 4, 4)) * np.array([0.0, 1.0, 5.0])[:, None, None, None]
    assert changed(channels.tolist(), BLUR) == pytest.approx(channels)
    channels[1, 2, 2, 2] = 4.0
    blurred = changed(channels.tolist(), BLUR)
    assert blurred[[0, 2]] == pytest.approx(channels[[0, 2]]) and 1.0 < blurred[1, 2, 2, 2] < 2.0


def test_blur_has_half_the_chance_of_the_other_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    blurred, curved = [], []
    monkeypatch.setattr(transforms.ndimage, "gaussian_filter", lambda channel, *_, **__: blurred.append(1) or channel)
    monkeypatch.setattr(transforms, "apply_gamma", lambda channel, _: curved.append(1) or channel)
    for seed in range(100):
        change_intensity(np.zeros((1, 2, 2, 2), np.float32), np.random.default_rng(seed), chance=1.0, size=1.0)
    assert len(curved) == 100 and 30 < len(blurred) < 70


def test_each_axis_is_mirrored_in_half_of_the_patches() -> None:
    image, options = np.arange(8.0).reshape(1, 2, 2, 2), AugmentOptions((2, 2, 2), flip_axes=(0, 1, 2))
    found = [mirror_and_turn([image], np.random.default_rng(seed), options)[0] for seed in range(400)]
    firsts = np.array([np.unravel_index(int(patch[0, 0, 0, 0]), (2, 2, 2)) for patch in found])  # 1 where mirrored
    assert (abs(firsts.mean(0) - 0.5) < 0.1).all() and (abs(np.corrcoef(firsts.T) - np.eye(3)) < 0.2).all()


def test_quarter_turns_are_in_the_first_two_axes() -> None:
    image, options = np.arange(4.0).reshape(1, 2, 2, 1), AugmentOptions((2, 2, 1), flip_axes=(), rotate90=True)
    found = [mirror_and_turn([image], np.random.default_rng(seed), options)[0] for seed in range(30)]
    assert {patch.shape for patch in found} == {(1, 2, 2, 1)}
    turns = {(0, 1, 2, 3), (1, 3, 0, 2), (3, 2, 1, 0), (2, 0, 3, 1)}  # [[0, 1], [2, 3]] by 0, 1, 2 and 3 quarters
    assert {tuple(patch.ravel().tolist()) for patch in found} == turns


@pytest.mark.parametrize("corner", [(0, 0, 0), (1, 0, 0), (-1, 0, 0)])
def test_a_crop_can_be_changed_without_its_volume(corner: tuple[int, int, int]) -> None:
    volume = np.zeros((1, 3, 2, 2))
    crop(volume, np.array(corner), (2, 2, 2), fill=0)[...] = 7.0
    assert not volume.any()


def test_random_affine_turns_and_scales_both_ways() -> None:
    options = AugmentOptions((8, 8, 8), max_angle=10.0, max_scale=0.1)
    drawn = [random_affine(np.random.default_rng(seed), options) for seed in range(40)]
    scales = [np.cbrt(np.linalg.det(matrix)) for matrix in drawn]
    assert min(scales) < 0.95 and max(scales) > 1.05
    for row, column in ((2, 1), (2, 0), (1, 0)):  # the angle about each axis, by the sign of its sine
        assert {np.sign(matrix[row, column]) for matrix in drawn} == {-1.0, 1.0}


@pytest.mark.parametrize("axis", range(3))
def test_a_single_slice_turns_within_itself(axis: int) -> None:
    shape = [16, 16, 16]
    shape[axis] = 1
    image = np.ones((1, *shape), np.float32)
    matrix = random_affine(np.random.default_rng(3), AugmentOptions((8, 8, 8), max_scale=0.0), shape=shape)
    assert matrix[axis, axis] == 1.0 and not np.allclose(matrix, np.eye(3))
    turned = affine_crop(image, matrix, np.zeros(3, dtype=int), tuple(shape), order=1, fill=0)
    assert turned.mean() > 0.8  # the corners alone leave it


@pytest.mark.parametrize(("shape", "spacing"), [((7, 9, 1), 8.0), ((20, 18, 9), 5.0)])
def test_outer_slices_are_not_lost_to_a_change_of_size(shape: tuple[int, int, int], spacing: float) -> None:
    """A voxel reaches half a step beyond its centre, as SciPy sees it too where it is told to."""
    rng, patch = np.random.default_rng(0), (8, 8, 2 if shape[2] == 1 else 12)
    image = rng.normal(size=shape).astype(np.float32)
    label = (3 * rng.random(shape)).astype(np.uint8)
    for _ in range(10):
        matrix = random_affine(rng, AugmentOptions(patch), (1.0, 1.0, spacing), shape)
        corner = rng.integers(-2, 3, 3) * (1, 1, 0)
        offset = corner + (np.asarray(patch) - 1) / 2 - matrix @ ((np.asarray(patch) - 1) / 2)
        for array, order, fill in ((image, 1, -5.0), (label, 0, 9)):
            found = affine_crop(array, matrix, corner, patch, order=order, fill=fill)
            whole: dict[str, Any] = {"output_shape": patch, "order": order, "mode": "grid-constant", "cval": fill}
            np.testing.assert_allclose(found, ndimage.affine_transform(array, matrix, offset, **whole), atol=1e-4)
            assert (found != fill).mean() > 0.2


def test_a_patch_beside_the_volume_is_all_fill() -> None:
    array = np.ones((1, 4, 4, 4), np.float32)
    for place in (-9, 9):
        assert (crop(array, np.array([0, place, 0]), (4, 4, 4), 7.0) == 7).all()


def test_the_blur_is_as_wide_in_mm_along_all_axes() -> None:
    image = np.zeros((1, 15, 15, 15), np.float32)
    image[0, 7, 7, 7] = 1

    def blurred(spacing: tuple[float, float, float]) -> np.ndarray:
        return change_intensity(image, Only(BLUR), chance=0.5, size=1.0, spacing=spacing)[0]  # type: ignore[arg-type]

    thin, thick = blurred((0.7, 0.7, 0.7)), blurred((1.0, 1.0, 10.0))
    np.testing.assert_array_equal(thin, changed(image.tolist(), BLUR)[0])
    assert thin[7, 7, 8] > 0.02 and thick[..., 8:].max() < 1e-6 < thick[8, 7, 7]


def test_a_mirrored_slice_can_be_handed_to_torch() -> None:
    options = AugmentOptions((1, 8, 8), flip_axes=(0,))
    for seed in range(8):
        (patch,) = mirror_and_turn([np.zeros((1, 1, 8, 8), np.float32)], np.random.default_rng(seed), options)
        assert torch.from_numpy(patch).shape == (1, 1, 8, 8)
