"""DICOM: one folder with one series per case, read by SimpleITK, with a NIfTI label beside it or none."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np

from dataloaders.base import SOURCES
from dataloaders.case_lists import is_nifti, refuse_broken_links, some
from dataloaders.class_names import choose_modality, fit_class_names, plausible_flips, stated_class_names
from dataloaders.dicom_series import read_dicom_series
from dataloaders.dicom_tags import kind_of, read_tags
from dataloaders.file_source import FileSource
from dataloaders.geometry import Spacing
from dataloaders.nifti_folder import list_labels, list_nifti

logger = logging.getLogger(__name__)

LABEL_FOLDER = "labels"


@SOURCES.register("dicom")
class DicomFolders(FileSource):
    """Cases ``<id>/`` with the files of one series; label ``<id>.nii.gz`` in the root or in its ``labels/``, or none.

    The number of classes comes from ``num_classes``, or from a ``dataset.json`` or ``classes.txt`` in the root, as in
    ``NiftiFolder``. The modality is that of the DICOM headers, which must agree, the patient of a case that of its own.

    Args:
        root: Folder of the case folders.
        num_classes: Classes with the background; None to take what the root states.
        modality: "mr" or "ct"; None to take the DICOM headers'.
    """

    in_channels = 1
    format_name = "dicom"

    def __init__(self, root: Path, *, num_classes: int | None = None, modality: str | None = None) -> None:
        self.root = root
        refuse_broken_links(root.iterdir())
        folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        self.images = {path.name: path for path in folders if path.name != LABEL_FOLDER}
        self._headers = {case_id: read_tags(folder) for case_id, folder in self.images.items()}
        self._leave_out_what_is_no_scan()
        self._name_inner_nifti()
        if not self.images:
            raise FileNotFoundError(
                f"{root} has no case folders; put each case's DICOM series into a folder of its own"
            )
        beside = list_nifti(root)
        inside = list_labels(root / LABEL_FOLDER)
        both = [case_id for case_id in beside if case_id in inside]
        if both:
            raise ValueError(f"case {both[0]} has the labels {beside[both[0]]} and {inside[both[0]]}; keep one")
        self.labels = {**beside, **inside}
        self.warn_of_orphans()
        self.class_names = fit_class_names(stated_class_names(root), num_classes, str(root))
        self.num_classes = len(self.class_names)
        self.flip_axes = plausible_flips(self.class_names)
        self.modality = self._fit_modality(modality)
        self._patients: dict[str, str] | None = None

    def _leave_out_what_is_no_scan(self) -> None:
        others = {case_id: tags.modality for case_id, tags in self._headers.items() if tags and not tags.is_scan}
        if others:
            kinds, names = ", ".join(sorted(set(others.values()))), some(list(others))
            logger.warning("%s: no scans by their headers (%s), left out: %s", self.root, kinds, names)
        for case_id in others:
            del self.images[case_id], self._headers[case_id]

    def _name_inner_nifti(self) -> None:
        hidden = [case_id for case_id, folder in self.images.items() if _holds_nifti(folder)]
        if hidden:
            text = "%s: NIfTI files within the folders of cases are left out: %s; a label is <id>.nii.gz beside them"
            logger.warning(text, self.root, some(hidden))

    def _fit_modality(self, asked: str | None) -> str:
        """What was asked for, else that of the first header.

        Raises:
            ValueError: If nothing was asked for and the headers say both CT and another modality.
        """
        found = {case_id: header.modality for case_id, header in self._headers.items() if header and header.modality}
        chosen = choose_modality(asked, kind_of(next(iter(found.values()), "")))
        others = [case_id for case_id, stated in found.items() if kind_of(stated) != chosen]
        if not others:
            return chosen
        fewer = f"{len(others)} of {len(found)} cases are {found[others[0]]} by their DICOM headers: {some(others)}"
        if asked is None:
            raise ValueError(
                f"{self.root}: {fewer}, the first case is {chosen.upper()}; keep one modality per folder, or pass "
                "--modality to have all normalised alike"
            )
        logger.warning("%s: %s; they are normalised as %s", self.root, fewer, chosen.upper())
        return chosen

    def patient(self, case_id: str) -> str:
        """Cases with one PatientID are of one patient; without, as in the other folder formats."""
        if self._patients is None:
            self._patients = self._patient_ids()
        return self._patients.get(case_id) or super().patient(case_id)

    def _patient_ids(self) -> dict[str, str]:
        """PatientID per case by its header; but none that half of the cases have, for an anonymiser wrote it."""
        empty = [case_id for case_id, header in self._headers.items() if header is None]
        if empty:
            raise ValueError(f"{self.root}: no DICOM file in {some(empty)}; put the series there, or remove the folder")
        ids = {case_id: header.patient for case_id, header in self._headers.items() if header}
        nameless = [case_id for case_id, found in ids.items() if not found]
        if nameless:
            logger.warning(
                "%s: no PatientID in %s, so that each counts as a patient of its own, but for names after BIDS; where "
                "one patient has several cases, give lists that keep them together",
                self.root,
                some(nameless),
            )
        commonest, count = Counter(ids.values()).most_common(1)[0]
        if commonest and count >= max(3, len(ids) / 2):
            logger.warning(
                "%s: %d of %d cases have the same PatientID, so that each counts as a patient of its own; where one "
                "patient has several cases, give lists that keep them together",
                self.root,
                count,
                len(ids),
            )
            ids = {case_id: found for case_id, found in ids.items() if found != commonest}
        return {case_id: f"PatientID {found}" for case_id, found in ids.items() if found}

    def states_orientation(self, case_id: str) -> bool:
        """Always; ``grid`` would read the voxels for it."""
        return True

    def read_image(self, case_id: str) -> tuple[np.ndarray, np.ndarray, Spacing]:
        """Read one series."""
        return read_dicom_series(self.images[case_id])


def _holds_nifti(folder: Path) -> bool:
    return any(is_nifti(path.name) for path in folder.iterdir())
