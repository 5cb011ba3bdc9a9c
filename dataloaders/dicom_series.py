"""Reading a DICOM series through SimpleITK as one image in RAS+ millimetres; one that is no regular grid is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 - its usual name

from dataloaders.case_lists import refuse_broken_links, some
from dataloaders.dicom_frames import is_enhanced, read_frames
from dataloaders.dicom_grid import LPS_TO_RAS, require_grid, require_one_size
from dataloaders.dicom_tags import tags_of
from dataloaders.geometry import Spacing, affine_spacing
from dataloaders.say_once import warn_once

logger = logging.getLogger(__name__)

POSITION, ORIENTATION, THICKNESS = "0020|0032", "0020|0037", "0018|0050"
PIXEL_SIZES = ("0028|0030", "0018|1164", "0018|2010")  # in the body; else at the detector, or on a scanned film
GREY_LEVELS = "0028|0004"
TAGS = (POSITION, ORIENTATION, THICKNESS, GREY_LEVELS, *PIXEL_SIZES)

_NUMBER = re.compile(r"\d+")

Header = dict[str, str]  # text per tag of TAGS that a slice has


@contextmanager
def quiet_itk() -> Iterator[None]:
    """No warnings of ITK's own, which name no file: what matters of them is said here, with the folder."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


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


@quiet_itk()
def read_dicom_series(folder: Path) -> tuple[np.ndarray, np.ndarray, Spacing]:
    """Read the one DICOM series of a folder; GDCM orders the slices by position.

    Returns:
        Image (C, X, Y, Z) float32 after rescale slope and intercept, affine (4, 4) float64 to RAS+ mm, spacing in mm.

    Raises:
        FileNotFoundError: If there is no such folder, or a link in it leads to no file.
        ValueError: If the folder holds no series or several, a DICOM file in it cannot be read, a header has text for a
            number, the slices lie on no common orthogonal grid, or one file holds several and does not describe them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; a DICOM case is a folder with the files of one series")
    refuse_broken_links(folder.iterdir())
    try:
        series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        if len(series) != 1:
            found = f"{len(series)} DICOM series: {', '.join(series)}" if series else "no DICOM series"
            raise ValueError(f"{folder} holds {found}; put the files of exactly one series into each case folder")
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
        _refuse_lost_slices(folder, files)
        if is_enhanced(files[0]):
            voxels, affine = read_frames(files, folder)
            return voxels, affine, affine_spacing(affine, str(folder))
        image = _read_slice(files[0], folder) if len(files) == 1 else _read_slices(files, folder)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"{folder}: the series cannot be read ({reason}); export it again, and move slices of another "
            "kind, such as a localiser, away"
        ) from error
    if image.GetDimension() != 3:
        raise ValueError(f"{folder}: the series has {image.GetDimension()} dimensions; export a 3D series")
    affine = sitk_affine(image)
    return sitk_to_array(image), affine, affine_spacing(affine, str(folder))


def _refuse_lost_slices(folder: Path, files: tuple[str, ...]) -> None:
    """Raise a ValueError for a DICOM file outside the series: GDCM leaves damaged slices out without a word.

    One that is empty or cut off is known by its name, which is that of a slice but for its numbers. A structure set or
    a report beside the slices is none of them.
    """
    kept = {Path(name).name for name in files} | {"DICOMDIR"}
    patterns = {_NUMBER.sub("0", name) for name in kept}
    for path in sorted(folder.iterdir()):
        if path.name in kept or path.name.startswith(".") or not path.is_file():
            continue
        with path.open("rb") as file:
            marked = file.read(132)[128:] == b"DICM"
        named = path.suffix.lower() == ".dcm" or _NUMBER.sub("0", path.name) in patterns
        if (marked or named) and tags_of(path).is_scan:
            raise ValueError(
                f"{path} is no readable slice of the series; export it again, or remove it if it is no slice"
            )


def _read_slice(file: str, folder: Path) -> sitk.Image:
    """A series of one file."""
    image = sitk.ReadImage(file)
    if image.GetDimension() > 2 and (frames := image.GetSize()[2]) > 1:
        raise ValueError(
            f"{file}: a multi-frame file; where each of its {frames} frames lies, it does not say; make NIfTI of it, "
            "as dcm2niix does, or export one file per slice"
        )
    header = {tag: image.GetMetaData(tag) for tag in TAGS if image.HasMetaDataKey(tag)}
    _refuse_inverted([header], folder)
    _set_voxel_size(image, [header], folder)
    return image


def _read_slices(files: tuple[str, ...], folder: Path) -> sitk.Image:
    """Stack ordered slices that lie on one grid, and warn where their distances say that one is missing."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    first = sitk.ImageFileReader()
    first.SetFileName(files[0])
    first.ReadImageInformation()
    in_colour = first.GetNumberOfComponents() > 1  # which a scalar type would make grey
    # else all slices would get the type of the first, whose slope and sign are not theirs
    reader.SetOutputPixelType(sitk.sitkVectorFloat32 if in_colour else sitk.sitkFloat32)
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()
    count = len(files)
    headers = [{tag: reader.GetMetaData(k, tag) for tag in TAGS if reader.HasMetaDataKey(k, tag)} for k in range(count)]
    _refuse_inverted(headers, folder)
    _set_voxel_size(image, headers, folder)
    positions, directions = _numbers(headers, POSITION, 3, folder), _numbers(headers, ORIENTATION, 6, folder)
    if 0 < len(positions) < count:
        nowhere = [Path(name).name for name, header in zip(files, headers, strict=True) if not header.get(POSITION)]
        raise ValueError(
            f"{folder}: {count - len(positions)} of {count} slices do not say where they lie, such as {some(nowhere)}; "
            "export the series again, or move them away"
        )
    if not len(positions) == len(directions) == count:
        warn_once(logger, f"{folder}: slices do not say where they lie; their order and distances are guessed")
        return image
    names = [Path(name).name for name in files]
    require_grid(folder, names, positions, directions.reshape(-1, 2, 3), min(image.GetSpacing()[:2]))
    return image


