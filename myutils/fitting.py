"""Settings that the labelled cases decide where nobody gave them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from nibabel.affines import voxel_sizes

from dataloaders.base import CaseSource, Grid, Triple
from dataloaders.case_lists import some
from dataloaders.checked_cases import grid_of, grids_by_header, name_odd_voxels
from dataloaders.orientation import LARGEST_TILT, Turn, axis_names, tilt
from dataloaders.preprocess import Preprocess
from dataloaders.survey import fitting_flat_levels, fitting_patch, structure_range, survey_grids
from dataloaders.transforms import turns_quarterly
from myutils.config import RunConfig
from networks.base import NETWORKS, make_network

logger = logging.getLogger(__name__)


def fit_to_cases(config: RunConfig, source: CaseSource, labeled: Sequence[str]) -> RunConfig:
    """Fill what was left open: axes, flat levels and patch from headers, the range of a CT from voxels.

    Raises:
        FileNotFoundError, ValueError: If a case cannot be read, or resampling it leaves far too few or too many voxels.
    """
    wants_range = config.modality == "ct" and config.ct_range is None
    is_open = wants_range or None in (config.orientation, config.flat_levels, config.patch_size)
    if not is_open and config.spacing is None and not config.rotate90:
        return config
    grids = [grid_of(source, case_id) for case_id in labeled]
    orientation = config.orientation or _fitting_orientation(grids, labeled)
    preprocess = Preprocess(str(config.modality), config.spacing, orientation=orientation)
    shapes = [_require_size(grid, case_id, preprocess) for case_id, grid in zip(labeled, grids, strict=True)]
    survey = survey_grids(grids, orientation)
    takes_flat_levels = NETWORKS.get(config.model).takes_flat_levels
    fitting = fitting_flat_levels(config.spacing or survey.spacing) if takes_flat_levels else (0, 0, 0)
    flat_levels = config.flat_levels or fitting
    patch, stride = config.patch_size, _stride(config.model, flat_levels)
    if patch is None:
        patch = fitting_patch(survey, config.spacing, source.defaults.patch_size, stride)
    else:
        _name_padding(patch, shapes, stride)
    ct_range = structure_range(source, labeled) if wants_range else config.ct_range
    if wants_range and ct_range is None:
        logger.warning(
            "CT: the labelled cases show no structure, or one value in all of it, to take a range from; each case is "
            "clipped to its own"
        )
    if config.rotate90 and not (
        turns_quarterly(patch, config.spacing or survey.spacing) and flat_levels[0] == flat_levels[1]
    ):
        logger.warning("without effect on patches or voxels that are not square in the X-Y plane: --rotate90")
    return dataclasses.replace(
        config, orientation=orientation, flat_levels=flat_levels, patch_size=patch, ct_range=ct_range
    )


def _name_padding(patch: Triple, shapes: Sequence[Sequence[int]], stride: Triple) -> None:
    """Warn of a patch that no labelled case fills, beyond what the network's stride asks for."""
    largest = np.max(shapes, axis=0)
    needed = [-(-int(size) // step) * step for size, step in zip(largest, stride, strict=True)]
    if any(side > enough for side, enough in zip(patch, needed, strict=True)):
        fitting = " ".join(str(min(pair)) for pair in zip(patch, needed, strict=True))
        logger.warning(
            "--patch_size %s: no labelled case has more than %s voxels, the rest is padding; %s shows as much of them",
            " ".join(map(str, patch)),
            " x ".join(map(str, largest)),
            fitting,
        )


def _stride(model: str, flat_levels: Triple) -> Triple:
    """What the network divides the axes by, found without weights where its constructor can do without."""
    kind = NETWORKS.get(model)
    try:
        with torch.device("meta"):
            return make_network(kind, 1, 2, flat_levels).stride
    except (RuntimeError, TypeError):  # one that computes with the values of tensors
        return make_network(kind, 1, 2, flat_levels).stride


def require_headers(source: CaseSource, case_ids: Sequence[str]) -> None:
    """Refuse cases that their headers show to be of no use: now, not at the step that first draws one.

    Voxels of another order of size than the others' are a warning.

    Raises:
        ValueError: Naming up to three of them.
    """

    grids: dict[str, Grid] = {}

    def look(case_id: str) -> None:
        found = source.header_channels(case_id)
        if found != source.in_channels:
            raise ValueError(f"case {case_id}: {found} channels, where the first case has {source.in_channels}")
        if grids_by_header(source):
            grids[case_id] = grid_of(source, case_id)

    _refuse_unusable(case_ids, look)
    name_odd_voxels(grids)


def require_sizes(source: CaseSource, case_ids: Sequence[str], preprocess: Preprocess) -> None:
    """As ``require_headers``, of cases that ``--spacing`` would leave far too few or too many voxels of.

    Formats whose headers do not tell are left to the step that draws the case.
    """
    if preprocess.spacing is not None and grids_by_header(source):
        _refuse_unusable(case_ids, lambda case_id: _require_size(grid_of(source, case_id), case_id, preprocess))


def _require_size(grid: Grid, case_id: str, preprocess: Preprocess) -> tuple[int, ...]:
    """The shape that the case is worked on in; an error as in ``require_sizes``."""
    turn, steps = Turn.of(grid.affine, preprocess.orientation), voxel_sizes(grid.affine)
    return preprocess.working_shape(case_id, turn.values_forth(grid.shape), turn.values_forth(steps))


def _refuse_unusable(case_ids: Sequence[str], look: Callable[[str], object]) -> None:
    """Raise a ValueError that names up to three of the cases for which ``look`` raises."""
    wrong = []
    for case_id in case_ids:
        try:
            look(case_id)
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ValueError(
            f"{len(wrong)} of {len(case_ids)} training cases cannot be used; mend them, or leave them out: {shown}"
        )


def _fitting_orientation(grids: Sequence[Grid], labeled: Sequence[str]) -> str:
    """Axes of the body, unless a case does not say where they are, or lies so oblique that they might be confused."""
    unstated = [case_id for case_id, grid in zip(labeled, grids, strict=True) if not grid.oriented]
    if len(unstated) == len(grids):
        logger.info("axes stay as stored: the labelled cases do not say how they lie in the body")
        return "stored"
    if unstated:
        logger.warning(
            "axes stay as stored in all scans, for %d of %d labelled cases do not say how they lie in the body: %s; "
            "write their qform or sform, or pass --orientation ras to turn the others",
            len(unstated),
            len(grids),
            some(unstated),
        )
        return "stored"
    most, names = max(tilt(grid.affine) for grid in grids), axis_names(grid.affine for grid in grids)
    if most > LARGEST_TILT:
        logger.warning(
            "the labelled images lie oblique, by up to %.0f degrees: axes stay as stored (%s), which must mean the "
            "same in all scans, those to predict included; else pass --orientation ras",
            most,
            names,
        )
        return "stored"
    if names != "RAS":
        logger.info(
            "images are turned to RAS axes (the labelled ones are stored as %s): all settings per axis mean right, "
            "forward, up",
            names,
        )
    return "ras"
