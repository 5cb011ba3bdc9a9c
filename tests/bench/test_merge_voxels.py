"""Blocks of voxels become one, in the same place; so were the data of the results made."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import BallSource

from benchmarks import merge_voxels
from dataloaders.base import SOURCES, SourceOptions, Volume
from dataloaders.nifti_folder import NiftiFolder


def test_thick_slices_are_means_of_thin_ones_in_the_same_place(tmp_path: Path) -> None:
    source = BallSource(cases=2, labeled=1)
    merge_voxels.write_folder(source, (1, 1, 3), tmp_path)
    thin = source.load("ball00", with_label=True)
    image, label = (nib.load(tmp_path / kind / "000_ball00.nii.gz") for kind in ("images", "labels"))
    assert image.shape == label.shape == (20, 18, 5)  # 16 slices: the last is left out
    np.testing.assert_allclose(image.get_fdata()[..., 1], thin.image[0, ..., 3:6].mean(-1), atol=1e-6)
    assert (image.affine @ [2, 1, 1, 1]).tolist() == (thin.affine @ [2, 1, 4, 1]).tolist()
    assert thin.label is not None
    np.testing.assert_array_equal(label.get_fdata()[..., 1] > 0, np.median(thin.label[..., 3:6] > 0, axis=-1) > 0)
    assert NiftiFolder(tmp_path).case_ids() == ["000_ball00"]


class Patients(BallSource):
    """Two cases of each patient."""

    def patient(self, case_id: str) -> str:
        return f"P-{int(case_id[4:]) // 2}"


def test_cases_of_a_patient_stay_together_in_the_new_folder(tmp_path: Path) -> None:
    merge_voxels.write_folder(Patients(cases=4, labeled=4), (2, 2, 2), tmp_path)
    made = NiftiFolder(tmp_path)
    assert made.case_ids() == [f"sub-00{n // 2}P{n // 2}_00{n}_ball0{n}" for n in range(4)]
    assert [made.patient(case_id) for case_id in made.case_ids()] == ["sub-000P0"] * 2 + ["sub-001P1"] * 2


def test_merged_voxels_are_blocks_of_small_ones() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (5, 4, 7)).astype(np.uint8)
    case = Volume("a", rng.normal(size=(2, 5, 4, 7)).astype(np.float32), label, np.eye(4), (1.0, 1.0, 1.0))
    for ties in ("lower", "higher"):
        merged = merge_voxels.merge(case, (2, 2, 3), 3, ties=ties)
        assert merged.image.shape == (2, 2, 2, 2) and merged.spacing == (2, 2, 3)
        assert merged.affine[:, 3].tolist() == [0.5, 0.5, 1, 1]
        for place in np.ndindex(2, 2, 2):
            block = tuple(slice(n * step, (n + 1) * step) for n, step in zip(place, (2, 2, 3), strict=True))
            np.testing.assert_allclose(
                merged.image[(slice(None), *place)], case.image[(slice(None), *block)].mean((1, 2, 3)), atol=1e-6
            )
            counts = np.bincount(label[block].ravel(), minlength=3)
            assert merged.label[place] == (np.flatnonzero(counts == counts.max())[0 if ties == "lower" else -1])


def test_a_block_larger_than_a_case_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--factor 1 1 17: more than a case of \(20, 18, 16\) voxels has"):
        merge_voxels.merge(BallSource().load("ball00", with_label=True), (1, 1, 17), 3)


def test_the_left_atrium_of_the_results_is_merged_from_full_size(shared_data: Path) -> None:
    full = NiftiFolder(shared_data / "LA_0.625mm", num_classes=2)
    case_id = full.case_ids()[0]
    options = SourceOptions(shared_data / "LA_2.5mm", voxel_size=(2.5, 2.5, 2.5))
    wanted = SOURCES.get("LA").from_options(options).load(case_id, with_label=True)
    found = merge_voxels.merge(full.load(case_id, with_label=True), (4, 4, 4), 2, ties="higher")
    image = (found.image - found.image.mean()) / found.image.std()
    np.testing.assert_allclose(image, wanted.image, atol=1e-5)
    np.testing.assert_array_equal(found.label, wanted.label)
