"""Whether the slices of a DICOM series, files or frames, lie on one regular grid."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from dataloaders.say_once import warn_once

logger = logging.getLogger(__name__)

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
GAP_TOLERANCE = 0.1  # of the usual slice distance
SAME_PLACE = 0.01  # mm; no two slices lie closer
LARGEST_SHIFT = 0.5  # of a pixel, beside the line through the first slice
LARGEST_TURN = 1e-3  # of a direction's entries between two slices: rounding in the header
LARGEST_SIZE_GAP = 1e-3  # of a pixel's side between two slices: rounding in the header


def require_one_size(folder: Path, sizes: np.ndarray) -> None:
    """Refuse slices with pixels of other sizes (N, 2), in mm, than the first."""
    others = sizes[np.abs(sizes / sizes[0] - 1).max(1) > LARGEST_SIZE_GAP]
    if len(others):
        raise ValueError(
            f"{folder}: {len(others)} of {len(sizes)} slices have pixels of another size, such as {others[0]} mm "
            f"beside {sizes[0]} mm; keep the slices of one size, or resample the series to one grid first"
        )


def require_grid(folder: Path, names: list[str], positions: np.ndarray, directions: np.ndarray, pixel: float) -> None:
    """Refuse slices that are turned, doubled or shifted against each other; unequal distances are a warning.

    Args:
        folder: For messages.
        names: File name per slice.
        positions: Of each slice's first pixel (N, 3), in mm.
        directions: Of its rows and columns (N, 2, 3).
        pixel: Smaller side of a pixel in mm.
    """
    turned = np.flatnonzero(np.abs(directions - directions[0]).max((1, 2)) > LARGEST_TURN)
    if len(turned):
        raise ValueError(
            f"{folder}: {len(turned)} of {len(names)} slices have another orientation than {names[0]}, the first is "
            f"{names[turned[0]]}; keep the slices of one orientation, and move others, such as a localiser, away"
        )
    normal = np.cross(*directions[0])
    normal /= np.linalg.norm(normal)
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    gaps = np.diff(heights[order])
    doubled = np.flatnonzero(gaps < SAME_PLACE)
    if len(doubled):
        first, second = (names[order[doubled[0] + k]] for k in (0, 1))
        raise ValueError(
            f"{folder}: {len(doubled)} of {len(names)} slices lie where another does, within {SAME_PLACE} mm, such as "
            f"{second} on {first}; keep one time point, echo or copy per folder (where one file has several, dcm2niix "
            "makes a NIfTI file of each), or mend the positions"
        )
    beside = positions - positions[0] - np.outer(heights - heights[0], normal)
    shift = float(np.linalg.norm(beside, axis=1).max())
    if shift > LARGEST_SHIFT * pixel:
        raise ValueError(
            f"{folder}: slices are shifted sideways by up to {shift:.3g} mm, more than {LARGEST_SHIFT:g} of a pixel of "
            f"{pixel:.3g} mm, as with a tilted gantry; resample the series to an orthogonal grid first"
        )
    if np.ptp(gaps) > GAP_TOLERANCE * np.median(gaps):
        text = f"{folder}: slice distances run from {gaps.min():.4g} to {gaps.max():.4g} mm; a slice may be missing, "
        warn_once(logger, text + "distances in mm are not exact")
