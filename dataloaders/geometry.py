"""Reading NIfTI images with their geometry through nibabel, as RAS+ millimetres."""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from dataloaders.base import Grid, check_label
from dataloaders.orientation import Turn
from dataloaders.say_once import warn_once

logger = logging.getLogger(__name__)

Spacing = tuple[float, float, float]
MILLIMETRES = {1: 1000.0, 3: 0.001}  # by NIfTI's code of the unit: metres, micrometres
GRID_TOLERANCE = 1e-3
_CONTRADICTION = 0.5  # of a voxel's edge, by which qform and sform may place a corner apart: a qform is rounded
READ_ERRORS = (OSError, EOFError, ValueError, OverflowError, zlib.error, ImageFileError, HeaderDataError)


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray, Spacing]:
    """Read a NIfTI image.

    A file with a fourth axis holds channels; NIfTI's vector form (X, Y, Z, 1, C) is read too. An affine stored in
    metres or micrometres is converted to millimetres.

    Returns:
        Image (C, X, Y, Z) float32, affine (4, 4) float64 to RAS+ mm, spacing along X, Y, Z in mm.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, not a NIfTI image, complex or in colour, not 3D or
            4D, or its affine not invertible.
    """
    image = open_nifti(path)
    _require_axes(image.shape, path)
    kind = image.get_data_dtype().kind
    if kind == "c":
        raise ValueError(f"{path}: the voxels are complex numbers; export the magnitude image")
    if kind == "V":
        raise ValueError(f"{path}: the voxels are colours (RGB), as of a screenshot; export the scan's own intensities")
    try:
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
        _require_checksum(path)
    except READ_ERRORS as error:
        raise ValueError(f"{path}: the voxels cannot be read ({error}); the file is damaged, copy it again") from error
    affine = _affine_mm(image)
    return _channels_first(voxels, path), affine, affine_spacing(affine, str(path))


def _require_checksum(path: Path) -> None:
    """Read a gzipped file to its end, where its checksum is; nibabel stops at the last voxel, before it."""
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as file:
            while file.read(2**22):
                pass


def read_nifti_channels(paths: Sequence[Path], case_id: str) -> tuple[np.ndarray, np.ndarray, Spacing]:
    """Read the files of a case's channels as one image; the geometry is that of the first.

    Returns:
        As ``read_nifti``; the channels of the files follow each other.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As ``read_nifti``, and if the files do not share a grid.
    """
    parts = [read_nifti(path) for path in paths]
    image, affine, spacing = parts[0]
    tolerance = GRID_TOLERANCE * min(spacing)
    for path, (other, other_affine, _) in zip(paths[1:], parts[1:], strict=True):
        if other.shape[1:] != image.shape[1:] or np.abs(other_affine - affine).max() > tolerance:
            raise ValueError(f"case {case_id}: {path} is not on the grid of {paths[0]}; resample it")
    return np.concatenate([part[0] for part in parts]), affine, spacing  # (C, X, Y, Z)


def nifti_channels(path: Path) -> int:
    """Number of channels C of a NIfTI file, from its header alone; errors as in ``read_nifti``."""
    shape = _header_of(path).shape
    _require_axes(shape, path)
    return 1 if len(shape) == 3 else int(shape[-1])


def nifti_grid(path: Path) -> Grid:
    """Where the voxels of a NIfTI file lie, from its header alone.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a NIfTI image, not 3D or 4D, or its affine is not invertible.
    """
    image = _header_of(path)
    _require_axes(image.shape, path)
    affine = _affine_mm(image)
    affine_spacing(affine, str(path))
    x, y, z = image.shape[:3]
    return Grid((x, y, z), affine, states_orientation(image.header))


def states_orientation(header: nib.Nifti1Header) -> bool:
    """Whether a header has a qform or an sform; without, nibabel makes an affine up."""
    return bool(header["qform_code"] or header["sform_code"])


def _affine_mm(image: nib.Nifti1Image) -> np.ndarray:
    """Affine (4, 4) to RAS+ mm; a header that contradicts itself is named."""
    header = image.header
    unit = MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)  # nibabel fails for unknown units of time
    if header["qform_code"] and header["sform_code"] and (fault := _contradiction(header, image.shape[:3], unit)):
        warn_once(logger, f"{image.get_filename()}: {fault}; the sform is taken, other programs may take the qform")
    affine = np.asarray(image.affine, dtype=np.float64).copy()
    affine[:3] *= unit
    return affine


def _contradiction(header: nib.Nifti1Header, shape: Sequence[int], unit: float) -> str | None:
    """How a header's qform contradicts its sform, by where they place the corner voxels; None where it does not."""
    sform = header.get_sform()
    try:
        qform = header.get_qform()
    except (ValueError, HeaderDataError) as error:  # of rounding alone, perhaps
        return f"its qform cannot be read ({error})"
    corners = np.array(list(product(*((0, size - 1) for size in shape))))
    gap = float(np.linalg.norm(corners @ (qform - sform)[:3, :3].T + (qform - sform)[:3, 3], axis=1).max())
    if gap <= _CONTRADICTION * float(voxel_sizes(sform).min()):
        return None
    return f"its qform and sform place a corner of the image {unit * gap:.3g} mm apart"


def _header_of(path: Path) -> nib.Nifti1Image:
    """``open_nifti`` for the header's sake: a start asks each file for several things, and reads it once."""
    if not path.is_file():
        return open_nifti(path)  # which says so
    state = path.stat()
    return _opened(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4096)
