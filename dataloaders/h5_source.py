"""What the field's HDF5 releases share: a file per case with ``image`` and, perhaps, ``label``, and no geometry."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from dataloaders.base import CaseSource, Grid, SourceOptions, Triple, Volume, check_label, lookup_case, require_root
from dataloaders.case_lists import read_case_list
from dataloaders.class_names import choose_modality, fit_class_names
from dataloaders.geometry import Spacing

logger = logging.getLogger(__name__)


class H5Source(CaseSource):
    """Base of the HDF5 formats; the affine of a case is the diagonal of the voxel size.

    The ids of the train list whose files are there come first, then the others by name. The lists may each be missing;
    each is read by the job that asks for it.

    Attributes:
        format_name: The registered name, for messages.
        known_classes: Names of the classes, the background first.
        usual_voxel_size: Along X, Y, Z in mm, where nobody gives it.
        stored_axes: Where the files have X, Y and Z.
        spacing: Voxel size along X, Y, Z in mm, the same for all cases.
        files: File per case id, in the order of ``case_ids``.

    Args:
        root: The data folder.
        voxel_size: Voxel size in mm; None for the usual one, with a warning.
        num_classes: Classes with the background, at least the known ones; None for these.
        modality: "mr" or "ct"; None for "mr".
    """

    in_channels = 1
    stores_voxel_size = False
    format_name: str
    known_classes: tuple[str, ...]
    usual_voxel_size: Spacing
    stored_axes: Triple = (0, 1, 2)

    def __init__(
        self,
        root: Path,
        *,
        voxel_size: Spacing | None = None,
        num_classes: int | None = None,
        modality: str | None = None,
    ) -> None:
        self.root = root
        self.class_names = fit_class_names(self.known_classes, num_classes, str(root))
        self.num_classes = len(self.class_names)
        self.modality = choose_modality(modality, "mr")
        self.spacing = stated_voxel_size(voxel_size, self.usual_voxel_size, root)
        found = self.find_files(root)
        first = [case_id for case_id in self.official_train() or () if case_id in found]
        self.files = {case_id: found[case_id] for case_id in dict.fromkeys([*first, *found])}
        self._labeled: list[str] | None = None

    @staticmethod
    @abstractmethod
    def find_files(root: Path) -> dict[str, Path]:
        """File per case id, by name; raises FileNotFoundError where there is none."""

    @classmethod
    def from_options(cls, options: SourceOptions) -> H5Source:
        """Build from ``--dataset_path``, ``--voxel_size``, ``--num_classes`` and ``--modality``."""
        return cls(
            require_root(options.root, cls.format_name),
            voxel_size=options.voxel_size,
            num_classes=options.num_classes,
            modality=options.modality,
        )

    def case_ids(self) -> list[str]:
        """All cases in the order in which they were listed."""
        return list(self.files)

    def labeled_ids(self) -> list[str]:
        """Cases whose file has a ``label`` dataset; looks at the files' tables of contents, once."""
        if self._labeled is None:
            self._labeled = [case_id for case_id in self.files if self._has_label(case_id)]
        return list(self._labeled)

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        """Read one case; ``label`` is not read unless asked for."""
        with self._open(case_id) as file:
            image = self._read(_image(file)).astype(np.float32, copy=False)
            label = self._read(_dataset(file, "label")) if with_label else None
        if label is not None:
            label = check_label(label, image.shape, self.num_classes, case_id)
        return Volume(case_id, image[None], label, self._affine(), self.spacing)  # image (1, X, Y, Z)

    def grid(self, case_id: str) -> Grid:
        """The shape by the file's table of contents; the files store neither orientation nor place."""
        with self._open(case_id) as file:
            stored = _image(file).shape
        x, y, z = (int(stored[axis]) for axis in self.stored_axes)
        return Grid((x, y, z), self._affine(), oriented=False)

    def case_files(self, case_id: str, *, with_label: bool) -> tuple[Path, ...]:
        """The case's one file."""
        return (lookup_case(case_id, self.files, self.root),)

    def official_train(self) -> tuple[str, ...] | None:
        """The ids of ``train.list``; None without the file."""
        return self._list("train.list")

    def official_test(self) -> tuple[str, ...] | None:
        """The ids of ``test.list``; None without the file."""
        return self._list("test.list")

    def list_folders(self) -> tuple[Path, ...]:
        """Where lists are looked for, the first first."""
        return (self.root,)

    def _list(self, name: str) -> tuple[str, ...] | None:
        path = next((path for folder in self.list_folders() if (path := folder / name).is_file()), None)
        return None if path is None else tuple(line.removesuffix(".h5") for line in read_case_list(path))

    def _read(self, dataset: h5py.Dataset) -> np.ndarray:
        """The voxels (X, Y, Z); a label of other axes than three as it is stored, for the check to name."""
        stored = np.asarray(dataset[()])
        return np.ascontiguousarray(stored.transpose(self.stored_axes)) if stored.ndim == 3 else stored

    def _affine(self) -> np.ndarray:
        return np.diag([*self.spacing, 1.0])

    def _has_label(self, case_id: str) -> bool:
        with self._open(case_id) as file:
            return "label" in file

    @contextmanager
    def _open(self, case_id: str) -> Iterator[h5py.File]:
        path = lookup_case(case_id, self.files, self.root)
        try:
            with h5py.File(path, "r") as file:
                yield file
        except FileNotFoundError:  # is an OSError too, but says itself what is missing
            raise
        except (OSError, KeyError, RuntimeError, TypeError) as error:  # h5py has one for each kind of damage
            raise ValueError(f"{path} is not a readable HDF5 file ({error}); copy it again") from error


def stated_voxel_size(asked: Spacing | None, usual: Spacing, root: Path) -> Spacing:
    """The voxel size of ``--voxel_size`` in mm, checked; or ``usual``, with a warning.

    Raises:
        ValueError: If it is not three positive numbers.
    """
    if asked is None:
        logger.warning(
            "%s stores no voxel size: taking %s mm, the usual one of the release; pass --voxel_size where the scans "
            "have another, for all distances in mm depend on it",
            root,
            " x ".join(f"{size:g}" for size in usual),
        )
        return usual
    if len(asked) != 3 or not all(np.isfinite(size) and size > 0 for size in asked):
        raise ValueError(f"--voxel_size {asked}: pass three positive numbers in mm")
    return asked


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """The named dataset; a FileNotFoundError lists what the file has, a ValueError says that it is something else."""
    if name not in file:
        raise FileNotFoundError(f"{file.filename} has no dataset {name!r} (it has: {', '.join(file) or 'nothing'})")
    found = file[name]
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{file.filename}: {name!r} is a {type(found).__name__}; store it as a dataset of voxels")
    return found


def _image(file: h5py.File) -> h5py.Dataset:
    """The dataset of the image, with three axes."""
    image = _dataset(file, "image")
    if image.ndim != 3:
        raise ValueError(f"{file.filename}: image has shape {image.shape}; expected (X, Y, Z)")
    return image
