"""Reading NIfTI: axes, units, spacing, damaged headers."""

from __future__ import annotations

from pathlib import Path

import data_makers as make
import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, ornt_transform

from dataloaders.geometry import (
    affine_spacing,
    nifti_channels,
    nifti_grid,
    read_label,
    read_nifti,
    read_nifti_channels,
    states_orientation,
)
from dataloaders.nifti_folder import NiftiFolder
from myutils.scan_inputs import Scan


def test_read_nifti_gives_channels_first_float32(tmp_path: Path) -> None:
    image, affine, spacing = read_nifti(make.write_nifti(tmp_path / "a.nii.gz", make.counting_image().astype(np.int16)))
    assert image.dtype == np.float32 and image.shape == (1, 6, 5, 4) and image.flags.c_contiguous
    assert image[0, 2, 1, 3] == 2 * 20 + 1 * 4 + 3
    assert affine.dtype == np.float64 and np.array_equal(affine, make.AFFINE) and spacing == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (6, 5, 4, 1, 3)])
def test_channels_lie_on_the_fourth_or_the_vector_axis(tmp_path: Path, shape: tuple[int, ...]) -> None:
    voxels = make.counting_image(shape)
    path = make.write_nifti(tmp_path / "a.nii.gz", voxels)
    image, _, _ = read_nifti(path)
    assert nifti_channels(path) == 3 and image.shape == (3, 6, 5, 4)
    assert image[2, 1, 1, 1] == voxels.reshape(6, 5, 4, 3)[1, 1, 1, 2]


def test_stored_scale_and_intercept_are_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(make.counting_image().astype(np.int16), np.eye(4))
    image.header.set_slope_inter(2.0, -1024.0)
    nib.save(image, tmp_path / "a.nii.gz")
    stored = nib.load(tmp_path / "a.nii.gz")
    read, _, _ = read_nifti(tmp_path / "a.nii.gz")
    assert np.array_equal(read[0], stored.get_fdata()) and read[0, 0, 0, 0] == pytest.approx(
        stored.get_fdata()[0, 0, 0]
    )


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1000.0), ("micron", 0.001), ("mm", 1.0), ("unknown", 1.0)])
def test_units_become_millimetres(tmp_path: Path, unit: str, factor: float) -> None:
    _, affine, spacing = read_nifti(make.write_nifti(tmp_path / "a.nii.gz", make.counting_image(), unit=unit))
    assert np.allclose(affine[:3], make.AFFINE[:3] * factor) and affine[3].tolist() == [0, 0, 0, 1]
    assert spacing == pytest.approx((factor, 2 * factor, 3 * factor))


@pytest.mark.parametrize(("code", "factor"), [(66, 1.0), (255, 1.0), (65, 1000.0), (5, 1.0)])
def test_unknown_units_are_no_error(tmp_path: Path, code: int, factor: float) -> None:
    image = nib.Nifti1Image(make.counting_image(), make.AFFINE)
    image.header["xyzt_units"] = code  # space in the last three bits; time 64 is unknown to NIfTI
    nib.save(image, tmp_path / "a.nii")
    assert read_nifti(tmp_path / "a.nii")[2] == pytest.approx((factor, 2 * factor, 3 * factor))


def test_negative_dimension_is_refused_by_name(tmp_path: Path) -> None:
    path = make.write_nifti(tmp_path / "a.nii", make.counting_image())
    content = bytearray(path.read_bytes())
    content[42:44] = np.int16(-6).tobytes()  # dim[1]
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"a\.nii: the voxels cannot be read \(.*the file is damaged, copy it"):
        read_nifti(path)


