"""What the labelled cases say about settings that nobody gave: flat levels, a fitting patch, the range of a CT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nibabel.affines import voxel_sizes

from dataloaders.base import CaseSource, Grid, Triple
from dataloaders.checked_cases import load_case
from dataloaders.geometry import Spacing
from dataloaders.orientation import Turn

_PATCH_VOXELS = 64**3
_PATCH_STEP = 8
_MOST_FLAT_LEVELS = 3
_PERCENTILES = (0.5, 99.5)
_VOXELS_PER_CASE = 100_000


@dataclass(frozen=True)
class Survey:
    """The typical case among some.

    Attributes:
        extent: Median extent in mm along each axis.
        spacing: Median voxel size in mm along each axis.
    """

    extent: Spacing
    spacing: Spacing


def survey_grids(grids: Sequence[Grid], orientation: str) -> Survey:
    """The typical case, with the axes that cases are worked on ("ras" or "stored")."""
    spacings, extents = [], []
    for grid in grids:
        turn = Turn.of(grid.affine, orientation)
        spacings.append(turn.values_forth(voxel_sizes(grid.affine)))
        extents.append([size * step for size, step in zip(turn.values_forth(grid.shape), spacings[-1], strict=True)])
    return Survey(_median(extents), _median(spacings))


def structure_range(source: CaseSource, case_ids: Sequence[str]) -> tuple[float, float] | None:
    """0.5 and 99.5 percentile of the intensities inside the labelled structures, all cases and channels together.

    None where nothing is labelled, or all values are one; rounded to five digits. Cases are read one after the other;
    errors as in ``CaseSource.load``.
    """
    found = [np.empty(0, np.float32)]
    for case_id in case_ids:
        volume = load_case(source, case_id, with_label=True)
        inside = volume.image[:, volume.label > 0].ravel()  # type: ignore[operator, index]
        found.append(inside[:: max(1, len(inside) // _VOXELS_PER_CASE)])
    inside = np.concatenate(found)
    inside = inside[np.isfinite(inside)]
    low, high = (float(f"{x:.5g}") for x in np.percentile(inside, _PERCENTILES)) if len(inside) else (0.0, 0.0)
    return (low, high) if low < high else None


def _median(rows: Sequence[Sequence[float]]) -> Spacing:
    x, y, z = np.median(rows, axis=0).tolist()
    return x, y, z


def fitting_flat_levels(spacing: Spacing) -> Triple:
    """How many first levels of a network shall neither convolve over nor downsample an axis, for voxels of this size.

    An axis joins in where its voxels are less than twice as long as the shortest axis's at that level (nnU-Net, Isensee
    et al. 2021, doi:10.1038/s41592-020-01008-z): before, the next slice shows other anatomy.
    """
    shortest = min(spacing)
    x, y, z = (min(_MOST_FLAT_LEVELS, int(math.log2(step / shortest + 1e-6))) for step in spacing)
    return x, y, z


def fitting_patch(
    survey: Survey, spacing: Spacing | None, usual: Triple | None = None, parts: Triple = (_PATCH_STEP,) * 3
) -> Triple:
    """Size of a training patch that fits the cases, as they are or resampled.

    A patch that is larger than the cases is padding for the most part, and one whose sides differ much in mm sees far
    along one axis and nothing along another (nnU-Net, Isensee et al. 2021, doi:10.1038/s41592-020-01008-z). From the
    median case the axis that is longest in mm is cut, until at most 64^3 voxels are left.

    Args:
        survey: Of the labelled cases.
        spacing: Voxel size in mm that they are resampled to; None for their own.
        usual: The data set's customary patch; it is cut down to the median case alone.
        parts: What each side is a multiple of, such as what the network divides the axes by: it pads the rest with
            zeros, in the middle of a case too.
    """
    steps = spacing or survey.spacing
    sizes = [round(extent / step, 3) for extent, step in zip(survey.extent, steps, strict=True)]
    held = [math.ceil(size / part) * part for size, part in zip(sizes, parts, strict=True)]
    if usual is not None:
        x, y, z = map(min, usual, held)
        return x, y, z
    least = [min(2 * part, limit) for part, limit in zip(parts, held, strict=True)]
    patch = [max(low, int(size) // part * part) for low, size, part in zip(least, sizes, parts, strict=True)]
    while math.prod(patch) > _PATCH_VOXELS and (long := [i for i in range(3) if patch[i] > 2 * parts[i]]):
        longest = max(long, key=lambda i: patch[i] * steps[i])
        patch[longest] -= parts[longest]
    return patch[0], patch[1], patch[2]
