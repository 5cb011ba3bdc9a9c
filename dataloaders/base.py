"""What every data format offers: cases by id, read as channel-first volumes with their geometry."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from myutils.registry import Registry

Triple = tuple[int, int, int]
MAX_CLASSES = 256  # labels are uint8
_ROUNDING = 1e-4  # how far a stored class id may be from a whole number


@dataclass(frozen=True)
class Volume:
    """One case.

    Attributes:
        case_id: Name of the case, unique in its source.
        image: Image (C, X, Y, Z), float32, raw intensities as stored.
        label: Class ids (X, Y, Z), uint8, or None where there is no label or it was not asked for.
        affine: Voxel index to RAS+ millimetres (4, 4), float64, as in NIfTI.
        spacing: Voxel size along X, Y, Z in mm.
    """

    case_id: str
    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    spacing: tuple[float, float, float]

    @property
    def arrays(self) -> list[np.ndarray]:
        """The image and, where there is one, the label."""
        return [self.image] if self.label is None else [self.image, self.label]


class Grid(NamedTuple):
    """Where the voxels of a case lie.

    Attributes:
        shape: Voxels along X, Y, Z, as stored.
        affine: As that of a ``Volume``.
        oriented: Whether the data say how the voxels lie in the body; else the affine's directions mean nothing.
    """

    shape: Triple
    affine: np.ndarray
    oriented: bool = True


def default_cache_dir() -> Path:
    """The user's folder for what is made once; a temporary one where the user has no home, as in some containers."""
    try:
        home = Path.home()
    except RuntimeError:
        home = Path(tempfile.gettempdir())
    return home / ".cache" / "cov_dfp_3d"


@dataclass(frozen=True)
class SourceOptions:
    """What a source may be told by flags; a source ignores what does not concern it.

    Attributes:
        root: Data folder (``--dataset_path``); None for sources that make their own data.
        num_classes: Classes with the background (``--num_classes``); None to take what the data say.
        voxel_size: Voxel size in mm for formats that store none (``--voxel_size``).
        modality: "mr", "ct" or None to take what the data say.
        cache_dir: Folder for files that a source makes once, such as the demo cohort.
    """

    root: Path | None = None
    num_classes: int | None = None
    voxel_size: tuple[float, float, float] | None = None
    modality: str | None = None
    cache_dir: Path = field(default_factory=default_cache_dir)


@dataclass(frozen=True)
class TrainingDefaults:
    """Flag values that suit a data set where the user gives none.

    Attributes:
        patch_size: Size of a training patch in voxels, cut down to the cases; None for one that fits them.
        max_iteration: Number of training steps.
        labelnum: Number of labelled cases; None for all that have a label and are not for the test.
    """

    patch_size: tuple[int, int, int] | None = None
    max_iteration: int = 6000
    labelnum: int | None = None


class CaseSource(ABC):
    """A data set in one format. Construction is cheap: it lists cases and opens no image but, at most, a header.

    Attributes:
        num_classes: Number of classes, the background included.
        in_channels: Number of image channels C.
        class_names: One name per class, ``class_names[0]`` is the background.
        modality: "mr" or "ct"; decides how intensities are normalised.
        flip_axes: Image axes (0, 1, 2) along which a mirrored case is a plausible case; left-right unless a source
            knows better, since no patient is upside down.
        defaults: Training settings that suit the data where the user gives none.
        stores_voxel_size: Whether the files do; ``--voxel_size`` is for those that do not.
    """

    num_classes: int
    in_channels: int
    class_names: tuple[str, ...]
    modality: str = "mr"
    flip_axes: tuple[int, ...] = (0,)
    defaults: TrainingDefaults = TrainingDefaults()
    stores_voxel_size: bool = True

    @classmethod
    @abstractmethod
    def from_options(cls, options: SourceOptions) -> CaseSource:
        """Build the source from flags; raises FileNotFoundError or ValueError that names the fix."""

    @abstractmethod
    def case_ids(self) -> list[str]:
        """All case ids, sorted or in the order that the data's own list gives."""

    @abstractmethod
    def labeled_ids(self) -> list[str]:
        """Ids of the cases for which a label file exists, in the order of ``case_ids``; opens no label."""

    @abstractmethod
    def load(self, case_id: str, *, with_label: bool) -> Volume:
        """Read one case; with ``with_label=False`` no label file is opened.

        Raises:
            FileNotFoundError: If the image, or a label that was asked for, is missing.
            ValueError: If image and label disagree in shape, or a class id is beyond ``num_classes``.
        """

    def grid(self, case_id: str) -> Grid:
        """Where a case's voxels lie; formats that have it in a header read no more than that."""
        volume = self.load(case_id, with_label=False)
        x, y, z = volume.image.shape[1:]
        return Grid((x, y, z), volume.affine)

    def header_channels(self, case_id: str) -> int:
        """Image channels of a case by its header, where the format has one; raises as ``load`` does."""
        return self.in_channels

    def states_orientation(self, case_id: str) -> bool:
        """Whether a case's file says how it lies in the body."""
        return self.grid(case_id).oriented

    def patient(self, case_id: str) -> str:
        """Whom a case shows: cases with the same answer are kept together by the splits. By default the case itself."""
        return case_id

    def case_files(self, case_id: str, *, with_label: bool) -> tuple[Path, ...]:
        """The files that ``load`` reads, for a cache that must notice a change; empty where there are none to watch."""
        return ()

    def official_train(self) -> tuple[str, ...] | None:
        """Ids of the training list that comes with the data, read when asked for; None where there is none."""
        return None

    def official_test(self) -> tuple[str, ...] | None:
        """Ids of the test list that comes with the data; evaluation alone asks for it, training never does."""
        return None


