"""Reading images with their geometry: NIfTI through nibabel, DICOM through SimpleITK, both as RAS+ millimetres."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its usual name
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from dataloaders.base import Grid, check_label

logger = logging.getLogger(__name__)

Spacing = tuple[float, float, float]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
GRID_TOLERANCE = 1e-3
GAP_TOLERANCE = 0.1
READ_ERRORS = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError)


def reason_of(error: Exception) -> str:
    """An error's text in one line; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray, Spacing]:
    """Read a NIfTI image.

    A file with a fourth axis holds channels; NIfTI's vector form (X, Y, Z, 1, C) is read too. An affine stored in
    metres or micrometres is converted to millimetres.

    Returns:
        Image (C, X, Y, Z) float32, affine (4, 4) float64 to RAS+ mm, spacing along X, Y, Z in mm.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, not a NIfTI image, complex, not 3D or 4D, or its affine not invertible.
    """
    image = _open_nifti(path)
    if image.get_data_dtype().kind == "c":
        raise ValueError(f"{path}: the voxels are complex numbers; export the magnitude image")
    try:
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (*READ_ERRORS, TypeError) as error:
        raise ValueError(f"{path}: the voxels cannot be read ({error}); the file is damaged, copy it again") from error
    affine = _affine_mm(image)
    return _channels_first(voxels, path), affine, affine_spacing(affine, str(path))


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
    shape = _open_nifti(path).shape
    return 1 if len(shape) == 3 else int(shape[-1])


def nifti_grid(path: Path) -> Grid:
    """Where the voxels of a NIfTI file lie, from its header alone.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a NIfTI image, not 3D or 4D, or its affine is not invertible.
    """
    image = _open_nifti(path)
    affine = _affine_mm(image)
    affine_spacing(affine, str(path))
    _require_axes(image.shape, path)
    x, y, z = image.shape[:3]
    return Grid((x, y, z), affine, states_orientation(image.header))


def states_orientation(header: nib.Nifti1Header) -> bool:
    """Whether a header has a qform or an sform; without, nibabel makes an affine up."""
    return bool(header["qform_code"] or header["sform_code"])


def _affine_mm(image: nib.Nifti1Image) -> np.ndarray:
    affine = np.asarray(image.affine, dtype=np.float64).copy()
    affine[:3] *= MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
    return affine


def _open_nifti(path: Path) -> nib.Nifti1Image:
    """Open the header; the voxels are read later."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the data folder and the list files")
    try:
        image = nib.load(path)
    except READ_ERRORS as error:
        raise ValueError(f"{path}: not a readable NIfTI file ({error}); copy or export it again") from error
    if not isinstance(image, nib.Nifti1Image):  # Nifti2Image is a subclass
        raise ValueError(f"{path}: is {type(image).__name__}, not NIfTI; convert it to .nii.gz")
    return image


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


def read_label(path: Path, case_id: str, *, image: np.ndarray, affine: np.ndarray, num_classes: int) -> np.ndarray:
    """Read a NIfTI label that lies on the grid of its image.

    Args:
        path: Label file.
        case_id: Name of the case, for messages.
        image: The case's image (C, X, Y, Z).
        affine: The image's affine (4, 4).
        num_classes: Classes with the background; every id is below it.

    Returns:
        Class ids (X, Y, Z), uint8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If shape, affine or class ids do not fit.
    """
    voxels, label_affine, _ = read_nifti(path)
    if voxels.shape[0] != 1:
        raise ValueError(f"case {case_id}: label {path} has {voxels.shape[0]} channels; store one map of class ids")
    label = check_label(voxels[0], image.shape[1:], num_classes, case_id)
    gap = float(np.abs(label_affine - affine).max())
    limit = GRID_TOLERANCE * float(voxel_sizes(affine).min())
    if gap > limit:
        raise ValueError(
            f"case {case_id}: the affine of label {path} differs from the image's by {gap:.4g} mm, more than "
            f"{limit:.2g} mm; resample the label onto the image grid, or copy the image's affine if only the header "
            "is wrong"
        )
    return label


def sitk_affine(image: sitk.Image) -> np.ndarray:
    """Affine (4, 4) from the (X, Y, Z) index of a 3D SimpleITK image to RAS+ mm; ITK itself works in LPS."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return LPS_TO_RAS @ affine


def sitk_to_array(image: sitk.Image) -> np.ndarray:
    """Voxels of a 3D SimpleITK image as (C, X, Y, Z), float32."""
    voxels = sitk.GetArrayFromImage(image).astype(np.float32)  # (Z, Y, X) or (Z, Y, X, C)
    if image.GetNumberOfComponentsPerPixel() == 1:
        voxels = voxels[..., None]  # (Z, Y, X, 1)
    return np.ascontiguousarray(voxels.transpose(3, 2, 1, 0))  # (C, X, Y, Z)


def read_dicom_series(folder: Path) -> tuple[np.ndarray, np.ndarray, Spacing]:
    """Read the one DICOM series of a folder; GDCM orders the slices by position.

    Returns:
        Image (C, X, Y, Z) float32 after rescale slope and intercept, affine (4, 4) float64 to RAS+ mm, spacing in mm.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder holds no series or several, or a DICOM file in it cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; a DICOM case is a folder with the files of one series")
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        found = f"{len(series)} DICOM series: {', '.join(series)}" if series else "no DICOM series"
        raise ValueError(f"{folder} holds {found}; put the files of exactly one series into each case folder")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    _refuse_lost_slices(folder, files)
    try:
        image = sitk.ReadImage(files[0]) if len(files) == 1 else _read_slices(files, folder)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{folder}: the series cannot be read ({reason}); export it again") from error
    if image.GetDimension() != 3:
        raise ValueError(f"{folder}: the series has {image.GetDimension()} dimensions; export a 3D series")
    affine = sitk_affine(image)
    return sitk_to_array(image), affine, affine_spacing(affine, str(folder))


def _refuse_lost_slices(folder: Path, files: tuple[str, ...]) -> None:
    """Raise a ValueError for a DICOM file outside the series: GDCM leaves damaged slices out without a word."""
    kept = {Path(name).name for name in files} | {"DICOMDIR"}
    for path in sorted(folder.iterdir()):
        if path.name in kept or path.name.startswith(".") or not path.is_file():
            continue
        with path.open("rb") as file:
            marked = file.read(132)[128:] == b"DICM"
        if marked or path.suffix.lower() == ".dcm":
            raise ValueError(
                f"{path} is no readable slice of the series; export it again, or remove it if it is no slice"
            )


def _read_slices(files: tuple[str, ...], folder: Path) -> sitk.Image:
    """Stack ordered slices, and warn where their distances say that one is missing."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()
    if not all(reader.HasMetaDataKey(k, "0020|0032") for k in range(len(files))):
        return image
    positions = np.array([reader.GetMetaData(k, "0020|0032").split("\\") for k in range(len(files))], dtype=float)
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    if np.ptp(gaps) > GAP_TOLERANCE * np.median(gaps):
        logger.warning(
            "%s: slice distances run from %.4g to %.4g mm; a slice may be missing, distances in mm are not exact",
            folder,
            gaps.min(),
            gaps.max(),
        )
    return image
