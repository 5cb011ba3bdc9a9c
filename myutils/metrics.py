"""Overlap and surface distances per class: Dice, Jaccard, HD95 and ASSD in mm, with a stated policy for empty masks.

Policy: both masks empty -> Dice 1, Jaccard 1, distances 0; one of them empty -> Dice 0, Jaccard 0, distances ``inf``.

Why not medpy's or MONAI's: one distance transform per mask, of the box that holds both, gives all four figures, several
times as fast (``benchmarks/metrics_speed.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.spatial import cKDTree

Box = tuple[slice, ...]

# Surface voxels per voxel of the box below which a search tree beats a distance map (benchmarks/metrics_speed.py).
_SPARSE_SHARE = 0.1


class CaseMetrics(NamedTuple):
    """Figures of one class in one case; the distances are in mm."""

    dice: float
    jaccard: float
    hd95_mm: float
    assd_mm: float


BOTH_EMPTY = CaseMetrics(1.0, 1.0, 0.0, 0.0)
ONE_EMPTY = CaseMetrics(0.0, 0.0, math.inf, math.inf)


def segmentation_metrics(
    prediction: ArrayLike, truth: ArrayLike, *, num_classes: int, spacing: Sequence[float]
) -> dict[int, CaseMetrics]:
    """Compare two label maps class by class, NumPy arrays or tensors on the CPU.

    Args:
        prediction: Predicted class ids (X, Y, Z), integer.
        truth: Reference class ids (X, Y, Z), integer.
        num_classes: Classes K with the background; figures are given for 1..K-1.
        spacing: Voxel size along X, Y, Z in mm, positive.

    Raises:
        ValueError: If the shapes differ, a map is not of integers, an id is outside 0..K-1 or a spacing is not
            positive.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    _check_inputs(prediction, truth, num_classes, spacing)
    boxes_prediction, boxes_truth = class_boxes(prediction, num_classes), class_boxes(truth, num_classes)
    figures: dict[int, CaseMetrics] = {}
    for class_id in range(1, num_classes):
        box_prediction, box_truth = boxes_prediction[class_id - 1], boxes_truth[class_id - 1]
        if box_prediction is None and box_truth is None:
            figures[class_id] = BOTH_EMPTY
        elif box_prediction is None or box_truth is None:
            figures[class_id] = ONE_EMPTY
        else:
            box = _union(box_prediction, box_truth)
            # One memory layout for both: files read by nibabel have the other one, several times as slow to compare.
            found, wanted = (np.ascontiguousarray(label_map[box] == class_id) for label_map in (prediction, truth))
            figures[class_id] = _compare(found, wanted, spacing)
    return figures


def class_boxes(label_map: np.ndarray, num_classes: int) -> list[Box | None]:
    """Bounding boxes of the classes 1..K-1 of class ids (X, Y, Z), None for an absent one."""
    found = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        occupied = np.flatnonzero(label_map.any(axis=others))
        if not len(occupied):
            return [None] * (num_classes - 1)
        found.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    foreground = tuple(found)
    if num_classes == 2:
        return [foreground]
    # find_objects reads signed integers only; one pass finds the boxes of all classes.
    boxes = ndimage.find_objects(label_map[foreground].astype(np.int32, copy=False), max_label=num_classes - 1)
    return [None if box is None else _shifted(box, foreground) for box in boxes]


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of ``mask`` (X, Y, Z) with a face neighbour outside it; beyond the array is outside."""
    padded = np.pad(mask, 1)
    inner = padded[1:-1, 1:-1, 1:-1]
    inside = inner.copy()  # shifted views: ten times as fast as a binary erosion
    for axis in range(3):
        for side in (slice(None, -2), slice(2, None)):
            index = [slice(1, -1)] * 3
            index[axis] = side
            inside &= padded[tuple(index)]
    return inner & ~inside


def surface_distances(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distances in mm (N,) from each surface to the other, both directions in one array; no mask is empty.

    Note:
        The masks may be cropped to their common bounding box without a margin: all surface voxels lie in it, and
        what is cut off is outside both masks, which is how :func:`surface` reads the border of the array.

    Source: Heimann et al. 2009, doi:10.1109/TMI.2009.2013851; the surface is that of medpy (6-neighbourhood).
    """
    first, second = surface(prediction), surface(truth)
    shared = first & second
    count = np.count_nonzero(first) + np.count_nonzero(second)
    distances_of = distances_by_tree if count < _SPARSE_SHARE * prediction.size else distances_by_transform
    zeros = np.zeros(2 * np.count_nonzero(shared))
    return np.concatenate([zeros, *distances_of(first, second, shared, spacing)])


