"""DICOM series whose slices lie on no regular grid: refused by name, but for a missing slice."""

from __future__ import annotations

from pathlib import Path

import data_makers as make
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - its usual name

from dataloaders import dicom_series
from dataloaders.dicom_series import read_dicom_series

PIXELS = b".75\\.5"  # as written into every slice: DICOM has the distance of the rows first
CORONAL = (1, 0, 0, 0, 0, -1, 0, 1, 0)


def add_slices(folder: Path, name: str, voxels: np.ndarray | None = None, **changes: object) -> None:
    """Move slices of the same series, written with ``changes``, into ``folder``."""
    other = make.write_dicom(folder.parent / name, make.counting_image() if voxels is None else voxels, **changes)
    for path in other.iterdir():
        path.rename(folder / f"{name}_{path.name}")


def patch_header(path: Path, old: bytes, new: bytes) -> None:
    """Exchange bytes that occur once, for as many others."""
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def test_each_slice_has_its_own_slope(tmp_path: Path) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image(), modality="CT")
    slope = b"\x28\0\x53\x10\2\0\0\0"
    patch_header(folder / "1_003.dcm", slope + b"1 ", slope + b".5")  # the names run against the order: the second
    patch_header(folder / "1_002.dcm", slope + b"1 ", slope + b"4 ")
    image, _, _ = read_dicom_series(folder)
    assert np.array_equal(image[0], make.counting_image() * [1, 0.5, 4, 1])


def test_slices_may_be_signed_after_an_unsigned_one(tmp_path: Path) -> None:
    voxels = make.counting_image() - 50
    voxels[..., 0] += 50
    folder = make.write_dicom(tmp_path / "a", voxels, skip=(1, 2, 3), dtype=np.uint16)
    add_slices(folder, "signed", voxels, skip=(0,))
    assert np.array_equal(read_dicom_series(folder)[0][0], voxels)


def test_slices_in_colour_stay_in_colour(tmp_path: Path) -> None:
    for k in range(2):
        colour = sitk.GetImageFromArray(np.full((5, 6, 3), (1, 2, 3 + k), np.uint8), isVector=True)
        for key, value in {"0020|000e": "1.2.3.4", "0020|0032": f"0\\0\\{k}", "0020|0037": "1\\0\\0\\0\\1\\0"}.items():
            colour.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(tmp_path / f"{k}.dcm"))
        writer.Execute(colour)
    image, _, _ = read_dicom_series(tmp_path)
    assert image.shape == (3, 6, 5, 2) and image[:, 0, 0, 1].tolist() == [1, 2, 4]


def test_pixels_of_other_sizes_are_refused(tmp_path: Path) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image())
    patch_header(folder / "1_002.dcm", PIXELS, b".75\\.6")
    message = r"a: 1 of 4 slices have pixels of another size, such as \[0.75 0.6 ?\] mm beside \[0.75 0.5 ?\] mm; keep"
    with pytest.raises(ValueError, match=message):
        read_dicom_series(folder)


@pytest.mark.parametrize("change", [(PIXELS, b"0.0\\.0"), (b"\x28\0\x30\0", b"\x28\0\x32\0")])
def test_pixels_without_a_size_get_1_mm_with_a_warning(
    tmp_path: Path, change: tuple[bytes, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image())
    for path in folder.iterdir():
        patch_header(path, *change)  # a size of zero, or its tag made another
    assert read_dicom_series(folder)[2] == pytest.approx((1.0, 1.0, 2.0))
    assert "a: no pixel size is stated, 1 mm is taken" in caplog.text and "into tag 0028|0030" in caplog.text


def test_a_single_slice_is_as_thick_as_it_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image((6, 5, 1)), spacing=(0.5, 0.75, 6.5))
    assert read_dicom_series(folder)[2] == pytest.approx((0.5, 0.75, 6.5)) and not caplog.text
    thickness = b"\x18\0\x50\0\4\0\0\0"
    patch_header(folder / "1_001.dcm", thickness + b"6.5 ", thickness + b"    ")
    assert read_dicom_series(folder)[2] == pytest.approx((0.5, 0.75, 1.0))
    assert "a: no slice thickness is stated, 1 mm is taken" in caplog.text


def test_a_position_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image())
    patch_header(folder / "1_002.dcm", b"-10\\20\\34", b"-1o\\20\\34")
    with pytest.raises(ValueError, match=r"a: tag 0020\|0032 is no number in a slice \(.*'-1o'\); correct it"):
        read_dicom_series(folder)


@pytest.mark.parametrize("shift", [0.4, -0.4])
def test_a_tilted_gantry_is_refused(tmp_path: Path, shift: float) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image(), shift=shift)
    message = (
        r"a: slices are shifted sideways by up to 1.2 mm, more than 0.5 of a pixel of 0.5 mm.* resample the series"
    )
    with pytest.raises(ValueError, match=message):  # three steps of 0.4 mm
        read_dicom_series(folder)


def test_a_shift_of_rounding_is_none(tmp_path: Path) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image(), shift=0.01)
    assert read_dicom_series(folder)[2] == pytest.approx((0.5, 0.75, 2.0), abs=1e-4)


