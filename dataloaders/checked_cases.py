"""Cases as their source gives them, looked at once more: what a new reader does wrong must not train in silence."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
from nibabel.affines import voxel_sizes

from dataloaders.base import CaseSource, Grid, Volume
from dataloaders.case_lists import reject_duplicates, some
from dataloaders.class_names import MODALITIES
from dataloaders.say_once import warn_once

logger = logging.getLogger(__name__)

_ODD_VOXEL = 100
_TOLERANCE = 1e-3  # of a voxel's edge


def require_sound(source: CaseSource) -> None:
    """Look at what a source says of itself, without opening a case.

    Raises:
        ValueError: If an id comes twice or cannot be written into a table, a labelled one is no case, or classes,
            modality or axes are not as in the contract of ``CaseSource``.
    """
    ids, name = source.case_ids(), type(source).__name__
    reject_duplicates(ids, f"case_ids of {name}")
    if nameless := [case_id for case_id in ids if not _is_unicode(case_id)]:
        raise ValueError(
            f"case ids that are not UTF-8, as of files from another system: {some(nameless)}; rename these files"
        )
    known = set(ids)
    if unknown := [case_id for case_id in source.labeled_ids() if case_id not in known]:
        raise ValueError(f"labeled_ids of {name} names {some(unknown)}, which case_ids does not; each is one of these")
    if len(source.class_names) != source.num_classes or source.num_classes < 2:
        raise ValueError(
            f"class_names of {name} has {len(source.class_names)} names for num_classes {source.num_classes}; give one "
            "to each class, the background first"
        )
    if source.modality not in MODALITIES or not {0, 1, 2}.issuperset(source.flip_axes):
        raise ValueError(
            f"{name} has modality {source.modality!r} and flip_axes {source.flip_axes}; pass one of "
            f"{', '.join(MODALITIES)}, and axes among 0, 1, 2"
        )


def _is_unicode(case_id: str) -> bool:
    """Whether it can be written into lists, tables and JSON: a file name may hold any bytes."""
    try:
        case_id.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_case(source: CaseSource, case_id: str, *, with_label: bool) -> Volume:
    """``source.load``, whose volume keeps the contract of ``Volume``.

    Raises:
        FileNotFoundError: As ``CaseSource.load``.
        ValueError: As ``CaseSource.load``, and where the volume is not as its contract says, or brings a label that
            nobody asked for.
    """
    volume = source.load(case_id, with_label=with_label)
    if fault := _fault_of(volume, source, case_id, with_label):
        raise ValueError(f"case {case_id}: {type(source).__name__}.load gave {fault}")
    return volume


def grid_of(source: CaseSource, case_id: str) -> Grid:
    """``source.grid``, whose affine keeps the contract of ``Volume``; errors as in ``load_case``."""
    grid = source.grid(case_id)
    if len(grid.shape) != 3 or not _is_affine(grid.affine):
        found = f"a shape {tuple(grid.shape)} and an affine {np.shape(grid.affine)}"
        raise ValueError(
            f"case {case_id}: {type(source).__name__}.grid gave {found}; give (X, Y, Z) and a regular (4, 4)"
        )
    return grid


def grids_by_header(source: CaseSource) -> bool:
    """Whether ``grid`` is of the format, and reads no voxel."""
    return type(source).grid is not CaseSource.grid


def name_odd_voxels(grids: Mapping[str, Grid]) -> None:
    """Warn of cases whose voxels are far smaller or larger than the others', as where a header states another unit."""
    if not grids:
        return
    edges = {case_id: voxel_sizes(grid.affine) for case_id, grid in grids.items()}
    volumes = {case_id: float(np.prod(sizes)) for case_id, sizes in edges.items()}
    usual = float(np.median(list(volumes.values())))
    odd = [case_id for case_id, volume in volumes.items() if not usual / _ODD_VOXEL < volume < usual * _ODD_VOXEL]
    if odd:
        sizes = " x ".join(f"{size:.3g}" for size in edges[odd[0]])
        warn_once(
            logger,
            f"voxels {_ODD_VOXEL} times as large as the others' or as small, {sizes} mm in {some(odd)}: mend the voxel "
            "size, or its unit, if the header is wrong",
        )


def readable_grids(source: CaseSource, case_ids: Sequence[str]) -> dict[str, Grid]:
    """``grid_of`` of cases that are about to be scored; a file that cannot be read is named then."""
    grids = {}
    for case_id in case_ids:
        with suppress(ValueError, OSError):
            grids[case_id] = grid_of(source, case_id)
    return grids


def warn_of_odd_voxels(source: CaseSource, case_ids: Sequence[str]) -> None:
    """``name_odd_voxels`` of cases that are about to be scored."""
    if grids_by_header(source):
        name_odd_voxels(readable_grids(source, case_ids))


def _is_affine(affine: np.ndarray) -> bool:
    """Whether it is (4, 4) and maps no two voxels to one place."""
    return np.shape(affine) == (4, 4) and bool(np.linalg.det(affine[:3, :3]))


def _fault_of(volume: Volume, source: CaseSource, case_id: str, with_label: bool) -> str | None:
    """What is wrong with a volume, and what is asked for; None for a sound one."""
    image, label = volume.image, volume.label
    if volume.case_id != case_id:
        return f"case {volume.case_id!r}; give the one that was asked for"
    if image.ndim != 4 or len(image) != source.in_channels or image.dtype != np.float32:
        return f"an image {image.shape} of {image.dtype}; give ({source.in_channels}, X, Y, Z) of float32"
    if not _is_affine(volume.affine):
        return f"an affine {np.shape(volume.affine)}; give a regular (4, 4), from voxels to RAS+ mm"
    edges = np.linalg.norm(volume.affine[:3, :3], axis=0)
    if not np.allclose(edges, volume.spacing, rtol=_TOLERANCE, atol=0):
        sides = " x ".join(f"{side:.4g}" for side in edges)
        return f"spacing {volume.spacing}, but an affine with voxels of {sides} mm; give one"
    if label is None:
        return "no label; read it" if with_label else None
    if not with_label:
        return "a label that was not asked for; open no label file with with_label=False, and give None"
    if label.shape != image.shape[1:] or label.dtype != np.uint8:
        return f"a label {label.shape} of {label.dtype}; give {image.shape[1:]} of uint8, as check_label does"
    if label.max(initial=0) >= source.num_classes:
        return f"class id {label.max()}; give 0..{source.num_classes - 1}, as check_label makes sure"
    return None


class KeptCases:
    """Cases of a source with their labels, the first ones kept in memory: for few cases, asked for many times.

    Args:
        source: Where they come from.
        limit_bytes: Cases beyond this are read each time.
    """

    def __init__(self, source: CaseSource, limit_bytes: int = 4 << 30) -> None:
        self._source, self._free = source, limit_bytes
        self._kept: dict[str, Volume] = {}

    def patient(self, case_id: str) -> str:
        """As the source's."""
        return self._source.patient(case_id)

    def states_orientation(self, case_id: str) -> bool:
        """As the source's."""
        return self._source.states_orientation(case_id)

    def load(self, case_id: str) -> Volume:
        """As ``load_case``, with the label."""
        if case_id in self._kept:
            return self._kept[case_id]
        volume = load_case(self._source, case_id, with_label=True)
        size = sum(array.nbytes for array in volume.arrays)
        if size <= self._free:
            self._kept[case_id] = volume
            self._free -= size
        return volume
