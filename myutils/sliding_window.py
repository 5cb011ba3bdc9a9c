"""Sliding windows over a volume of any size: rows of the result come out as soon as they are complete.

Contract: no map of the whole volume is held here, only a band of one window's extent along X.

Why not MONAI's ``sliding_window_inference``: it holds maps of all classes and their weights for the whole volume, 2 GB
of scores for 512 x 512 x 400 voxels and 5 classes where the band takes 0.4, and its last windows overlap unevenly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

Box = tuple[slice, slice, slice]
WindowFunction = Callable[[Tensor], Tensor]  # windows (B, C, x, y, z) to class scores (B, K, x, y, z)


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxels of evenly spaced windows along an axis; neighbours share at least ``overlap`` of a window.

    Args:
        size: Voxels along the axis, at least ``window``.
        window: Extent of a window.
        overlap: 0 <= overlap < 1.

    Raises:
        ValueError: If the overlap is out of range.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap {overlap}: must be at least 0 and below 1, a share of the window")
    step = max(1, int(window * (1 - overlap) + 1e-6))  # 40 * (1 - 0.8) is a little less than 8
    count = -(-(size - window) // step) + 1
    return [round(start) for start in np.linspace(0, size - window, count)]


def axis_weights(starts: list[int], window: int, size: int, sigma: float) -> list[Tensor]:
    """Gaussian weights (window,) of each window along an axis; those of the windows over a voxel sum to 1.

    Args:
        starts: First voxel of each window.
        window: Extent of a window.
        size: Voxels along the axis.
        sigma: Standard deviation as a share of ``window``, > 0.

    Raises:
        ValueError: If ``sigma`` is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma {sigma}: must be above 0, a share of the window")
    distance = np.arange(window) - (window - 1) / 2
    bell = np.exp(-0.5 * np.square(distance / (sigma * window)))
    total = np.zeros(size)
    for start in starts:
        total[start : start + window] += bell
    return [torch.from_numpy(bell / total[start : start + window]).float() for start in starts]


def stitched_rows(
    scores: WindowFunction,
    image: Tensor,
    num_classes: int,
    *,
    window: tuple[int, int, int],
    overlap: float,
    sigma: float,
    window_batch: int,
    device: torch.device,
) -> Iterator[tuple[slice, Tensor]]:
    """Class scores of a whole image, a few rows along X at a time, in order.

    A voxel's scores are the mean over the windows that show it, with Gaussian weights about each window's centre. Of
    windows that show nothing but each channel's least value one is scored, for equal windows have equal scores. All
    rows share one buffer, so use or copy them before the next ones are asked for;
    ``myutils.inference.sliding_window_probabilities`` gives whole maps.

    Args:
        scores: Called with windows on ``device``, each scored by itself; of a network, ``lambda windows:
            network(windows).logits``.
        image: (C, X, Y, Z), float32; one smaller than the window is padded with its least value, evenly on both sides.
        num_classes: Number of scores K of a voxel.
        window: Extent of a window in voxels.
        overlap: Share of a window that its neighbour covers too, 0 <= overlap < 1.
        sigma: Standard deviation of the weights as a share of the window, > 0.
        window_batch: Windows per call of ``scores``.
        device: Where ``scores`` runs.

    Yields:
        Rows of the image, and their scores (K, rows, Y, Z), float32, where the image lies.

    Raises:
        ValueError: If ``overlap`` or ``sigma`` is out of range, when the first rows are asked for.
    """
    image, inner = _padded(image, window)
    size = image.shape[1:]
    starts = [window_starts(n, w, overlap) for n, w in zip(size, window, strict=True)]
    weights = [
        [part.to(image.device) for part in axis_weights(found, w, n, sigma)]
        for found, w, n in zip(starts, window, size, strict=True)
    ]
    band, first = image.new_zeros(num_classes, window[0], *size[1:]), 0  # the rows from ``first`` on
    along = [[slice(start, start + w) for start in s] for s, w in zip(starts, window, strict=True)]
    boxes: list[Box] = list(product(along[0], along[1], along[2]))  # those along X change last
    empty = _empty_windows(image, boxes)
    found = _scored_windows(scores, image, boxes, empty, window_batch, device)
    for box, bells, values in zip(boxes, product(*weights), found, strict=True):
        done = box[0].start - first
        if done:
            yield _inside(band[:, :done], first, inner)
            band[:, : window[0] - done] = band[:, done:].clone()
            band[:, window[0] - done :] = 0
            first = box[0].start
        weight = bells[0][:, None, None] * (bells[1][:, None] * bells[2])  # (x, y, z)
        band[:, :, box[1], box[2]].addcmul_(values, weight)
    yield _inside(band, first, inner)


def _empty_windows(image: Tensor, boxes: list[Box]) -> list[bool]:
    """Whether a window shows nothing but each channel's least value: background without noise, a CT's clipped air."""
    least = image.amin((1, 2, 3))[:, None, None, None]
    planes: dict[int, Tensor] = {}  # where the windows that begin there along X show something, (Y, Z)
    for along_x, _, _ in boxes:
        if along_x.start not in planes:
            planes[along_x.start] = (image[:, along_x] != least).any(0).any(0).cpu()
    return [not bool(planes[along_x.start][along_y, along_z].any()) for along_x, along_y, along_z in boxes]


def _scored_windows(
    scores: WindowFunction, image: Tensor, boxes: list[Box], empty: list[bool], window_batch: int, device: torch.device
) -> Iterator[Tensor]:
    """Scores (K, x, y, z) of each window in turn; empty ones are alike, and the first of them is scored alone."""

    def run(chosen: list[Box]) -> Tensor:
        return scores(torch.stack([image[(slice(None), *box)] for box in chosen]).to(device)).to(image.device)

    @cache
    def of_empty() -> Tensor:
        return run([boxes[empty.index(True)]])[0]

    shown = [box for box, nothing in zip(boxes, empty, strict=True) if not nothing]
    batches = (shown[begin : begin + window_batch] for begin in range(0, len(shown), window_batch))
    found = (values for batch in batches for values in run(batch))
    for nothing in empty:
        yield of_empty() if nothing else next(found)


def _padded(image: Tensor, window: tuple[int, int, int]) -> tuple[Tensor, list[slice]]:
    """An image (C, X, Y, Z) made as large as a window by its channels' least values, and where it lies in that."""
    missing = [max(0, extent - size) for extent, size in zip(window, image.shape[1:], strict=True)]
    margins = [(gap // 2, gap - gap // 2) for gap in missing]
    inner = [slice(low, low + n) for (low, _), n in zip(margins, image.shape[1:], strict=True)]
    if any(missing):
        least = image.flatten(1).amin(1)[:, None, None, None]
        padded = least.expand(-1, *(n + gap for n, gap in zip(image.shape[1:], missing, strict=True))).clone()
        padded[(slice(None), *inner)] = image
        image = padded
    return image, inner


def _inside(band: Tensor, first: int, inner: list[slice]) -> tuple[slice, Tensor]:
    """Rows of the image and their scores, without the padding."""
    low, high = max(first, inner[0].start), min(first + band.shape[1], inner[0].stop)
    rows = slice(low - inner[0].start, high - inner[0].start)
    return rows, band[:, low - first : high - first, inner[1], inner[2]]
