"""nnU-Net raw folders: files per channel, tables of cases, labelled test images, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import data_makers as make
import pytest
from data_makers import describe, entry, write_case

from dataloaders.decathlon import DecathlonFolder
from dataloaders.splits import SplitRequest, make_test_ids, make_training_split


def test_nnunet_channel_files_are_stacked(tmp_path: Path) -> None:
    for case in ("p1", "p2"):
        for channel in (0, 1):
            make.write_nifti(tmp_path / f"imagesTr/{case}_{channel:04d}.nii.gz", make.counting_image() + 1000 * channel)
    make.write_nifti(tmp_path / "labelsTr/p1.nii.gz", make.corner_label())
    for channel in (0, 1):
        make.write_nifti(tmp_path / f"imagesTs/p9_{channel:04d}.nii.gz", make.counting_image())
    describe(
        tmp_path,
        labels={"background": 0, "organ": 1},
        channel_names={"0": "CT", "1": "CT"},
        file_ending=".nii.gz",
        numTraining=2,
    )
    source = DecathlonFolder(tmp_path)
    assert source.case_ids() == ["p1", "p2", "p9"] and source.labeled_ids() == ["p1"]
    assert source.in_channels == 2 and source.modality == "ct" and source.num_classes == 2
    volume = source.load("p1", with_label=True)
    assert volume.image.shape == (2, 6, 5, 4) and volume.image[1, 0, 0, 0] == 1000


def test_nnunet_v1_names_stand_for_their_channel_files(tmp_path: Path) -> None:
    make.write_nifti(tmp_path / "imagesTr/a_0000.nii.gz", make.counting_image())
    make.write_nifti(tmp_path / "imagesTr/a_0001.nii.gz", make.counting_image())
    describe(tmp_path, training=[entry("a")])
    source = DecathlonFolder(tmp_path)
    assert source.case_ids() == ["a"] and source.in_channels == 2


def test_nnunet_v1_channels_are_those_of_the_case_and_follow_each_other(tmp_path: Path) -> None:
    make.write_nifti(tmp_path / "imagesTr/a[1]_0000.nii.gz", make.counting_image())
    make.write_nifti(tmp_path / "imagesTr/a1_0000.nii.gz", make.counting_image() + 1000)
    describe(tmp_path, training=[entry("a[1]")])
    assert DecathlonFolder(tmp_path).load("a[1]", with_label=False).image[0, 0, 0, 0] == 0
    make.write_nifti(tmp_path / "imagesTr/a[1]_0003.nii.gz", make.counting_image())
    with pytest.raises(ValueError, match=r"'a\[1\]' has .*_0003.*number its channels from 0000 on"):
        DecathlonFolder(tmp_path)


def test_nnunet_v2_dataset_table_names_its_cases(tmp_path: Path) -> None:
    write_case(tmp_path, "file")
    item = {"images": ["imagesTr/file.nii.gz"], "label": "labelsTr/file.nii.gz"}
    describe(tmp_path, dataset={"case7": item})
    source = DecathlonFolder(tmp_path)
    assert source.case_ids() == ["case7"] == source.labeled_ids()


def test_folders_without_channel_suffix_hold_a_case_per_file(tmp_path: Path) -> None:
    write_case(tmp_path, "scan_2020")  # four digits that are no channel
    write_case(tmp_path, "other")
    (tmp_path / "imagesTr/._other.nii.gz").write_bytes(b"macOS")
    describe(tmp_path)
    assert DecathlonFolder(tmp_path).labeled_ids() == ["other", "scan_2020"]


def test_labels_and_channels_that_fit_no_case_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a_0000", "b_0000"):
        make.write_nifti(tmp_path / f"imagesTr/{name}.nii.gz", make.counting_image())
    for name in ("a", "B"):
        make.write_nifti(tmp_path / f"labelsTr/{name}.nii.gz", make.corner_label())
    describe(tmp_path)
    assert DecathlonFolder(tmp_path).labeled_ids() == ["a"]
    assert "labels without an image of the same name are left out: 'B'" in caplog.text
    assert "each file is a case" not in caplog.text
    make.write_nifti(tmp_path / "imagesTr/stray.nii.gz", make.counting_image())
    assert DecathlonFolder(tmp_path).case_ids() == ["a_0000", "b_0000", "stray"]
    assert "each file is a case, as some have no channel number from 0000 on: 'stray'" in caplog.text


def test_labelled_images_of_the_test_folder_are_the_test(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        write_case(tmp_path, f"{name}_0000")
        (tmp_path / f"labelsTr/{name}_0000.nii.gz").rename(tmp_path / f"labelsTr/{name}.nii.gz")
    for name in ("t0", "t1"):
        make.write_nifti(tmp_path / f"imagesTs/{name}_0000.nii.gz", make.counting_image())
    describe(tmp_path, channel_names={"0": "T1"})
    assert DecathlonFolder(tmp_path).official_test() is None
    for name in ("t1", "b", "x"):
        make.write_nifti(tmp_path / f"labelsTs/{name}.nii.gz", make.corner_label())
    source = DecathlonFolder(tmp_path)
    assert source.case_ids() == ["a", "b", "t0", "t1"] and source.labeled_ids() == ["a", "b", "t1"]
    assert source.official_test() == ("t1",)
    assert "labelsTs: labels without an image of the same name are left out: 'b', 'x'" in caplog.text
    request = SplitRequest(labelnum=1)
    split = make_training_split(source, request)
    assert {*split.labeled, *split.unlabeled} == {"a", "b", "t0"}
    assert make_test_ids(source, request, split) == ("t1",)


def test_a_test_image_with_the_name_of_a_training_image_is_refused(tmp_path: Path) -> None:
    for name in ("a_0000", "b_0000"):
        write_case(tmp_path, name)
    describe(tmp_path, training=[entry("b_0000")], test=["./imagesTr/b_0000.nii.gz"])  # the same file: no other case
    assert DecathlonFolder(tmp_path).case_ids() == ["b_0000"]
    make.write_nifti(tmp_path / "imagesTs/b_0000.nii.gz", make.counting_image())
    describe(tmp_path, channel_names={"0": "T1"})
    with pytest.raises(ValueError, match=r"'b' name training and test images both; rename those of imagesTs/"):
        DecathlonFolder(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a_0000", "a_0002"], r"case 'a' has 'a_0000', 'a_0002'; number its channels from 0000 on"),
        (["a_0000", "a_0001", "a_0002"], r"case 'a' has 'a_0000', .*names the channels T2, ADC; give each case a file"),
        (["a_0000"], r"case 'a' has 'a_0000', but .*names the channels T2, ADC"),
    ],
)
def test_channels_that_are_missing_are_named(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        make.write_nifti(tmp_path / f"imagesTr/{name}.nii.gz", make.counting_image())
    describe(tmp_path, channel_names={"0": "T2", "1": "ADC"})
    with pytest.raises(ValueError, match=message):
        DecathlonFolder(tmp_path)
