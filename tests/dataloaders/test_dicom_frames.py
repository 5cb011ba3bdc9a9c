"""Enhanced DICOM: frames that describe themselves give the volume that single slices give, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_makers as make
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

from dataloaders.dicom_series import read_dicom_series

ANGLE = np.radians(30)
DIRECTIONS = {
    "axial": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "oblique": (1, 0, 0, 0, np.cos(ANGLE), -np.sin(ANGLE), 0, np.sin(ANGLE), np.cos(ANGLE)),
    "coronal": (1, 0, 0, 0, 0, -1, 0, 1, 0),
}
SPACING, ORIGIN = (0.5, 0.75, 2.0), (-10.0, 20.0, 30.0)
SCALE = "PixelValueTransformationSequence"


def group(**content: Any) -> list[Dataset]:
    """A functional group: a sequence of one item."""
    item = Dataset()
    for keyword, value in content.items():
        setattr(item, keyword, value)
    return [item]


def enhanced(voxels: np.ndarray, direction: tuple[float, ...] = DIRECTIONS["axial"]) -> Dataset:
    """Voxels (X, Y, Z) as one multi-frame MR; geometry as ``make.write_dicom`` has it by default."""
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID = EnhancedMRImageStorage, generate_uid()
    header.SeriesInstanceUID, header.StudyInstanceUID, header.Modality = "1.2.3.4", "1.2.3", "MR"
    header.Columns, header.Rows, header.NumberOfFrames = voxels.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 1
    axes = np.reshape(direction, (3, 3))
    shared = Dataset()
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=[*axes[:, 0].tolist(), *axes[:, 1].tolist()])
    shared.PixelMeasuresSequence = group(PixelSpacing=[SPACING[1], SPACING[0]], SliceThickness=SPACING[2])
    header.SharedFunctionalGroupsSequence = [shared]
    header.PerFrameFunctionalGroupsSequence = []
    for k in range(voxels.shape[2]):
        frame = Dataset()
        place = np.array(ORIGIN) + k * SPACING[2] * axes[:, 2]
        frame.PlanePositionSequence = group(ImagePositionPatient=[float(f"{x:.9g}") for x in place])
        header.PerFrameFunctionalGroupsSequence.append(frame)
    header.PixelData = voxels.astype(np.int16).transpose(2, 1, 0).tobytes()
    return header


def save(folder: Path, *headers: Dataset) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, header in enumerate(headers):
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
        pydicom.dcmwrite(folder / f"{k}.dcm", header, enforce_file_format=True)
    return folder


def shuffle(header: Dataset, order: list[int]) -> None:
    frames = np.frombuffer(header.PixelData, np.int16).reshape(-1, header.Rows, header.Columns)
    header.PixelData = frames[order].tobytes()
    header.PerFrameFunctionalGroupsSequence = [header.PerFrameFunctionalGroupsSequence[k] for k in order]


@pytest.mark.parametrize("name", DIRECTIONS)
def test_frames_in_any_order_are_the_volume_of_the_slices(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    voxels, direction = make.counting_image() - 50, DIRECTIONS[name]
    expected = read_dicom_series(make.write_dicom(tmp_path / "slices", voxels, direction=direction))
    header = enhanced(voxels, direction)
    shuffle(header, [2, 0, 3, 1])
    header.PixelData += bytes(200)  # which belong to no frame
    image, affine, spacing = read_dicom_series(save(tmp_path / "frames", header))
    assert np.array_equal(image, expected[0]) and image.dtype == np.float32
    np.testing.assert_allclose(affine, expected[1], atol=1e-6)
    assert spacing == pytest.approx(expected[2]) and not caplog.text


def test_a_slight_shift_is_straightened_as_that_of_slices_is(tmp_path: Path) -> None:
    voxels = make.counting_image()
    expected = read_dicom_series(make.write_dicom(tmp_path / "slices", voxels, shift=0.06))
    header = enhanced(voxels)
    for k in range(4):
        move(header, k, [ORIGIN[0] + 0.06 * k, ORIGIN[1], ORIGIN[2] + 2 * k])
    image, affine, _ = read_dicom_series(save(tmp_path / "frames", header))
    assert np.array_equal(image, expected[0])
    np.testing.assert_allclose(affine, expected[1], atol=1e-6)


def test_each_frame_has_its_own_scale_or_that_of_all(tmp_path: Path) -> None:
    header = enhanced(make.counting_image())
    header.RescaleSlope, header.RescaleIntercept = 7, 7  # of plain DICOM, which the groups come before
    header.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = group(
        RescaleSlope=2, RescaleIntercept=-1024
    )
    header.PerFrameFunctionalGroupsSequence[1].PixelValueTransformationSequence = group(
        RescaleSlope=0.5, RescaleIntercept=3
    )
    image, _, _ = read_dicom_series(save(tmp_path / "a", header))
    slopes, intercepts = np.array([2, 0.5, 2, 2]), np.array([-1024, 3, -1024, -1024])
    assert np.array_equal(image[0], make.counting_image() * slopes + intercepts)
    for part in (header.SharedFunctionalGroupsSequence[0], header.PerFrameFunctionalGroupsSequence[1]):
        del part[SCALE]
    assert np.array_equal(read_dicom_series(save(tmp_path / "b", header))[0][0], make.counting_image() * 7 + 7)


def test_frames_of_a_series_may_lie_in_several_files(tmp_path: Path) -> None:
    voxels = make.counting_image()
    parts = [enhanced(voxels[..., k : k + 1]) for k in range(voxels.shape[2])]
    for k, part in enumerate(parts):
        place = part.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
        place.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] - 2 * k]  # the last file lies lowest
    image, affine, _ = read_dicom_series(save(tmp_path / "a", *parts))
    assert np.array_equal(image[0], voxels[..., ::-1])
    assert affine[:3, 3] == pytest.approx([10, -20, 24]) and affine[2, 2] == pytest.approx(2)
    image, affine, spacing = read_dicom_series(save(tmp_path / "one", parts[0]))
    assert np.array_equal(image[0], voxels[..., :1]) and spacing == pytest.approx(SPACING)


def test_a_lost_frame_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = enhanced(make.counting_image())
    shuffle(header, [0, 1, 3])
    header.NumberOfFrames = 3
    assert read_dicom_series(save(tmp_path / "a", header))[0].shape[-1] == 3
    assert "a: slice distances run from 2 to 4 mm; a slice may be missing" in caplog.text


def move(header: Dataset, number: int, place: list[float]) -> None:
    header.PerFrameFunctionalGroupsSequence[number].PlanePositionSequence[0].ImagePositionPatient = place


def two_times(header: Dataset) -> None:
    for k in range(4):
        move(header, k, [*ORIGIN[:2], ORIGIN[2] + 2 * (k % 2)])


def tilted(header: Dataset) -> None:
    for k in range(4):
        move(header, k, [ORIGIN[0] + k, ORIGIN[1], ORIGIN[2] + 2 * k])


def turned(header: Dataset) -> None:
    header.PerFrameFunctionalGroupsSequence[2].PlaneOrientationSequence = group(
        ImageOrientationPatient=[1, 0, 0, 0, 0, -1]
    )


def nowhere(header: Dataset) -> None:
    del header.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence


def at_no_number(header: Dataset) -> None:
    move(header, 0, [0.0, float("nan"), 0.0])


def of_another_size(header: Dataset) -> None:
    header.PerFrameFunctionalGroupsSequence[1].PixelMeasuresSequence = group(PixelSpacing=[0.75, 0.6])


def without_a_size(header: Dataset) -> None:
    header.PerFrameFunctionalGroupsSequence[1].PixelMeasuresSequence = group(PixelSpacing=[0.0, 0.5])


def in_colour(header: Dataset) -> None:
    header.SamplesPerPixel, header.PhotometricInterpretation, header.PlanarConfiguration = 3, "RGB", 0
    header.PixelData = header.PixelData * 3


def inverted(header: Dataset) -> None:
    header.PhotometricInterpretation = "MONOCHROME1"


def skewed(header: Dataset) -> None:
    header.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence = group(
        ImageOrientationPatient=[1, 0, 0, 0.5, 0.866, 0]
    )


def without_a_slope(header: Dataset) -> None:
    header.PerFrameFunctionalGroupsSequence[3].PixelValueTransformationSequence = group(RescaleSlope=0)


def two_stacks(header: Dataset) -> None:
    for k, frame in enumerate(header.PerFrameFunctionalGroupsSequence):
        frame.FrameContentSequence = group(StackID=str(1 + k // 2), TemporalPositionIndex=1)


def two_times_apart(header: Dataset) -> None:
    for k, frame in enumerate(header.PerFrameFunctionalGroupsSequence):
        frame.FrameContentSequence = group(StackID="1", TemporalPositionIndex=1 + k // 2)


def everywhere_at_once(header: Dataset) -> None:
    header.ImagePositionPatient = list(ORIGIN)
    for frame in header.PerFrameFunctionalGroupsSequence:
        del frame.PlanePositionSequence
        frame.FrameContentSequence = group(StackID="1")


def cut_off(header: Dataset) -> None:
    header.PixelData = header.PixelData[:100]


def described_less(header: Dataset) -> None:
    del header.PerFrameFunctionalGroupsSequence[3]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (two_times, r"2 of 4 slices lie where another does, within 0.01 mm, such as 0\.dcm frame 3 on 0\.dcm frame 1"),
        (tilted, "slices are shifted sideways by up to 3 mm"),
        (turned, r"1 of 4 slices have another orientation than 0\.dcm frame 1, the first is 0\.dcm frame 3"),
        (nowhere, r"0\.dcm: frame 3 does not state a usable position; make NIfTI"),
        (
            of_another_size,
            r"1 of 4 slices have pixels of another size, such as \[0.75 0.6 ?\] mm beside \[0.75 0.5 ?\]",
        ),
        (without_a_size, r"0\.dcm: frame 2 does not state a usable pixel size"),
        (in_colour, r"0\.dcm: pixels are RGB, not MONOCHROME2"),
        (inverted, r"0\.dcm: pixels are MONOCHROME1, not MONOCHROME2"),
        (skewed, r"0\.dcm: frame 1 does not state a usable orientation"),
        (without_a_slope, r"0\.dcm: frame 4 does not state a usable rescale slope and intercept"),
        (two_stacks, "a: frames belong to 2 stacks; make NIfTI"),
        (two_times_apart, "a: frames belong to 2 time points; make NIfTI"),
        (everywhere_at_once, r"0\.dcm: frame 1 does not state a usable position"),
        (cut_off, r"0\.dcm: the pixels cannot be read \(.*\); where they are compressed, pip install python-gdcm"),
        (described_less, r"0\.dcm: of 4 frames, 3 say where they lie"),
    ],
)
def test_frames_without_a_common_grid_are_refused(tmp_path: Path, change: Callable[[Dataset], None], text: str) -> None:
    header = enhanced(make.counting_image())
    change(header)
    with pytest.raises(ValueError, match=text):
        read_dicom_series(save(tmp_path / "a", header))


def test_files_of_other_sizes_are_refused(tmp_path: Path) -> None:
    small, large = enhanced(make.counting_image()), enhanced(make.counting_image((8, 8, 4)))
    with pytest.raises(ValueError, match="a: frames have different numbers of pixels"):
        read_dicom_series(save(tmp_path / "a", small, large))


def test_a_single_frame_says_how_thick_it_is(tmp_path: Path) -> None:
    header = enhanced(make.counting_image((6, 5, 1)))
    del header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness
    with pytest.raises(ValueError, match="a: a single frame without a slice thickness"):
        read_dicom_series(save(tmp_path / "a", header))
