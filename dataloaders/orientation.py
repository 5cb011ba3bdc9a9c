"""Array axes and the body: images whose axes run right, forward and up, however a scanner or a program stored them.

Contract: a turn permutes and mirrors axes; no voxel's value or place in space changes, and every turn can be undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from nibabel.orientations import aff2axcodes, inv_ornt_aff, io_orientation

from dataloaders.base import Volume

ORIENTATIONS = ("ras", "stored")
LARGEST_TILT = 30.0  # degrees; at 45 an axis is as close to one direction of the body as to another

T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """How an image's axes become those of RAS+: right, anterior and superior, as closely as they go.

    Attributes:
        order: The stored axis that becomes each of X, Y, Z.
        mirrored: Stored axes that run the other way.
    """

    order: tuple[int, ...] = (0, 1, 2)
    mirrored: tuple[int, ...] = ()

    @classmethod
    def to_ras(cls, affine: np.ndarray) -> Turn:
        """For an image with this affine (4, 4) to RAS+ mm."""
        found = io_orientation(affine)  # per stored axis: the axis of the body, and 1 or -1
        return cls(tuple(np.argsort(found[:, 0]).tolist()), tuple(np.flatnonzero(found[:, 1] < 0).tolist()))

    def forth(self, array: np.ndarray) -> np.ndarray:
        """A view of an array (..., X, Y, Z), stored axes, with axes of RAS+."""
        mirrored = np.flip(array, tuple(axis - 3 for axis in self.mirrored))
        return np.moveaxis(mirrored, [axis - 3 for axis in self.order], (-3, -2, -1))

    def back(self, array: np.ndarray) -> np.ndarray:
        """A view of an array (..., X, Y, Z), axes of RAS+, with stored axes."""
        ordered = np.moveaxis(array, (-3, -2, -1), [axis - 3 for axis in self.order])
        return np.flip(ordered, tuple(axis - 3 for axis in self.mirrored))

    def values_back(self, values: Sequence[T]) -> tuple[T, ...]:
        """One value per stored axis, from one per axis of RAS+."""
        return tuple(values[self.order.index(axis)] for axis in range(3))


def turned(volume: Volume) -> Volume:
    """A case with axes of RAS+; the case itself where they are so already, else its image is a view."""
    turn = Turn.to_ras(volume.affine)
    if turn == Turn():
        return volume
    x, y, z = (volume.spacing[axis] for axis in turn.order)
    return replace(
        volume,
        image=turn.forth(volume.image),
        label=None if volume.label is None else np.ascontiguousarray(turn.forth(volume.label)),
        affine=volume.affine @ inv_ornt_aff(io_orientation(volume.affine), volume.image.shape[1:]),
        spacing=(x, y, z),
    )


def tilt(affine: np.ndarray) -> float:
    """Largest angle in degrees between an array axis and the direction of the body that it is turned to."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    closest = io_orientation(affine)[:, 0].astype(int)
    cosines = np.abs(directions[closest, range(3)])
    return float(np.degrees(np.arccos(np.clip(cosines, 0, 1))).max())


def axis_names(affines: Sequence[np.ndarray]) -> str:
    """The orientations that occur, such as "LPS, RAS"."""
    return ", ".join(sorted({"".join(aff2axcodes(affine)) for affine in affines}))
