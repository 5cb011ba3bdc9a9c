"""Predictions as NIfTI files: from an affine, or in exactly the geometry of an input file."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from dataloaders.geometry import GRID_TOLERANCE, READ_ERRORS
from myutils.whole_files import whole_file

SCANNER_CODE = 1
GEOMETRY_FIELDS = (
    "xyzt_units",
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
)
_ORIGIN = "sha256"
FOLDER_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class OutputFolderError(OSError):
    """A file could not be written for a reason that holds for all others in its folder too."""


def save_label_map(path: Path, label_map: np.ndarray, affine: np.ndarray, *, placed: bool = True) -> None:
    """Write class ids (X, Y, Z) as uint8; geometry as in :func:`save_volume`."""
    save_volume(path, label_map.astype(np.uint8), affine, placed=placed)


def is_default_place(affine: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether ``affine`` (4, 4) is what nibabel takes for a file of ``shape`` (X, Y, Z) that states neither form."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_zooms(voxel_sizes(affine))
    return np.allclose(header.get_base_affine(), affine)


def save_volume(path: Path, array: np.ndarray, affine: np.ndarray, origin: str = "", *, placed: bool = True) -> None:
    """Write an array (X, Y, Z) or (X, Y, Z, K) with ``affine`` (4, 4) as sform and qform, in mm.

    ``origin`` is the text of ``origin_of``, for the header. Where the scan is not ``placed``, for its file states
    neither form, this one does neither, so that all programs lay the two on each other; ``affine`` then is the default.

    Note:
        A qform holds no shear; for a sheared affine it is the closest rotation, and the sform is exact.
    """
    image = nib.Nifti1Image(array, affine)
    code = SCANNER_CODE if placed else 0
    image.set_qform(affine, code=code)
    image.set_sform(affine, code=code)
    image.header.set_xyzt_units("mm")
    _save(image, path, origin)


def save_in_geometry_of(path: Path, array: np.ndarray, header: nib.Nifti1Header, origin: str = "") -> None:
    """Write an array (X, Y, Z) or (X, Y, Z, K) with the spatial part of an input's header.

    Args:
        path: File to write, ``.nii.gz``.
        array: uint8 or float32 on the input's grid.
        header: Header of the input; zooms, units, qform, sform and their codes are copied bit by bit.
        origin: The text of ``origin_of``.
    """
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    copy = image_class(array, None).header
    copy["pixdim"][:4] = header["pixdim"][:4]
    for name in GEOMETRY_FIELDS:
        copy[name] = header[name]
    _save(image_class(array, None, header=copy), path, origin)


def origin_of(checkpoints: Sequence[Path], settings: str = "own") -> str:
    """What the headers of predictions say of their origin: SHA-256 of the checkpoints' bytes in turn, and their names.

    As much as fits into the 79 characters of a NIfTI header: 16 digits, as ``cat A.pt B.pt | sha256sum`` begins, then
    in brackets the ``settings`` that are not the checkpoint's own.
    """
    digest = hashlib.sha256()
    for path in checkpoints:
        digest.update(path.read_bytes())
    names = " ".join("/".join(path.resolve().parts[-2:]) for path in checkpoints)
    return f"{_ORIGIN} {digest.hexdigest()[:16]} [{settings}] {names}"[:79]


def said_origin(path: Path) -> str | None:
    """What a file's header says of its origin, as ``origin_of``; None where it does not."""
    try:
        header: Any = nib.load(path).header
        said = header["descrip"].item().decode("ascii", "replace")
    except (*READ_ERRORS, KeyError):
        return None  # corrected by hand, say, in another program
    return said if said.split()[:1] == [_ORIGIN] else None


def is_of_others(path: Path, origin: str) -> bool:
    """Whether other checkpoints or settings than ``origin`` tells of made a file; False where it does not say."""
    said = said_origin(path)
    return said is not None and said.split()[:3] != origin.split()[:3]  # names may be others by now


def is_whole(path: Path) -> bool:
    """Whether all voxels of a file can be read: a copy that was cut off, or a full disk, leaves less."""
    try:
        np.asarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
    except READ_ERRORS:
        return False
    return True


def are_probabilities(path: Path) -> bool:
    """Whether a file says that a prediction wrote it, and holds the maps of several classes."""
    return said_origin(path) is not None and nib.load(path).ndim == 4  # type: ignore[attr-defined]


def lies_elsewhere(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> bool:
    """Whether a file's voxels lie elsewhere than those of a scan of ``shape`` (X, Y, Z); False if it cannot be read."""
    try:
        image: Any = nib.load(path)
        found = image.affine
    except READ_ERRORS:
        return False
    tolerance = GRID_TOLERANCE * float(voxel_sizes(affine).min())
    return image.shape[:3] != shape or not np.allclose(found, affine, rtol=0, atol=tolerance)


def _save(image: nib.Nifti1Image, path: Path, origin: str) -> None:
    image.header["descrip"] = origin.encode("ascii", "replace")
    try:
        with whole_file(path) as partial:
            nib.save(image, partial)
    except OSError as error:
        if error.errno not in FOLDER_ERRNOS:
            raise
        reason = f"{error.strerror}; make room there, or use another folder"
        raise OutputFolderError(f"cannot write {path}: {reason}") from error
