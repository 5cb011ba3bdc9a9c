"""Scans to predict: NIfTI files and DICOM series under a path, and the output file of each."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its usual name

from dataloaders.base import Volume
from dataloaders.case_lists import CHANNEL_SUFFIX, is_nifti, refuse_broken_links, some, strip_nifti_suffix
from dataloaders.dicom import LABEL_FOLDER
from dataloaders.dicom_series import quiet_itk, read_dicom_series
from dataloaders.dicom_tags import kind_of, read_tags
from dataloaders.geometry import READ_ERRORS, nifti_channels, open_nifti, read_nifti_channels
from dataloaders.nifti_folder import list_nifti

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scan:
    """One input: a NIfTI file, one file per channel, or a folder with one DICOM series.

    Attributes:
        name: Name of the output, without suffix.
        path: The file, that of the first channel, or the folder.
        more_channels: Files of the other channels.
    """

    name: str
    path: Path
    more_channels: tuple[Path, ...] = ()

    @property
    def is_dicom(self) -> bool:
        """Whether this is a DICOM folder."""
        return self.path.is_dir()

    @property
    def files(self) -> tuple[Path, ...]:
        """The NIfTI files, one per channel or one for all; none for DICOM."""
        return () if self.is_dicom else (self.path, *self.more_channels)

    def read(self) -> Volume:
        """Read image and geometry; errors as in ``read_nifti_channels`` and ``read_dicom_series``."""
        found = read_dicom_series(self.path) if self.is_dicom else read_nifti_channels(self.files, self.name)
        image, affine, spacing = found
        return Volume(self.name, image, None, affine, spacing)

    def place(self) -> tuple[tuple[int, ...], np.ndarray]:
        """Shape (X, Y, Z) and affine, in mm or the file's unit; of a DICOM series by reading it. Errors as ``read``."""
        header = self.header()
        if header is None:
            volume = self.read()
            return volume.image.shape[1:], volume.affine
        return header.get_data_shape()[:3], header.get_best_affine()

    def header(self) -> nib.Nifti1Header | None:
        """The NIfTI header; None for DICOM."""
        return None if self.is_dicom else open_nifti(self.path).header


def warn_of_modality(scan: Scan, trained: str) -> None:
    """Say that a DICOM series is of another modality than the network was trained for ("ct" or "mr")."""
    tags = read_tags(scan.path) if scan.is_dicom else None
    if tags and tags.modality and kind_of(tags.modality) != trained:
        logger.warning(
            "%s is %s by its header, and the network was trained with --modality %s: its segmentation may be wrong",
            scan.path,
            tags.modality,
            trained,
        )


def find_scans(path: Path) -> list[Scan]:
    """All scans that ``path`` stands for, sorted by name.

    A file is one NIfTI scan. A folder with NIfTI files stands for these; one with DICOM files for its series; else
    each of its folders is a series if at least one is, but for ``labels`` and folders of NIfTI files. NIfTI
    files that bear the names of such folders are their labels. Hidden ones are left out.

    Raises:
        FileNotFoundError: If there is no such path, no scan in it, or a link in it that leads to none.
        ValueError: If a file is not NIfTI by its name, two files bear the same name, or a folder holds both kinds.
    """
    if path.is_file():
        if not is_nifti(path.name):
            raise ValueError(
                f"--input {path}: pass a .nii or .nii.gz file, a folder of them, or a DICOM series' folder"
            )
        return [Scan(strip_nifti_suffix(path.name), path)]
    if not path.is_dir():
        raise FileNotFoundError(f"--input {path} does not exist; pass a NIfTI file, a folder, or a DICOM folder")
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = list_nifti(path)
    itself, inside = _holds_series(path), any(_holds_series(folder) for folder in folders)
    labels = inside and set(files) <= {folder.name for folder in folders}  # of series, as training reads them
    if files and (itself or inside) and not labels:
        raise ValueError(f"--input {path} holds NIfTI files and DICOM series; pass a folder of either alone")
    if files and not labels:
        if folders:
            logger.info("--input %s holds NIfTI files; its %d folders are left out", path, len(folders))
        return [Scan(name, file) for name, file in files.items()]
    if itself:
        if folders:
            logger.warning("--input %s is a DICOM series; its %d folders are left out", path, len(folders))
        _require_scan(path)
        return [Scan(path.resolve().name, path)]
    if inside:
        if files:
            logger.info("--input %s: its %d NIfTI files are taken for labels of the series", path, len(files))
        refuse_broken_links(path.iterdir())
        chosen = [
            folder
            for folder in folders
            if _holds_series(folder) or not (folder.name == LABEL_FOLDER or list_nifti(folder))
        ]
        others = [folder for folder in chosen if (tags := read_tags(folder)) and not tags.is_scan]
        if others:
            names = some([folder.name for folder in others])
            logger.warning("--input %s: no scans by their headers, as segmentations are, left out: %s", path, names)
            chosen = [folder for folder in chosen if folder not in others]
        return [Scan(folder.name, folder) for folder in chosen]
    holders = [str(folder) for folder in folders if list_nifti(folder)]
    hint = f"; pass {' or '.join(holders[:3])}" if holders else ""
    raise FileNotFoundError(f"--input {path} itself holds no .nii, no .nii.gz and no DICOM series{hint}")