def test_spacing_is_the_length_of_the_affine_columns() -> None:
    turned = np.array([[0.0, -2, 0, 7], [3, 0, 0, 8], [0, 0, 4, 9], [0, 0, 0, 1]])
    assert affine_spacing(turned, "x") == (3.0, 2.0, 4.0)
    sheared = np.array([[3.0, 0, 0, 0], [4, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    assert affine_spacing(sheared, "x") == (5.0, 1.0, 2.0)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_affine_that_cannot_be_inverted_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"scan.nii: the affine .* is not invertible"):
        affine_spacing(np.diag([1.0, bad, 1.0, 1.0]), "scan.nii")


def test_files_that_are_no_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone.nii.gz does not exist"):
        read_nifti(tmp_path / "gone.nii.gz")
    for name in ("text.nii", "text.nii.gz", "text.dat"):
        (tmp_path / name).write_text("this is a note")
        with pytest.raises(ValueError, match=f"{name}: not a readable NIfTI file"):
            read_nifti(tmp_path / name)
    nib.save(nib.MGHImage(make.counting_image(), np.eye(4)), tmp_path / "free.mgz")
    with pytest.raises(ValueError, match=r"free.mgz: is MGHImage, not NIfTI; convert it"):
        read_nifti(tmp_path / "free.mgz")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_file_is_refused_by_name(tmp_path: Path, name: str, share: float) -> None:
    path = make.write_nifti(tmp_path / name, np.random.default_rng(0).normal(size=(8, 8, 8)))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"(?s){name}: .* again"):
        read_nifti(path)


def test_a_gzipped_file_with_wrong_voxels_is_refused_by_name(tmp_path: Path) -> None:
    path = make.write_nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(size=(16, 16, 16)))
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum: every voxel can be read
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.nii\.gz: the voxels cannot be read .* damaged, copy it again"):
        read_nifti(path)


def test_a_header_that_contradicts_itself_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = nib.Nifti1Image(make.counting_image(), make.AFFINE)
    image.set_qform(make.AFFINE, code=1)
    nib.save(image, tmp_path / "same.nii.gz")
    image.set_qform(np.diag([-1.0, 1, 1, 1]) @ make.AFFINE, code=1)
    nib.save(image, tmp_path / "mirrored.nii.gz")
    for name in ("same", "mirrored", "mirrored"):
        assert np.array_equal(read_nifti(tmp_path / f"{name}.nii.gz")[1], make.AFFINE)
    (warning,) = caplog.messages
    assert "mirrored.nii.gz: its qform and sform place a corner of the image 6 mm apart" in warning  # -3 or 3
    assert "the sform is taken" in warning


