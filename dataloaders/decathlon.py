"""Medical Segmentation Decathlon and nnU-Net raw folders: a ``dataset.json`` and NIfTI files.

Source: Simpson et al. 2019 (MSD), arXiv:1902.09063; Isensee et al. 2021 (nnU-Net), doi:10.1038/s41592-020-01008-z.
"""

from __future__ import annotations

import logging
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.base import SOURCES, Grid, lookup_case
from dataloaders.case_lists import (
    CHANNEL_SUFFIX,
    NIFTI_SUFFIXES,
    is_nifti,
    refuse_broken_links,
    some,
    strip_nifti_suffix,
)
from dataloaders.class_names import (
    choose_modality,
    fit_class_names,
    names_from_labels,
    plausible_flips,
    read_dataset_json,
    stated_modality,
)
from dataloaders.file_source import FileSource, warn_of_orphans
from dataloaders.geometry import Spacing, nifti_channels, nifti_grid, read_nifti_channels
from dataloaders.nifti_folder import list_labels, list_nifti
from dataloaders.say_once import warn_once

logger = logging.getLogger(__name__)

CaseTable = dict[str, tuple[tuple[Path, ...], Path | None]]  # id -> (channel files, label file)


@SOURCES.register("decathlon")
class DecathlonFolder(FileSource):
    """Cases of ``training`` (MSD) or of ``imagesTr/`` and ``labelsTr/`` (nnU-Net raw v2, ``<id>_0000.nii.gz``).

    A case without a label file is unlabelled, with a warning where one is listed. The images of ``test`` or
    ``imagesTs/`` come after the training ones: those with a label in ``labelsTs/`` are the data's own test cases, the
    others unlabelled cases too. 4D images and files per channel are multi-channel.

    Args:
        root: Folder of ``dataset.json``.
        num_classes: Classes with the background, at least those that ``labels`` names; None to take these.
        modality: "mr" or "ct"; None to take ``modality`` or ``channel_names``.
    """

    format_name = "decathlon"

    def __init__(self, root: Path, *, num_classes: int | None = None, modality: str | None = None) -> None:
        self.root = root
        description = root / "dataset.json"
        content = read_dataset_json(description)
        stated = names_from_labels(content["labels"], str(description)) if "labels" in content else None
        self.class_names = fit_class_names(stated, num_classes, str(description))
        self.num_classes = len(self.class_names)
        self.flip_axes = plausible_flips(self.class_names)
        self.modality = choose_modality(modality, stated_modality(content))
        cases = training_cases(root, content)
        if not cases:
            raise FileNotFoundError(f"{root}: neither 'training' in dataset.json nor imagesTr/ names a NIfTI image")
        training = {case_id: images for case_id, (images, _) in cases.items()}
        further = further_images(root, content)
        _refuse_shared_ids(root, training, further)
        others = {case_id: images for case_id, images in further.items() if case_id not in training}
        self.images = training | others
        self.labels = {case_id: label for case_id, (_, label) in cases.items() if label is not None}
        of_others = list_nifti(root / "labelsTs")
        warn_of_orphans(root / "labelsTs", of_others, others)
        self._test = tuple(case_id for case_id in others if case_id in of_others)
        self.labels |= {case_id: of_others[case_id] for case_id in self._test}
        self.in_channels = self.header_channels(next(iter(self.images)))

    def read_image(self, case_id: str) -> tuple[np.ndarray, np.ndarray, Spacing]:
        """Read one image, or the files of its channels, which must share a grid."""
        return read_nifti_channels(self.images[case_id], case_id)

    def official_test(self) -> tuple[str, ...] | None:
        """The cases with a label in ``labelsTs/``; None without."""
        return self._test or None

    def header_channels(self, case_id: str) -> int:
        """From the headers of its files."""
        return sum(map(nifti_channels, self.images[case_id]))

    def grid(self, case_id: str) -> Grid:
        """From the header of the first channel."""
        return nifti_grid(lookup_case(case_id, self.images, self.root)[0])


def _refuse_shared_ids(root: Path, training: dict[str, tuple[Path, ...]], further: dict[str, tuple[Path, ...]]) -> None:
    """Raise a ValueError where a test image has the id of another training image: one of them would be left out."""
    shared = [
        case_id
        for case_id in further.keys() & training.keys()
        if [path.resolve() for path in further[case_id]] != [path.resolve() for path in training[case_id]]
    ]
    if shared:
        raise ValueError(
            f"{root}: {some(sorted(shared))} name training and test images both; rename those of imagesTs/ and their "
            "labels, no two cases can have the same name"
        )


def training_cases(root: Path, content: dict[str, Any]) -> CaseTable:
    """Cases by id from ``training``, else ``dataset``, else the folders; the label is None where there is none.

    Raises:
        FileNotFoundError: If an image that dataset.json names does not exist, or a label is a link to nothing.
        ValueError: If an entry has no image, or an id comes twice.
    """
    if not content.get("training") and not content.get("dataset"):
        grouped, labels = group_channels(root / "imagesTr", content), list_labels(root / "labelsTr")
        warn_of_orphans(root, labels, grouped)
        return {case_id: (files, labels.get(case_id)) for case_id, files in grouped.items()}
    cases: CaseTable = {}
    for case_id, images, label in _entries(content):
        files = _image_files(root, images)
        name = case_id or strip_nifti_suffix(Path(images[0]).name)
        if name in cases:
            raise ValueError(f"{root / 'dataset.json'} lists case {name!r} twice; remove one entry")
        cases[name] = (files, root / label if label else None)
    known = {strip_nifti_suffix(path.name) for files, _ in cases.values() for path in files}
    found = (path.name for path in sorted((root / "imagesTr").glob("[!.]*")) if is_nifti(path.name))
    if unlisted := [name for name in map(strip_nifti_suffix, found) if name not in known]:
        warn_once(
            logger,
            f"images of {root / 'imagesTr'} that dataset.json does not list are left out ({len(unlisted)}): "
            f"{some(unlisted)}; list them under 'training', without a label they are unlabelled cases",
        )
    listed = [label for _, label in cases.values() if label]
    refuse_broken_links(listed)
    missing = [label for label in listed if not label.is_file()]
    if missing:
        warn_once(
            logger,
            f"labels that {root / 'dataset.json'} lists do not exist ({len(missing)}), so that these cases are "
            f"unlabelled: {some([str(label) for label in missing], 3)}",
        )
    absent = set(missing)
    return {name: (files, None if label in absent else label) for name, (files, label) in cases.items()}


