"""Plain NIfTI folders: ``images/`` and ``labels/`` matched by file name, a missing label means unlabelled."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path

from dataloaders.base import SOURCES
from dataloaders.case_lists import is_nifti, refuse_broken_links, some, strip_nifti_suffix
from dataloaders.class_names import (
    choose_modality,
    fit_class_names,
    plausible_flips,
    read_dataset_json,
    stated_class_names,
    stated_modality,
)
from dataloaders.file_source import NiftiFiles
from dataloaders.geometry import nifti_channels
from dataloaders.say_once import warn_once

logger = logging.getLogger(__name__)

OTHER_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".hdr")  # of images; .img and .raw go with a header


def list_nifti(folder: Path, names: re.Pattern[str] | None = None) -> dict[str, Path]:
    """NIfTI files of a folder by name without suffix, sorted; none where there is no folder.

    Hidden files, and other names, are left out. Scans in other formats are a warning.

    Raises:
        FileNotFoundError: If the folder, or a NIfTI file in it, is a symbolic link to nothing.
        ValueError: If ``a.nii`` and ``a.nii.gz`` are both there.
    """
    refuse_broken_links([folder])
    files: dict[str, Path] = {}
    others: Counter[str] = Counter()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or path.is_dir():
            continue
        if not is_nifti(path.name):
            others[path.suffix.lower()] += path.suffix.lower() in OTHER_SUFFIXES
            continue
        case_id = strip_nifti_suffix(path.name)
        if names is not None and not names.fullmatch(case_id):
            continue
        if case_id in files:
            raise ValueError(f"{folder} holds {files[case_id].name} and {path.name}; keep one file per case")
        files[case_id] = path
    refuse_broken_links(files.values())
    if others.total():
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.items() if count)
        warn_once(logger, f"{folder}: files that are not NIfTI are left out: {found}; convert them to .nii.gz")
    return files


def list_labels(folder: Path) -> dict[str, Path]:
    """``list_nifti`` of a folder of labels, where folders and DICOM files, such as segmentations, are a warning too."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    lost = [
        entry.name
        for entry in entries
        if not entry.name.startswith(".") and (entry.suffix.lower() == ".dcm" or entry.is_dir())
    ]
    if lost:
        warn_once(
            logger, f"{folder}: labels are NIfTI files, not {some(lost)}; convert what is one to <id>.nii.gz there"
        )
    return list_nifti(folder)


@SOURCES.register("nifti")
class NiftiFolder(NiftiFiles):
    """Cases ``images/<id>.nii.gz`` (or .nii; 4D is multi-channel) with ``labels/<id>.nii.gz`` where there is one.

    The number of classes is never read from labels, since training may not open those of unlabelled cases: it comes
    from ``num_classes``, from ``labels`` in a ``dataset.json``, or from a ``classes.txt`` (a name per line, the
    background first) in the root.

    Args:
        root: Folder with ``images/`` and, where there are labels, ``labels/``.
        num_classes: Classes with the background; None to take the root's dataset.json or classes.txt.
        modality: "mr" or "ct"; None for the dataset.json's, else "mr".
    """

    format_name = "nifti"

    def __init__(self, root: Path, *, num_classes: int | None = None, modality: str | None = None) -> None:
        self.root = root
        if not (root / "images").is_dir():
            raise FileNotFoundError(f"{root} has no folder images/; put the scans there, one .nii.gz per case")
        self.images = list_nifti(root / "images")
        if not self.images:
            raise FileNotFoundError(f"{root / 'images'} holds no .nii or .nii.gz file")
        folders = [path for path in sorted((root / "images").iterdir()) if path.is_dir() and path.name[0] != "."]
        nested = [path.name for path in folders if any(is_nifti(inside.name) for inside in path.iterdir())]
        if nested:
            warn_once(logger, f"{root / 'images'}: the scans in its folders {some(nested)} are left out; move them up")
        self.labels = list_labels(root / "labels")
        self.warn_of_orphans()
        self.class_names = fit_class_names(stated_class_names(root), num_classes, str(root))
        self.num_classes = len(self.class_names)
        self.flip_axes = plausible_flips(self.class_names)
        description = root / "dataset.json"
        stated = stated_modality(read_dataset_json(description)) if description.is_file() else "mr"
        self.modality = choose_modality(modality, stated)
        self.in_channels = nifti_channels(next(iter(self.images.values())))
