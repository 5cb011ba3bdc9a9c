"""Settings that the labelled cases decide where nobody gave them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from nibabel.affines import voxel_sizes

from dataloaders.base import CaseSource, Triple
from dataloaders.orientation import LARGEST_TILT, Turn, axis_names, tilt
from dataloaders.survey import fitting_flat_levels, fitting_patch, survey_cases
from myutils.config import RunConfig, required
from networks.base import NETWORKS

logger = logging.getLogger(__name__)


def fit_to_cases(config: RunConfig, source: CaseSource, labeled: Sequence[str]) -> RunConfig:
    """Fill what was left open: axes and flat levels by headers; patch and range of a CT by voxels, read for these only.

    Raises:
        FileNotFoundError, ValueError: If a case cannot be read.
    """
    if config.orientation is None or config.flat_levels is None:
        affines = [source.affine(case_id) for case_id in labeled]
        orientation = config.orientation or _fitting_orientation(affines)
        flat_levels = config.flat_levels or _fitting_flat_levels(config, affines, orientation)
        config = dataclasses.replace(config, orientation=orientation, flat_levels=flat_levels)
    wants_range = config.modality == "ct" and config.ct_range is None
    if config.patch_size is not None and not wants_range:
        return config
    survey = survey_cases(source, labeled, required(config.orientation, "orientation"))
    flat_levels = required(config.flat_levels, "flat_levels")
    patch = config.patch_size or fitting_patch(survey, config.spacing, source.defaults.patch_size, flat_levels)
    ct_range = survey.structure_range if wants_range else config.ct_range
    if wants_range and ct_range is None:
        logger.warning("CT: no structure in the labelled cases to take a range from; each case is clipped to its own")
    return dataclasses.replace(config, patch_size=patch, ct_range=ct_range)


def _fitting_orientation(affines: Sequence[np.ndarray]) -> str:
    """Axes of the body, unless some case lies so oblique that its axes might be other ones than the next case's."""
    most, names = max(map(tilt, affines)), axis_names(affines)
    if most <= LARGEST_TILT:
        if names != "RAS":
            logger.info("images are turned to RAS axes (the labelled ones are stored as %s)", names)
        return "ras"
    logger.warning(
        "the labelled images lie oblique, by up to %.0f degrees: axes stay as stored (%s), which must mean the same "
        "in all scans, those to predict included; else pass --orientation ras",
        most,
        names,
    )
    return "stored"


def _fitting_flat_levels(config: RunConfig, affines: Sequence[np.ndarray], orientation: str) -> Triple:
    """For the voxels that the network will see; none where it takes none."""
    if not NETWORKS.get(config.model).takes_flat_levels:
        return 0, 0, 0
    turns = [Turn.to_ras(affine) if orientation == "ras" else Turn() for affine in affines]
    sizes = [voxel_sizes(affine)[list(turn.order)] for affine, turn in zip(affines, turns, strict=True)]
    x, y, z = config.spacing or np.median(sizes, axis=0).tolist()
    return fitting_flat_levels((x, y, z))