def test_slices_at_one_position_are_refused(tmp_path: Path) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image(), spacing=(0.5, 0.75, 1e-4))
    with pytest.raises(ValueError, match=r"3 of 4 slices lie where another does, within 0.01 mm, .* keep one time"):
        read_dicom_series(folder)


def test_a_doubled_slice_is_refused_by_name(tmp_path: Path) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image())
    add_slices(folder, "copy", skip=(0, 1, 3))
    with pytest.raises(ValueError, match=r"1 of 5 slices lie where .* such as (copy_)?1_002.dcm on (copy_)?1_002.dcm"):
        read_dicom_series(folder)


def test_two_time_points_are_refused(tmp_path: Path) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image())
    add_slices(folder, "later")
    with pytest.raises(ValueError, match=r"4 of 8 slices lie where another does"):
        read_dicom_series(folder)


@pytest.mark.parametrize("origin", [(-10.0, 20.0, 30.0), (-10.0, 20.0, 90.0)])
def test_a_localiser_is_refused_by_name(tmp_path: Path, origin: tuple[float, float, float]) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image())
    add_slices(folder, "localiser", direction=CORONAL, origin=origin, skip=(1, 2, 3))
    with pytest.raises(ValueError, match=r"of 5 slices have another orientation than .* such as a localiser, away"):
        read_dicom_series(folder)


def test_a_localiser_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image())
    other = make.write_dicom(tmp_path / "b", make.counting_image((9, 9, 1)), direction=CORONAL)
    next(other.iterdir()).rename(folder / "localiser.dcm")
    with pytest.raises(ValueError, match=r"cannot be read .* such as a localiser, away"):
        read_dicom_series(folder)


def test_slices_without_a_position_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image())
    monkeypatch.setattr(dicom_series, "POSITION", "0020|0030")  # a tag that the slices lack
    read_dicom_series(folder)
    assert "a: slices do not say where they lie; their order and distances are guessed" in caplog.text


def test_one_slice_without_a_position_is_refused_by_name(tmp_path: Path) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image())
    path = sorted(folder.iterdir())[0]
    patch_header(path, b"\x20\x00\x32\x00", b"\x20\x00\x30\x00")  # a tag that nothing reads
    with pytest.raises(ValueError, match=rf"a: 1 of \d+ slices do not say where they lie, such as '{path.name}'"):
        read_dicom_series(folder)


def test_a_multi_frame_file_is_refused_where_it_does_not_describe_its_frames(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "frames.dcm"
    image = sitk.GetImageFromArray(make.counting_image().astype(np.uint8).transpose(2, 1, 0))
    image.SetSpacing((0.5, 0.75, 2.0))
    sitk.WriteImage(image, path)
    voxels, _, spacing = read_dicom_series(tmp_path / "a")
    assert np.array_equal(voxels[0], make.counting_image()) and spacing == pytest.approx((0.5, 0.75, 2.0))
    header = pydicom.dcmread(path)
    del header.PerFrameFunctionalGroupsSequence
    header.save_as(path)
    text = rf"frames\.dcm: a multi-frame file; where each of its {image.GetDepth()} frames lies"
    with pytest.raises(ValueError, match=f"{text}.*dcm2niix"):
        read_dicom_series(tmp_path / "a")


def test_the_order_of_a_mirrored_or_oblique_series_is_no_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    angle = np.radians(30)
    tipped = (1, 0, 0, 0, np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle))
    for name, direction in (("a", tipped), ("b", CORONAL)):
        image, _, spacing = read_dicom_series(
            make.write_dicom(tmp_path / name, make.counting_image(), direction=direction)
        )
        assert np.array_equal(image[0], make.counting_image()) and spacing == pytest.approx((0.5, 0.75, 2.0))
    assert not caplog.text


@pytest.mark.parametrize("inverted", ["all", "one"])
def test_series_that_would_be_read_inverted_is_refused(tmp_path: Path, inverted: str) -> None:
    folder = make.write_dicom(tmp_path / "ct", np.arange(60).reshape(3, 4, 5), modality="CT")
    files = sorted(folder.iterdir())
    for path in files if inverted == "all" else files[2:3]:
        header = pydicom.dcmread(path)
        header.PhotometricInterpretation = "MONOCHROME1"
        header.save_as(path)
    with pytest.raises(ValueError, match=r"ct: pixels are MONOCHROME1, not MONOCHROME2 .* export the series as"):
        read_dicom_series(folder)
    for path in files[1:]:
        path.unlink()
    if inverted == "all":
        with pytest.raises(ValueError, match="MONOCHROME1"):
            read_dicom_series(folder)


@pytest.mark.parametrize(("suffix", "left"), [("", 0), (".IMA", 100)])
def test_empty_or_cut_off_slice_is_known_by_its_name(tmp_path: Path, suffix: str, left: int) -> None:
    folder = make.write_dicom(tmp_path / "mr", np.arange(60).reshape(3, 4, 5))
    for path in sorted(folder.iterdir()):
        path.rename(path.with_suffix(suffix))
    last = max(folder.iterdir())
    whole = last.read_bytes()
    (folder / "notes").write_text("of a radiologist")
    assert read_dicom_series(folder)[0].shape == (1, 3, 4, 5)
    last.write_bytes(whole[:left])
    with pytest.raises(ValueError, match=f"{last.name} is no readable slice of the series; export it again"):
        read_dicom_series(folder)
