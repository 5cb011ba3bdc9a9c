"""Array axes and the body: images whose axes run right, forward and up, however a scanner or a program stored them.

Contract: a turn permutes and mirrors axes; no voxel's value or place in space changes, and every turn can be undone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from nibabel.orientations import aff2axcodes, io_orientation

from dataloaders.base import CaseSource, Triple, Volume
from dataloaders.case_lists import some
from dataloaders.say_once import warn_once

logger = logging.getLogger(__name__)

ORIENTATIONS = ("ras", "stored")
LARGEST_TILT = 40.0  # degrees; at 45 an axis is as close to one direction of the body as to another

T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """How the axes of an image become others; ``Turn()`` leaves them as they are.

    Attributes:
        order: The stored axis that becomes each of X, Y, Z.
        mirrored: Stored axes that run the other way.
    """

    order: Triple = (0, 1, 2)
    mirrored: tuple[int, ...] = ()

    @classmethod
    def of(cls, affine: np.ndarray, orientation: str) -> Turn:
        """For an image with this affine (4, 4) to RAS+ mm: to axes of RAS+ for "ras", none for "stored"."""
        if orientation != "ras":
            return cls()
        found = io_orientation(affine)  # per stored axis: the axis of the body, and 1 or -1
        x, y, z = np.argsort(found[:, 0]).tolist()
        return cls((x, y, z), tuple(np.flatnonzero(found[:, 1] < 0).tolist()))

    def forth(self, array: np.ndarray) -> np.ndarray:
        """A view of an array (..., X, Y, Z), stored axes, with the new ones."""
        mirrored = np.flip(array, tuple(axis - 3 for axis in self.mirrored))
        return np.moveaxis(mirrored, [axis - 3 for axis in self.order], (-3, -2, -1))

    def back(self, array: np.ndarray) -> np.ndarray:
        """A view of an array (..., X, Y, Z), new axes, with the stored ones."""
        ordered = np.moveaxis(array, (-3, -2, -1), [axis - 3 for axis in self.order])
        return np.flip(ordered, tuple(axis - 3 for axis in self.mirrored))

    def values_forth(self, values: Sequence[T]) -> tuple[T, T, T]:
        """One value per new axis, from one per stored axis."""
        x, y, z = (values[axis] for axis in self.order)
        return x, y, z

    def values_back(self, values: Sequence[T]) -> tuple[T, T, T]:
        """One value per stored axis, from one per new axis."""
        x, y, z = (values[self.order.index(axis)] for axis in range(3))
        return x, y, z

    def affine_forth(self, affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Affine (4, 4) of the image with new axes, from that with stored ones and its ``shape``."""
        index = np.eye(4)[:, [*self.order, 3]]  # from new voxel indices to stored ones
        for axis in self.mirrored:
            index[axis] *= -1
            index[axis, 3] = shape[axis] - 1
        return affine @ index


def in_order(array: np.ndarray) -> np.ndarray:
    """The array laid out in memory as torch takes it, copied where it is not.

    NumPy calls one contiguous whose mirrored axis holds a single voxel, and keeps a negative stride there.
    """
    ordered = np.ascontiguousarray(array)
    return ordered if min(ordered.strides, default=1) >= 0 else ordered.copy()


def turned(volume: Volume, turn: Turn) -> Volume:
    """A case with other axes, its image a view; the case itself where nothing is turned."""
    if turn == Turn():
        return volume
    return replace(
        volume,
        image=turn.forth(volume.image),
        label=None if volume.label is None else np.ascontiguousarray(turn.forth(volume.label)),
        affine=turn.affine_forth(volume.affine, volume.image.shape[1:]),
        spacing=turn.values_forth(volume.spacing),
    )


def axis_directions(affine: np.ndarray) -> np.ndarray:
    """Unit vectors (3, 3) along the array axes, one per column."""
    return np.asarray(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))


def tilt(affine: np.ndarray) -> float:
    """Largest angle in degrees between an array axis and the direction of the body that it is turned to."""
    directions = axis_directions(affine)
    closest = io_orientation(affine)[:, 0].astype(int)
    cosines = np.abs(directions[closest, range(3)])
    return float(np.degrees(np.arccos(np.clip(cosines, 0, 1))).max())


def axis_names(affines: Iterable[np.ndarray]) -> str:
    """The orientations that occur, such as "LPS, RAS"."""
    return ", ".join(sorted({"".join(aff2axcodes(affine)) for affine in affines}))


def stated_axes(affine: np.ndarray, oriented: bool) -> str:
    """The orientation of one scan, or that nobody stated it."""
    return axis_names([affine]) if oriented else "without directions"


def warn_if_oblique(volume: Volume) -> None:
    """Say once per case that its closest axes may be others than they should."""
    degrees = tilt(volume.affine)
    if degrees > LARGEST_TILT:
        warn_once(
            logger,
            f"case {volume.case_id} lies {round(degrees)} degrees off the axes of the body: it is turned to the "
            "closest, which may be others than in the other scans; look at its prediction, or train "
            "with --orientation stored",
        )


def warn_of_unstated(source: CaseSource, case_ids: Sequence[str], orientation: str) -> None:
    """Say once which cases are turned by directions that nobody stated; a file that cannot be read is named later."""
    unstated = []
    for case_id in case_ids if orientation == "ras" else ():
        with suppress(ValueError, OSError):
            if not source.states_orientation(case_id):
                unstated.append(case_id)
    if unstated:
        warn_once(
            logger,
            f"{len(unstated)} of {len(case_ids)} cases do not say how they lie in the body, having neither qform nor "
            f"sform or a format without them, and may be mirrored to other scans: {some(unstated)}; write their "
            "headers, as NIfTI where the format has none, or leave them out",
        )


def note_stored_axes(names: str) -> None:
    """Say once per orientation of scans to predict that their axes are not looked at."""
    warn_once(
        logger,
        f"the network takes axes as stored, here {names}: in each scan they must mean what they did in the training "
        "scans",
    )
