"""Plain NIfTI folders: matching by name, class names beside the data, damaged and unfitting files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import data_makers as make
import numpy as np
import pytest

from dataloaders.nifti_folder import NiftiFolder


def write_pair(root: Path, name: str, label: np.ndarray | None = None) -> None:
    make.write_nifti(root / f"images/{name}.nii.gz", make.counting_image())
    make.write_nifti(root / f"labels/{name}.nii.gz", make.corner_label() if label is None else label)


def test_images_and_labels_match_by_name(tmp_path: Path) -> None:
    write_pair(tmp_path, "b")
    make.write_nifti(tmp_path / "images/a.nii", make.counting_image())
    (tmp_path / "images/.hidden.nii.gz").write_bytes(b"")
    (tmp_path / "images/notes.txt").write_text("no image")
    source = NiftiFolder(tmp_path, num_classes=2)
    assert source.case_ids() == ["a", "b"] and source.labeled_ids() == ["b"]
    assert source.modality == "mr" and source.in_channels == 1
    volume = source.load("b", with_label=True)
    assert volume.image[0, 5, 4, 3] == 119 and volume.label is not None and volume.label.sum() == 8
    assert np.array_equal(volume.affine, make.AFFINE)
    with pytest.raises(FileNotFoundError, match=r"case a of .* has no label file"):
        source.load("a", with_label=True)


def test_suffixes_may_be_in_capitals(tmp_path: Path) -> None:
    for name in ("images/a.NII.GZ", "labels/a.nii.GZ", "images/b.NII"):
        voxels = make.corner_label() if name.startswith("labels") else make.counting_image()
        path = make.write_nifti(tmp_path / "small" / name.lower(), voxels)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        path.rename(tmp_path / name)
    source = NiftiFolder(tmp_path, num_classes=2)
    assert source.case_ids() == ["a", "b"] and source.labeled_ids() == ["a"]
    volume = source.load("a", with_label=True)
    assert volume.image[0, 5, 4, 3] == 119 and volume.label is not None and volume.label.sum() == 8
    assert source.load("b", with_label=False).image[0, 5, 4, 3] == 119


def test_scans_in_other_formats_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pair(tmp_path, "a")
    for name in ("images/b.nrrd", "images/c.NRRD", "images/d.mha", "images/e.json", "labels/b.seg.nrrd"):
        (tmp_path / name).write_bytes(b"")
    for _ in range(2):
        NiftiFolder(tmp_path, num_classes=2)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{tmp_path}/images: files that are not NIfTI are left out: 2 .nrrd, 1 .mha; convert them to .nii.gz",
        f"{tmp_path}/labels: files that are not NIfTI are left out: 1 .nrrd; convert them to .nii.gz",
    ]


def test_folder_without_labels_is_unlabeled(tmp_path: Path) -> None:
    make.write_nifti(tmp_path / "images/a.nii.gz", make.counting_image())
    assert NiftiFolder(tmp_path, num_classes=2).labeled_ids() == []


def test_label_without_an_image_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pair(tmp_path, "a")
    make.write_nifti(tmp_path / "labels/orphan.nii.gz", make.corner_label())
    with caplog.at_level(logging.WARNING):
        source = NiftiFolder(tmp_path, num_classes=2)
    assert source.case_ids() == ["a"] and "'orphan'" in caplog.text


def test_number_of_classes_is_never_read_from_labels(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    with pytest.raises(ValueError, match="pass --num_classes"):
        NiftiFolder(tmp_path)


def test_class_names_come_from_classes_txt_or_dataset_json(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    (tmp_path / "classes.txt").write_bytes(b"background\r\nliver\r\n\r\ntumour\r\n")
    assert NiftiFolder(tmp_path).class_names == ("background", "liver", "tumour")
    content = {"labels": {"background": 0, "spleen": 1}, "channel_names": {"0": "CT"}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    source = NiftiFolder(tmp_path)
    assert source.class_names == ("background", "spleen") and source.modality == "ct"


def test_classes_txt_with_one_name_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    (tmp_path / "classes.txt").write_text("background\n")
    with pytest.raises(ValueError, match="write at least 2"):
        NiftiFolder(tmp_path)


@pytest.mark.parametrize("count", [1, 0, -2, 257])
def test_impossible_number_of_classes_is_refused(tmp_path: Path, count: int) -> None:
    write_pair(tmp_path, "a")
    with pytest.raises(ValueError, match=f"{count} classes; pass --num_classes"):
        NiftiFolder(tmp_path, num_classes=count)


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_links_to_nothing_are_refused_by_name(tmp_path: Path, folder: str) -> None:
    for name in ("a", "b"):
        write_pair(tmp_path, name)
    (tmp_path / folder / ".#b.nii.gz").symlink_to("editor")  # hidden
    (tmp_path / folder / "notes.txt").symlink_to("gone.txt")  # no scan
    NiftiFolder(tmp_path, num_classes=2)
    for name in "cdef":
        (tmp_path / folder / f"{name}.nii.gz").symlink_to(tmp_path / "annex" / name)
    message = rf"that lead to no file \(4\): '.*{folder}/c.nii.gz', .*/e.nii.gz' and 1 more; fetch their contents"
    with pytest.raises(FileNotFoundError, match=message):
        NiftiFolder(tmp_path, num_classes=2)


def test_a_label_folder_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    make.write_nifti(tmp_path / "images/a.nii.gz", make.counting_image())
    (tmp_path / "labels").symlink_to(tmp_path / "share")
    with pytest.raises(FileNotFoundError, match=r"symbolic links that lead to no file \(1\): '.*labels'; .* mount"):
        NiftiFolder(tmp_path, num_classes=2)


def test_same_name_with_both_suffixes_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    make.write_nifti(tmp_path / "images/a.nii", make.counting_image())
    with pytest.raises(ValueError, match=r"holds a.nii and a.nii.gz; keep one"):
        NiftiFolder(tmp_path, num_classes=2)


def test_empty_image_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no .nii or .nii.gz file"):
        NiftiFolder(tmp_path, num_classes=2)


@pytest.mark.parametrize("kept", [40, 200])
def test_truncated_image_is_refused_by_name(tmp_path: Path, kept: int) -> None:
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    path = tmp_path / "images/b.nii.gz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"(?s)b.nii.gz: .* again"):
        NiftiFolder(tmp_path, num_classes=2).load("b", with_label=False)


def test_case_with_other_channels_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    make.write_nifti(tmp_path / "images/b.nii.gz", make.counting_image((*make.SHAPE, 3)))
    with pytest.raises(ValueError, match="case b: 3 channels, but this data set has 1, as its first case, a; mend"):
        NiftiFolder(tmp_path, num_classes=2).load("b", with_label=False)


def test_first_image_without_three_axes_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path, "b")
    make.write_nifti(tmp_path / "images/a.nii.gz", np.zeros((5, 4), np.float32))
    with pytest.raises(ValueError, match=r"a.nii.gz: shape \(5, 4\); an image has 3 axes"):
        NiftiFolder(tmp_path, num_classes=2)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (make.corner_label((5, 5, 4)), r"label shape \(5, 5, 4\) differs"),
        (
            make.corner_label(class_id=7),
            "class id 7 is outside 0..1; pass --num_classes 8 .* a checkpoint of 2 classes cannot",
        ),
        (make.corner_label(class_id=255), "class id 255 is outside 0..1; store a mask of 0 and 255 as 0 and 1"),
        (-make.corner_label().astype(np.int16), "class id -1 is outside 0..1; no class has a negative id: store such"),
        (300 * make.corner_label().astype(np.int16), "class id 300 is .* above 255: number the classes anew"),
        (make.corner_label().astype(np.float32) + 0.25, "are no whole numbers, such as 1.25 at"),
    ],
)
def test_bad_label_is_refused_with_the_case(tmp_path: Path, label: np.ndarray, message: str) -> None:
    write_pair(tmp_path, "a", label)
    source = NiftiFolder(tmp_path, num_classes=2)
    source.load("a", with_label=False)  # the label is not looked at
    with pytest.raises(ValueError, match=f"case a: .*{message}"):
        source.load("a", with_label=True)


def test_real_left_atrium_at_full_resolution_loads(shared_data: Path) -> None:
    source = NiftiFolder(shared_data / "LA_1.25mm", num_classes=2)
    volume = source.load(source.labeled_ids()[0], with_label=True)
    assert volume.spacing == pytest.approx((1.25, 1.25, 1.25)) and volume.label is not None


def test_sessions_of_a_bids_subject_are_one_patient(tmp_path: Path) -> None:
    for name in ("patient7_frame01", "sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-02", "subject_3"):
        make.write_nifti(tmp_path / f"images/{name}.nii.gz", make.counting_image())
    source = NiftiFolder(tmp_path, num_classes=2)
    assert [source.patient(case_id) for case_id in source.case_ids()] == [
        "patient7",
        "sub-01",
        "sub-01",
        "sub-02",
        "subject_3",
    ]


def test_scans_in_folders_of_images_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pair(tmp_path, "a", make.corner_label())
    for name in ("p1/b.nii.gz", "p2/c.nii", "notes/readme.txt", ".cache/d.nii.gz"):
        path = tmp_path / "images" / name
        path.parent.mkdir()
        path.touch()
    assert NiftiFolder(tmp_path, num_classes=2).case_ids() == ["a"]
    assert caplog.messages == [f"{tmp_path}/images: the scans in its folders 'p1', 'p2' are left out; move them up"]


@pytest.mark.parametrize(
    ("names", "axes"),
    [
        ("left kidney|right kidney", ()),
        ("Kidney_L|spleen|Kidney_R", ()),
        ("lh-cortex|rh-cortex", ()),
        ("LeftKidney|RightKidney", ()),
        ("LKidney|spleen|RKidney", ()),
        ("rightkidney|leftkidney", ()),
        ("Kidney_Lt|Kidney_Rt", ()),
        ("kidney sin|kidney dex", ()),
        ("bright spot|dark spot", (0,)),
        ("left atrium", (0,)),
        ("kidney_L1|kidney_R1", ()),
        ("vertebra_L1|vertebra_L2", (0,)),
        ("rib|lung", (0,)),
        ("anterior|posterior", (0,)),
    ],
)
def test_classes_that_differ_by_their_side_are_not_mirrored(
    names: str, axes: tuple[int, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make.write_nifti(tmp_path / "images" / "a.nii.gz", make.counting_image())
    (tmp_path / "classes.txt").write_text("\n".join(["background", *names.split("|")]))
    assert NiftiFolder(tmp_path).flip_axes == axes
    assert ("differ by their side" in caplog.text) == (not axes)


@pytest.mark.parametrize(
    ("names", "hint"),
    [(("a_0000", "a_0001"), ", as files of one channel each: --dataset_name decathlon reads them"), (("b",), None)],
)
def test_labels_of_other_names_say_what_images_are_called(
    names: tuple[str, ...], hint: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        make.write_nifti(tmp_path / "images" / f"{name}.nii.gz", make.counting_image())
    make.write_nifti(tmp_path / "labels" / "a.nii.gz", make.corner_label())
    assert not NiftiFolder(tmp_path, num_classes=2).labeled_ids()
    assert f"left out: 'a'; images are called {', '.join(map(repr, names))}{hint or ''}" in caplog.text
    assert ("decathlon" in caplog.text) == (hint is not None)
