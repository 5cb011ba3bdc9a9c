"""Preprocessing that training, evaluation and prediction share: axes, intensities and optional resampling."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dataloaders.base import Volume
from dataloaders.class_names import MODALITIES
from dataloaders.orientation import ORIENTATIONS, Turn, in_order, turned, warn_if_oblique
from dataloaders.resampling import SPLINE_ORDER, resample, resample_labels, resampled_affine
from dataloaders.say_once import warn_once

logger = logging.getLogger(__name__)

CT_PERCENTILES = (0.5, 99.5)
FEWEST_VOXELS = 4  # along an axis, after resampling of at least twice as many
AIR = -900  # in Hounsfield units; MR has no values like it
MOST_VOXELS = 2**31  # after resampling: 8 GiB per channel


@dataclass(frozen=True)
class Preprocess:
    """Turn the axes to RAS+ where asked for, normalise intensities and, where ``spacing`` is set, resample.

    The resampled grid has exactly ``spacing``, the axes of the turned image and its centre; its affine says so.

    Note:
        There is no low-pass filter before the image is sampled down, as in nnU-Net (doi:10.1038/s41592-020-01008-z).

    Args:
        modality: "mr" (z-score) or "ct" (clip, then scale).
        spacing: Voxel size in mm to work at, along the turned axes; None to keep each image's own.
        interpolation: "linear" or "cubic", for the image, within its own range; of a label the class with the largest
            linear weight is taken.
        ct_range: Values that CT is clipped to and that become -2 and 2, in every case alike: Hounsfield units mean the
            same everywhere. None to clip each case to percentiles of its own and take the z-score.
        orientation: "ras" for axes that run right, forward and up, as closely as they go; "stored" for the file's.

    Raises:
        ValueError: If a value is none of these.
    """

    modality: str
    spacing: tuple[float, float, float] | None = None
    interpolation: str = "linear"
    ct_range: tuple[float, float] | None = None
    orientation: str = "stored"

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise ValueError(f"modality {self.modality!r}: pass one of {', '.join(MODALITIES)}")
        if self.interpolation not in SPLINE_ORDER:
            raise ValueError(f"interpolation {self.interpolation!r}: pass one of {', '.join(SPLINE_ORDER)}")
        if self.orientation not in ORIENTATIONS:
            raise ValueError(f"orientation {self.orientation!r}: pass one of {', '.join(ORIENTATIONS)}")
        if self.spacing is None:
            return
        if len(self.spacing) != 3 or not all(math.isfinite(size) and size > 0 for size in self.spacing):
            raise ValueError(f"--spacing {self.spacing}: pass three positive numbers in mm")

    def __call__(self, volume: Volume) -> Volume:
        """Normalised float32 image (C, X', Y', Z'), label on the same grid, and the new affine and spacing.

        Raises:
            ValueError: If the image has non-finite voxels, or ``spacing`` leaves it far too few or too many.
        """
        bad = volume.image.size - int(np.isfinite(volume.image).sum())
        if bad:
            raise ValueError(
                f"case {volume.case_id}: {bad} voxels are NaN or infinite, or beyond the 3.4e38 of float32; repair the "
                "file, or leave the case out"
            )
        for number, channel in enumerate(volume.image):
            low = channel.min(initial=np.inf)
            if self.modality == "mr" and low <= AIR:
                warn_once(
                    logger,
                    f"images with values below {AIR}, such as the air of CT in Hounsfield units, are normalised as MR, "
                    "each by its own mean; train with --modality ct if they are CT",
                )
            if low == channel.max(initial=-np.inf):
                warn_once(
                    logger,
                    f"case {volume.case_id}: every voxel of channel {number} is {float(channel.flat[0]):g}, so that it "
                    "shows nothing; export the scan again, or leave it out",
                )
        if self.orientation == "ras":
            warn_if_oblique(volume)
        volume = turned(volume, self.turn_of(volume))
        size = self.working_shape(volume.case_id, volume.image.shape[1:], volume.spacing)
        image = np.stack([np.ascontiguousarray(self._normalize(channel)) for channel in volume.image])  # (C, X, Y, Z)
        if self.spacing is None:
            return replace(volume, image=image)
        shape, ratio, order = image.shape[1:], self._ratio(volume.spacing), SPLINE_ORDER[self.interpolation]
        image = resample(image, size, ratio, order=order)
        label = volume.label
        if label is not None:
            label = resample_labels(label, size, ratio)
        affine = resampled_affine(volume.affine, shape, size, ratio)
        return Volume(volume.case_id, image, label, affine, self.spacing)

    def restore(self, probabilities: np.ndarray, original: Volume, rows: slice | None = None) -> np.ndarray:
        """Bring class probabilities back onto the original grid, linearly.

        Args:
            probabilities: Class probabilities (K, X', Y', Z'), float32, on the grid that ``__call__`` gave.
            original: The case before ``__call__``.
            rows: Part of the original image along X; all of it by default.

        Returns:
            Probabilities (K, X, Y, Z), float32, X, Y, Z those of the original image, X those of ``rows``.

        Raises:
            ValueError: If the shape is not the one that ``__call__`` gives for this case.
        """
        shape, turn = original.image.shape[1:], self.turn_of(original)
        ratio = self._ratio(turn.values_forth(original.spacing))
        expected = _working_shape(turn.values_forth(shape), ratio)
        if probabilities.ndim != 4 or probabilities.shape[1:] != expected:
            raise ValueError(
                f"case {original.case_id}: probabilities have shape {probabilities.shape}; "
                f"expected (K, {', '.join(map(str, expected))})"
            )
        probabilities = probabilities.astype(np.float32, copy=False)
        probabilities, rows = turn.back(probabilities), rows or slice(0, shape[0])
        if self.spacing is None:
            return in_order(probabilities[:, rows])
        inverse = turn.values_back([1 / step for step in ratio])
        return resample(probabilities, shape, inverse, order=1, rows=rows)  # (K, X, Y, Z)

    def turn_of(self, volume: Volume) -> Turn:
        """How ``__call__`` turns a case."""
        return Turn.of(volume.affine, self.orientation)

    def working_shape(self, case_id: str, shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...]:
        """Voxels per axis of a turned case of this ``shape`` and ``spacing`` after resampling.

        Raises:
            ValueError: If they are fewer than 4 where there were 8 or more, or too many in all.
        """
        size = _working_shape(tuple(shape), self._ratio(spacing))
        few = any(new < FEWEST_VOXELS and old >= 2 * FEWEST_VOXELS for new, old in zip(size, shape, strict=True))
        if self.spacing is None or not (few or math.prod(size) > MOST_VOXELS):
            return size
        rows = (self.spacing, size, shape, spacing)
        asked, after, before, steps = (" x ".join(f"{value:g}" for value in row) for row in rows)
        limit = f"fewer than {FEWEST_VOXELS} along an axis" if few else f"more than {MOST_VOXELS} in all"
        raise ValueError(
            f"case {case_id}: --spacing of {asked} mm makes {after} voxels out of {before} of {steps} mm, {limit}; "
            f"train with a {'smaller' if few else 'larger'} one, or mend the voxel size or its unit in the header"
        )

    def _ratio(self, spacing: Sequence[float]) -> tuple[float, ...]:
        """Working voxel size over the turned volume's, per axis."""
        return tuple(new / old for new, old in zip(self.spacing or spacing, spacing, strict=True))

    def _normalize(self, channel: np.ndarray) -> np.ndarray:
        """Normalise one channel (X, Y, Z), by its foreground or by ``ct_range``."""
        if self.modality == "ct" and self.ct_range is not None:
            low, high = self.ct_range
            return (channel.clip(low, high) - (low + high) / 2) * (4 / (high - low))
        foreground = channel[foreground_mask(channel)].astype(np.float64)
        limits = (-np.inf, np.inf)
        if self.modality == "ct" and foreground.size:
            limits = tuple(np.percentile(foreground, CT_PERCENTILES))
            np.clip(foreground, *limits, out=foreground)
        return z_score(channel, foreground, limits)


def foreground_mask(channel: np.ndarray) -> np.ndarray:
    """Voxels (X, Y, Z) that differ from the constant border value, bool.

    The border is constant if all eight corners hold one value, as in a scan whose background is set to zero, padded
    or masked. Else every voxel is foreground.
    """
    corners = channel[np.ix_(*[(0, -1)] * 3)]
    if (corners == corners.flat[0]).all():
        return channel != corners.flat[0]
    return np.ones(channel.shape, dtype=bool)


def z_score(values: np.ndarray, foreground: np.ndarray, limits: tuple[float, float] = (-np.inf, np.inf)) -> np.ndarray:
    """Clip to ``limits``, subtract the foreground's mean and divide by its standard deviation, at every voxel; float32.

    A foreground of one value (a mask, say) is replaced by all voxels; a constant image gives zeros. The foreground is
    float64 and clipped already; the image is worked on slice by slice, for volumes may be large.
    """
    if foreground.size == 0 or np.ptp(foreground) == 0:
        foreground = np.clip(values.astype(np.float64), *limits)
    deviation, mean = float(foreground.std()), float(foreground.mean())
    scaled = np.zeros(values.shape, dtype=np.float32)
    if np.ptp(foreground) == 0 or deviation == 0:
        return scaled
    for place, part in zip(scaled, values, strict=True):
        place[...] = (np.clip(part.astype(np.float64), *limits) - mean) / deviation
    return scaled


def _working_shape(shape: tuple[int, ...], ratio: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(max(1, round(count / step)) for count, step in zip(shape, ratio, strict=True))
