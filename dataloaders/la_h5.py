"""Left Atrium 2018 challenge as released with UA-MT and SS-Net: one HDF5 file per case, id lists beside them.

Source: Xiong et al. 2021, Medical Image Analysis 67, 101832; crops by Yu et al. 2019 (UA-MT), arXiv:1907.07034.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from dataloaders.base import (
    SOURCES,
    CaseSource,
    Grid,
    SourceOptions,
    TrainingDefaults,
    Volume,
    check_label,
    lookup_case,
    require_root,
)
from dataloaders.case_lists import read_case_list
from dataloaders.class_names import choose_modality, fit_class_names

logger = logging.getLogger(__name__)

CASE_FOLDER = "2018LA_Seg_Training Set"
CASE_FILE = "mri_norm2.h5"
DEFAULT_VOXEL_SIZE = (0.625, 0.625, 0.625)


@SOURCES.register("LA")
class LeftAtriumH5(CaseSource):
    """Cases ``2018LA_Seg_Training Set/<id>/mri_norm2.h5`` with ``image`` and ``label`` (X, Y, Z).

    ``train.list`` and ``test.list`` may each be missing; each is read by the job that asks for it. The files store
    neither voxel size nor orientation: ``--voxel_size`` gives the one, and the affine is the diagonal of it. (By the
    anatomy the axes of the release run left, backward and up: LPS, as in DICOM.)

    Args:
        root: Folder with the lists and the case folder.
        voxel_size: Voxel size in mm; None for the challenge's 0.625 mm, with a warning.
        num_classes: Classes with the background; None for 2.
        modality: "mr" or "ct"; None for "mr".
    """

    in_channels = 1
    flip_axes = (0, 1)  # the field's augmentation on LA turns and flips in the axial plane
    defaults = TrainingDefaults(patch_size=(112, 112, 80), max_iteration=6000, labelnum=8)

    def __init__(
        self,
        root: Path,
        *,
        voxel_size: tuple[float, float, float] | None = None,
        num_classes: int | None = None,
        modality: str | None = None,
    ) -> None:
        self.root = root
        self.class_names = fit_class_names(("background", "left atrium"), num_classes, str(root))
        self.num_classes = len(self.class_names)
        self.modality = choose_modality(modality, "mr")
        self.spacing = _voxel_size(voxel_size, root)
        folder = root / CASE_FOLDER if (root / CASE_FOLDER).is_dir() else root
        self._files = {path.parent.name: path for path in sorted(folder.glob(f"*/{CASE_FILE}"))}
        if not self._files:
            raise FileNotFoundError(
                f"{root} holds no '{CASE_FOLDER}/<id>/{CASE_FILE}'; pass the folder of the UA-MT release"
            )
        first = [case_id for case_id in self.official_train() or () if case_id in self._files]
        self._ids = list(dict.fromkeys([*first, *self._files]))
        self._labeled: list[str] | None = None

    @classmethod
    def from_options(cls, options: SourceOptions) -> LeftAtriumH5:
        """Build from ``--dataset_path``, ``--voxel_size``, ``--num_classes`` and ``--modality``."""
        return cls(
            require_root(options.root, "LA"),
            voxel_size=options.voxel_size,
            num_classes=options.num_classes,
            modality=options.modality,
        )

    def case_ids(self) -> list[str]:
        """The ids of ``train.list`` whose files are there, then every other case folder by name."""
        return list(self._ids)

    def labeled_ids(self) -> list[str]:
        """Cases whose file has a ``label`` dataset; looks at the files' tables of contents, once."""
        if self._labeled is None:
            self._labeled = [case_id for case_id in self._ids if self._has_label(case_id)]
        return list(self._labeled)

    def official_train(self) -> tuple[str, ...] | None:
        """The ids of ``train.list``; None without the file."""
        return self._list("train.list")

    def official_test(self) -> tuple[str, ...] | None:
        """The ids of ``test.list``; None without the file."""
        return self._list("test.list")

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        """Read one case; ``label`` is not read unless asked for."""
        with self._open(case_id) as file:
            image = np.asarray(_image(file)[()], dtype=np.float32)
            label = np.asarray(_dataset(file, "label")[()]) if with_label else None
        if label is not None:
            label = check_label(label, image.shape, self.num_classes, case_id)
        return Volume(case_id, image[None], label, self._affine(), self.spacing)  # image (1, X, Y, Z)

    def grid(self, case_id: str) -> Grid:
        """The shape by the file's table of contents; the files store neither orientation nor place."""
        with self._open(case_id) as file:
            x, y, z = _image(file).shape
        return Grid((x, y, z), self._affine(), oriented=False)

    def _affine(self) -> np.ndarray:
        return np.diag([*self.spacing, 1.0])

    def case_files(self, case_id: str, *, with_label: bool) -> tuple[Path, ...]:
        """The case's one file."""
        return (lookup_case(case_id, self._files, self.root),)

    def _list(self, name: str) -> tuple[str, ...] | None:
        path = self.root / name
        return read_case_list(path) if path.is_file() else None

    def _has_label(self, case_id: str) -> bool:
        with self._open(case_id) as file:
            return "label" in file

    @contextmanager
    def _open(self, case_id: str) -> Iterator[h5py.File]:
        path = lookup_case(case_id, self._files, self.root)
        try:
            with h5py.File(path, "r") as file:
                yield file
        except FileNotFoundError:  # is an OSError too, but says itself what is missing
            raise
        except OSError as error:
            raise ValueError(f"{path} is not a readable HDF5 file ({error}); copy it again") from error


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """The named dataset, or a FileNotFoundError that lists what the file has."""
    if name not in file:
        raise FileNotFoundError(f"{file.filename} has no dataset {name!r} (it has: {', '.join(file) or 'nothing'})")
    return file[name]


def _image(file: h5py.File) -> h5py.Dataset:
    """The dataset of the image, with three axes."""
    image = _dataset(file, "image")
    if image.ndim != 3:
        raise ValueError(f"{file.filename}: image has shape {image.shape}; expected (X, Y, Z)")
    return image


def _voxel_size(voxel_size: tuple[float, float, float] | None, root: Path) -> tuple[float, float, float]:
    """The flag's voxel size in mm, checked, or the default with a warning."""
    if voxel_size is None:
        logger.warning(
            "%s stores no voxel size: taking %g mm, that of the full-resolution LA release; pass --voxel_size where "
            "the scans were resampled, for all distances in mm depend on it",
            root,
            DEFAULT_VOXEL_SIZE[0],
        )
        return DEFAULT_VOXEL_SIZE
    if len(voxel_size) != 3 or not all(np.isfinite(size) and size > 0 for size in voxel_size):
        raise ValueError(f"--voxel_size {voxel_size}: pass three positive numbers in mm")
    return voxel_size
