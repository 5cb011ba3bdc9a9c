"""Decathlon and nnU-Net raw folders: dataset.json in its forms, channels, missing labels, damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import data_makers as make
import numpy as np
import pytest
from data_makers import describe, entry, write_case

from dataloaders.decathlon import DecathlonFolder


def test_msd_cases_keep_the_order_of_dataset_json(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_case(tmp_path, name)
    make.write_nifti(tmp_path / "imagesTs/t.nii.gz", make.counting_image())
    describe(tmp_path, training=[entry("b"), entry("a")], test=["./imagesTs/t.nii.gz"])
    source = DecathlonFolder(tmp_path)
    assert source.case_ids() == ["b", "a", "t"] and source.labeled_ids() == ["b", "a"]
    assert source.class_names == ("background", "organ", "tumour") and source.num_classes == 3
    volume = source.load("a", with_label=True)
    assert np.array_equal(volume.affine, make.AFFINE) and volume.spacing == (1.0, 2.0, 3.0)
    assert volume.image[0, 1, 2, 3] == 31 and volume.label is not None and volume.label.sum() == 8


def test_missing_label_file_means_unlabeled_with_a_warning_where_one_is_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_case(tmp_path, "a")
    for name in ("b", "c"):
        make.write_nifti(tmp_path / f"imagesTr/{name}.nii.gz", make.counting_image())
    describe(tmp_path, training=[entry("a"), entry("b"), "imagesTr/c.nii.gz"])
    source = DecathlonFolder(tmp_path)
    assert source.case_ids() == ["a", "b", "c"] and source.labeled_ids() == ["a"]
    with pytest.raises(FileNotFoundError, match=r"case b of .* has no label file"):
        source.load("b", with_label=True)
    assert "lists do not exist (1), so that these cases are unlabelled: " in caplog.text and "b.nii.gz" in caplog.text
    (tmp_path / "labelsTr/b.nii.gz").symlink_to(tmp_path / "annex")
    with pytest.raises(FileNotFoundError, match=r"that lead to no file \(1\): '.*labelsTr/b.nii.gz'; fetch"):
        DecathlonFolder(tmp_path)


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr", "imagesTs"])
def test_links_to_nothing_in_the_folders_are_refused(tmp_path: Path, folder: str) -> None:
    write_case(tmp_path, "a")
    describe(tmp_path)
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "b.nii.gz").symlink_to(tmp_path / "annex")
    with pytest.raises(FileNotFoundError, match=rf"that lead to no file \(1\): '.*{folder}/b.nii.gz'; fetch"):
        DecathlonFolder(tmp_path)


def test_four_axes_are_channels(tmp_path: Path) -> None:
    make.write_nifti(tmp_path / "imagesTr/a.nii.gz", make.counting_image((*make.SHAPE, 2)))
    describe(tmp_path, training=[entry("a")])
    source = DecathlonFolder(tmp_path)
    image = source.load("a", with_label=False).image
    assert source.in_channels == 2 and image.shape == (2, 6, 5, 4)
    assert image[1, 0, 0, 1] == 3 and image[0, 0, 0, 1] == 2  # channels run fastest in the file


def test_images_that_are_not_listed_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b", "c"):
        write_case(tmp_path, name)
    describe(tmp_path, training=[entry("b")])
    assert DecathlonFolder(tmp_path).case_ids() == ["b"]
    assert "dataset.json does not list are left out (2): 'a', 'c'; list them under 'training'" in caplog.text


def test_channel_on_another_grid_is_refused(tmp_path: Path) -> None:
    shifted = make.AFFINE.copy()
    shifted[0, 3] += 1
    make.write_nifti(tmp_path / "imagesTr/a_0000.nii.gz", make.counting_image())
    make.write_nifti(tmp_path / "imagesTr/a_0001.nii.gz", make.counting_image(), shifted)
    describe(tmp_path)
    with pytest.raises(ValueError, match=r"case a: .*a_0001.nii.gz is not on the grid"):
        DecathlonFolder(tmp_path).load("a", with_label=False)


def test_case_with_other_channels_is_refused(tmp_path: Path) -> None:
    write_case(tmp_path, "a")
    make.write_nifti(tmp_path / "imagesTr/b.nii.gz", make.counting_image((*make.SHAPE, 2)))
    describe(tmp_path, training=[entry("a"), entry("b")])
    with pytest.raises(ValueError, match="case b: 2 channels, but this data set has 1"):
        DecathlonFolder(tmp_path).load("b", with_label=False)


def test_truncated_image_is_refused_by_name(tmp_path: Path) -> None:
    write_case(tmp_path, "a")
    path = tmp_path / "imagesTr/a.nii.gz"
    path.write_bytes(path.read_bytes()[:-30])
    describe(tmp_path, training=[entry("a")])
    with pytest.raises(ValueError, match=r"(?s)a.nii.gz: .* again"):
        DecathlonFolder(tmp_path).load("a", with_label=False)


def test_label_on_a_shifted_grid_is_refused(tmp_path: Path) -> None:
    write_case(tmp_path, "a")
    shifted = make.AFFINE.copy()
    shifted[2, 3] += 0.5
    make.write_nifti(tmp_path / "labelsTr/a.nii.gz", make.corner_label(), shifted)
    describe(tmp_path, training=[entry("a")])
    with pytest.raises(ValueError, match=r"case a: the affine of label .* by 0.5 mm, more than 0.001 mm"):
        DecathlonFolder(tmp_path).load("a", with_label=True)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (make.corner_label((6, 5, 5)), r"label shape \(6, 5, 5\) differs"),
        (make.corner_label(class_id=3), "class id 3 is outside 0..2; pass --num_classes 4"),
        (make.corner_label().astype(np.float32) * 0.5, "are no whole numbers, such as 0.5 at"),
        (np.stack([make.corner_label()] * 2, -1), "has 2 channels"),
    ],
)
def test_bad_label_is_refused_with_the_case(tmp_path: Path, label: np.ndarray, message: str) -> None:
    write_case(tmp_path, "a", label)
    describe(tmp_path, training=[entry("a")])
    with pytest.raises(ValueError, match=f"case a: .*{message}"):
        DecathlonFolder(tmp_path).load("a", with_label=True)


def test_bad_entries_are_refused(tmp_path: Path) -> None:
    write_case(tmp_path, "a")
    describe(tmp_path, training=[entry("a"), entry("a")])
    with pytest.raises(ValueError, match="lists case 'a' twice"):
        DecathlonFolder(tmp_path)
    describe(tmp_path, training=[entry("a"), entry("gone")])
    with pytest.raises(FileNotFoundError, match=r"gone.nii.gz is listed in .* but does not exist"):
        DecathlonFolder(tmp_path)
    describe(tmp_path, training=[{"label": "x"}])
    with pytest.raises(ValueError, match="has no 'image'"):
        DecathlonFolder(tmp_path)
    describe(tmp_path, file_ending=".png")
    with pytest.raises(ValueError, match="convert the images"):
        DecathlonFolder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [{"training": [{"image": 5}]}, {"training": [entry("a") | {"label": 7}]}, {"training": [entry("a")], "test": [1]}],
)
def test_entries_that_are_no_file_names_are_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    write_case(tmp_path, "a")
    describe(tmp_path, **content)
    with pytest.raises(ValueError, match=r"dataset\.json: '(training|test)' names [571]; write file names as text"):
        DecathlonFolder(tmp_path)


def test_bad_dataset_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset.json at its top"):
        DecathlonFolder(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        DecathlonFolder(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        DecathlonFolder(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "whole": [1, 2]}, "regions and ignore labels"),
        ({"background": 0, "organ": 1, "ignore": 2}, "regions and ignore labels"),
        ({"organ": 1, "other": 1}, "class id 1 has two names"),
        ([], "expected names by class id"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: Any, message: str) -> None:
    describe(tmp_path, labels=labels)
    with pytest.raises(ValueError, match=message):
        DecathlonFolder(tmp_path)


def test_num_classes_flag_adds_classes_and_never_drops_named_ones(tmp_path: Path) -> None:
    write_case(tmp_path, "a")
    describe(tmp_path, training=[entry("a")], labels={"0": "background", "2": "tumour"})
    assert DecathlonFolder(tmp_path).class_names == ("background", "class 1", "tumour")
    assert DecathlonFolder(tmp_path, num_classes=4).class_names[3] == "class 3"
    with pytest.raises(ValueError, match="pass --num_classes 3 or more"):
        DecathlonFolder(tmp_path, num_classes=2)


def test_modality_comes_from_dataset_json_unless_a_flag_says_otherwise(tmp_path: Path) -> None:
    write_case(tmp_path, "a")
    describe(tmp_path, training=[entry("a")], modality={"0": "CT"})
    assert DecathlonFolder(tmp_path).modality == "ct"
    assert DecathlonFolder(tmp_path, modality="mr").modality == "mr"
    with pytest.raises(ValueError, match="--modality 'pet': pass one of mr, ct"):
        DecathlonFolder(tmp_path, modality="pet")
    describe(tmp_path, training=[entry("a")], modality={"0": "CT", "1": "PET"})
    assert DecathlonFolder(tmp_path).modality == "mr"


def test_real_hippocampus_has_200_labeled_cases_of_three_classes(shared_data: Path) -> None:
    source = DecathlonFolder(shared_data / "Task04_Hippocampus")
    assert len(source.case_ids()) == 200 == len(source.labeled_ids())
    assert source.class_names == ("background", "Anterior", "Posterior") and source.modality == "mr"
    volume = source.load("hippocampus_001", with_label=True)
    assert volume.label is not None and set(np.unique(volume.label)) == {0, 1, 2}
    assert volume.spacing == pytest.approx((1.0, 1.0, 1.0))
