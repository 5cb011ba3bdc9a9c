"""Enhanced DICOM (CT, MR, PET): files of one or many frames, each with its own place and scale, read by pydicom.

The multi-frame functional groups of DICOM PS3.3, section C.7.6.16: what a frame does not say, all frames share.
"""

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError

from dataloaders.dicom_grid import LARGEST_TURN, LPS_TO_RAS, require_grid, require_one_size

PER_FRAME, SHARED = "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"
_PYDICOM_ERRORS = (
    BytesLengthException,
    InvalidDicomError,
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


@dataclass(frozen=True)
class Frame:
    """What one frame says of itself; lengths in mm, places in DICOM's LPS."""

    name: str
    position: tuple[float, ...]  # of the first pixel
    direction: tuple[float, ...]  # of rows, then of columns
    pixel: tuple[float, ...]  # distance of the rows, then of the columns
    thickness: float  # 0 where it is not stated
    slope: float
    intercept: float
    stack: str  # which of several stacks of planes it belongs to, "" where that is not said
    time: str  # likewise, of several time points


def is_enhanced(file: str) -> bool:
    """Whether a DICOM file describes its frames one by one."""
    try:
        with _quiet():
            return PER_FRAME in pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[PER_FRAME])
    except _PYDICOM_ERRORS:
        return False


def header_texts(file: str, *names: str) -> tuple[str, ...]:
    """Elements of a header, of an old file without the mark of DICOM too; "" each where there is none to read."""
    try:
        with _quiet():
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(names))
            return tuple(str(header.get(name) or "").strip() for name in names)
    except (*_PYDICOM_ERRORS, OSError):
        return ("",) * len(names)


