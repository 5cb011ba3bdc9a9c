"""DICOM series whose slices lie on no regular grid: refused by name, but for a missing slice."""

from __future__ import annotations

from pathlib import Path

import data_makers as make
import numpy as np
import pytest

from dataloaders import dicom_series
from dataloaders.dicom_series import read_dicom_series

CORONAL = (1, 0, 0, 0, 0, -1, 0, 1, 0)


def add_slices(folder: Path, name: str, **changes: object) -> None:
    """Move slices of the same series, written with ``changes``, into ``folder``."""
    other = make.write_dicom(folder.parent / name, make.counting_image(), **changes)
    for path in other.iterdir():
        path.rename(folder / f"{name}_{path.name}")


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