def test_a_qform_that_is_turned_is_told_by_the_corners(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A degree changes no entry of the matrix by more than 0.02, and moves a corner of a large image by voxels."""
    angle = np.deg2rad(1)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    image = nib.Nifti1Image(np.zeros((256, 256, 2), np.uint8), np.eye(4))
    image.set_qform(turn, code=1)
    nib.save(image, tmp_path / "a.nii.gz")
    read_nifti(tmp_path / "a.nii.gz")
    assert "place a corner of the image 6.29 mm apart" in caplog.text  # 2 sin(0.5 degrees) 255 sqrt(2)


def test_a_qform_off_by_rounding_does_not_hide_the_sform(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = nib.Nifti1Image(make.counting_image(), make.AFFINE)
    image.set_qform(make.AFFINE, code=1)
    image.header["quatern_d"] = 1.0000003
    nib.save(image, tmp_path / "a.nii.gz")
    assert np.array_equal(read_nifti(tmp_path / "a.nii.gz")[1], make.AFFINE)
    assert np.array_equal(nifti_grid(tmp_path / "a.nii.gz").affine, make.AFFINE)
    assert "a.nii.gz: its qform cannot be read (w2 should be positive" in caplog.text


@pytest.mark.parametrize("sform", [False, True])
def test_a_voxel_size_of_zero_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, sform: bool) -> None:
    path = make.write_nifti(tmp_path / "a.nii", make.counting_image())
    content = bytearray(path.read_bytes())
    content[88:92] = np.array(0.0, "<f4").tobytes()  # pixdim[3]
    content[252:256] = np.array([1, 2 * sform], "<i2").tobytes()  # codes of qform and sform
    path.write_bytes(content)
    _, _, spacing = read_nifti(path)
    assert spacing[2] == (3.0 if sform else 1.0)
    Scan("a", path).header()  # says no more
    said = [message for message in caplog.messages if "qform" not in message]
    assert len(said) == (not sform) and all("a.nii: its header is wrong" in message for message in said)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4, 2, 2)])
def test_other_numbers_of_axes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.nii.gz"
    image = nib.Nifti1Image(make.counting_image(shape), np.eye(4))
    image.set_qform(np.eye(4), 1)  # both, which are compared at the corners
    nib.save(image, path)
    for read in (read_nifti, nifti_grid):
        with pytest.raises(ValueError, match=r"a.nii.gz: shape .* an image has 3 axes, or 4 with channels last"):
            read(path)


@pytest.mark.parametrize("channels", ["RGB", "RGBA"])
def test_colour_voxels_are_refused(tmp_path: Path, channels: str) -> None:
    colour = np.zeros(make.SHAPE, dtype=[(name, "u1") for name in channels])
    path = make.write_nifti(tmp_path / "a.nii.gz", colour)
    with pytest.raises(ValueError, match=r"a.nii.gz: the voxels are colours \(RGB\), as of a screenshot; export"):
        read_nifti(path)


def test_complex_voxels_are_refused(tmp_path: Path) -> None:
    path = make.write_nifti(tmp_path / "a.nii.gz", make.counting_image().astype(np.complex64))
    with pytest.raises(ValueError, match=r"a\.nii\.gz: the voxels are complex numbers; export the magnitude"):
        read_nifti(path)


def test_label_affine_may_differ_by_rounding_alone(tmp_path: Path) -> None:
    image = make.counting_image()[None]
    near = make.AFFINE.copy()
    near[:3, 3] += 5e-4  # the limit is a thousandth of the smallest voxel side, 1 mm
    path = make.write_nifti(tmp_path / "a.nii.gz", make.corner_label(), near)
    label = read_label(path, "a", image=image, affine=make.AFFINE, num_classes=2)
    assert label.dtype == np.uint8 and label.sum() == 8
    near[:3, 3] += 2e-3
    make.write_nifti(path, make.corner_label(), near)
    with pytest.raises(ValueError, match=r"differs from the image's by 0.0025 mm"):
        read_label(path, "a", image=image, affine=make.AFFINE, num_classes=2)


@pytest.mark.parametrize("axes", ["LAS", "PIR", "SRA"])
def test_a_label_in_other_axes_is_turned_to_its_image(tmp_path: Path, axes: str) -> None:
    image = make.counting_image()[None]
    path = make.write_nifti(tmp_path / "a.nii.gz", image[0] % 3)
    turned = nib.load(path).as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes)))
    assert nib.aff2axcodes(turned.affine) == tuple(axes)
    nib.save(turned, path)
    label = read_label(path, "a", image=image, affine=make.AFFINE, num_classes=3)
    assert np.array_equal(label, image[0] % 3) and label.flags.c_contiguous
    turned.affine[:3, 3] += 1.0
    nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine), path)
    with pytest.raises(ValueError, match=r"label shape .* differs|resample the label onto the image grid$"):
        read_label(path, "a", image=image, affine=make.AFFINE, num_classes=3)


def test_a_label_without_a_place_is_not_to_be_resampled(tmp_path: Path) -> None:
    path = make.write_nifti(tmp_path / "a.nii.gz", make.corner_label())
    make.forget_orientation(path)
    with pytest.raises(ValueError, match=r"has neither qform nor sform, .* copy the image's"):
        read_label(path, "a", image=make.counting_image()[None], affine=make.AFFINE, num_classes=2)


def test_an_image_without_a_place_is_named_before_its_label(tmp_path: Path) -> None:
    for folder, voxels in (("images", make.counting_image()), ("labels", make.corner_label())):
        make.write_nifti(tmp_path / folder / "a.nii.gz", voxels)
    source = NiftiFolder(tmp_path, num_classes=2)
    assert source.load("a", with_label=True).label is not None
    make.forget_orientation(tmp_path / "images" / "a.nii.gz")
    with pytest.raises(ValueError, match=r"image .*images/a\.nii\.gz has neither qform nor sform.*copy the label's"):
        source.load("a", with_label=True)


def test_a_label_is_not_turned_onto_an_image_without_a_place(tmp_path: Path) -> None:
    image = make.write_nifti(tmp_path / "images" / "a.nii.gz", make.counting_image())
    make.forget_orientation(image)
    centred = np.eye(4)  # where the affine that nibabel makes up for the image would lie, but for its mirrored X
    centred[:3, 3] = -(np.array(make.counting_image().shape) - 1) / 2
    make.write_nifti(tmp_path / "labels" / "a.nii.gz", make.corner_label(), centred)
    with pytest.raises(ValueError, match=r"image .*images/a\.nii\.gz has neither qform nor sform"):
        NiftiFolder(tmp_path, num_classes=2).load("a", with_label=True)


def test_class_ids_may_be_off_by_rounding(tmp_path: Path) -> None:
    path = make.write_nifti(tmp_path / "a.nii.gz", make.corner_label() * np.float32(1.00001))
    image = make.counting_image()[None]
    assert read_label(path, "a", image=image, affine=make.AFFINE, num_classes=2).sum() == 8


def test_label_in_other_units_fits_its_image(tmp_path: Path) -> None:
    metres = np.diag([1e-3, 1e-3, 1e-3, 1]) @ make.AFFINE
    path = make.write_nifti(tmp_path / "a.nii.gz", make.corner_label()[..., None], metres, unit="meter")
    label = read_label(path, "a", image=make.counting_image()[None], affine=make.AFFINE, num_classes=2)
    assert label.shape == make.SHAPE


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1), (2, 2)])
def test_a_header_states_its_orientation_by_qform_or_sform(codes: tuple[int, int]) -> None:
    header = nib.Nifti1Header()
    header["qform_code"], header["sform_code"] = codes
    assert states_orientation(header) is any(codes)


def test_files_of_channels_follow_each_other_on_one_grid(tmp_path: Path) -> None:
    near, far = make.AFFINE.copy(), make.AFFINE.copy()
    near[0, 3] += 5e-4  # the limit is a thousandth of the smallest voxel side, 1 mm
    far[0, 3] += 2e-3
    voxels = make.counting_image()
    first = make.write_nifti(tmp_path / "a_0.nii", voxels)
    paths = [first, make.write_nifti(tmp_path / "a_1.nii", voxels + 1000, near)]
    image, affine, spacing = read_nifti_channels(paths, "a")
    assert np.array_equal(image, [voxels, voxels + 1000])
    assert np.array_equal(affine, make.AFFINE) and spacing == (1.0, 2.0, 3.0)
    moved = make.write_nifti(tmp_path / "moved.nii", voxels, far)
    for other in (moved, make.write_nifti(tmp_path / "cut.nii", voxels[1:])):
        with pytest.raises(ValueError, match=rf"case a: .*{other.name} is not on the grid of .*a_0\.nii; resample it"):
            read_nifti_channels([first, other], "a")


def test_a_header_is_read_once_until_its_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, load, opened = make.write_nifti(tmp_path / "a.nii.gz", make.counting_image()), nib.load, []
    monkeypatch.setattr(nib, "load", lambda name: opened.append(name) or load(name))
    for _ in range(2):
        assert nifti_channels(path) == 1 and nifti_grid(path).shape == (6, 5, 4)
    assert opened == [path]
    make.write_nifti(path, make.counting_image((6, 5, 4, 3)), 2 * make.AFFINE)
    assert nifti_channels(path) == 3 and np.array_equal(nifti_grid(path).affine[:3], 2 * make.AFFINE[:3])
    assert opened == [path, path]