def distances_by_tree(
    first: np.ndarray, second: np.ndarray, shared: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm from the voxels of each mask (X, Y, Z) that are not ``shared`` to the other mask.

    Looks at the voxels of the masks alone: several times as fast as a distance map where they are few.
    """
    places, asked = [], []
    for mask in (first, second):
        flat = np.flatnonzero(mask)
        places.append(np.stack(np.unravel_index(flat, mask.shape), axis=1) * np.asarray(spacing))
        asked.append(places[-1][~shared.ravel()[flat]])
    # Voxels of a grid are spread evenly: an unbalanced tree is built in a quarter of the time and asked in half of it.
    trees = [cKDTree(voxels, leafsize=32, balanced_tree=False) for voxels in places]
    return trees[1].query(asked[0])[0], trees[0].query(asked[1])[0]


def distances_by_transform(
    first: np.ndarray, second: np.ndarray, shared: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """As ``distances_by_tree``, from distance maps of the whole box: the cost does not depend on the masks."""
    to_first, to_second = (ndimage.distance_transform_edt(~mask, sampling=tuple(spacing)) for mask in (first, second))
    return to_second[first & ~shared], to_first[second & ~shared]


def _compare(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> CaseMetrics:
    """Figures of two cropped masks, neither of them empty.

    Note:
        HD95 follows medpy: the 95th percentile of the distances of both directions pooled. MONAI takes the percentile
        of each direction and then the larger one, which is not below the pooled value but for interpolation.
        ASSD is the mean of the pooled distances, in medpy and in MONAI.
    """
    overlap = int(np.count_nonzero(prediction & truth))
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth))
    distances = surface_distances(prediction, truth, spacing)
    return CaseMetrics(
        dice=2.0 * overlap / total,
        jaccard=overlap / (total - overlap),
        hd95_mm=float(np.percentile(distances, 95)),
        assd_mm=float(distances.mean()),
    )


def _union(first: Box, second: Box) -> Box:
    pairs = zip(first, second, strict=True)
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in pairs)


def _shifted(box: Box, origin: Box) -> Box:
    """A box within the box ``origin``, in the coordinates that ``origin`` is given in."""
    return tuple(slice(o.start + b.start, o.start + b.stop) for b, o in zip(box, origin, strict=True))


def _check_inputs(prediction: np.ndarray, truth: np.ndarray, num_classes: int, spacing: Sequence[float]) -> None:
    if prediction.shape != truth.shape or prediction.ndim != 3:
        raise ValueError(
            f"prediction has shape {prediction.shape} and truth {truth.shape}; both must be the same (X, Y, Z): "
            "resample the prediction onto the grid of the truth"
        )
    if len(spacing) != 3 or not all(math.isfinite(step) and step > 0 for step in spacing):
        raise ValueError(f"spacing {tuple(spacing)}: need three positive voxel sizes in mm")
    for name, label_map in (("prediction", prediction), ("truth", truth)):
        if not np.issubdtype(label_map.dtype, np.integer):
            raise ValueError(f"{name} has type {label_map.dtype}; pass class ids as integers")
        low, high = int(label_map.min(initial=0)), int(label_map.max(initial=0))
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{name} has class ids {low}..{high}, outside 0..{num_classes - 1}; raise num_classes or relabel"
            )
