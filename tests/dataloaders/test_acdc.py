"""ACDC: the release and the HDF5 copy; patients stay together, diagnoses take turns, the cine is no case."""

from __future__ import annotations

import logging
from pathlib import Path

import data_makers as make
import numpy as np
import pytest

from dataloaders.acdc import AcdcH5, AcdcRelease
from dataloaders.base import SOURCES, CaseSource, SourceOptions
from dataloaders.splits import SplitRequest, make_test_ids, make_training_split


def acdc(root: Path, **options: object) -> CaseSource:
    return SOURCES.get("ACDC").from_options(SourceOptions(root=root, **options))


def write_release(root: Path, *, testing: bool = True) -> None:
    groups = {"patient001": "DCM", "patient002": "DCM", "patient003": "HCM", "patient004": "NOR", "patient005": "DCM"}
    for name, group in groups.items():
        make.write_acdc_patient(root / "training", name, group=group)
    make.write_acdc_patient(root / "testing", "patient101", label=testing)


def test_diagnoses_take_turns_and_a_patient_s_frames_follow_each_other(tmp_path: Path) -> None:
    write_release(tmp_path)
    source = acdc(tmp_path)
    assert isinstance(source, AcdcRelease)
    order = ["patient001", "patient003", "patient004", "patient002", "patient005"]
    assert list(source.official_train() or ()) == [f"{p}_frame{f}" for p in order for f in ("01", "12")]
    assert source.official_test() == ("patient101_frame01", "patient101_frame12")
    assert source.case_ids() == [*(source.official_train() or ()), *(source.official_test() or ())]
    assert source.patient("patient003_frame12") == "patient003"


def test_patients_without_a_diagnosis_come_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_release(tmp_path)
    (tmp_path / "training/patient004/patient004_frame12.nii.gz").unlink()
    assert not caplog.text and "patient004_frame12" not in acdc(tmp_path).case_ids()
    assert "left out: 'patient004_frame12'" in caplog.text
    for path in tmp_path.glob("*/*/Info.cfg"):
        path.unlink()
    assert acdc(tmp_path).case_ids()[2] == "patient002_frame01"
    assert "training: 5 patients have no Info.cfg" in caplog.text
    (tmp_path / "training/patient002/Info.cfg").write_bytes(b"\xff\xfe no text")
    (tmp_path / "training/patient003/Info.cfg").write_text("Group:\nHeight: 170\n")
    assert acdc(tmp_path).case_ids()[2] == "patient002_frame01"


def test_classes_and_labels_are_those_of_the_challenge(tmp_path: Path) -> None:
    write_release(tmp_path)
    source = acdc(tmp_path)
    assert source.class_names == ("background", "right ventricle", "myocardium", "left ventricle")
    volume = source.load("patient001_frame12", with_label=True)
    assert volume.label is not None and set(np.unique(volume.label)) == {0, 3}
    assert volume.spacing == (1.0, 2.0, 3.0) and source.grid("patient001_frame12").shape == make.SHAPE


def test_without_labels_in_testing_the_last_fifth_of_the_patients_is_the_test(tmp_path: Path) -> None:
    write_release(tmp_path, testing=False)
    source = acdc(tmp_path)
    assert source.official_test() == ("patient005_frame01", "patient005_frame12")
    request = SplitRequest(labelnum=4)
    split = make_training_split(source, request)
    assert split.labeled == tuple(f"{p}_frame{f}" for p in ("patient001", "patient003") for f in ("01", "12"))
    assert split.unlabeled[-2:] == ("patient101_frame01", "patient101_frame12")
    assert make_test_ids(source, request, split) == source.official_test()


def test_a_tested_patient_s_unlabelled_frame_is_in_no_role(tmp_path: Path) -> None:
    write_release(tmp_path)
    make.write_acdc_patient(tmp_path / "testing", "patient102", label=False)
    (tmp_path / "testing/patient101/patient101_frame12_gt.nii.gz").unlink()
    source = acdc(tmp_path)
    assert source.official_test() == ("patient101_frame01",)
    assert source.official_train()[-2:] == ("patient102_frame01", "patient102_frame12")
    assert "patient101_frame12" not in source.official_train()


