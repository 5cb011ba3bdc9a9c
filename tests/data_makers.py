"""Writers of tiny data sets, one per format, and a template of blobs in place of the brain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its usual name

from dataloaders.demo_cohort import CohortSettings
from dataloaders.demo_template import CLASS_NAMES, Template

SHAPE = (6, 5, 4)
AFFINE = np.array([[1.0, 0, 0, -3], [0, 2.0, 0, 4], [0, 0, 3.0, 5], [0, 0, 0, 1]])
TINY_COHORT = CohortSettings(shape=(12, 10, 8), voxel_mm=16.0)


def counting_image(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Float32 voxels with the values 0, 1, 2, ... in C order."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def corner_label(shape: tuple[int, ...] = SHAPE, class_id: int = 1) -> np.ndarray:
    """Zeros with ``class_id`` in the first 2x2x2 voxels, uint8."""
    label = np.zeros(shape, np.uint8)
    label[:2, :2, :2] = class_id
    return label


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE, unit: str = "mm") -> Path:
    """Save voxels (X, Y, Z[, C]) with an affine in ``unit``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


def forget_orientation(path: Path) -> None:
    """Take qform and sform out of a NIfTI file, so that nibabel makes an affine up."""
    image = nib.load(path)
    voxels = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(voxels, None), path)


def write_la_case(root: Path, case_id: str, image: np.ndarray, label: np.ndarray | None = None) -> Path:
    """Save one case as the UA-MT release does."""
    return write_h5(root / "2018LA_Seg_Training Set" / case_id / "mri_norm2.h5", image, label)


def write_h5(path: Path, image: np.ndarray, label: np.ndarray | None = None) -> Path:
    """Save one HDF5 file with ``image`` and, if there is one, ``label``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"] = image
        if label is not None:
            file["label"] = label
    return path


def write_acdc_patient(
    root: Path, patient: str, *, group: str = "NOR", frames: Sequence[int] = (1, 12), label: bool = True
) -> Path:
    """Save a patient of ``training/`` or ``testing/`` as the ACDC release does, the cine included; (X, Y, Z)."""
    folder = root / patient
    name = folder.name
    write_nifti(folder / f"{name}_4d.nii.gz", counting_image((*SHAPE, 3)))
    (folder / "Info.cfg").write_text(f"ED: {frames[0]}\nES: {frames[-1]}\nGroup: {group}\nHeight: 170.0\n")
    for frame in frames:
        write_nifti(folder / f"{name}_frame{frame:02d}.nii.gz", counting_image())
        if label:
            write_nifti(folder / f"{name}_frame{frame:02d}_gt.nii.gz", corner_label(class_id=3))
    return folder


def write_dicom(
    folder: Path,
    voxels: np.ndarray,
    *,
    spacing: Sequence[float] = (0.5, 0.75, 2.0),
    origin: Sequence[float] = (-10.0, 20.0, 30.0),
    direction: Sequence[float] = (1, 0, 0, 0, 1, 0, 0, 0, 1),
    series: str = "1.2.826.0.1.3680043.2.1125.1",
    modality: str = "MR",
    patient: str = "",
    skip: Sequence[int] = (),
    shift: float = 0.0,
    dtype: type[np.integer] = np.int16,
) -> Path:
    """Save voxels (X, Y, Z) as one DICOM series, a file per slice; spacing, origin, direction as in ITK (LPS).

    The names run against the slice order, so that a reader that sorts by name gets it wrong. ``skip`` leaves slices
    out; each lies ``shift`` mm further along x, as with a tilted gantry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(voxels.astype(dtype).transpose(2, 1, 0))  # (X, Y, Z) in ITK
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection([float(value) for value in direction])
    rows = [str(float(direction[k])) for k in (0, 3, 6, 1, 4, 7)]
    depth = image.GetDepth()
    for k in (k for k in range(depth) if k not in skip):
        plane = image[:, :, k]
        x, y, z = image.TransformIndexToPhysicalPoint((0, 0, k))
        tags = {
            "0008|0060": modality,
            "0010|0020": patient,
            "0020|000e": series,
            "0020|000d": series + ".9",
            "0020|0032": "\\".join(str(value) for value in (x + shift * k, y, z)),
            "0020|0037": "\\".join(rows),
            "0020|0013": str(k),
            "0018|0050": str(spacing[2]),
        }
        for key, value in tags.items():
            plane.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{series[-1]}_{depth - k:03d}.dcm"))
        writer.Execute(plane)
    return folder


def blob_template() -> Template:
    """A head of 24^3 voxels of 8 mm: a bright ball (cerebral WM) with five smaller balls, symmetric left to right."""
    grid = np.indices((24, 24, 24)) - 11.5
    labels = np.zeros((24, 24, 24), np.uint8)
    balls = {4: (0, 0, 10.0), 3: (4, 4, 3.5), 1: (0, 0, 2.5), 2: (-5, 3, 2.5), 5: (-4, -5, 3.0), 6: (4, -5, 3.0)}
    for class_id, (y, z, radius) in balls.items():
        labels[grid[0] ** 2 + (grid[1] - y) ** 2 + (grid[2] - z) ** 2 < radius**2] = class_id
    tones = np.linspace(0, 0.9, len(CLASS_NAMES), dtype=np.float32)
    return Template(tones[labels], labels, 8.0)


def describe(root: Path, **content: Any) -> None:
    """The ``dataset.json`` of a decathlon folder with three classes."""
    labels = {"0": "background", "1": "organ", "2": "tumour"}
    (root / "dataset.json").write_text(json.dumps({"labels": labels} | content))


def entry(name: str) -> dict[str, str]:
    """A case of ``dataset.json``."""
    return {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}


def write_case(root: Path, name: str, label: np.ndarray | None = None) -> None:
    """Image and label of a case of a decathlon folder."""
    write_nifti(root / f"imagesTr/{name}.nii.gz", counting_image())
    write_nifti(root / f"labelsTr/{name}.nii.gz", corner_label() if label is None else label)
