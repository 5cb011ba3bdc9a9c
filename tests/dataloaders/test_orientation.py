"""Turning images to the axes of the body: fields known at every point in space, and all 48 ways to store an image."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import data_makers as make
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BallSource
from helpers_runs import small_config
from scipy.spatial.transform import Rotation

from dataloaders.base import Grid, Volume
from dataloaders.geometry import nifti_grid
from dataloaders.la_h5 import LeftAtriumH5
from dataloaders.orientation import Turn, tilt, turned, warn_of_unstated
from dataloaders.preprocess import Preprocess
from dataloaders.survey import survey_grids
from myutils.build import build_preprocess
from myutils.config import RunConfig
from myutils.fitting import fit_to_cases
from myutils.inference import InferenceOptions, predict_label_map, predict_probabilities
from networks.base import NETWORKS

CPU = torch.device("cpu")
STORED = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def scan() -> Volume:
    """Random voxels with axes of RAS+, a label that no turn maps onto itself, and three voxel sizes."""
    rng = np.random.default_rng(0)
    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    affine[:3, 3] = (-30.0, 12.0, 7.0)
    image = rng.normal(size=(2, 12, 10, 8)).astype(np.float32)
    return Volume("case", image, (image[0] > 0.5).astype(np.uint8), affine, (1.0, 1.5, 2.0))


def stored_as(volume: Volume, order: tuple[int, ...], signs: tuple[int, ...]) -> Volume:
    """The same scan in another file: axis ``order[i]`` is the i-th, backwards where ``signs[i]`` is -1."""
    mirrored = [axis - 3 for axis, sign in enumerate(signs) if sign < 0]

    def change(array: np.ndarray) -> np.ndarray:
        ordered = np.moveaxis(array, [axis - 3 for axis in order], (-3, -2, -1))
        return np.ascontiguousarray(np.flip(ordered, mirrored))

    image, label = change(volume.image), change(volume.label)  # type: ignore[arg-type]
    steps = np.diag([*signs, 1.0])
    steps[:3, 3] = [size - 1 if sign < 0 else 0 for size, sign in zip(image.shape[1:], signs, strict=True)]
    affine = volume.affine[:, [*order, 3]] @ steps
    x, y, z = (volume.spacing[axis] for axis in order)
    return Volume(volume.case_id, image, label, affine, (x, y, z))


def rotated(affine: np.ndarray, degrees: float) -> np.ndarray:
    """The grid turned in space about its first axis."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("x", degrees, degrees=True).as_matrix()
    return turn @ affine


@pytest.mark.parametrize(("order", "signs"), STORED)
def test_every_way_to_store_a_scan_gives_the_same_arrays(order: tuple, signs: tuple) -> None:
    volume = scan()
    stored = stored_as(volume, order, signs)
    found = turned(stored, Turn.of(stored.affine, "ras"))
    np.testing.assert_array_equal(found.image, volume.image)
    np.testing.assert_array_equal(found.label, volume.label)
    assert found.affine == pytest.approx(volume.affine) and found.spacing == volume.spacing


def test_lps_by_hand() -> None:
    image = np.arange(6, dtype=np.float32).reshape(1, 3, 2, 1)
    volume = Volume(
        "dicom", image, None, np.array([[-2.0, 0, 0, 9], [0, -1, 0, 5], [0, 0, 4, 0], [0, 0, 0, 1]]), (2, 1, 4)
    )
    found = turned(volume, Turn.of(volume.affine, "ras"))
    assert found.image[0, :, :, 0].tolist() == [[5, 4], [3, 2], [1, 0]]
    assert found.affine.tolist() == [[2, 0, 0, 5], [0, 1, 0, 4], [0, 0, 4, 0], [0, 0, 0, 1]]
    assert found.label is None


def test_oblique_voxels_stay_where_they_are_in_space() -> None:
    volume = stored_as(scan(), (2, 0, 1), (-1, 1, -1))
    oblique = Volume("case", volume.image, volume.label, rotated(volume.affine, 20.0), volume.spacing)
    found = turned(oblique, Turn.of(oblique.affine, "ras"))
    stored, now = np.argwhere(oblique.label), np.argwhere(found.label)
    places = [np.sort(v @ a[:3, :3].T + a[:3, 3], axis=0) for v, a in ((stored, oblique.affine), (now, found.affine))]
    assert len(stored) > 50 and places[0] == pytest.approx(places[1])
    assert Turn.of(found.affine, "ras") == Turn()