T = TypeVar("T")

SOURCES: Registry[type[CaseSource]] = Registry("data set", "dataloaders", CaseSource)


def check_label(label: np.ndarray, image_shape: Sequence[int], num_classes: int, case_id: str) -> np.ndarray:
    """Validate a label map and return it as uint8 (X, Y, Z).

    Raises:
        ValueError: If its shape is not that of the image, its values are not whole numbers, or an id is
            beyond ``num_classes``.
    """
    if tuple(label.shape) != tuple(image_shape):
        raise ValueError(
            f"case {case_id}: label shape {tuple(label.shape)} differs from image shape {tuple(image_shape)}; "
            "give the case its own label, or resample the label onto the image grid"
        )
    whole = np.rint(label)
    with np.errstate(invalid="ignore"):
        odd = ~(np.abs(label - whole) <= _ROUNDING)  # NaN and infinities too
    if odd.any():
        place = tuple(int(index) for index in np.argwhere(odd)[0])
        raise ValueError(
            f"case {case_id}: {int(odd.sum())} voxels of the label are no whole numbers, such as {label[place]:.6g} at "
            f"{place}; store class ids 0..{num_classes - 1}"
        )
    low, high = int(whole.min(initial=0)), int(whole.max(initial=0))
    if low < 0 or high >= num_classes:
        bad = low if low < 0 else high
        advice = _advice_on(whole, low, high, num_classes)
        raise ValueError(f"case {case_id}: class id {bad} is outside 0..{num_classes - 1}; {advice}")
    return whole.astype(np.uint8)


def _advice_on(label: np.ndarray, low: int, high: int, num_classes: int) -> str:
    """What to do about a label whose ids from ``low`` to ``high`` are no classes."""
    if low < 0:
        return "no class has a negative id: store such voxels as 0, the background, or leave the case out"
    if high == MAX_CLASSES - 1 and np.isin(label, (0, high)).all():
        return f"store a mask of 0 and {high} as 0 and 1"
    if high >= MAX_CLASSES:
        return f"no class id is above {MAX_CLASSES - 1}: number the classes anew"
    found = np.unique(label).astype(int).tolist()
    gaps = f" (it holds {', '.join(map(str, found))}; classes are numbered without gaps)" * (len(found) <= high)
    return (
        f"pass --num_classes {high + 1} to the training, or correct the label{gaps}; a checkpoint of {num_classes} "
        "classes cannot be scored on it"
    )


def lookup_case(case_id: str, table: Mapping[str, T], root: Path) -> T:
    """What is filed under ``case_id``, or a FileNotFoundError that names the folder and a few known ids."""
    if case_id in table:
        return table[case_id]
    known = ", ".join(list(table)[:3])
    raise FileNotFoundError(
        f"case {case_id!r} is not in {root} ({len(table)} cases: {known}, ...); check the list file"
    )


def require_root(root: Path | None, kind: str) -> Path:
    """The data folder, or an error that says which flag gives it.

    Raises:
        ValueError: If no folder was given.
        FileNotFoundError: If the folder does not exist.
    """
    if root is None:
        raise ValueError(f"data set {kind!r} reads files: pass its folder as --dataset_path")
    if not root.is_dir():
        raise FileNotFoundError(f"--dataset_path {root}: there is no such folder; pass the folder of the data set")
    return root
