"""What data cost: a patch from volumes of several sizes, resampling, and the start of a training on many cases.

    python -m benchmarks.data_speed --sizes 64 128 256 --cases 500

Patches: image and label, each turned, scaled, mirrored and changed in its intensities, from cases in memory, one after
the other in one process. ``ours`` cuts and turns in one go; ``monai`` are its dictionary transforms, the whole volume
first and the crop last; ``monai, crop first`` the other way round. Printed: the median time of a patch, and its ratio
to ours.

Resampling: an image of 160 x 160 x 100 voxels to 256 x 256 x 200 (MONAI's ``Spacing`` makes a voxel less of each) and
back, linearly, in turn with MONAI's; ``scipy`` is ``ndimage.affine_transform``.

Start: from the command to the end of the first step on ``--cases`` gzipped NIfTI scans, the first time with an empty
``--cache_gb`` folder, then again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import scipy
import torch
from monai import transforms as mt
from monai.data import MetaTensor
from scipy import ndimage

from benchmarks.trainer_process import TRAINER, run_to_end
from dataloaders.base import Volume
from dataloaders.case_cache import PreparedCase
from dataloaders.patches import PatchDataset
from dataloaders.resampling import resample
from dataloaders.samplers import SampleKey
from dataloaders.transforms import AugmentOptions

ANGLE, SCALE = 12.0, 0.12  # of every patch, so that each time is of the same work
COARSE, FINE = (160, 160, 100), (256, 256, 200)


def main() -> None:
    """Measure and print."""
    settings = parse()
    patch = tuple(settings.patch_size)
    versions = f"monai {monai.__version__}, scipy {scipy.__version__}, torch {torch.__version__}"
    lines = [f"{versions}, patch {'x'.join(map(str, patch))}"]
    lines.append(f"{'':10s}{'side':>19s}{'ms':>14s}{'x ours':>8s}")
    parts = {f"{size}^3": make_sides(size, patch) for size in settings.sizes}
    for part, sides in (parts | resampling_sides()).items():
        typical = typical_seconds(sides, settings.rounds)
        for name, value in typical.items():
            lines.append(f"{part:>10s}{name:>19s}{1000 * value:14.2f}{value / typical['ours']:8.1f}")
    if settings.cases:
        first, again = start_seconds(settings.cases)
        lines.append(f"start with {settings.cases} cases: {first:.1f} s, again {again:.1f} s")
    sys.stdout.write("\n".join(lines) + "\n")


def parse() -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="sides of the volumes in voxels")
    parser.add_argument("--patch_size", type=int, nargs=3, default=(64, 64, 48))
    parser.add_argument("--rounds", type=int, default=15, help="patches of each side")
    parser.add_argument("--cases", type=int, default=500, help="scans of the training that is started; 0: none")
    return parser.parse_args()


def typical_seconds(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, all in turn, without the first round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


class OneCase:
    """A case cache that holds one prepared case."""

    def __init__(self, case: PreparedCase) -> None:
        self._case = case

    def get(self, case_id: str, *, with_label: bool) -> PreparedCase:
        """The case."""
        return self._case


def make_sides(size: int, patch: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """Functions that make one patch of a made-up case each."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, size, size, size), dtype=np.float32)
    label = (image[0] > 1).astype(np.uint8)
    case = PreparedCase(Volume("a", image, label, np.eye(4), (1.0, 1.0, 1.0)), (), image.min((1, 2, 3)))
    options = AugmentOptions(patch, affine_share=1.0, foreground_share=0.0, max_angle=ANGLE, max_scale=SCALE)  # type: ignore[arg-type]
    ours = PatchDataset(OneCase(case), options)  # type: ignore[arg-type]
    keys = ("image", "label")
    turn = mt.RandAffined(
        keys,
        prob=1.0,
        rotate_range=[np.deg2rad(ANGLE)] * 3,
        scale_range=[SCALE] * 3,
        mode=("bilinear", "nearest"),
        padding_mode="border",
    )
    rest: list[Callable[..., object]] = [mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)]
    rest += [mt.RandScaleIntensityd("image", factors=0.2, prob=0.2), mt.RandShiftIntensityd("image", 0.2, prob=0.2)]
    rest += [mt.RandAdjustContrastd("image", prob=0.2), mt.RandGaussianSmoothd("image", prob=0.1)]
    rest += [mt.RandGaussianNoised("image", prob=0.2, std=0.125)]
    crop = mt.RandSpatialCropd(keys, patch, random_size=False)
    orders: dict[str, Sequence[Callable[..., object]]] = {
        "monai": [turn, *rest, crop],
        "monai, crop first": [crop, turn, *rest],
    }
    held = {"image": torch.from_numpy(image), "label": torch.from_numpy(label)[None]}
    counter = iter(range(10**9))
    sides: dict[str, Callable[[], object]] = {"ours": lambda: ours[SampleKey("a", True, next(counter))]}
    for name, steps in orders.items():
        sides[name] = partial(mt.Compose(steps), held)  # dictionary transforms change a copy
    return sides


def resampling_sides() -> dict[str, dict[str, Callable[[], object]]]:
    """Functions that bring an image to finer voxels and back."""
    rng = np.random.default_rng(0)
    parts: dict[str, dict[str, Callable[[], object]]] = {}
    for part, old, new in (("finer", COARSE, FINE), ("coarser", FINE, COARSE)):
        image = rng.standard_normal(old, dtype=np.float32)
        ratio = tuple(a / b for a, b in zip(old, new, strict=True))
        start = (np.array(old) - 1) / 2 - (np.array(new) - 1) / 2 * ratio
        held = MetaTensor(torch.from_numpy(image)[None], affine=torch.eye(4, dtype=torch.float64))
        parts[part] = {
            "ours": partial(resample, image, new, ratio, order=1),
            "monai": partial(mt.Spacing(ratio, mode="bilinear", padding_mode="border"), held),
            "scipy": partial(ndimage.affine_transform, image, np.array(ratio), start, new, order=1, mode="nearest"),
        }
    return parts


def start_seconds(cases: int) -> tuple[float, float]:
    """Seconds from the command to the end of one step on so many scans of 48 x 48 x 48, the first time and again."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        for part in ("images", "labels"):
            (root / part).mkdir(parents=True)
        for index in range(cases):
            voxels = rng.integers(0, 500, (48, 48, 48), dtype=np.int16)
            for part, array in (("images", voxels), ("labels", (voxels > 250).astype(np.uint8))):
                nib.save(nib.Nifti1Image(array, np.eye(4)), root / part / f"case{index:04d}.nii.gz")
        command = [sys.executable, TRAINER, "--dataset_path", str(root), "--labelnum", str(max(1, cases // 4))]
        command += ["--dataset_name", "nifti", "--num_classes", "2", "--patch_size", "16", "16", "16"]
        command += ["--max_iteration", "1", "--no-evaluate", "--cache_dir", f"{folder}/cache", "--cache_gb", "4"]
        found = []
        for name in ("first", "again"):
            started = time.perf_counter()
            run_to_end("data_speed: the training", [*command, "--output_dir", folder, "--exp", name])
            found.append(time.perf_counter() - started)
    return found[0], found[1]


if __name__ == "__main__":
    main()