def join_channels(scans: Sequence[Scan], channels: int) -> list[Scan]:
    """nnU-Net's ``<name>_0000``, ``<name>_0001`` ... as one scan each; all other scans as they are.

    Files are joined where a network of several ``channels`` can take them in no other way: exactly so many files, of
    one channel each, numbered from 0. For one of a single channel they lose the number, as in a training on a
    ``decathlon`` folder, where every file has it.
    """
    if channels == 1 and all(scan.name.endswith("_0000") and not scan.is_dicom for scan in scans):
        return [replace(scan, name=scan.name.removesuffix("_0000")) for scan in scans]
    groups: dict[str, list[Scan]] = {}
    for scan in scans:
        match = None if scan.is_dicom else CHANNEL_SUFFIX.match(scan.name)
        groups.setdefault(match["case"] if match else f"/{scan.name}", []).append(scan)  # no name has a slash
    joined: list[Scan] = []
    for name, parts in groups.items():
        numbered = [part.name for part in parts] == [f"{name}_{channel:04d}" for channel in range(channels)]
        if channels > 1 and numbered and all(_holds_one_channel(part.path) for part in parts):
            first, *others = (part.path for part in parts)
            joined.append(Scan(name, first, tuple(others)))
        else:
            joined += parts
    return joined


def _holds_one_channel(path: Path) -> bool:
    """By the header; a damaged file counts, so that its scan is reported once, as a whole."""
    try:
        return nifti_channels(path) == 1
    except READ_ERRORS:
        return True


@quiet_itk()
def _holds_series(folder: Path) -> bool:
    """Whether GDCM finds a series."""
    return bool(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))


def _require_scan(folder: Path) -> None:
    tags = read_tags(folder)
    if tags and not tags.is_scan:
        raise ValueError(
            f"--input {folder}: {tags.modality} by its header, no scan; pass the series that it belongs to"
        )


def require_free_outputs(scans: Iterable[Scan], outputs: Iterable[Path]) -> None:
    """Refuse outputs that are inputs, would be taken for labels of them, or come twice; links are seen through.

    Raises:
        ValueError: Naming the file and the fix.
    """
    scans, outputs = list(scans), list(outputs)
    refuse_label_folders(scans, {output.parent for output in outputs})
    inputs = [path for scan in scans for path in scan.files]
    resolved = {path.resolve() for path in inputs}
    others = [path for path in inputs if not path.name.endswith(".nii.gz")]  # .nii and .NII.GZ
    twins = {path.with_name(f"{strip_nifti_suffix(path.name)}.nii.gz").resolve() for path in others}
    held = set(map(_identity, inputs)) - {None}
    seen: set[Path] = set()
    for output in outputs:
        if output.resolve() in resolved or _identity(output) in held:
            raise ValueError(f"{output} is an input and would be overwritten; pass another --output")
        if output.resolve() in twins:
            raise ValueError(f"{output} would lie beside the scan of the same name; pass another --output")
        if output in seen:
            raise ValueError(f"two inputs would be written to {output}; rename one, or predict them separately")
        seen.add(output)


def refuse_label_folders(scans: Iterable[Scan], folders: Iterable[Path]) -> None:
    """Refuse output folders in which a training would take the predictions for the experts' labels of the scans.

    Raises:
        ValueError: Naming the folder and the fix.
    """
    taken: set[Path] = set()
    for scan in scans:
        named, real = Path(os.path.normpath(scan.path.absolute())), scan.path.resolve()
        for around in (named.parent, real.parent):
            if scan.is_dicom:
                taken |= {real, around.resolve(), (around / LABEL_FOLDER).resolve()}
            elif around.name.startswith("images"):  # images, imagesTr and imagesTs
                taken.add(around.with_name(around.name.replace("images", "labels", 1)).resolve())
    for folder in folders:
        if folder.resolve() in taken:
            raise ValueError(
                f"--output {folder}: a training would take the predictions there for labels of these scans, and there "
                "may be such labels; pass another folder"
            )


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file of the system this is, whatever its name; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
