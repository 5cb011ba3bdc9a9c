"""What a prediction may write: no output is an input, however many of both there are."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import data_makers as make
import pytest

from myutils import scan_inputs
from myutils.scan_inputs import Scan, find_scans, require_free_outputs

SERIES = ("scans/p1", "scans/p2")


def test_outputs_of_before_are_looked_at_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans, outputs = [], []
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    for name in map(str, range(50)):
        for folder in ("in", "out"):
            (tmp_path / folder / f"{name}.nii.gz").touch()
        scans.append(Scan(name, tmp_path / "in" / f"{name}.nii.gz"))
        outputs.append(tmp_path / "out" / f"{name}.nii.gz")
    looked, stat = [], Path.stat

    def counted(path: Path, **options: Any) -> os.stat_result:
        looked.append(path)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", counted)
    require_free_outputs(scans, outputs)
    assert 0 < len(looked) <= 10 * 50  # not the 50 * 50 of each with each
    outputs[7].unlink()
    outputs[7].hardlink_to(scans[8].path)
    with pytest.raises(ValueError, match=r"out/7\.nii\.gz is an input and would be overwritten"):
        require_free_outputs(scans, outputs)


@pytest.mark.parametrize(
    ("inputs", "folder"),
    [
        (SERIES, "scans"),
        (SERIES, "scans/labels"),
        (SERIES, "scans/p2"),
        (("images/a.nii",), "labels"),
        (("imagesTr/a.nii.gz",), "labelsTr"),
    ],
)
def test_predictions_are_not_put_where_training_looks_for_labels(
    tmp_path: Path, inputs: tuple[str, ...], folder: str
) -> None:
    scans = [Scan(Path(name).name.partition(".")[0], tmp_path / name) for name in inputs]
    for scan in scans:
        (scan.path if inputs == SERIES else scan.path.parent).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"--output .*/{folder}: a training would take the predictions there"):
        require_free_outputs(scans, [tmp_path / folder / f"{scan.name}.nii.gz" for scan in scans])
    require_free_outputs(scans, [tmp_path / "out" / f"{scan.name}.nii.gz" for scan in scans])


@pytest.mark.parametrize(("start", "source", "folder"), [("images", ".", "../labels"), ("", "link", "labels")])
def test_labels_are_found_however_the_scans_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, source: str, folder: str
) -> None:
    make.write_nifti(tmp_path / "images" / "a.nii.gz", make.counting_image())
    (tmp_path / "labels").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    monkeypatch.chdir(tmp_path / start)
    with pytest.raises(ValueError, match="a training would take the predictions there"):
        require_free_outputs(find_scans(Path(source)), [Path(folder) / "b.nii.gz"])


def test_predictions_among_series_are_no_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_inputs, "_holds_series", lambda folder: folder.name == "p1")
    for name in ("p1", "empty", "labels"):
        (tmp_path / name).mkdir()
    make.write_nifti(tmp_path / "predicted" / "p1.nii.gz", make.counting_image())
    assert [scan.name for scan in find_scans(tmp_path)] == ["empty", "p1"]  # an empty one is named when it is read


def test_a_prediction_does_not_lie_beside_its_scan_as_one_more_file_of_the_case(tmp_path: Path) -> None:
    scans = [Scan("a", tmp_path / "a.nii"), Scan("b", tmp_path / "b.nii.gz")]
    with pytest.raises(ValueError, match=r"a\.nii\.gz would lie beside the scan of the same name"):
        require_free_outputs(scans, [tmp_path / "a.nii.gz"])
    require_free_outputs(scans, [tmp_path / "a_prob.nii.gz"])
    with pytest.raises(ValueError, match=r"c\.nii\.gz would lie beside the scan of the same name"):
        require_free_outputs([Scan("c", tmp_path / "c.NII.GZ")], [tmp_path / "c.nii.gz"])


def test_segmentations_and_inner_folders_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name, modality in (("a", "MR"), ("b", "SEG")):
        make.write_dicom(tmp_path / name, make.counting_image(), modality=modality)
    assert [scan.name for scan in find_scans(tmp_path)] == ["a"]
    assert "no scans by their headers, as segmentations are, left out: 'b'" in caplog.text
    with pytest.raises(ValueError, match="b: SEG by its header, no scan"):
        find_scans(tmp_path / "b")
    make.write_dicom(tmp_path / "a" / "inner", make.counting_image())
    assert [scan.name for scan in find_scans(tmp_path / "a")] == ["a"]
    assert "a is a DICOM series; its 1 folders are left out" in caplog.text