def read_frames(files: Sequence[str], folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Stack the frames of a series in the order of their places.

    Returns:
        Image (1, X, Y, Z) float32 after the rescale slope and intercept of each frame, affine (4, 4) to RAS+ mm.

    Raises:
        ValueError: If a frame does not say where it lies, frames lie on no common grid, in several stacks or at several
            time points, or pixels are no grey values or packed in a way that cannot be read.
    """
    frames: list[Frame] = []
    planes: list[np.ndarray] = []  # (Y, X) each
    for file in files:
        with _quiet():
            header, own, shared = _read(file)
            described = [_frame(file, number, [part, shared, header]) for number, part in enumerate(own, start=1)]
            stored = _pixels(header, file)
        for number, frame in enumerate(described, start=1):
            _require_usable(frame, file, number)
        if len(stored) != len(described):
            raise ValueError(
                f"{file}: of {len(stored)} frames, {len(described)} say where they lie; export the series again, or "
                "move files of another kind away"
            )
        frames += described
        planes += [
            frame.slope * plane.astype(np.float32) + np.float32(frame.intercept)
            for frame, plane in zip(described, stored, strict=True)
        ]
    if len({plane.shape for plane in planes}) > 1:
        raise ValueError(f"{folder}: frames have different numbers of pixels; keep the files of one image")
    order, affine = _grid(frames, folder)
    return np.stack([planes[k].T for k in order], axis=-1)[None], affine


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of pydicom's own, which name no file: what matters is refused here."""
    log = logging.getLogger("pydicom")  # which repeats them
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _read(file: str) -> tuple[pydicom.FileDataset, list[pydicom.Dataset], pydicom.Dataset]:
    """A file with what each of its frames says, and what all of them do."""
    try:
        header = pydicom.dcmread(file)
        return header, list(header.get(PER_FRAME) or []), (header.get(SHARED) or [pydicom.Dataset()])[0]
    except _PYDICOM_ERRORS as error:
        raise ValueError(f"{file} cannot be read ({error}); export the series again") from error


def _frame(file: str, number: int, parts: list[pydicom.Dataset]) -> Frame:
    """Gather what a frame says itself, else what all share, else what the file says as in plain DICOM.

    Args:
        file: For messages.
        number: Of the frame, from 1.
        parts: Groups of the frame, groups that all share, and the file's header.
    """

    def said(group: str, tag: str, plain: bool = True) -> Any:
        stated: Any = next((part.get(group)[0] for part in parts if part.get(group)), parts[-1] if plain else {})
        return stated.get(tag)

    def numbers(group: str, tag: str, plain: bool = True) -> tuple[float, ...]:
        value = said(group, tag, plain)
        return () if value is None else tuple(np.atleast_1d(np.asarray(value, dtype=float)).tolist())

    scale, content = "PixelValueTransformationSequence", "FrameContentSequence"
    try:
        alone = int(parts[-1].get("NumberOfFrames") or 1) == 1
        return Frame(
            f"{Path(file).name} frame {number}",
            position=numbers("PlanePositionSequence", "ImagePositionPatient", plain=alone),
            direction=numbers("PlaneOrientationSequence", "ImageOrientationPatient"),
            pixel=numbers("PixelMeasuresSequence", "PixelSpacing"),
            thickness=(numbers("PixelMeasuresSequence", "SliceThickness") or (0.0,))[0],
            slope=(numbers(scale, "RescaleSlope") or (1.0,))[0],
            intercept=(numbers(scale, "RescaleIntercept") or (0.0,))[0],
            stack=str(said(content, "StackID", plain=False) or ""),
            time=str(said(content, "TemporalPositionIndex", plain=False) or ""),
        )
    except _PYDICOM_ERRORS as error:
        raise ValueError(
            f"{file}: frame {number} has no number where one belongs ({error}); export the series again"
        ) from error


def _require_usable(frame: Frame, file: str, number: int) -> None:
    found = {
        "position": len(frame.position) == 3 and np.isfinite(frame.position).all(),
        "orientation": len(frame.direction) == 6 and _orthonormal(np.reshape(frame.direction, (2, 3))),
        "pixel size": len(frame.pixel) == 2 and np.isfinite(frame.pixel).all() and min(frame.pixel) > 0,
        "rescale slope and intercept": np.isfinite(frame.intercept) and np.isfinite(frame.slope) and frame.slope != 0,
    }
    if lacking := [what for what, is_there in found.items() if not is_there]:
        raise ValueError(
            f"{file}: frame {number} does not state a usable {' and '.join(lacking)}; make NIfTI of the series, as "
            "dcm2niix does, or export it again"
        )


def _orthonormal(direction: np.ndarray) -> bool:
    """Whether the directions of rows and columns (2, 3) are unit vectors at a right angle."""
    return bool(np.abs(direction @ direction.T - np.eye(2)).max() <= LARGEST_TURN)  # False for NaN


def _pixels(header: pydicom.FileDataset, file: str) -> np.ndarray:
    """Stored values (N, Y, X)."""
    try:
        header.pixel_array_options(allow_excess_frames=False)
        kind, pixels = header.get("PhotometricInterpretation", "MONOCHROME2"), header.pixel_array
    except _PYDICOM_ERRORS as error:
        reason = str(error).strip().splitlines()[0].rstrip(":") if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file}: the pixels cannot be read ({reason}); where they are compressed, pip install python-gdcm, make "
            "NIfTI of the series, as dcm2niix does, or export it without compression"
        ) from error
    if kind != "MONOCHROME2":
        raise ValueError(f"{file}: pixels are {kind}, not MONOCHROME2; export a series of grey values")
    return pixels if pixels.ndim == 3 else pixels[None]


def _grid(frames: list[Frame], folder: Path) -> tuple[list[int], np.ndarray]:
    """Order of the frames along the normal of their planes, and the affine (4, 4) of the stack."""
    positions = np.array([frame.position for frame in frames])
    directions = np.array([frame.direction for frame in frames]).reshape(-1, 2, 3)
    pixels = np.array([frame.pixel for frame in frames])
    for what, values in (
        ("stacks", {frame.stack for frame in frames}),
        ("time points", {frame.time for frame in frames}),
    ):
        if len(values) > 1:
            raise ValueError(
                f"{folder}: frames belong to {len(values)} {what}; make NIfTI of the series, as dcm2niix does, and "
                "keep one of them"
            )
    require_one_size(folder, pixels)
    axes = directions[0] / np.linalg.norm(directions[0], axis=1, keepdims=True)
    normal = np.cross(*axes)
    order = np.argsort(positions @ normal, kind="stable").tolist()
    if len(frames) > 1:
        require_grid(folder, [frame.name for frame in frames], positions, directions, float(pixels[0].min()))
        step = normal * np.linalg.norm(positions[order[-1]] - positions[order[0]]) / (len(frames) - 1)
    elif frames[0].thickness > 0:
        step = normal * frames[0].thickness
    else:
        raise ValueError(f"{folder}: a single frame without a slice thickness; export a volume")
    affine = np.eye(4)
    affine[:3, :3] = np.stack([axes[0] * pixels[0, 1], axes[1] * pixels[0, 0], step], axis=1)
    affine[:3, 3] = positions[order[0]]
    return order, LPS_TO_RAS @ affine
