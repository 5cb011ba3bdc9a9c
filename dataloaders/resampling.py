"""Images and labels on a grid of other voxels with the same centre."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy import ndimage

from dataloaders.orientation import in_order

SplineOrder = Literal[1, 3]
SPLINE_ORDER: dict[str, SplineOrder] = {"linear": 1, "cubic": 3}


def resample(
    array: np.ndarray, size: tuple[int, ...], ratio: tuple[float, ...], *, order: SplineOrder, rows: slice | None = None
) -> np.ndarray:
    """Sample arrays (..., X, Y, Z) on a grid with the same centre.

    Args:
        array: Values in float32 or float64; the type is kept.
        size: Voxels of the new grid per axis.
        ratio: Voxel size of the new grid over that of the old one, per axis.
        order: Spline order: 1 linear, 3 cubic, which would overshoot at edges and is kept within the array's range; the
            border value continues beyond the border.
        rows: Part of the new grid along X; all of it by default.
    """
    rows, old = rows or slice(0, size[0]), array.shape[-3:]
    if _is_same_grid(old, size, ratio):
        return array[..., rows, :, :].copy()
    starts, band = _first_voxel(old, size, ratio), (rows.stop - rows.start, *size[1:])
    starts[0] += rows.start * ratio[0]
    sampled = np.empty((*array.shape[:-3], *band), dtype=array.dtype)
    neighbours = _neighbours(starts, band, ratio, old)
    for index in np.ndindex(array.shape[:-3]):
        one, new = array[index], sampled[index]
        if order == 1:
            new[...] = _interpolate(one, neighbours)
        else:
            ndimage.affine_transform(one, np.asarray(ratio), starts, output=new, order=order, mode="nearest")
            new.clip(one.min(), one.max(), out=new)
    return sampled


def _interpolate(array: np.ndarray, neighbours: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """An array (X, Y, Z) on a grid, linear between the ``_neighbours`` of its voxels.

    One axis after the other takes less time than ``ndimage.affine_transform``, which weighs eight voxels for each new
    one. Axes that lose voxels come first; few are left then for Z, whose neighbours are costly to gather.
    """
    (rows, parts), *others = neighbours
    first, last = rows.min(), rows.max()
    pairs = [(rows - first, parts), *others]
    values = torch.from_numpy(in_order(array[first : last + 1]))
    shrinking = [axis for axis in range(3) if pairs[axis][0].shape[1] < array.shape[axis]]
    growing = [axis for axis in (2, 1, 0) if axis not in shrinking]
    for axis in (*shrinking, *growing):
        (below, above), (_, part) = (torch.from_numpy(both) for both in pairs[axis])
        weight = part.to(values.dtype).reshape([-1 if other == axis else 1 for other in range(3)])
        values = values.index_select(axis, below).lerp_(values.index_select(axis, above), weight)
    return values.numpy()


def resample_labels(labels: np.ndarray, size: tuple[int, ...], ratio: tuple[float, ...]) -> np.ndarray:
    """Class ids (X, Y, Z) on a grid with the same centre: each voxel's class has the largest linear weight there.

    Where two classes weigh the same, as halfway between two voxels, the lower id wins at every second voxel and the
    higher one at the others: one side alone, which is what the nearest voxel comes to, would move or swell a structure.
    """
    if _is_same_grid(labels.shape, size, ratio):
        return labels.copy()
    starts = _first_voxel(labels.shape, size, ratio)
    (below_x, part_x), (below_y, part_y), (below_z, part_z) = _neighbours(starts, size, ratio, labels.shape)
    sampled = np.empty(size, labels.dtype)
    for x, row in enumerate(sampled):
        corners = labels[below_x[:, x]][:, below_y][..., below_z]  # (2, 2, Y, 2, Z)
        corners = corners.swapaxes(2, 3).reshape(8, *size[1:])
        row[...] = corners[0]
        y, z = np.nonzero((corners != corners[0]).any(0))
        near = corners[:, y, z]  # (8, N)
        weights = np.einsum("i,jn,kn->ijkn", part_x[:, x], part_y[:, y], part_z[:, z]).reshape(8, -1)
        votes = ((near[:, None] == near) * weights).sum(1).round(6)
        higher = np.where((x + y + z) % 2, 1, -1)
        row[y, z] = near[np.lexsort((near * higher, votes), axis=0)[-1], np.arange(len(y))]
    return sampled


def resampled_affine(
    affine: np.ndarray, old_size: tuple[int, ...], new_size: tuple[int, ...], ratio: tuple[float, ...]
) -> np.ndarray:
    """Affine (4, 4) of the grid on which ``resample`` samples."""
    step = np.diag([*ratio, 1.0])
    step[:3, 3] = _first_voxel(old_size, new_size, ratio)
    return affine @ step


def _is_same_grid(old: tuple[int, ...], size: tuple[int, ...], ratio: tuple[float, ...]) -> bool:
    return tuple(size) == old and all(abs(step - 1) < 1e-9 for step in ratio)


def _first_voxel(old_size: tuple[int, ...], new_size: tuple[int, ...], ratio: tuple[float, ...]) -> np.ndarray:
    """Where the new grid's first voxel lies, in old voxel indices, if both grids share their centre."""
    return (np.array(old_size) - 1) / 2 - (np.array(new_size) - 1) / 2 * np.array(ratio)


def _neighbours(
    starts: np.ndarray, size: Sequence[int], ratio: Sequence[float], old: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """``_between`` along each axis for a grid of ``size`` that begins at ``starts``, in voxels of the old one."""
    axes = zip(starts, size, ratio, old, strict=True)
    return [_between(start + np.arange(count) * step, voxels) for start, count, step, voxels in axes]


def _between(at: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The two of ``count`` voxels that places (N,) along an axis lie between, and the weight of each: (2, N) both."""
    at = at.clip(0, count - 1)
    below = np.floor(at + 1e-6).astype(int).clip(max=max(0, count - 2))
    above = (below + 1).clip(max=count - 1)
    part = (at - below).clip(min=0)
    return np.stack([below, above]), np.stack([1 - part, part])
