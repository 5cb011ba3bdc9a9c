"""A labelled 3D brain template made from the ICBM152 average brain that the ``nilearn`` package ships.

The three volumes (T1, grey- and white-matter probability, 1 mm) are ICBM 2009a Nonlinear Symmetric. They are read from
the installed package; nilearn itself is not imported, and nothing of them is stored in this project.

Licence of the volumes: copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological
Institute, McGill University. Use, copying, modification and distribution for any purpose and without fee are granted
by their authors, provided that the copyright notice appears in all copies; they come as is, without any warranty.

Six structures are drawn by thresholds, markers and planes in MNI coordinates. They look like the anatomy and are good
for a demonstration; they are no anatomical reference.

Source: Fonov et al. 2011, doi:10.1016/j.neuroimage.2010.07.033.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from dataloaders.geometry import read_nifti

CLASS_NAMES = ("background", "ventricles", "deep grey", "cerebral GM", "cerebral WM", "cerebellum", "brainstem")
VENTRICLES, DEEP_GREY, CEREBRAL_GM, CEREBRAL_WM, CEREBELLUM, BRAINSTEM = range(1, 7)

FILES = {kind: f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm")}
MARGIN = 4  # voxels kept around the brain

# Watershed regions; the cerebellum and the brainstem keep their class ids, the cerebrum is split later.
CEREBRUM = 1
# (x, y, z) mm in MNI space, radius mm; x is mirrored for those off the midline.
CEREBRUM_MARKERS = (
    (30, -20, 45, 14), (40, 10, -25, 6), (45, -30, -15, 6), (25, -88, 5, 7), (18, -70, 12, 7), (30, -48, -7, 4),
    (24, -70, -4, 4), (45, -62, -4, 5), (14, -86, -2, 4), (40, -48, -16, 3), (20, 30, 0, 10), (26, 0, 0, 8),
    (11, -18, 10, 6), (20, -20, -14, 4),
)  # fmt: skip
CEREBELLUM_MARKERS = ((28, -62, -42, 14), (12, -62, -34, 8), (0, -62, -20, 5), (0, -56, -40, 3))
BRAINSTEM_MARKERS = ((0, -26, -30, 10), (0, -34, -52, 5), (0, -28, -18, 5))
# Points inside the bodies, atria and horns of the lateral ventricles, and in the third ventricle.
VENTRICLE_POINTS = ((8, 6, 18), (12, -14, 22), (25, -42, 8), (0, -14, 6), (8, 20, 10), (28, -36, 0))


@dataclass(frozen=True)
class Template:
    """One labelled head.

    Attributes:
        t1: T1 intensity (X, Y, Z), float32 in 0..1, 0 outside the brain.
        labels: Class ids (X, Y, Z), uint8, as in ``CLASS_NAMES``.
        voxel_mm: Voxel size in mm, the same along all axes, which are those of RAS+.
    """

    t1: np.ndarray
    labels: np.ndarray
    voxel_mm: float


@dataclass(frozen=True)
class _Atlas:
    """The 1 mm volumes (X, Y, Z) in 0..1, with MNI coordinates in mm that broadcast against them."""

    t1: np.ndarray
    grey: np.ndarray
    white: np.ndarray
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    depth: np.ndarray  # distance to the outside of the brain, mm

    @property
    def side(self) -> np.ndarray:
        """Distance from the midline in mm."""
        return np.abs(self.x)

    @property
    def brain(self) -> np.ndarray:
        return self.t1 > 0

    @property
    def fluid(self) -> np.ndarray:
        """What is neither grey nor white matter."""
        return np.clip(self.brain - self.grey - self.white, 0, 1)

    def index(self, point: tuple[int, int, int]) -> tuple[int, ...]:
        """Voxel index of a point in mm."""
        return tuple(round(p - float(axis.flat[0])) for p, axis in zip(point, (self.x, self.y, self.z), strict=True))


def nilearn_data_folder() -> Path:
    """Folder of the volumes inside the installed nilearn package, which is located but not imported.

    Raises:
        FileNotFoundError: If nilearn, or one of the three volumes in it, is not there.
    """
    spec = importlib.util.find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the demo data come with the package nilearn, which is not installed; run: pip install nilearn"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data"
    missing = [name for name in FILES.values() if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {missing[0]}; run: pip install 'nilearn>=0.10'")
    return folder


def build_template(voxel_mm: float = 2.0) -> Template:
    """Label the ICBM152 brain at 1 mm and average it onto voxels of ``voxel_mm``; takes a few seconds.

    Raises:
        FileNotFoundError: If the nilearn package is not installed.
        ValueError: If ``voxel_mm`` is below 1.
    """
    if not voxel_mm >= 1:
        raise ValueError(f"voxel_mm {voxel_mm}: the template is stored at 1 mm; pass 1 or more")
    atlas = _load_atlas(nilearn_data_folder())
    labels = _label(atlas)
    shape = tuple(int(size / voxel_mm) for size in labels.shape)
    axes = [np.arange(size) * voxel_mm + (voxel_mm - 1) / 2 for size in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))  # (3, X, Y, Z)

    def shrink(volume: np.ndarray) -> np.ndarray:
        blurred = ndimage.gaussian_filter(volume, 0.42 * voxel_mm) if voxel_mm > 1 else volume
        return ndimage.map_coordinates(blurred, grid, order=1)

    shares = [shrink((labels == k).astype(np.float32)) for k in range(len(CLASS_NAMES))]
    return Template(shrink(atlas.t1), np.argmax(shares, axis=0).astype(np.uint8), voxel_mm)


def _load_atlas(folder: Path) -> _Atlas:
    """Read the three volumes, cut to the brain and its margin."""
    images = {kind: read_nifti(folder / name) for kind, name in FILES.items()}
    t1, affine, _ = images["t1"]
    inside = np.argwhere(t1[0] > 0)
    low, high = np.maximum(inside.min(0) - MARGIN, 0), inside.max(0) + MARGIN + 1
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    axes = [affine[k, 3] + affine[k, k] * np.arange(a, b) for k, (a, b) in enumerate(zip(low, high, strict=True))]
    x, y, z = np.ix_(*[axis.astype(np.float32) for axis in axes])
    cut = {kind: np.ascontiguousarray(image[0][box]) / 255 for kind, (image, _, _) in images.items()}
    depth = ndimage.distance_transform_edt(cut["t1"] > 0).astype(np.float32)
    return _Atlas(cut["t1"], cut["gm"], cut["wm"], x, y, z, depth)


def _label(atlas: _Atlas) -> np.ndarray:
    """Class ids (X, Y, Z), uint8."""
    regions = _regions(atlas)
    ventricles = _ventricles(atlas)
    cerebrum = regions == CEREBRUM
    solid = atlas.fluid < 0.5
    grey = (atlas.grey >= atlas.white) & (atlas.grey > 0.5 * (1 - atlas.white))
    stem = regions == BRAINSTEM
    labels = np.zeros(atlas.t1.shape, np.uint8)
    labels[cerebrum & grey & solid] = CEREBRAL_GM
    labels[cerebrum & (atlas.white > atlas.grey) & solid] = CEREBRAL_WM
    labels[(regions == CEREBELLUM) & (atlas.fluid < 0.6)] = CEREBELLUM
    bright_stem = stem & ((atlas.t1 > 0.5) | ndimage.binary_opening(atlas.t1 > 0.45))
    labels[bright_stem & (atlas.fluid < 0.6)] = BRAINSTEM
    labels[_deep_grey(atlas, cerebrum & ~ventricles)] = DEEP_GREY
    labels[ventricles] = VENTRICLES
    return labels


def _ventricles(atlas: _Atlas) -> np.ndarray:
    """Dark, deep voxels connected to the lateral or third ventricle, without the cisterns nearby."""
    side, y, z = atlas.side, atlas.y, atlas.z
    dark = (atlas.t1 < 0.56) & atlas.brain & (atlas.depth > 20)
    dark &= (side < 40) & (y > -52) & (y < 40) & (z > -22) & (z < 34)
    dark &= ~((side < 14) & (y < -24) & (z < 16))  # quadrigeminal and ambient cisterns
    dark &= ~((side < 9) & (z < -9))  # interpeduncular and suprasellar cisterns
    dark &= ~((side > 14) & (y > -6) & (z < 4))  # stem of the Sylvian fissure
    parts, _ = ndimage.label(dark)
    kept: set[int] = set()
    for point in VENTRICLE_POINTS:
        for mirror in {1, -1 if point[0] else 1}:
            at = atlas.index((mirror * point[0], point[1], point[2]))
            kept |= set(np.unique(parts[tuple(slice(i - 3, i + 4) for i in at)]).tolist())
    return np.isin(parts, sorted(kept - {0}))


def _regions(atlas: _Atlas) -> np.ndarray:
    """Cerebrum, cerebellum and brainstem by a marker watershed on the inverted T1, then straightened by planes."""
    smooth = ndimage.gaussian_filter(atlas.t1, 0.7)
    markers = np.zeros(atlas.t1.shape, np.int16)
    # Later ones win where two meet, so the lobes come before the stem.
    for region, balls in (
        (CEREBELLUM, CEREBELLUM_MARKERS),
        (CEREBRUM, CEREBRUM_MARKERS),
        (BRAINSTEM, BRAINSTEM_MARKERS),
    ):
        for px, py, pz, radius in balls:
            for mirror in {1, -1 if px else 1}:
                distance = (atlas.x - mirror * px) ** 2 + (atlas.y - py) ** 2 + (atlas.z - pz) ** 2
                markers[(distance <= radius**2) & atlas.brain] = region
    regions = ndimage.watershed_ift(np.clip((1 - smooth) * 255, 0, 255).astype(np.uint8), markers)
    regions[~atlas.brain] = 0
    side, y, z = atlas.side, atlas.y, atlas.z
    stem = (regions != 0) & (y > -44) & (y < -12) & (z < -8)
    stem &= (side < 13) | ((side < 20) & (z < -18) & (y < -22) & (z > -46))
    stem &= ~((regions == CEREBELLUM) & (y < -40))
    outside = (regions == BRAINSTEM) & ~stem
    behind = outside & (z < -14) & (y < -36)
    regions[outside] = CEREBRUM
    regions[behind] = CEREBELLUM
    low = ((z < -20) & (y < -40) & (side < 27)) | ((z < -34) & (y < -46))
    regions[(regions == CEREBRUM) & low] = CEREBELLUM
    regions[stem] = BRAINSTEM
    return regions


def _deep_grey(atlas: _Atlas, where: np.ndarray) -> np.ndarray:
    """Thalamus, caudate, putamen and pallidum: the large deep grey components inside ``where``."""
    side, y, z = atlas.side, atlas.y, atlas.z
    nuclei = where & (atlas.grey > 0.42) & (atlas.depth > 24)
    nuclei &= (side > 2) & (side < 33) & (y > -34) & (y < 24) & (z > -9) & (z < 24)
    nuclei &= ~((side < 14) & (y > 4) & (z < -2)) & ~((y > 0) & (z > 14) & (side > 22)) & ~((z < -4) & (y < -6))
    parts, count = ndimage.label(ndimage.binary_opening(nuclei))
    sizes = ndimage.sum_labels(parts > 0, parts, range(1, count + 1))
    large = np.isin(parts, 1 + np.flatnonzero(np.asarray(sizes) > 800))
    return ndimage.binary_fill_holes(ndimage.binary_closing(large, iterations=2)) & where
