"""LA source: what its files and lists may be, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import data_makers as make
import h5py
import numpy as np
import pytest

from dataloaders.la_h5 import LeftAtriumH5

VOXEL = (2.5, 2.5, 2.5)


def write_cases(root: Path, *names: str) -> None:
    for name in names:
        make.write_la_case(root, name, make.counting_image(), make.corner_label())


@pytest.mark.parametrize("size", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, float("nan")), (1.0, 1.0)])
def test_voxel_size_that_is_not_positive_is_refused(tmp_path: Path, size: tuple[float, float, float]) -> None:
    write_cases(tmp_path, "a")
    with pytest.raises(ValueError, match="three positive numbers in mm"):
        LeftAtriumH5(tmp_path, voxel_size=size)


def test_cases_follow_the_train_list_then_the_names(tmp_path: Path) -> None:
    write_cases(tmp_path, "a", "b", "c", "d")
    (tmp_path / "train.list").write_bytes(b"c\r\n\r\na\r\n")
    source = LeftAtriumH5(tmp_path, voxel_size=VOXEL)
    assert source.case_ids() == ["c", "a", "b", "d"]
    assert source.official_train() == ("c", "a") and source.official_test() is None


def test_case_folders_may_lie_in_the_root_itself(tmp_path: Path) -> None:
    write_cases(tmp_path, "a")
    source = LeftAtriumH5(tmp_path / "2018LA_Seg_Training Set", voxel_size=VOXEL)
    assert source.case_ids() == ["a"]


def test_lists_are_found_from_the_folder_of_cases_too(tmp_path: Path) -> None:
    """A split by chance would train on the release's test cases."""
    write_cases(tmp_path, "a", "b", "c")
    (tmp_path / "train.list").write_text("b\n")
    (tmp_path / "test.list").write_text("c\n")
    cases = tmp_path / "2018LA_Seg_Training Set"
    source = LeftAtriumH5(cases, voxel_size=VOXEL)
    assert source.case_ids() == ["b", "a", "c"] and source.official_test() == ("c",)
    (cases / "test.list").write_text("a\n")
    assert source.official_test() == ("a",)
    for name in ("train.list", "test.list"):
        (tmp_path / name).rename(cases / name)
    inside = LeftAtriumH5(tmp_path, voxel_size=VOXEL)
    assert inside.case_ids() == ["b", "a", "c"] and inside.official_test() == ("c",)
    elsewhere = cases.rename(tmp_path / "mine")
    (elsewhere / "test.list").unlink()
    assert LeftAtriumH5(elsewhere, voxel_size=VOXEL).official_test() is None


@pytest.mark.parametrize("name", ["b", "b/mri_norm2.h5"])
def test_links_to_nothing_are_refused(tmp_path: Path, name: str) -> None:
    write_cases(tmp_path, "a")
    link = tmp_path / "2018LA_Seg_Training Set" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "annex")
    with pytest.raises(FileNotFoundError, match=rf"that lead to no file \(1\): '.*{name}'; fetch"):
        LeftAtriumH5(tmp_path, voxel_size=VOXEL)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (make.corner_label((6, 5, 3)), r"label shape \(6, 5, 3\) differs from image shape \(6, 5, 4\)"),
        (make.corner_label(class_id=2), r"class id 2 is outside 0..1; pass --num_classes 3"),
        (make.corner_label() * 0.5, r"8 voxels of the label are no whole numbers, such as 0.5 at \("),
        (-make.corner_label().astype(np.int16), "class id -1 is outside"),
        (np.where(make.corner_label(), np.inf, 0.0), "8 voxels of the label are no whole numbers, such as inf at"),
        (np.where(make.corner_label(), np.nan, 0.0), "8 voxels of the label are no whole numbers, such as nan at"),
    ],
)
def test_bad_label_is_refused_with_the_case(tmp_path: Path, label: np.ndarray, message: str) -> None:
    make.write_la_case(tmp_path, "bad_case", make.counting_image(), label)
    with pytest.raises(ValueError, match=f"case bad_case: .*{message}"):
        LeftAtriumH5(tmp_path, voxel_size=VOXEL).load("bad_case", with_label=True)


def test_missing_dataset_is_a_missing_file_and_says_what_is_there(tmp_path: Path) -> None:
    make.write_la_case(tmp_path, "b", make.counting_image())
    with pytest.raises(FileNotFoundError, match=r"no dataset 'label' \(it has: image\)$"):
        LeftAtriumH5(tmp_path, voxel_size=VOXEL).load("b", with_label=True)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = make.write_la_case(tmp_path, "a", make.counting_image(), make.corner_label())
    path.write_bytes(path.read_bytes()[:100])
    source = LeftAtriumH5(tmp_path, voxel_size=VOXEL)
    with pytest.raises(ValueError, match=r"mri_norm2.h5 is not a readable HDF5 file .* copy it again"):
        source.load("a", with_label=False)
    with pytest.raises(ValueError, match="is not a readable HDF5 file"):
        source.labeled_ids()


@pytest.mark.parametrize("kind", [KeyError, RuntimeError, TypeError])
def test_whatever_h5py_raises_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def damaged(*_: object) -> bool:
        raise kind("bad local heap signature")

    write_cases(tmp_path, "a")
    monkeypatch.setattr(h5py.Group, "__contains__", damaged)
    source = LeftAtriumH5(tmp_path, voxel_size=VOXEL)
    for read in (source.labeled_ids, lambda: source.load("a", with_label=True), lambda: source.grid("a")):
        with pytest.raises(ValueError, match=r"mri_norm2.h5 is not a readable HDF5 file \(.*bad local heap.*copy it"):
            read()


def test_image_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with h5py.File(make.write_la_case(tmp_path, "a", make.counting_image()), "a") as file:
        del file["image"]
        file.create_group("image")
    with pytest.raises(ValueError, match=r"mri_norm2.h5: 'image' is a Group; store it as a dataset"):
        LeftAtriumH5(tmp_path, voxel_size=VOXEL).grid("a")


def test_image_with_four_axes_is_refused(tmp_path: Path) -> None:
    make.write_la_case(tmp_path, "a", make.counting_image((2, 2, 2, 2)))
    with pytest.raises(ValueError, match=r"expected \(X, Y, Z\)"):
        LeftAtriumH5(tmp_path, voxel_size=VOXEL).load("a", with_label=False)


def test_more_classes_get_names(tmp_path: Path) -> None:
    write_cases(tmp_path, "a")
    source = LeftAtriumH5(tmp_path, voxel_size=VOXEL, num_classes=3, modality="ct")
    assert source.class_names == ("background", "left atrium", "class 2") and source.modality == "ct"


def test_real_left_atrium_has_80_cases_and_a_train_list_alone(shared_data: Path) -> None:
    source = LeftAtriumH5(shared_data / "LA_2.5mm", voxel_size=VOXEL)
    assert len(source.case_ids()) == 80 == len(source.official_train() or ())
    assert source.official_test() is None
    volume = source.load(source.case_ids()[0], with_label=True)
    assert volume.label is not None and 100 < volume.label.sum() < volume.label.size / 4
    assert volume.spacing == VOXEL
