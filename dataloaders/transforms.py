"""Random patches: crop first, then mirror, turn, deform and change intensities, all from one seeded generator.

The cost of a sample follows the patch, not the volume: an affine change samples the patch's own grid. Written by
hand, because MONAI's random transforms work on the whole volume or need a second crop, and give two views of one
geometry only through deep copies of their state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch.nn.functional import grid_sample

from dataloaders.orientation import in_order

_ALIKE = 0.1  # logarithm of the ratio of two sides of a voxel


@dataclass(frozen=True)
class AugmentOptions:
    """What may happen to a patch.

    Attributes:
        patch_size: Voxels of the patch along X, Y, Z.
        flip_axes: Image axes along which a mirrored patch is plausible.
        rotate90: Quarter turns in the X-Y plane; used where patch and voxels are square there (``turns_quarterly``).
        foreground_share: Share of patches that are centred on a structure, where one is known or guessed.
        affine_share: Share of patches that are rotated and scaled.
        intensity: Whether labelled patches get mild intensity changes, and strong views exist at all.
        max_angle: Largest rotation about each axis, in degrees.
        max_scale: Largest change of size, as a logarithm.
        strong_views: Strong views of each unlabelled patch.
        strong_intensity: Size of their intensity changes; 0 leaves them as the weak view.
    """

    patch_size: tuple[int, int, int]
    flip_axes: tuple[int, ...] = (0, 1, 2)
    rotate90: bool = False
    foreground_share: float = 0.5
    affine_share: float = 0.3
    intensity: bool = True
    max_angle: float = 12.0
    max_scale: float = 0.12
    strong_views: int = 1
    strong_intensity: float = 1.0


def choose_corner(
    shape: tuple[int, ...], patch_size: tuple[int, ...], rng: np.random.Generator, target: np.ndarray | None = None
) -> np.ndarray:
    """First corner of a patch (3,), every valid offset equally likely; with ``target`` a patch that holds it.

    Where the volume is smaller than the patch, the corner is negative and the volume lies anywhere inside.

    Args:
        shape: Size of the volume X, Y, Z.
        patch_size: Size of the patch.
        rng: Generator of this sample.
        target: Voxel (3,) to be inside the patch, near its centre.
    """
    corner = np.empty(3, dtype=np.int64)
    for axis, (size, patch) in enumerate(zip(shape, patch_size, strict=True)):
        low, high = min(0, size - patch), max(0, size - patch)
        if target is None:
            corner[axis] = rng.integers(low, high + 1)
        else:
            jitter = rng.integers(-(patch // 4), patch // 4 + 1)
            corner[axis] = np.clip(target[axis] - patch // 2 + jitter, low, high)
    return corner


def crop(array: np.ndarray, corner: np.ndarray, patch_size: tuple[int, ...], fill: float | np.ndarray) -> np.ndarray:
    """Cut a patch out of the last three axes; outside the volume is ``fill``, one number or (C, 1, 1, 1)."""
    shape = array.shape[-3:]
    start = np.maximum(corner, 0)
    stop = np.maximum(start, np.minimum(corner + patch_size, shape))  # a patch may lie beside the volume
    x, y, z = (slice(a, b) for a, b in zip(start, stop, strict=True))
    inside = array[..., x, y, z]
    if inside.shape[-3:] == tuple(patch_size):
        return inside.copy()
    patch = np.full((*array.shape[:-3], *patch_size), fill, dtype=array.dtype)
    x, y, z = (slice(a, a + n) for a, n in zip(start - corner, inside.shape[-3:], strict=True))
    patch[..., x, y, z] = inside
    return patch


def random_affine(
    rng: np.random.Generator,
    options: AugmentOptions,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    shape: Sequence[int] = (2, 2, 2),
) -> np.ndarray:
    """Matrix (3, 3), from voxels to voxels, of a random rotation in space and an isotropic scale.

    A rotation of voxel indices would tear thick slices apart: 12 degrees over 64 voxels are 13 slices. A volume of a
    single slice (``shape`` X, Y, Z) turns within it: any other rotation takes all of it out of the patch.
    """
    angles = np.deg2rad(rng.uniform(-options.max_angle, options.max_angle, 3))
    angles *= [all(size > 1 or other == axis for other, size in enumerate(shape)) for axis in range(3)]
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        first, second = (index for index in range(3) if index != axis)
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    step = np.asarray(spacing)
    return matrix * np.exp(rng.uniform(-options.max_scale, options.max_scale)) * (step / step[:, None])


def affine_crop(
    array: np.ndarray,
    matrix: np.ndarray,
    corner: np.ndarray,
    patch_size: tuple[int, ...],
    *,
    order: int,
    fill: float | np.ndarray,
) -> np.ndarray:
    """Sample a patch of array (..., X, Y, Z) through ``matrix`` about the patch's centre; ``fill`` as of ``crop``.

    ``order`` 1 interpolates linearly, 0 takes the nearest voxel. A voxel reaches half a step beyond its centre, or a
    single slice would be lost to any scale but 1: so the block that is sampled has a margin of ``fill``.
    """
    half = (np.asarray(patch_size) - 1) / 2
    reach = np.abs(matrix) @ half
    first = np.floor(corner + half - reach).astype(int) - 1
    sides = np.ceil(2 * reach).astype(int) + 4
    block = crop(array, first, tuple(sides), fill)
    grid = _sampling_grid(matrix, corner + half - matrix @ half - first, patch_size, sides)
    channels = torch.from_numpy(block.reshape(1, -1, *sides)).float()
    mode = "bilinear" if order else "nearest"
    # the block holds all of the grid: what padding_mode adds is never seen
    sampled = grid_sample(channels, grid, mode, padding_mode="border", align_corners=True)
    return sampled.numpy().astype(array.dtype, copy=False).reshape(*array.shape[:-3], *patch_size)


def _sampling_grid(matrix: np.ndarray, offset: np.ndarray, size: Sequence[int], sides: np.ndarray) -> torch.Tensor:
    """Where each of ``size`` voxels v lies in a block of ``sides``, at matrix v + offset, as ``grid_sample`` has it.

    Returns:
        (1, X, Y, Z, 3), -1 to 1 from the centre of a block's first voxel to that of its last, the last axis first.
    """
    grid = torch.empty((1, *size, 3))
    for axis in range(3):
        step = 2 / (sides[axis] - 1)
        x, y, z = (torch.from_numpy(step * matrix[axis, i] * np.arange(size[i])).float() for i in range(3))
        x = x + (step * offset[axis] - 1)
        torch.add((x[:, None] + y)[..., None], z, out=grid[0, ..., 2 - axis])
    return grid


def turns_quarterly(patch_size: Sequence[int], spacing: Sequence[float]) -> bool:
    """Whether a quarter turn in the X-Y plane leaves a patch's size and, but for a tenth, its voxels' as they are."""
    return patch_size[0] == patch_size[1] and abs(math.log(spacing[0] / spacing[1])) < _ALIKE


def mirror_and_turn(
    arrays: list[np.ndarray], rng: np.random.Generator, options: AugmentOptions, spacing: Sequence[float] = (1, 1, 1)
) -> list[np.ndarray]:
    """The same random mirroring and quarter turns for all arrays (..., X, Y, Z) of voxels of ``spacing``."""
    axes = tuple(axis - 3 for axis in options.flip_axes if rng.random() < 0.5)
    turns = int(rng.integers(4)) if options.rotate90 and turns_quarterly(options.patch_size, spacing) else 0
    result = []
    for array in arrays:
        changed = np.flip(array, axes) if axes else array
        changed = np.rot90(changed, turns, axes=(-3, -2)) if turns else changed
        result.append(in_order(changed))
    return result


def change_intensity(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    chance: float,
    size: float,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> np.ndarray:
    """Random contrast, brightness, gamma, blur and noise for a z-scored image (C, X, Y, Z).

    Args:
        image: Any channels.
        rng: Generator of this sample.
        chance: Of each change; blur has half of it.
        size: Of the changes; 1 leaves hardly more than the anatomy.
        spacing: Of the voxels, along X, Y, Z: the blur is as wide in mm along all, for the next slice of thick ones
            shows other anatomy.
    """
    image = image.astype(np.float32, copy=True)
    if rng.random() < chance:
        image *= np.float32(1.0 + size * rng.uniform(-0.4, 0.4))
    if rng.random() < chance:
        image += np.float32(size * rng.uniform(-0.4, 0.4))
    if rng.random() < chance:
        gamma = float(np.exp(size * rng.uniform(-0.6, 0.6)))
        image = np.stack([apply_gamma(channel, gamma) for channel in image])
    if rng.random() < 0.5 * chance:
        sigma = size * rng.uniform(0.3, 1.1) * min(spacing) / np.asarray(spacing)
        image = np.stack([ndimage.gaussian_filter(channel, sigma, truncate=3.0) for channel in image])
    if rng.random() < chance:
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        image += np.float32(size * rng.uniform(0.0, 0.25)) * noise
    return image


def apply_gamma(image: np.ndarray, gamma: float) -> np.ndarray:
    """``x ** gamma`` on one channel (X, Y, Z) rescaled to 0..1, put back to its own range; a constant is kept."""
    low, high = float(image.min()), float(image.max())
    if high - low < 1e-6:
        return image
    scaled = (image - low) / (high - low)
    return (scaled**gamma * (high - low) + low).astype(np.float32)
