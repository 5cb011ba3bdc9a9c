"""predict_3d.py from the command line: geometry of every kind of input, bad files, refused starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its usual name
from helpers_scans import oblique_affine, trained_run, write_cohort, write_dicom

import predict_3d
from dataloaders.say_once import warn_once

HEADER_FIELDS = (
    "qform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "sform_code",
    "srow_x",
    "srow_y",
    "srow_z",
)
SHAPE = (19, 14, 9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_cohort(tmp_path_factory.mktemp("data") / "balls")
    return trained_run(root, tmp_path_factory.mktemp("runs") / "run", method="supervised")


@pytest.fixture(scope="module")
def two_channel_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_cohort(tmp_path_factory.mktemp("data") / "two", channels=2)
    return trained_run(root, tmp_path_factory.mktemp("runs") / "run", method="supervised", spacing=(2.0, 2.0, 2.0))


def predict(checkpoint: Path, source: Path, output: Path, *flags: str) -> int:
    return predict_3d.main(["--checkpoint", str(checkpoint), "--input", str(source), "--output", str(output), *flags])


def scan(path: Path, *, shape: tuple[int, ...] = SHAPE, codes: tuple[int, int] = (1, 1), units: str = "mm") -> Path:
    """A noisy oblique scan whose sform lies 1 mm beside its qform."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=shape).astype(np.float32), oblique_affine())
    image.set_qform(oblique_affine(), codes[0])
    beside = oblique_affine()
    beside[0, 3] += 1
    image.set_sform(beside, codes[1])
    image.header.set_xyzt_units(units)
    nib.save(image, path)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        predict(*arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("codes", [(1, 1), (0, 2), (3, 0), (0, 0), (1, 4)])
@pytest.mark.parametrize("units", ["mm", "unknown"])
def test_label_map_has_the_geometry_of_its_input(
    checkpoint: Path, tmp_path: Path, codes: tuple[int, int], units: str
) -> None:
    path = scan(tmp_path / "a.scan.nii.gz", codes=codes, units=units)
    assert predict(checkpoint, path, tmp_path / "out", "--probabilities") == 0
    before, after = nib.load(path), nib.load(tmp_path / "out" / "a.scan.nii.gz")
    probabilities = nib.load(tmp_path / "out" / "a.scan_prob.nii.gz")
    assert after.shape == before.shape and probabilities.shape == (*SHAPE, 3)
    assert after.get_data_dtype() == np.uint8 and probabilities.get_data_dtype() == np.float32
    for image in (after, probabilities):
        np.testing.assert_array_equal(image.affine, before.affine)
        np.testing.assert_array_equal(image.header["pixdim"][:4], before.header["pixdim"][:4])
        assert image.header["xyzt_units"] == before.header["xyzt_units"]
        for name in HEADER_FIELDS:
            np.testing.assert_array_equal(image.header[name], before.header[name])
    values = np.asarray(probabilities.dataobj)
    np.testing.assert_allclose(values.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(values.argmax(-1), np.asarray(after.dataobj))
    if codes != (0, 0):
        itk_before, itk_after = sitk.ReadImage(str(path)), sitk.ReadImage(str(tmp_path / "out" / "a.scan.nii.gz"))
        assert itk_after.GetSize() == itk_before.GetSize()
        assert itk_after.GetDirection() == itk_before.GetDirection() and itk_after.GetOrigin() == itk_before.GetOrigin()


def test_nifti_2_stays_nifti_2(checkpoint: Path, tmp_path: Path) -> None:
    image = nib.Nifti2Image(np.random.default_rng(0).normal(size=SHAPE), oblique_affine((1 / 3, 1 / 7, 3)))
    nib.save(image, tmp_path / "a.nii")
    assert predict(checkpoint, tmp_path / "a.nii", tmp_path / "out") == 0
    after = nib.load(tmp_path / "out" / "a.nii.gz")
    assert isinstance(after, nib.Nifti2Image)
    np.testing.assert_array_equal(after.affine, nib.load(tmp_path / "a.nii").affine)


def test_multi_channel_scan_gives_a_3d_label_map(two_channel_checkpoint: Path, tmp_path: Path) -> None:
    path = scan(tmp_path / "in" / "four.nii.gz", shape=(*SHAPE, 2))
    scan(tmp_path / "in" / "three.nii.gz")
    assert predict(two_channel_checkpoint, path.parent, tmp_path / "out") == 1  # one has a single channel
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["four.nii.gz"]
    after = nib.load(tmp_path / "out" / "four.nii.gz")
    assert after.shape == SHAPE
    np.testing.assert_array_equal(after.affine, nib.load(path).affine)


def test_files_of_single_channels_are_joined_as_nnunet_names_them(
    two_channel_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = nib.load(scan(tmp_path / "both.nii.gz", shape=(*SHAPE, 2)))
    voxels = np.asarray(both.dataobj)
    folder = tmp_path / "in"
    folder.mkdir()
    for channel in range(2):
        nib.save(nib.Nifti1Image(voxels[..., channel], both.affine), folder / f"both_000{channel}.nii.gz")
        shutil.copy(folder / f"both_000{channel}.nii.gz", folder / f"moved_000{channel}.nii.gz")
    nib.save(nib.Nifti1Image(voxels[..., 0], np.eye(4)), folder / "moved_0001.nii.gz")
    shutil.copy(folder / "both_0000.nii.gz", folder / "single_0000.nii.gz")
    shutil.copy(tmp_path / "both.nii.gz", folder / "whole_0000.nii.gz")
    shutil.copy(tmp_path / "both.nii.gz", folder / "whole_0001.nii.gz")
    (folder / "broken_0000.nii.gz").write_bytes(b"rubbish")
    shutil.copy(folder / "both_0000.nii.gz", folder / "broken_0001.nii.gz")
    assert predict(two_channel_checkpoint, folder, tmp_path / "out") == 1
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["both.nii.gz", "whole_0000.nii.gz", "whole_0001.nii.gz"]
    joined, whole = (nib.load(tmp_path / "out" / name) for name in written[:2])
    np.testing.assert_array_equal(np.asarray(joined.dataobj), np.asarray(whole.dataobj))
    np.testing.assert_array_equal(joined.affine, both.affine)
    err = capsys.readouterr().err
    assert "3 of 6 scans segmented" in err and "is not on the grid of" in err and "single_0000.nii.gz: skipped" in err
    assert "1 channels, the network takes 2; store them in one 4D file" in err
    assert "failed: broken, moved, single_0000" in err


def test_bad_files_are_named_and_skipped(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    good = scan(folder / "b_good.nii.gz")
    (folder / "a_truncated.nii.gz").write_bytes(good.read_bytes()[:300])
    (folder / "c_text.nii").write_text("no image")
    (folder / "d_empty.nii.gz").write_bytes(b"")
    scan(folder / "e_channels.nii.gz", shape=(*SHAPE, 2))
    holes = np.ones(SHAPE, np.float32)
    holes[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(holes, np.eye(4)), folder / "f_nan.nii.gz")
    shutil.copy(good, folder / "g_good.nii.gz")
    (folder / "._b_good.nii.gz").write_bytes(b"hidden")
    (folder / "notes.txt").write_text("left alone")
    assert predict(checkpoint, folder, tmp_path / "out") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b_good.nii.gz", "g_good.nii.gz"]
    err = capsys.readouterr().err
    for name in ("a_truncated.nii.gz", "c_text.nii", "d_empty.nii.gz", "e_channels.nii.gz", "f_nan.nii.gz"):
        assert f"{name}: skipped: " in err
    assert "2 channels, the network takes 1" in err and "NaN" in err and "2 of 7 scans segmented" in err
    assert "Traceback" not in err


def test_suffixes_in_capitals_are_read_and_other_formats_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan(tmp_path / "in" / "a.nii.gz").rename(tmp_path / "in" / "a.NII.GZ")
    (tmp_path / "in" / "b.mha").write_bytes(b"")
    assert predict(checkpoint, tmp_path / "in", tmp_path / "out") == 0
    assert predict(checkpoint, tmp_path / "in" / "a.NII.GZ", tmp_path / "out", "--existing", "replace") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.nii.gz"]
    assert capsys.readouterr().err.count("left out: 1 .mha; convert them to .nii.gz") == 1


def test_dicom_series_and_folders_of_series(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voxels = np.random.default_rng(0).integers(0, 400, SHAPE)
    right_handed = oblique_affine() @ np.diag([-1.0, 1.0, 1.0, 1.0])
    reference = write_dicom(tmp_path / "study" / "first", voxels, right_handed)
    assert predict(checkpoint, tmp_path / "study" / "first", tmp_path / "one", "--probabilities") == 0
    after = sitk.ReadImage(str(tmp_path / "one" / "first.nii.gz"))
    assert after.GetSize() == reference.GetSize()
    for name in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(after, name)(), getattr(reference, name)(), atol=1e-4)
    assert nib.load(tmp_path / "one" / "first_prob.nii.gz").shape == (*SHAPE, 3)
    write_dicom(tmp_path / "study" / "second", voxels, right_handed, modality="CT")
    capsys.readouterr()
    (tmp_path / "study" / "third").mkdir()
    assert predict(checkpoint, tmp_path / "study", tmp_path / "many") == 1  # the third folder is empty
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["first.nii.gz", "second.nii.gz"]
    told = capsys.readouterr().err
    assert (
        told.count("by its header") == 1
        and "second is CT by its header, and the network was trained with --modality mr" in told
    )
    one, many = (nib.load(tmp_path / name / "first.nii.gz").get_fdata() for name in ("one", "many"))
    np.testing.assert_array_equal(one, many)


def test_a_scan_is_segmented_alike_as_nifti_and_as_dicom(tmp_path: Path) -> None:
    root = write_cohort(tmp_path / "balls")
    run = trained_run(root, tmp_path / "run", method="supervised", orientation="ras")
    voxels = np.random.default_rng(0).integers(0, 400, SHAPE)
    as_ras = nib.Nifti1Image(voxels.astype(np.int16), np.diag([1.0, 1.0, 2.0, 1.0]))
    nib.save(as_ras, tmp_path / "a.nii.gz")
    as_lps = nib.as_closest_canonical(as_ras).as_reoriented(np.array([[0, -1], [1, -1], [2, 1]]))
    write_dicom(tmp_path / "b", np.asarray(as_lps.dataobj), as_lps.affine)
    assert predict(run, tmp_path / "a.nii.gz", tmp_path / "out") == 0 == predict(run, tmp_path / "b", tmp_path / "out")
    first, second = (nib.load(tmp_path / "out" / f"{name}.nii.gz") for name in "ab")
    assert nib.aff2axcodes(second.affine) == ("L", "P", "S")
    found = np.asarray(nib.as_closest_canonical(second).dataobj)
    assert np.unique(found).size > 1
    np.testing.assert_array_equal(found, np.asarray(first.dataobj))


def test_axes_that_are_taken_as_stored_are_named_once(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_once.cache_clear()
    run = trained_run(write_cohort(tmp_path / "balls"), tmp_path / "run", method="supervised", orientation="stored")
    for name in ("a", "b"):
        scan(tmp_path / f"in/{name}.nii.gz")
    scan(tmp_path / "in/c.nii.gz", codes=(0, 0))
    assert predict(run, tmp_path / "in", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert said.count("takes axes as stored, here LAS") == 1 and said.count("as stored, here without directions") == 1
    assert predict(checkpoint, tmp_path / "in/a.nii.gz", tmp_path / "turned") == 0
    assert "as stored" not in capsys.readouterr().err


def test_inputs_are_never_overwritten(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scan(tmp_path / "a.nii.gz")
    before = path.read_bytes()
    assert "would be overwritten" in refused(capsys, checkpoint, path, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert "would be overwritten" in refused(capsys, checkpoint, path, tmp_path / "link")
    (tmp_path / "hard").mkdir()
    (tmp_path / "hard" / "a.nii.gz").hardlink_to(path)
    assert "would be overwritten" in refused(capsys, checkpoint, path, tmp_path / "hard")
    scan(tmp_path / "in" / "b.nii.gz")
    scan(tmp_path / "in" / "b_prob.nii.gz")
    out = tmp_path / "out"
    assert "two inputs" in refused(capsys, checkpoint, tmp_path / "in", out, "--probabilities")
    assert path.read_bytes() == before and not out.exists()


def test_files_of_before_are_replaced_on_request_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        scan(tmp_path / "images" / f"{name}.nii.gz")
    label = scan(tmp_path / "corrected" / "b.nii.gz")  # by an expert
    before = label.read_bytes()
    message = refused(capsys, checkpoint, tmp_path / "images", label.parent)
    assert "b.nii.gz exists already, and 0 more" in message and "--existing replace" in message
    assert label.read_bytes() == before and len(list(label.parent.iterdir())) == 1
    assert predict(checkpoint, tmp_path / "images", label.parent, "--existing", "keep") == 0
    assert label.read_bytes() == before and (label.parent / "a.nii.gz").exists()
    assert "1 of 2 scans are done already" in capsys.readouterr().err
    assert predict(checkpoint, tmp_path / "images", label.parent, "--existing", "keep") == 0  # nothing is left to do
    assert predict(checkpoint, tmp_path / "images", label.parent, "--existing", "replace") == 0
    assert label.read_bytes() != before


def test_labels_beside_series_are_not_segmented(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = tmp_path / "scans"
    upright = np.diag([-1.0, -1.0, 2.0, 1.0])
    write_dicom(scans / "patient01", np.random.default_rng(0).integers(0, 400, SHAPE), upright)
    scan(scans / "patient01.nii.gz")  # its label, where training looks for it
    assert predict(checkpoint, scans, tmp_path / "out") == 0
    assert "1 NIfTI files are taken for labels" in capsys.readouterr().err
    np.testing.assert_allclose(nib.load(tmp_path / "out/patient01.nii.gz").affine, upright, atol=1e-5)
    scan(scans / "patient01" / "seg.nii.gz")
    assert "NIfTI files and DICOM series" in refused(capsys, checkpoint, scans / "patient01", tmp_path / "other")
    scan(scans / "patient02.nii.gz")
    assert "NIfTI files and DICOM series" in refused(capsys, checkpoint, scans, tmp_path / "other")


def test_impossible_requests_are_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = scan(tmp_path / "a.nii.gz"), tmp_path / "out"
    assert "no checkpoint at" in refused(capsys, tmp_path / "none.pt", path, out)
    assert "does not exist" in refused(capsys, checkpoint, tmp_path / "none.nii.gz", out)
    (tmp_path / "empty").mkdir()
    assert "no DICOM series" in refused(capsys, checkpoint, tmp_path / "empty", out)
    (tmp_path / "empty" / "b.nii.gz").symlink_to(tmp_path / "annex")
    assert "lead to no file (1): " in refused(capsys, checkpoint, tmp_path / "empty", out)
    (tmp_path / "a.png").write_bytes(b"png")
    assert "pass a .nii or .nii.gz" in refused(capsys, checkpoint, tmp_path / "a.png", out)
    assert "is a file; pass a folder" in refused(capsys, checkpoint, path, tmp_path / "a.png")
    assert "did you mean --overlap" in refused(capsys, checkpoint, path, out, "--overlapp", "0.5")
    with pytest.raises(SystemExit) as stop:
        predict_3d.main(["--checkpoint", str(checkpoint)])
    assert stop.value.code == 2 and "--input, --output: required" in capsys.readouterr().err
    assert not out.exists()
