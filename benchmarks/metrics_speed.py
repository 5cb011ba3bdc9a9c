"""Dice, Jaccard, HD95 and ASSD of one case: ours against medpy and MONAI, in one process, in turn.

    python -m benchmarks.metrics_speed --labels LA_0.625mm/labels

Each label map is compared with itself shifted by a few voxels and grown, plus a false positive far away: what a
segmentation after some training looks like. Without ``--labels`` a made-up map of the size of a full-resolution left
atrium is used. Printed per library: median seconds, the ratio to ours, and the largest relative difference of the four
figures (of MONAI's without HD95, which it defines otherwise; see docs/protocol.md).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from medpy.metric import binary
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
)
from scipy import ndimage

from myutils.metrics import segmentation_metrics

Figures = tuple[float, float, float, float]
SPACING = (0.625, 0.625, 0.625)


def label_maps(folder: Path | None) -> list[np.ndarray]:
    """Masks (X, Y, Z) of a folder's NIfTI files, or one made-up ellipsoid with a rough surface."""
    if folder is not None:
        files = sorted(folder.glob("*.nii*"))
        if not files:
            raise SystemExit(f"--labels {folder}: no NIfTI file there")
        return [np.asarray(nib.load(path).dataobj) > 0 for path in files]  # type: ignore[attr-defined]
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (190, 140, 88)], indexing="ij"))
    rough = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=grid.shape[1:]), 4)
    return [(grid**2).sum(0) < 0.3 + 3 * rough]


def predicted(truth: np.ndarray) -> np.ndarray:
    """What a network might make of it: shifted, grown, with a false positive."""
    mask = np.roll(ndimage.binary_dilation(truth, iterations=2), (3, 1, 0), (0, 1, 2))
    mask[4:10, 4:10, 4:10] = True
    return mask


def ours(prediction: np.ndarray, truth: np.ndarray) -> Figures:
    """One call."""
    figures = segmentation_metrics(prediction.astype(np.uint8), truth.astype(np.uint8), num_classes=2, spacing=SPACING)[
        1
    ]
    return figures.dice, figures.jaccard, figures.hd95_mm, figures.assd_mm


def medpy(prediction: np.ndarray, truth: np.ndarray) -> Figures:
    """``dc, jc, hd95, asd``; the last looks one way only (``assd`` has the value to compare)."""
    return (
        float(binary.dc(prediction, truth)),
        float(binary.jc(prediction, truth)),
        float(binary.hd95(prediction, truth, voxelspacing=SPACING)),
        float(binary.asd(prediction, truth, voxelspacing=SPACING)),
    )


def monai(prediction: np.ndarray, truth: np.ndarray) -> Figures:
    """MONAI's functions on one-hot tensors (1, 2, X, Y, Z)."""
    one, two = (torch.from_numpy(np.stack([~mask, mask]))[None].float() for mask in (prediction, truth))
    return (
        float(compute_dice(one, two, include_background=False)),
        float(compute_iou(one, two, include_background=False)),
        float(compute_hausdorff_distance(one, two, percentile=95, include_background=False, spacing=SPACING)),
        float(compute_average_surface_distance(one, two, symmetric=True, include_background=False, spacing=SPACING)),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=Path, help="folder of NIfTI label maps; else a made-up one")
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [(predicted(truth), truth) for truth in label_maps(settings.labels)]
    sides: dict[str, Callable[[np.ndarray, np.ndarray], Figures]] = {"ours": ours, "medpy": medpy, "monai": monai}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    gaps = dict.fromkeys(sides, 0.0)
    for _ in range(settings.rounds):
        for prediction, truth in pairs:
            found = {}
            for name, side in sides.items():
                started = time.perf_counter()
                found[name] = side(prediction, truth)
                seconds[name].append(time.perf_counter() - started)
            assd = float(binary.assd(prediction, truth, voxelspacing=SPACING))
            found["medpy"] = (*found["medpy"][:3], assd)
            for name, figures in found.items():
                compared = [
                    (a, b)
                    for i, (a, b) in enumerate(zip(found["ours"], figures, strict=True))
                    if not (name == "monai" and i == 2)
                ]
                gaps[name] = max(gaps[name], *(abs(a - b) / abs(b) for a, b in compared))
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "medpy", "monai", "torch"))
    sys.stdout.write(f"{versions}; {len(pairs)} cases, shape {pairs[0][1].shape}, {settings.rounds} rounds\n")
    fastest = statistics.median(seconds["ours"])
    for name, values in seconds.items():
        median = statistics.median(values)
        ratio = median / fastest
        sys.stdout.write(f"{name:6s} {median:.4f} s, {ratio:5.1f} x ours, largest relative gap {gaps[name]:.1e}\n")


if __name__ == "__main__":
    main()
