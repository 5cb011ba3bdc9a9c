"""Simulated patients: one labelled template, warped and imaged anew for every case.

A case is the template pulled back through an affine map and the exponential of a smooth velocity field (one-to-one,
Arsigny et al. 2006, doi:10.1007/11866565_113) in which single structures also grow or shrink. Then come new tissue
contrasts, texture, unlabelled white-matter lesions, gamma, a bias field, blur and Rician noise
(Gudbjartsson & Patz 1995, doi:10.1002/mrm.1910340618).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dataloaders.demo_template import BRAINSTEM, CEREBELLUM, CEREBRAL_WM, DEEP_GREY, VENTRICLES, Template

COARSE = 2  # the velocity field lives on voxels this many times larger
SQUARINGS = 5
VELOCITY_MM = ((4, 4.5), (8, 2.2), (14, 0.9))  # (control points per axis, standard deviation in mm)
PULLED = (VENTRICLES, DEEP_GREY, CEREBELLUM, BRAINSTEM)  # structures that grow and shrink on their own
INTENSITY_SCALE = 1000.0
MAX_LESIONS = 8


@dataclass(frozen=True)
class CohortSettings:
    """What a cohort is made with; two equal settings give equal cases.

    Attributes:
        shape: Voxels along X, Y, Z.
        voxel_mm: Voxel size in mm, the same along all axes.
        strength: Scale of every variation between cases: 0 gives copies with noise, 1 is the default, 2 is hard.
        seed: Seed of the cohort; case ``i`` depends on it and on ``i`` alone.
    """

    shape: tuple[int, int, int] = (48, 56, 48)
    voxel_mm: float = 3.8
    strength: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 8:
            raise ValueError(f"demo shape {self.shape}: pass three sizes of at least 8 voxels")
        if not (self.voxel_mm > 0 and self.strength >= 0 and self.seed >= 0):
            raise ValueError(
                f"demo voxel_mm {self.voxel_mm}, strength {self.strength}, seed {self.seed}: "
                "the first must be positive, the others not negative"
            )

    @property
    def affine(self) -> np.ndarray:
        """Voxel index to mm (4, 4), the centre of the grid at the origin."""
        affine = np.diag([self.voxel_mm] * 3 + [1.0])
        affine[:3, 3] = -(np.array(self.shape) - 1) / 2 * self.voxel_mm
        return affine


class CohortSimulator:
    """Draws cases from a template; the same case comes out in any order and in any thread.

    Args:
        template: The labelled template.
        settings: Size, difficulty and seed.
    """

    def __init__(self, template: Template, settings: CohortSettings) -> None:
        self.settings = settings
        self._template_mm = template.voxel_mm
        self._centre = (np.array(template.labels.shape) - 1) / 2
        sigma = 0.42 * settings.voxel_mm / template.voxel_mm  # low-pass before sampling at the cohort's voxel size
        self._t1 = ndimage.gaussian_filter(template.t1, 0.8 * sigma)
        masks = [(template.labels == k).astype(np.float32) for k in range(int(template.labels.max()) + 1)]
        self._shares = [ndimage.gaussian_filter(mask, sigma) for mask in masks]
        self._pulls = {k: _inward_pull(masks[k]) for k in PULLED if k < len(masks)}

    def case(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (X, Y, Z) int16 in 0..4095, and class ids (X, Y, Z) uint8."""
        rng = np.random.default_rng([self.settings.seed, index])
        at = self._template_coordinates(rng)  # (3, X, Y, Z)
        shares = np.stack(
            [ndimage.map_coordinates(share, at, order=1, cval=float(k == 0)) for k, share in enumerate(self._shares)]
        )  # (K, X, Y, Z)
        labels = shares.argmax(0).astype(np.uint8)
        tissue = self._tissue(rng, ndimage.map_coordinates(self._t1, at, order=1), shares, labels)
        scan = self._acquire(rng, tissue)
        return np.round(scan * INTENSITY_SCALE).clip(0, 4095).astype(np.int16), labels

    def _template_coordinates(self, rng: np.random.Generator) -> np.ndarray:
        """Where each voxel of the case lies in the template, in template voxels (3, X, Y, Z), float32."""
        shape, voxel_mm = self.settings.shape, self.settings.voxel_mm
        matrix, shift = self._affine(rng)

        def to_template(millimetres: np.ndarray) -> np.ndarray:
            moved = np.tensordot(matrix, millimetres, 1) + shift[:, None, None, None]
            return moved / self._template_mm + self._centre[:, None, None, None]

        coarse = tuple(-(-size // COARSE) for size in shape)
        steps = [size * voxel_mm / count for size, count in zip(shape, coarse, strict=True)]
        velocity = self._velocity(rng, to_template(_centred_grid(coarse, steps)))  # mm
        steps_column = np.reshape(steps, (3, 1, 1, 1))
        displacement = exponential(velocity / steps_column) * steps_column  # (3, x, y, z) mm
        fine = np.stack([_resize(component, shape, order=1) for component in displacement])  # (3, X, Y, Z)
        at = to_template(_centred_grid(shape, [voxel_mm] * 3) + fine)
        if rng.random() < 0.5:
            at[0] = 2 * self._centre[0] - at[0]  # left-right mirror
        return at.astype(np.float32)

    def _affine(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Matrix (3, 3) and shift (3,) in mm from the case to the template: rotation, scale, shear, translation."""
        strength = self.settings.strength
        rotation = np.eye(3)
        for axis, angle in enumerate(np.deg2rad(rng.normal(0, 6, 3) * strength)):
            first, second = [k for k in range(3) if k != axis]
            turn = np.eye(3)
            turn[first, first] = turn[second, second] = np.cos(angle)
            turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
            rotation = rotation @ turn
        scale = np.diag(np.exp(rng.normal(0.05, 0.04 * strength) + rng.normal(0, 0.03 * strength, 3)))
        shear = np.eye(3)
        shear[np.triu_indices(3, 1)] = rng.normal(0, 0.03 * strength, 3)
        return rotation @ scale @ shear, rng.normal(0, 4 * strength, 3)

    def _velocity(self, rng: np.random.Generator, at: np.ndarray) -> np.ndarray:
        """Velocity field (3, x, y, z) in mm on the coarse grid, whose template coordinates are ``at``."""
        shape = at.shape[1:]
        velocity = np.zeros(at.shape, np.float32)
        for points, deviation in VELOCITY_MM:
            velocity += deviation * np.stack([smooth_field(rng, shape, points) for _ in range(3)])
        for structure, pull in self._pulls.items():
            amount = (
                rng.uniform(-2, 5) if structure == VENTRICLES else rng.normal()
            )  # ventricles mostly grow, as with age
            velocity += amount * np.stack([ndimage.map_coordinates(part, at, order=1) for part in pull])
        return self.settings.strength * velocity

    def _tissue(self, rng: np.random.Generator, t1: np.ndarray, shares: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Noise-free image (X, Y, Z): new contrast per class, texture and lesions."""
        contrast = rng.normal(0, 0.06 * self.settings.strength, len(shares))
        contrast[0] = 0
        image = t1 + np.tensordot(contrast, shares, 1)
        grain = 4 * ndimage.gaussian_filter(rng.standard_normal(t1.shape), 0.8) + smooth_field(rng, t1.shape, 12)
        image += (t1 > 0.05) * rng.uniform(0.008, 0.03) * grain
        image -= self._lesions(rng, labels)
        return np.clip(image, 0, None) ** np.exp(rng.normal(0, 0.22 * self.settings.strength))

    def _lesions(self, rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
        """Dark spots (X, Y, Z) in the white matter, which the label does not show."""
        darkening = np.zeros(labels.shape)
        white = np.argwhere(labels == CEREBRAL_WM)
        if len(white) == 0:
            return darkening
        grid = np.indices(labels.shape)
        for _ in range(rng.integers(0, MAX_LESIONS + 1)):
            centre = white[rng.integers(len(white))].reshape(3, 1, 1, 1)
            radius = rng.uniform(2.6, 6.5) / self.settings.voxel_mm
            darkening += 0.22 * np.exp(-((grid - centre) ** 2).sum(0) / (2 * radius**2))
        return darkening * (labels == CEREBRAL_WM)

    def _acquire(self, rng: np.random.Generator, tissue: np.ndarray) -> np.ndarray:
        """The scan (X, Y, Z): bias field, blur (more along one axis, as with thick slices) and Rician noise."""
        scan = tissue * np.exp(rng.uniform(0.04, 0.22) * self.settings.strength * smooth_field(rng, tissue.shape, 3))
        blur = rng.uniform(0, 0.35, 3)
        blur[rng.integers(3)] += rng.uniform(0, 0.8)
        scan = ndimage.gaussian_filter(scan, blur)
        noise = rng.uniform(0.015, 0.06)
        real, imaginary = noise * rng.standard_normal((2, *tissue.shape))
        return np.hypot(scan + real, imaginary)


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], points: int) -> np.ndarray:
    """Random field (X, Y, Z) of unit standard deviation: a cubic spline over ``points`` normal draws per axis."""
    field = _resize(rng.standard_normal((points,) * 3), shape, order=3)
    return field / (field.std() + 1e-6)


def exponential(velocity: np.ndarray, squarings: int = SQUARINGS) -> np.ndarray:
    """Displacement of the exponential of a steady velocity field, by scaling and squaring; (3, X, Y, Z) in voxels."""
    displacement = velocity / 2**squarings
    grid = np.indices(velocity.shape[1:])
    for _ in range(squarings):
        at = grid + displacement
        displacement = displacement + np.stack(
            [ndimage.map_coordinates(component, at, order=1, mode="nearest") for component in displacement]
        )
    return displacement


def _resize(field: np.ndarray, shape: tuple[int, ...], *, order: int) -> np.ndarray:
    """Spline interpolation of a field onto ``shape``, both grids covering the same box."""
    factors = [new / old for new, old in zip(shape, field.shape, strict=True)]
    return ndimage.zoom(field, factors, order=order, mode="nearest", grid_mode=True)


def _centred_grid(shape: tuple[int, ...], steps: list[float]) -> np.ndarray:
    """Coordinates (3, X, Y, Z) in mm of a grid whose centre is the origin."""
    grid = np.indices(shape, dtype=np.float64)
    centre = (np.reshape(shape, (3, 1, 1, 1)) - 1) / 2
    return (grid - centre) * np.reshape(steps, (3, 1, 1, 1))


def _inward_pull(mask: np.ndarray) -> np.ndarray:
    """Vectors (3, X, Y, Z) that point into a structure around its surface, the longest of length 1."""
    gradient = np.stack(np.gradient(ndimage.gaussian_filter(mask, 3.0)))
    return (gradient / (np.sqrt((gradient**2).sum(0)).max() + 1e-12)).astype(np.float32)