def test_ras_is_handed_on_as_it_is() -> None:
    volume = scan()
    assert turned(volume, Turn.of(volume.affine, "ras")) is volume
    stored = stored_as(volume, (2, 0, 1), (-1, 1, 1))
    assert turned(stored, Turn.of(stored.affine, "stored")) is stored


@pytest.mark.parametrize(("order", "signs"), STORED)
@pytest.mark.parametrize("spacing", [None, (1.3, 1.0, 2.5)])
def test_restore_undoes_the_turn(order: tuple, signs: tuple, spacing: tuple | None) -> None:
    volume, preprocess = scan(), Preprocess("mr", spacing, orientation="ras")
    stored = stored_as(volume, order, signs)
    working = preprocess(volume)
    probabilities = np.random.default_rng(1).random((2, *working.image.shape[1:]), dtype=np.float32)
    straight = Volume("case", preprocess.restore(probabilities, volume), volume.label, volume.affine, volume.spacing)
    expected = stored_as(straight, order, signs).image
    found = preprocess.restore(probabilities, stored)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(preprocess.restore(probabilities, stored, slice(2, 5)), expected[:, 2:5], atol=1e-6)
    assert np.allclose(preprocess(stored).image, working.image, atol=1e-5)


@pytest.mark.parametrize("spacing", [None, (1.3, 1.0, 2.5)])
def test_a_prediction_does_not_depend_on_how_the_scan_is_stored(spacing: tuple | None) -> None:
    torch.manual_seed(0)
    network = NETWORKS.get("unet_3d")(2, 3)
    options = InferenceOptions((16, 16, 16), flips=(0,))
    volume = scan()

    def predictions(case: Volume, orientation: str) -> tuple[np.ndarray, np.ndarray]:
        arguments = (network, case, Preprocess("mr", spacing, orientation=orientation), options, CPU)
        return predict_label_map(*arguments), predict_probabilities(*arguments)

    label_map, probabilities = predictions(volume, "ras")
    assert 0.05 < label_map.astype(bool).mean() < 0.999
    differ = 0
    for order, signs in STORED[::5]:
        stored = stored_as(Volume("case", volume.image, label_map, volume.affine, volume.spacing), order, signs)
        found, found_probabilities = predictions(stored, "ras")
        assert found.flags.c_contiguous and (found == stored.label).mean() > 0.999
        expected = stored_as(Volume("", probabilities, label_map, volume.affine, volume.spacing), order, signs).image
        np.testing.assert_allclose(found_probabilities, expected, atol=1e-4)
        differ += bool((predictions(stored, "stored")[0] != stored.label).any())
    assert differ > 5  # as stored, the network sees another scan


def test_tilt_is_the_largest_angle() -> None:
    affine = scan().affine
    assert tilt(affine) == pytest.approx(0, abs=1e-4)
    assert tilt(rotated(affine, 25.0)) == pytest.approx(25)
    assert tilt(rotated(affine, 90.0)) == pytest.approx(0, abs=1e-4)
    assert tilt(rotated(affine, 130.0)) == pytest.approx(40)


class Stored(BallSource):
    """Balls whose grid is turned in space, in degrees per case number."""

    degrees: tuple[float, ...] = (0.0, 0.0, 0.0)
    size = (20, 18, 16)
    oriented = True

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        volume = super().load(case_id, with_label=with_label)
        return Volume(case_id, volume.image, volume.label, self.grid(case_id).affine, volume.spacing)

    def grid(self, case_id: str) -> Grid:
        return Grid(self.size, rotated(np.diag([1.0, 2.0, 1.0, 1.0]), self.degrees[int(case_id[4:])]), self.oriented)


