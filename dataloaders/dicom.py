"""DICOM: one folder with one series per case, read by SimpleITK, with a NIfTI label beside it or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 - its usual name

from dataloaders.base import SOURCES
from dataloaders.class_names import choose_modality, fit_class_names, stated_class_names
from dataloaders.file_source import FileSource
from dataloaders.geometry import Spacing, read_dicom_series
from dataloaders.nifti_folder import list_nifti

LABEL_FOLDER = "labels"
MODALITY_TAG = "0008|0060"


@SOURCES.register("dicom")
class DicomFolders(FileSource):
    """Cases ``<id>/`` with the files of one series; label ``<id>.nii.gz`` in the root or in its ``labels/``, or none.

    The number of classes comes from ``num_classes``, or from a ``dataset.json`` or ``classes.txt`` in the root, as
    in ``NiftiFolder``. The modality is that of the first case's DICOM header.

    Args:
        root: Folder of the case folders.
        num_classes: Classes with the background; None to take what the root states.
        modality: "mr" or "ct"; None to take the DICOM header's.
    """

    in_channels = 1
    format_name = "dicom"

    def __init__(self, root: Path, *, num_classes: int | None = None, modality: str | None = None) -> None:
        self.root = root
        folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        self.images = {path.name: path for path in folders if path.name != LABEL_FOLDER}
        if not self.images:
            raise FileNotFoundError(
                f"{root} has no case folders; put each case's DICOM series into a folder of its own"
            )
        beside = list_nifti(root)
        inside = list_nifti(root / LABEL_FOLDER) if (root / LABEL_FOLDER).is_dir() else {}
        both = [case_id for case_id in beside if case_id in inside]
        if both:
            raise ValueError(f"case {both[0]} has the labels {beside[both[0]]} and {inside[both[0]]}; keep one")
        self.labels = {**beside, **inside}
        self.class_names = fit_class_names(stated_class_names(root), num_classes, str(root))
        self.num_classes = len(self.class_names)
        self.modality = choose_modality(modality, header_modality(next(iter(self.images.values()))))

    def read_image(self, case_id: str) -> tuple[np.ndarray, np.ndarray, Spacing]:
        """Read one series."""
        return read_dicom_series(self.images[case_id])


def header_modality(folder: Path) -> str:
    """ "ct" if the first DICOM header of a folder says CT, else "mr"; a folder without DICOM fails later, on load."""
    for path in sorted(folder.iterdir()):
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
        except RuntimeError:  # not a DICOM file, such as a note beside the slices
            continue
        if reader.HasMetaDataKey(MODALITY_TAG):
            return "ct" if reader.GetMetaData(MODALITY_TAG).strip().upper() == "CT" else "mr"
    return "mr"