def _refuse_inverted(headers: list[Header], folder: Path) -> None:
    """Raise a ValueError where high values are to be shown dark: GDCM turns them round, Hounsfield units too."""
    if any(header.get(GREY_LEVELS, "").strip() == "MONOCHROME1" for header in headers):
        raise ValueError(
            f"{folder}: pixels are MONOCHROME1, not MONOCHROME2 (tag {GREY_LEVELS}), and would be read inverted; "
            "export the series as MONOCHROME2, or make NIfTI of it, as dcm2niix does"
        )


def _numbers(headers: list[Header], tag: str, count: int, folder: Path) -> np.ndarray:
    """The ``count`` numbers of a tag (n, count) in the n slices that have them."""
    texts = [header[tag].split("\\") for header in headers if tag in header]
    full = [text for text in texts if len(text) == count and all(part.strip() for part in text)]
    try:
        return np.array(full, dtype=float).reshape(-1, count)
    except ValueError as error:
        raise ValueError(
            f"{folder}: tag {tag} is no number in a slice ({error}); correct it, or export the series again"
        ) from error


def _set_voxel_size(image: sitk.Image, headers: list[Header], folder: Path) -> None:
    """Give an image the pixel size that its headers state and, if it is one slice, its thickness.

    ITK takes 1 mm where it finds none, as in some kinds of image and for every single slice; that is a warning.
    """
    spacing = list(image.GetSpacing())
    found = (_numbers(headers, tag, 2, folder) for tag in PIXEL_SIZES)
    sizes = next((positive for size in found if len(positive := size[(size > 0).all(1)])), None)  # (n, 2)
    if sizes is not None:
        require_one_size(folder, sizes)
        spacing[:2] = sizes[0, ::-1].tolist()  # DICOM has the distance of the rows first
    elif spacing[:2] == [1, 1] or any(tag in header for tag in PIXEL_SIZES for header in headers):
        spacing[:2] = [1.0, 1.0]
        _warn_of_guess(folder, "pixel size", PIXEL_SIZES[0])
    if image.GetSize()[2:] == (1,):
        thickness = _numbers(headers, THICKNESS, 1, folder)
        if len(thickness) and thickness[0, 0] > 0:
            spacing[2] = float(thickness[0, 0])
        elif spacing[2] == 1:
            _warn_of_guess(folder, "slice thickness", THICKNESS)
    image.SetSpacing(spacing)


def _warn_of_guess(folder: Path, what: str, tag: str) -> None:
    warn_once(
        logger,
        f"{folder}: no {what} is stated, 1 mm is taken, on which all distances in mm depend; write it into tag {tag}",
    )