def _opened(path: Path, changed: int, size: int) -> nib.Nifti1Image:
    return open_nifti(path)


def open_nifti(path: Path) -> nib.Nifti1Image:
    """Open the header; the voxels are read later.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no NIfTI file that can be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the data folder and the list files")
    try:
        with _repairs() as repairs:
            image = nib.load(path)
    except READ_ERRORS as error:
        raise ValueError(f"{path}: not a readable NIfTI file ({error}); copy or export it again") from error
    if not isinstance(image, nib.Nifti1Image):  # Nifti2Image is a subclass
        raise ValueError(f"{path}: is {type(image).__name__}, not NIfTI; convert it to .nii.gz")
    if repairs and not image.header["sform_code"]:  # an sform has the voxel size too
        warn_once(logger, f"{path}: its header is wrong, and read as well as it can be ({'; '.join(repairs)})")
    return image


@contextmanager
def _repairs() -> Iterator[list[str]]:
    """What nibabel says about headers that it repairs, without a file's name, instead of its log."""
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    log = logging.getLogger("nibabel.global")
    log.addFilter(keep)
    try:
        yield said
    finally:
        log.removeFilter(keep)


def _require_axes(shape: tuple[int, ...], path: Path) -> None:
    """Refuse what is not (X, Y, Z), (X, Y, Z, C) or (X, Y, Z, 1, C)."""
    if not (len(shape) in (3, 4) or (len(shape) == 5 and shape[3] == 1)) or 0 in shape:
        raise ValueError(f"{path}: shape {shape}; an image has 3 axes, or 4 with channels last, none empty")


def _channels_first(voxels: np.ndarray, path: Path) -> np.ndarray:
    """(X, Y, Z), (X, Y, Z, C) or (X, Y, Z, 1, C) to a contiguous (C, X, Y, Z)."""
    _require_axes(voxels.shape, path)
    if voxels.ndim == 5:
        voxels = voxels[:, :, :, 0]  # (X, Y, Z, C)
    if voxels.ndim == 3:
        voxels = voxels[..., None]  # (X, Y, Z, 1)
    return np.ascontiguousarray(np.moveaxis(voxels, -1, 0), dtype=np.float32)  # (C, X, Y, Z)


def affine_spacing(affine: np.ndarray, where: str) -> Spacing:
    """Voxel size in mm along each array axis of an affine (4, 4).

    Raises:
        ValueError: If the affine is not finite or not invertible; ``where`` names the file.
    """
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ValueError(f"{where}: the affine {affine.tolist()} is not invertible; repair the header")
    sizes = voxel_sizes(affine)
    return (float(sizes[0]), float(sizes[1]), float(sizes[2]))


def read_label(
    path: Path,
    case_id: str,
    *,
    image: np.ndarray,
    affine: np.ndarray,
    num_classes: int,
    image_file: Path | None = None,
) -> np.ndarray:
    """Read a NIfTI label that lies on the grid of its image, where it is stored in other axes turned to the image's.

    Args:
        path: Label file.
        case_id: Name of the case, for messages.
        image: The case's image (C, X, Y, Z).
        affine: The image's affine (4, 4).
        num_classes: Classes with the background; every id is below it.
        image_file: The image's NIfTI file, whose header is looked at where the label's differs; None for other formats.

    Returns:
        Class ids (X, Y, Z), uint8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If shape, affine or class ids do not fit.
    """
    voxels, label_affine, _ = read_nifti(path)
    if voxels.shape[0] != 1:
        raise ValueError(f"case {case_id}: label {path} has {voxels.shape[0]} channels; store one map of class ids")
    stored, shape = voxels[0], image.shape[1:]
    gap = float(np.abs(label_affine - affine).max())
    limit = GRID_TOLERANCE * float(voxel_sizes(affine).min())
    image_placed = gap <= limit or image_file is None or nifti_grid(image_file).oriented
    if gap > limit and nifti_grid(path).oriented and image_placed:
        ours, theirs = Turn.of(affine, "ras"), Turn.of(label_affine, "ras")
        grids = ours.affine_forth(affine, shape), theirs.affine_forth(label_affine, stored.shape)
        if np.abs(grids[0] - grids[1]).max() <= limit and ours.values_forth(shape) == theirs.values_forth(stored.shape):
            stored, gap = np.ascontiguousarray(ours.back(theirs.forth(stored))), 0.0
    label = check_label(stored, shape, num_classes, case_id)
    if gap > limit and not nifti_grid(path).oriented:
        raise ValueError(
            f"case {case_id}: label {path} has neither qform nor sform, so that its place in space is not known; copy "
            "the image's, or resample it if it was drawn on another grid"
        )
    if gap > limit and not image_placed:
        raise ValueError(
            f"case {case_id}: image {image_file} has neither qform nor sform, so that it cannot be told whether label "
            f"{path} lies on it; copy the label's, or resample the label if it was drawn on another grid"
        )
    if gap > limit:
        moved = float(np.abs(label_affine - affine)[:3, :3].max()) * max(shape) <= limit
        raise ValueError(
            f"case {case_id}: the affine of label {path} differs from the image's by {gap:.4g} mm, more than "
            f"{limit:.2g} mm; resample the label onto the image grid"
            + (", or copy the image's affine if only the header is wrong" * moved)
        )
    return label