def further_images(root: Path, content: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    """Images beside the training cases by id: those of ``test``, else of ``imagesTs/``."""
    listed = content.get("test")
    if not listed:
        return group_channels(root / "imagesTs", content)
    if not isinstance(listed, list):
        raise ValueError(f"{root / 'dataset.json'}: 'test' is {listed!r}; write a list of file names")
    names: list[Any] = [item.get("image") if isinstance(item, dict) else item for item in listed]
    _require_paths(names, "test")
    return {strip_nifti_suffix(Path(name).name): _image_files(root, [name]) for name in names}


def group_channels(folder: Path, content: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    """Files of a folder by case; empty if there is no folder.

    Where every case has a ``_0000`` file, as nnU-Net demands, ``_0000``, ``_0001`` ... are the channels of one case;
    else each file is a case.

    Raises:
        ValueError: If ``file_ending`` is no NIfTI suffix, a case lacks a channel between others, or the first has other
            channels than ``channel_names``.
    """
    ending = content.get("file_ending", ".nii.gz")
    if str(ending).lower() not in NIFTI_SUFFIXES:
        raise ValueError(f"{folder.parent / 'dataset.json'}: file_ending {ending!r}; convert the images to .nii.gz")
    files = list_nifti(folder)
    grouped: dict[str, list[str]] = {}
    for name in files:
        match = CHANNEL_SUFFIX.match(name)
        grouped.setdefault(match["case"] if match else "", []).append(name)
    odd = [name for names in grouped.values() if not names[0].endswith("_0000") for name in names]
    if odd:
        if len(odd) < len(files):
            warn_once(
                logger, f"{folder}: each file is a case, as some have no channel number from 0000 on: {some(odd)}"
            )
        return {name: (path,) for name, path in files.items()}
    for case_id, names in grouped.items():
        _require_numbered(folder, case_id, names)
    stated, first = content.get("channel_names"), next(iter(grouped.items()), None)
    if isinstance(stated, dict) and first and len(first[1]) != len(stated):
        channels = ", ".join(map(str, stated.values()))
        raise ValueError(
            f"{folder}: case {first[0]!r} has {some(first[1])}, but dataset.json names the channels {channels}; give "
            "each case a file for each"
        )
    return {case_id: tuple(files[name] for name in names) for case_id, names in grouped.items()}


def _require_numbered(folder: Path, case_id: str, names: list[str]) -> None:
    """Raise a ValueError where the channel files of a case do not follow each other from ``_0000`` on."""
    if names != [f"{case_id}_{number:04d}" for number in range(len(names))]:
        raise ValueError(f"{folder}: case {case_id!r} has {some(names)}; number its channels from 0000 on, each once")


def _entries(content: dict[str, Any]) -> list[tuple[str | None, list[str], str | None]]:
    """(id or None, image paths, label path or None) of ``training`` (MSD) or ``dataset`` (nnU-Net v2)."""
    listed = content.get("training") or content["dataset"]
    if not isinstance(listed, list | dict):
        raise ValueError(f"dataset.json: 'training' is {listed!r}; write a list of {{'image': ..., 'label': ...}}")
    named = listed.items() if isinstance(listed, dict) else ((None, item) for item in listed)
    entries: list[tuple[str | None, list[str], str | None]] = []
    for case_id, item in named:
        item = {"image": item} if isinstance(item, str) else item
        images = item.get("images") or item.get("image") if isinstance(item, dict) else None
        if not images:
            raise ValueError(
                f"dataset.json: training entry {item!r} has no 'image'; write {{'image': ..., 'label': ...}}"
            )
        files, label = images if isinstance(images, list) else [images], item.get("label")
        _require_paths([*files, label or ""], "training")
        entries.append((case_id, files, label))
    return entries


def _require_paths(names: list[Any], where: str) -> None:
    """Raise a ValueError for an entry of dataset.json that is no file name."""
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"dataset.json: {where!r} names {wrong[0]!r}; write file names as text")


def _image_files(root: Path, images: list[str]) -> tuple[Path, ...]:
    """The files of an entry; ``a.nii.gz`` stands for ``a_0000.nii.gz``, ... where nnU-Net split the channels."""
    files = [root / image for image in images]
    if len(files) == 1 and not files[0].is_file():
        stem = strip_nifti_suffix(files[0].name)
        ending = files[0].name[len(stem) :]
        if found := sorted(files[0].parent.glob(f"{escape(stem)}_[0-9][0-9][0-9][0-9]{ending}")):
            _require_numbered(found[0].parent, stem, [strip_nifti_suffix(path.name) for path in found])
            files = found
    missing = [path for path in files if not path.is_file()]
    if missing:
        listed = f"{missing[0]} is listed in {root / 'dataset.json'} but does not exist"
        raise FileNotFoundError(f"{listed}; copy it there, or take it out of the list")
    return tuple(files)
