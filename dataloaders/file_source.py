"""What the formats with one image and perhaps one NIfTI label file per case share: listing, label look-up, checks."""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.base import CaseSource, Grid, SourceOptions, Volume, lookup_case, require_root
from dataloaders.case_lists import CHANNEL_SUFFIX, some
from dataloaders.geometry import Spacing, nifti_channels, nifti_grid, read_label, read_nifti

logger = logging.getLogger(__name__)

PATIENT = re.compile(  # BIDS, Gorgolewski et al. 2016, doi:10.1038/sdata.2016.44; the frames of ACDC
    r"sub-[A-Za-z0-9]+(?=_)|patient\d+(?=_frame\d+)"
)


def warn_of_orphans(root: Path, labels: Iterable[str], images: Collection[str]) -> None:
    """Say which labels of a data set have no image, by their ids, and what images are called if none has."""
    labels = list(labels)
    orphans = [case_id for case_id in labels if case_id not in images]
    if orphans:
        called = f"; images are called {some(list(images))}" if images and len(orphans) == len(labels) else ""
        if called and all(map(CHANNEL_SUFFIX.match, images)):
            called += ", as files of one channel each: --dataset_name decathlon reads them, in its folders"
        logger.warning("%s: labels without an image of the same name are left out: %s%s", root, some(orphans), called)


class FileSource(CaseSource):
    """Base of the folder formats. A subclass fills the attributes in ``__init__(root, *, num_classes, modality)``.

    Attributes:
        format_name: The registered name, for messages.
        root: The data folder.
        images: Image file, series folder or channel files per case id, in the order of ``case_ids``.
        labels: Label file per case id, for the cases that have one.
    """

    format_name: str
    root: Path
    images: dict[str, Any]
    labels: dict[str, Path]

    @classmethod
    def from_options(cls, options: SourceOptions) -> CaseSource:
        """Build from ``--dataset_path``, ``--num_classes`` and ``--modality``."""
        root = require_root(options.root, cls.format_name)
        return cls(root, num_classes=options.num_classes, modality=options.modality)  # type: ignore[call-arg]

    def warn_of_orphans(self) -> None:
        """Say which labels have no image."""
        warn_of_orphans(self.root, self.labels, self.images)

    def case_ids(self) -> list[str]:
        """All cases in the order in which they were found."""
        return list(self.images)

    def labeled_ids(self) -> list[str]:
        """Cases whose label file exists."""
        return [case_id for case_id in self.images if case_id in self.labels]

    def patient(self, case_id: str) -> str:
        """The subject of an id named as in BIDS (``sub-01_ses-02_T1w``: ``sub-01``) or ACDC; else the id."""
        found = PATIENT.match(case_id)
        return found[0] if found else case_id

    def case_files(self, case_id: str, *, with_label: bool) -> tuple[Path, ...]:
        """The image file, those of all channels, or those of the series; and the label file."""
        paths = self._image_paths(case_id)
        files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        return (*files, *([self.labels[case_id]] if with_label and case_id in self.labels else []))

    @abstractmethod
    def read_image(self, case_id: str) -> tuple[np.ndarray, np.ndarray, Spacing]:
        """Image (C, X, Y, Z), affine (4, 4) and spacing of a known case."""

    def _image_paths(self, case_id: str) -> list[Path]:
        """The image file, those of all channels, or the folder of the series."""
        found = lookup_case(case_id, self.images, self.root)
        return [found] if isinstance(found, Path) else list(found)

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        """Read one case; the label file is not opened unless asked for."""
        image_file, *_ = self._image_paths(case_id)
        image, affine, spacing = self.read_image(case_id)
        if image.shape[0] != self.in_channels:
            first = next(iter(self.images))
            hint = "" if first == case_id else f", as its first case, {first}; mend whichever is wrong"
            found = f"case {case_id}: {image.shape[0]} channels, but this data set has {self.in_channels}"
            raise ValueError(f"{found}{hint}")
        label = None
        if with_label:
            if case_id not in self.labels:
                raise FileNotFoundError(f"case {case_id} of {self.root} has no label file; it is an unlabelled case")
            label = read_label(
                self.labels[case_id],
                case_id,
                image=image,
                affine=affine,
                num_classes=self.num_classes,
                image_file=image_file if image_file.is_file() else None,
            )
        return Volume(case_id, image, label, affine, spacing)


class NiftiFiles(FileSource):
    """Base of the formats with one NIfTI image per case."""

    images: dict[str, Path]

    def read_image(self, case_id: str) -> tuple[np.ndarray, np.ndarray, Spacing]:
        """Read one image file."""
        return read_nifti(self.images[case_id])

    def header_channels(self, case_id: str) -> int:
        """From the image's header."""
        return nifti_channels(self.images[case_id])

    def grid(self, case_id: str) -> Grid:
        """From the header."""
        return nifti_grid(lookup_case(case_id, self.images, self.root))
