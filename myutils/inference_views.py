"""Views of a whole image whose predictions are averaged: mirrored ones, and ones that are turned and scaled too.

Turned and scaled views differ as training patches do by default (``dataloaders.transforms.random_affine``), about
the image's centre. They are the same for every image of a voxel size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dataloaders.transforms import AugmentOptions, random_affine

_SLAB = 16  # voxels along X
_ANGLE, _SCALE = 12.0, 0.12  # degrees about each axis, logarithm; changes here need not follow those of training


class View(NamedTuple):
    """How an image is looked at: turned and scaled by a matrix (3, 3), if there is one, then mirrored along ``axes``.

    A turned image is sampled at ``matrix @ (voxel - centre) + centre``.
    """

    axes: tuple[int, ...]
    matrix: np.ndarray | None


def make_views(axes: tuple[int, ...], count: int, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> list[View]:
    """The views to average over, the image itself first.

    Args:
        axes: Image axes (0, 1, 2) to mirror along.
        count: 0 for every way of mirroring, untouched else; else this many views, all but the first turned and scaled
            at random and mirrored in turn.
        spacing: Voxel size of the image.
    """
    mirrored = [subset for size in range(len(axes) + 1) for subset in combinations(axes, size)]
    if count == 0:
        return [View(subset, None) for subset in mirrored]
    rng, options = np.random.default_rng(0), AugmentOptions((1, 1, 1), max_angle=_ANGLE, max_scale=_SCALE)
    turned = [View(mirrored[i % len(mirrored)], random_affine(rng, options, spacing)) for i in range(1, count)]
    return [View((), None), *turned]


def slabs(length: int) -> Iterator[slice]:
    """Rows of the first axis, a few at a time, that are worked on where a whole volume would be copied."""
    for start in range(0, length, _SLAB):
        yield slice(start, min(start + _SLAB, length))


def seen_from(view: View, images: Tensor) -> Tensor:
    """Images (B, C, X, Y, Z) as the view shows them; places outside show the nearest border."""
    if view.matrix is None:
        return _mirror(images, view.axes)
    turned = torch.empty_like(images)
    for rows in slabs(images.shape[2]):
        turned[:, :, rows], _ = _sample(images, view.matrix, rows)
    return _mirror(turned, view.axes)


def seen_places(view: View, seen: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """What a view (B, K, X, Y, Z) says about the voxels of some rows along X of the image itself.

    Returns:
        Values (B, K, rows, Y, Z), and whether the view shows the place (rows, Y, Z), bool.
    """
    matrix = np.eye(3) if view.matrix is None else view.matrix
    return _sample(_mirror(seen, view.axes), np.linalg.inv(matrix), rows)


def _mirror(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    return values.flip([axis + 2 for axis in axes]) if axes else values


def _sample(values: Tensor, matrix: np.ndarray, rows: slice) -> tuple[Tensor, Tensor]:
    """Values (B, C, X, Y, Z) at the turned places of the voxels in ``rows``, and which of these lie inside."""
    size = values.shape[2:]
    half = [max((count - 1) / 2, 0.5) for count in size]
    own = [torch.arange(count, device=values.device, dtype=torch.float32) - (count - 1) / 2 for count in size]
    own[0] = own[0][rows]
    voxels = torch.stack(torch.meshgrid(*own, indexing="ij"), dim=-1)  # (rows, Y, Z, 3)
    turn = torch.tensor(matrix / np.array(half)[:, None], dtype=torch.float32, device=values.device)
    places = voxels @ turn.T  # -1..1 from the first voxel's centre to the last one's
    grid = places.flip(-1).expand(len(values), *places.shape)
    sampled = functional.grid_sample(values, grid, padding_mode="border", align_corners=True)
    return sampled, (places.abs() <= 1 + 1e-4).all(-1)