def test_few_patients_have_no_test_list(tmp_path: Path) -> None:
    make.write_acdc_patient(tmp_path / "training", "patient001")
    assert acdc(tmp_path).official_test() is None


def test_files_that_are_no_frame_of_the_patient_are_passed_by(tmp_path: Path) -> None:
    write_release(tmp_path)
    folder = tmp_path / "training/patient001"
    make.write_nifti(folder / "patient001_4d.nii", make.counting_image())  # unpacked beside the .nii.gz
    make.write_nifti(folder / "patient009_frame01.nii.gz", make.counting_image())
    make.write_nifti(folder / "mean.nii.gz", make.counting_image())
    assert len(acdc(tmp_path).case_ids()) == 12


def test_another_folder_is_refused_with_both_layouts(tmp_path: Path) -> None:
    make.write_acdc_patient(tmp_path, "patient001")  # training/ is missing
    with pytest.raises(FileNotFoundError, match=r"neither training/patientNNN/.* nor data/patientNNN_frameMM.h5"):
        acdc(tmp_path)


def write_h5_copy(root: Path) -> None:
    for patient in ("patient001", "patient002", "patient003", "patient004"):
        for frame in ("01", "12"):
            name = f"{patient}_frame{frame}"
            make.write_h5(root / f"data/{name}.h5", make.counting_image().T, make.corner_label(class_id=2).T)
            make.write_h5(root / f"data/slices/{name}_slice_0.h5", np.zeros((5, 6)), np.zeros((5, 6)))
    slices = [f"{p}_frame{f}_slice_{k}" for p in ("patient003", "patient001") for f in ("01", "12") for k in (0, 1)]
    (root / "train_slices.list").write_text("\n".join(slices) + "\n")
    (root / "val.list").write_text("patient002_frame01\npatient002_frame12\n")
    (root / "test.list").write_text("patient004_frame01.h5\npatient004_frame12.h5\n")


def test_the_copy_has_the_field_s_lists_and_axes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_h5_copy(tmp_path)
    with caplog.at_level(logging.WARNING):
        source = acdc(tmp_path)
    assert "taking 1.5 x 1.5 x 10 mm" in caplog.text and isinstance(source, AcdcH5)
    assert len(source.case_ids()) == 8  # no slice is a case
    assert source.official_train() == tuple(f"{p}_frame{f}" for p in ("patient003", "patient001") for f in ("01", "12"))
    volume = source.load("patient001_frame01", with_label=True)
    assert np.array_equal(volume.image[0], make.counting_image())  # stored as (Z, Y, X)
    assert np.array_equal(volume.label, make.corner_label(class_id=2)) and volume.label.flags["C_CONTIGUOUS"]
    grid = source.grid("patient001_frame01")
    assert grid.shape == make.SHAPE and not grid.oriented and volume.spacing == (1.5, 1.5, 10.0)


def test_a_split_of_the_copy_leaves_validation_out(tmp_path: Path) -> None:
    write_h5_copy(tmp_path)
    source, request = acdc(tmp_path, voxel_size=(1.4, 1.4, 10.0)), SplitRequest(labelnum=2)
    split = make_training_split(source, request)
    assert split.labeled == ("patient003_frame01", "patient003_frame12")
    assert split.unlabeled == ("patient001_frame01", "patient001_frame12")
    assert make_test_ids(source, request, split) == ("patient004_frame01", "patient004_frame12")


def test_a_copy_without_its_lists_is_split_by_patient(tmp_path: Path) -> None:
    write_h5_copy(tmp_path)
    for path in tmp_path.glob("*.list"):
        path.unlink()
    source, request = acdc(tmp_path), SplitRequest(labelnum=2)
    assert len(make_test_ids(source, request, make_training_split(source, request))) == 2
