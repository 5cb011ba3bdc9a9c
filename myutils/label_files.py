"""Predictions as NIfTI files: from an affine, or in exactly the geometry of an input file."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

SCANNER_CODE = 1


def save_label_map(path: Path, label_map: np.ndarray, affine: np.ndarray) -> None:
    """Write class ids (X, Y, Z) as uint8 with ``affine`` (4, 4) as sform and qform, in mm.

    Note:
        A qform holds no shear; for a sheared affine it is the closest rotation, and the sform is exact.
    """
    image = nib.Nifti1Image(label_map.astype(np.uint8), affine)
    image.set_qform(affine, code=SCANNER_CODE)
    image.set_sform(affine, code=SCANNER_CODE)
    image.header.set_xyzt_units("mm")
    _save(image, path)


def save_in_geometry_of(path: Path, array: np.ndarray, header: nib.Nifti1Header) -> None:
    """Write an array (X, Y, Z) or (X, Y, Z, K) with the spatial part of an input's header.

    Args:
        path: File to write, ``.nii.gz``.
        array: uint8 or float32 on the input's grid.
        header: Header of the input; zooms, units, qform, sform and their codes are copied bit by bit.
    """
    image = nib.Nifti1Image(array, None)
    copy = image.header
    copy.set_data_dtype(array.dtype)
    copy["pixdim"][:4] = header["pixdim"][:4]
    copy["xyzt_units"] = header["xyzt_units"]
    for name in ("qform_code", "sform_code"):
        copy[name] = header[name]
    for name in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
        copy[name] = header[name]
    for name in ("srow_x", "srow_y", "srow_z"):
        copy[name] = header[name]
    # A new image from the edited header: the affine of an open image is not derived from its header again.
    _save(nib.Nifti1Image(array, None, header=copy), path)


def _save(image: nib.Nifti1Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
