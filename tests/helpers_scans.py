"""Shared by the tests of the two inference scripts: data on disk and a checkpoint that was trained on them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its usual name
from conftest import BallSource
from helpers_runs import small_trainer
from scipy.spatial.transform import Rotation

from dataloaders.base import SOURCES, SourceOptions

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_cohort(root: Path, *, cases: int = 8, labeled: int = 6, channels: int = 1, prefix: str = "ball") -> Path:
    """A folder in the ``nifti`` format with the balls of ``BallSource``; the first ``labeled`` cases have a label."""
    source = BallSource(cases=cases, labeled=labeled, channels=channels)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(source.class_names))
    for case_id in source.case_ids():
        volume = source.load(case_id, with_label=True)
        image = np.moveaxis(volume.image, 0, -1) if channels > 1 else volume.image[0]
        name = f"{case_id.replace('ball', prefix)}.nii.gz"
        nib.save(nib.Nifti1Image(image, volume.affine), root / "images" / name)
        if case_id in source.labeled_ids():
            nib.save(nib.Nifti1Image(volume.label, volume.affine), root / "labels" / name)
    return root


def trained_run(root: Path, folder: Path, **changes: object) -> Path:
    """Train two steps on a cohort on disk; returns the checkpoint."""
    source = SOURCES.get("nifti").from_options(SourceOptions(root=root))
    settings = {"dataset_name": "nifti", "dataset_path": root, "max_iteration": 2, **changes}
    trainer = small_trainer(source, folder, **settings)
    trainer.read_labels()
    trainer.fit()
    return folder / "last.pt"


def oblique_affine(spacing: tuple[float, float, float] = (0.7, 1.2, 3.0)) -> np.ndarray:
    """A turned grid with a mirrored first axis and an origin off zero."""
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", [10, 20, -30], degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.diag([-spacing[0], spacing[1], spacing[2]])
    affine[:3, 3] = [-50.5, 30.25, 7.125]
    return affine


def write_dicom(folder: Path, voxels: np.ndarray, affine: np.ndarray, modality: str = "MR") -> sitk.Image:
    """Write integer voxels (X, Y, Z) as one DICOM series; returns the image as ITK knows it.

    ``affine`` must be right-handed: DICOM derives the slice axis from the two others, and GDCM sorts slices along it.
    """
    folder.mkdir(parents=True)
    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(voxels.astype(np.int16).transpose(2, 1, 0))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    direction = np.reshape(image.GetDirection(), (3, 3))
    uid = "1.2.826.0.1.3680043.2.1125.1"
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index in range(image.GetDepth()):
        plane = image[:, :, index]
        position = image.TransformIndexToPhysicalPoint((0, 0, index))
        tags = {
            "0008|0060": modality,
            "0020|000d": f"{uid}.1",
            "0020|000e": uid,
            "0008|0018": f"{uid}.2.{index + 1}",
            "0020|0013": str(index + 1),
            "0020|0032": "\\".join(f"{value:.10g}" for value in position),
            "0020|0037": "\\".join(f"{value:.10g}" for value in (*direction[:, 0], *direction[:, 1])),
        }
        for key, value in tags.items():
            plane.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{index:03d}.dcm"))
        writer.Execute(plane)
    return image