@pytest.mark.parametrize(
    ("degrees", "orientation", "said"),
    [
        ((0.0, 0.0, 0.0), "ras", ""),
        ((10.0, 100.0, 0.0), "ras", "turned to RAS axes (the labelled ones are stored as RAS, RSP)"),
        ((10.0, 100.0, 38.0), "ras", "stored as RAS, RSP"),
        ((10.0, 100.0, 42.0), "stored", "oblique, by up to 42 degrees: axes stay as stored (RAS, RSP)"),
    ],
)
def test_orientation_is_fitted_to_the_labelled_cases(
    degrees: tuple, orientation: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = Stored()
    source.degrees = degrees
    with caplog.at_level(logging.INFO):
        fitted = fit_to_cases(small_config(source), source, ["ball00", "ball01", "ball02"])
    assert fitted.orientation == orientation and not source.label_reads
    assert said in caplog.text and bool(caplog.text) == bool(said)
    asked = fit_to_cases(small_config(source, orientation="stored"), source, ["ball00", "ball01", "ball02"])
    assert asked.orientation == build_preprocess(asked).orientation == "stored"


def test_cases_that_do_not_say_how_they_lie_stay_as_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Stored, "oriented", False)
    source = Stored()
    with caplog.at_level(logging.INFO):
        assert fit_to_cases(small_config(source), source, ["ball00"]).orientation == "stored"
    assert "the labelled cases do not say how they lie" in caplog.text
    assert [record.levelname for record in caplog.records] == ["INFO"]
    for name, codes in (("stated", (0, 1)), ("silent", (0, 0))):
        image = nib.Nifti1Image(np.zeros((3, 4, 5, 2), np.float32), np.diag([2.0, 2, 3, 1]))
        image.set_sform(image.affine, codes[1])
        image.set_qform(image.affine, codes[0])
        nib.save(image, tmp_path / f"{name}.nii")
    stated, silent = (nifti_grid(tmp_path / f"{name}.nii") for name in ("stated", "silent"))
    assert stated.oriented and not silent.oriented
    assert stated.shape == silent.shape == (3, 4, 5) and stated.affine.tolist() == np.diag([2.0, 2, 3, 1]).tolist()


def test_a_case_that_does_not_say_how_it_lies_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class OneSilent(Stored):
        def grid(self, case_id: str) -> Grid:
            return super().grid(case_id)._replace(oriented=case_id != "ball01")

    source = OneSilent()
    fitted = fit_to_cases(small_config(source), source, ["ball00", "ball01", "ball02"])
    assert fitted.orientation == "stored" and [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 of 3 labelled cases do not say how they lie in the body: 'ball01'; write their qform" in caplog.text


def test_cases_of_a_format_without_orientation_are_named_where_they_are_turned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # what runs before may leave a lower one
    names = ["unstated1", "unstated2"]  # no other test's: a warning is said once in a process
    for name in names:
        make.write_la_case(tmp_path, name, make.counting_image((20, 20, 20)))
    source = LeftAtriumH5(tmp_path, voxel_size=(1.0, 1.0, 1.0))
    fitted = fit_to_cases(RunConfig(modality="mr"), source, names[:1]).orientation
    warn_of_unstated(source, names, str(fitted))
    assert fitted == "stored" and not caplog.text  # as in every training on LA
    warn_of_unstated(source, names, "ras")
    assert "2 of 2 cases do not say how they lie in the body" in caplog.text
    assert "'unstated1', 'unstated2'; write" in caplog.text


def test_an_oblique_case_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    volume = scan()
    oblique = Volume("askew", volume.image, None, rotated(volume.affine, 44.0), volume.spacing)
    for orientation in ("stored", "ras", "ras"):
        Preprocess("mr", orientation=orientation)(oblique)
    assert [record.message[:48] for record in caplog.records] == ["case askew lies 44 degrees off the axes of the b"]


def test_patch_follows_the_turned_axes() -> None:
    source = Stored(size=(20, 18, 40))
    grids = [Grid((20, 18, 40), rotated(np.diag([1.0, 2.0, 1.0, 1.0]), 90.0))]
    assert survey_grids(grids, "stored").extent == pytest.approx((20, 36, 40))
    found = survey_grids(grids, "ras")
    assert found.extent == pytest.approx((20, 40, 36)) and found.spacing == pytest.approx((1.0, 1.0, 2.0))
    assert fit_to_cases(small_config(source), source, ["ball00"]).patch_size == (16, 16, 16)  # as the data set says


def test_a_run_of_before_keeps_the_axes_of_its_files() -> None:
    stored = RunConfig(modality="mr").to_dict()
    del stored["orientation"]
    assert build_preprocess(RunConfig.from_dict(stored)).orientation == "stored"


def test_another_orientation_is_refused() -> None:
    with pytest.raises(ValueError, match="orientation 'lps': pass one of ras, stored"):
        Preprocess("mr", orientation="lps")
