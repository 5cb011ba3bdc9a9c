"""DICOM folders: series written slice by slice with SimpleITK come back in (X, Y, Z) with their RAS affine."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import data_makers as make
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its usual name
from pydicom.data import get_testdata_file

from dataloaders.dicom import DicomFolders
from dataloaders.dicom_series import read_dicom_series
from myutils.scan_inputs import find_scans

# ITK's LPS: spacing (0.5, 0.75, 2), origin (-10, 20, 30), axes along L, P, S. RAS turns the signs of x and y.
RAS = np.array([[-0.5, 0, 0, 10], [0, -0.75, 0, -20], [0, 0, 2, 30], [0, 0, 0, 1.0]])


def test_axial_series_has_its_voxels_and_ras_affine(tmp_path: Path) -> None:
    voxels = make.counting_image()
    make.write_dicom(tmp_path / "a", voxels)
    volume = DicomFolders(tmp_path, num_classes=2).load("a", with_label=False)
    assert volume.image.shape == (1, 6, 5, 4) and np.array_equal(volume.image[0], voxels)
    assert np.allclose(volume.affine, RAS, atol=1e-5) and volume.spacing == pytest.approx((0.5, 0.75, 2.0))


def test_sagittal_series_has_its_voxels_and_ras_affine(tmp_path: Path) -> None:
    # In LPS: rows run to the back (+y), columns down (-z), slices to the right (-x).
    direction = (0, 0, -1, 1, 0, 0, 0, -1, 0)
    voxels = make.counting_image()
    image, affine, spacing = read_dicom_series(make.write_dicom(tmp_path / "a", voxels, direction=direction))
    expected = [[0, 0, 2, 10], [-0.5, 0, 0, -20], [0, -0.75, 0, 30], [0, 0, 0, 1]]
    assert np.array_equal(image[0], voxels)
    assert np.allclose(affine, expected, atol=1e-5) and spacing == pytest.approx((0.5, 0.75, 2.0))


def test_single_slice_is_a_volume(tmp_path: Path) -> None:
    image, affine, _ = read_dicom_series(make.write_dicom(tmp_path / "a", make.counting_image((6, 5, 1))))
    assert image.shape == (1, 6, 5, 1) and np.allclose(affine[:3, 3], RAS[:3, 3], atol=1e-5)


def test_nifti_label_in_the_root_or_in_its_labels_folder(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        make.write_dicom(tmp_path / name, make.counting_image())
    make.write_nifti(tmp_path / "a.nii.gz", make.corner_label(), RAS)
    make.write_nifti(tmp_path / "labels/b.nii.gz", make.corner_label(), RAS)
    source = DicomFolders(tmp_path, num_classes=2)
    assert source.case_ids() == ["a", "b", "c"] and source.labeled_ids() == ["a", "b"]
    for name in ("a", "b"):
        label = source.load(name, with_label=True).label
        assert label is not None and label.sum() == 8 and label[:2, :2, :2].all()
    with pytest.raises(FileNotFoundError, match=r"case c of .* has no label file"):
        source.load("c", with_label=True)


def test_label_on_the_lps_grid_is_refused(tmp_path: Path) -> None:
    make.write_dicom(tmp_path / "a", make.counting_image())
    make.write_nifti(tmp_path / "a.nii.gz", make.corner_label(), np.diag([-1.0, -1, 1, 1]) @ RAS)
    with pytest.raises(ValueError, match=r"case a: the affine of label .* differs"):
        DicomFolders(tmp_path, num_classes=2).load("a", with_label=True)


def test_two_labels_of_a_case_are_refused(tmp_path: Path) -> None:
    make.write_dicom(tmp_path / "a", make.counting_image())
    make.write_nifti(tmp_path / "a.nii.gz", make.corner_label())
    make.write_nifti(tmp_path / "labels/a.nii.gz", make.corner_label())
    with pytest.raises(ValueError, match=r"case a has the labels .* keep one"):
        DicomFolders(tmp_path, num_classes=2)


def test_two_series_in_a_folder_are_refused(tmp_path: Path) -> None:
    make.write_dicom(tmp_path / "a", make.counting_image(), series="1.2.3.1")
    make.write_dicom(tmp_path / "a", make.counting_image(), series="1.2.3.2")
    with pytest.raises(ValueError, match=r"a holds 2 DICOM series: 1.2.3.1.*exactly one series"):
        DicomFolders(tmp_path, num_classes=2).load("a", with_label=False)


def test_folder_without_dicom_is_refused_on_load(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/readme.txt").write_text("nothing here")
    source = DicomFolders(tmp_path, num_classes=2)
    assert source.modality == "mr"
    with pytest.raises(ValueError, match="a holds no DICOM series"):
        source.load("a", with_label=False)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_dicom_series(tmp_path / "b")


@pytest.mark.parametrize("kept", [0, 600, 5000])
def test_damaged_slice_is_refused_by_name(tmp_path: Path, kept: int) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image((64, 64, 4)))
    path = min(folder.iterdir())  # the last slice: without it the others are still evenly spaced
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{path.name} is no readable slice of the series; export it again"):
        read_dicom_series(folder)


def test_links_to_nothing_are_refused(tmp_path: Path) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image())
    (folder / "slice").symlink_to(tmp_path / "annex")
    source = DicomFolders(tmp_path, num_classes=2)
    with pytest.raises(FileNotFoundError, match=r"symbolic links that lead to no file \(1\): '.*a/slice'; fetch"):
        source.load("a", with_label=False)
    (tmp_path / "b").symlink_to(tmp_path / "annex")
    for find in (find_scans, lambda root: DicomFolders(root, num_classes=2)):
        with pytest.raises(FileNotFoundError, match=r"symbolic links that lead to no file \(1\): '.*b'; fetch"):
            find(tmp_path)


def test_files_that_are_no_slices_may_lie_beside_the_series(tmp_path: Path) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image())
    (folder / "note.txt").write_text("from the scanner in room 3")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (folder / "old").mkdir()
    assert read_dicom_series(folder)[0].shape == (1, 6, 5, 4)


def test_series_that_cannot_be_stacked_is_refused(tmp_path: Path) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image((6, 5, 2)))
    make.write_dicom(tmp_path / "b", make.counting_image((8, 5, 2)), origin=(-10, 20, 40))
    for path in (tmp_path / "b").iterdir():
        path.rename(folder / f"wider_{path.name}")
    with pytest.raises(ValueError, match=r"the series cannot be read .* export it again"):
        read_dicom_series(folder)


def test_missing_slice_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make.write_dicom(tmp_path / "a", make.counting_image((6, 5, 6)), skip=(3,))
    with caplog.at_level(logging.WARNING):
        image, _, _ = read_dicom_series(folder)
        read_dicom_series(folder)
    assert image.shape == (1, 6, 5, 5)
    assert caplog.text.count("slice distances run from 2 to 4 mm") == 1


def test_colour_series_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    colour = sitk.GetImageFromArray(np.zeros((1, 5, 6, 3), np.uint8), isVector=True)
    colour.SetMetaData("0020|000e", "1.2.3.4")
    sitk.WriteImage(colour, str(tmp_path / "a/colour.dcm"))
    with pytest.raises(ValueError, match="case a: 3 channels, but this data set has 1"):
        DicomFolders(tmp_path, num_classes=2).load("a", with_label=False)


@pytest.mark.parametrize(("stated", "expected"), [("CT", "ct"), ("MR", "mr"), ("PT", "mr")])
def test_modality_comes_from_the_header_unless_a_flag_gives_it(tmp_path: Path, stated: str, expected: str) -> None:
    make.write_dicom(tmp_path / "a", make.counting_image(), modality=stated)
    (tmp_path / "a/0_note.txt").write_text("not DICOM")
    assert DicomFolders(tmp_path, num_classes=2).modality == expected
    assert DicomFolders(tmp_path, num_classes=2, modality="ct").modality == "ct"


def test_cases_of_two_modalities_are_refused_unless_a_flag_chooses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, modality in (("a", "CT"), ("b", "MR"), ("c", "CT"), ("d", "MR"), ("e", "")):
        make.write_dicom(tmp_path / name, make.counting_image(), modality=modality)
    with pytest.raises(ValueError, match=r"2 of 4 cases are MR .*: 'b', 'd', the first case is CT; keep one modality"):
        DicomFolders(tmp_path, num_classes=2)
    assert DicomFolders(tmp_path, num_classes=2, modality="mr").modality == "mr"
    assert "2 of 4 cases are CT by their DICOM headers: 'a', 'c'; they are normalised as MR" in caplog.text


def test_what_is_no_scan_is_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, modality in (("a", "MR"), ("b", "SEG"), ("c", "MR")):
        make.write_dicom(tmp_path / name, make.counting_image(), modality=modality)
    make.write_nifti(tmp_path / "c" / "label.nii.gz", make.corner_label())
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.dcm").touch()
    (tmp_path / "labels" / "folder").mkdir()
    assert DicomFolders(tmp_path, num_classes=2).case_ids() == ["a", "c"]
    assert "no scans by their headers (SEG), left out: 'b'" in caplog.text
    assert "NIfTI files within the folders of cases are left out: 'c'" in caplog.text
    assert "labels are NIfTI files, not 'a.dcm', 'folder'; convert" in caplog.text
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="has no case folders"):
        DicomFolders(tmp_path, num_classes=2)


@pytest.mark.parametrize(("file", "modality"), [("rtplan", "RTPLAN"), ("rtstruct", "RTSTRUCT"), ("reportsi", "SR")])
def test_what_has_no_pixels_is_left_out_by_name_too(
    file: str, modality: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make.write_dicom(tmp_path / "a", make.counting_image())
    for folder in ("a", "b"):  # beside the slices of a case it is no matter
        (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copy(str(get_testdata_file(f"{file}.dcm", download=False)), tmp_path / folder / "0000.dcm")
    (tmp_path / "b" / "note.txt").write_text("exported")
    source = DicomFolders(tmp_path, num_classes=2)
    assert source.case_ids() == ["a"] and source.load("a", with_label=False).image.ndim == 4
    assert f"no scans by their headers ({modality}), left out: 'b'" in caplog.text
    assert [scan.name for scan in find_scans(tmp_path)] == ["a"]


def test_class_names_come_from_the_root(tmp_path: Path) -> None:
    make.write_dicom(tmp_path / "a", make.counting_image())
    (tmp_path / "classes.txt").write_text("background\nliver\n")
    assert DicomFolders(tmp_path).class_names == ("background", "liver")


def test_root_without_case_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    with pytest.raises(FileNotFoundError, match="has no case folders"):
        DicomFolders(tmp_path, num_classes=2)


def test_affine_agrees_with_itk_written_nifti(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16))
    image.SetSpacing((0.5, 0.75, 2.0))
    image.SetOrigin((-10, 20, 30))
    sitk.WriteImage(image, str(tmp_path / "itk.nii.gz"))
    _, affine, _ = read_dicom_series(make.write_dicom(tmp_path / "a", make.counting_image()))
    assert np.allclose(nib.load(tmp_path / "itk.nii.gz").affine, affine, atol=1e-5)


def test_series_of_one_patient_id_are_of_one_patient(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, patient in (("a", "7"), ("b", "8 "), ("c", "7"), ("sub-01_ses-1", ""), ("sub-01_ses-2", "")):
        make.write_dicom(tmp_path / name, make.counting_image(), patient=patient)
    source = DicomFolders(tmp_path, num_classes=2)
    groups = [source.patient(case_id) for case_id in source.case_ids()]
    assert groups[0] == groups[2] != groups[1] and groups[3] == groups[4] == "sub-01"
    assert caplog.text.count("no PatientID in 'sub-01_ses-1', 'sub-01_ses-2', so that each counts as a patient") == 1


def test_a_folder_without_dicom_is_named_before_the_split(tmp_path: Path) -> None:
    make.write_dicom(tmp_path / "a", make.counting_image(), patient="7")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.txt").write_text("nothing here")
    with pytest.raises(ValueError, match="no DICOM file in 'notes'; put the series there, or remove the folder"):
        DicomFolders(tmp_path, num_classes=2).patient("a")


def test_labels_without_a_series_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make.write_dicom(tmp_path / "a", make.counting_image())
    make.write_nifti(tmp_path / "labels/studie.nii.gz", make.corner_label())
    DicomFolders(tmp_path, num_classes=2)
    assert "labels without an image of the same name are left out: 'studie'" in caplog.text


def test_a_patient_id_of_most_cases_is_an_anonymiser_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, patient in (("a", "secret"), ("b", "secret"), ("c", "secret"), ("d", ""), ("e", "7")):
        make.write_dicom(tmp_path / name, make.counting_image(), patient=patient)
    source = DicomFolders(tmp_path, num_classes=2)
    assert [source.patient(case_id) for case_id in "abcda"] == ["a", "b", "c", "d", "a"]
    assert source.patient("e") == "PatientID 7"
    assert caplog.text.count("3 of 5 cases have the same PatientID") == 1 and "secret" not in caplog.text


def test_half_of_the_cases_may_be_of_one_patient(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, patient in (("a", "1"), ("b", "1"), ("c", "2"), ("d", "3")):
        make.write_dicom(tmp_path / name, make.counting_image(), patient=patient)
    source = DicomFolders(tmp_path, num_classes=2)
    assert source.patient("a") == source.patient("b") != source.patient("c") and not caplog.text
    make.write_dicom(tmp_path / "only/a", make.counting_image(), patient="1")
    assert DicomFolders(tmp_path / "only", num_classes=2).patient("a") == "PatientID 1" and not caplog.text
