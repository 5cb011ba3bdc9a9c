"""Whole volumes through a network: ours against MONAI's call as people write it, and against the field's stride.

    python -m benchmarks.inference_speed --checkpoint runs/la/last.pt --image scan.nii.gz --label label.nii.gz

Sides, in one process, in turn, with the same network: ``ours`` is what evaluation and prediction do, ``ours plain`` the
same with all voxels of a window weighing alike, as in MONAI's default; ``monai`` is
``monai.inferers.sliding_window_inference`` in float32 with the same window and overlap and otherwise its defaults;
``monai spread`` has its windows where ours are (evenly spaced; to a voxel), ``monai weighted`` our weights as well, and
``monai alike`` also our precision, layout of the weights and number of windows at once, so that what is left between it
and ``ours`` is the stitching alone; ``stride`` is the test of the published left-atrium codes, a window every
``--stride`` voxels (18×18×4), probabilities averaged, float32, window by window. Printed: median seconds, the ratio to
ours, the Dice of each label map against the label, where there is one, and against MONAI's. A first round warms up.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from dataloaders.geometry import read_label
from myutils.checkpoint import InferenceBundle, load_for_inference
from myutils.distributed import autocast, start_process_group
from myutils.inference import InferenceOptions, fast_layout, sliding_window_probabilities
from myutils.inference_flags import InferenceFlags, inference_options
from myutils.metrics import segmentation_metrics
from myutils.pseudo_labels import most_probable
from myutils.scan_inputs import find_scans
from myutils.sliding_window import window_starts

Side = Callable[[Tensor], Tensor]
STRIDE = "stride"


def main() -> None:
    """Measure and print."""
    settings = parse()
    _, device = start_process_group()
    bundle = load_for_inference(settings.checkpoint, device)
    options = inference_options(bundle, InferenceFlags().apply_to(bundle.config), device)
    if settings.window:
        options = dataclasses.replace(options, patch_size=tuple(settings.window))
    volume = find_scans(settings.image)[0].read()
    if settings.label is not None:
        label = read_label(
            settings.label,
            volume.case_id,
            image=volume.image,
            affine=volume.affine,
            num_classes=bundle.num_classes,
        )
        volume = dataclasses.replace(volume, label=label)
    prepared = bundle.preprocess(volume)  # image and label, turned and resampled as for the network
    image, truth = torch.from_numpy(np.array(prepared.image)), prepared.label
    sides = make_sides(bundle, options, tuple(settings.stride), device)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    maps: dict[str, np.ndarray] = {}
    for number in range(settings.rounds + 1):
        for name, side in sides.items():
            if number == 0 and name == STRIDE:
                continue  # its many windows need no warming up
            started = time.perf_counter()
            maps[name] = most_probable(side(image), 0).cpu().numpy()
            if number:
                seconds[name].append(time.perf_counter() - started)
    lines = [
        f"torch {torch.__version__}, monai {version('monai')}, {torch.get_num_threads()} threads, {device.type}, "
        f"volume {tuple(image.shape[1:])}, window {options.patch_size}, overlap {options.overlap}, "
        f"{settings.rounds} rounds, ours and 'monai alike' with --amp {options.amp}, the others in float32",
        f"{'side':16s}{'seconds':>10s}{'x ours':>8s}{'Dice %':>9s}{'Dice to monai %':>17s}",
    ]
    for name, values in seconds.items():
        median = statistics.median(values)
        against = "-" if truth is None else f"{dice(maps[name], truth, bundle.num_classes):.2f}"
        agreement = dice(maps[name], maps["monai"], bundle.num_classes)
        ratio = median / statistics.median(seconds["ours"])
        lines.append(f"{name:16s}{median:10.2f}{ratio:8.2f}{against:>9s}{agreement:17.2f}")
    sys.stdout.write("\n".join(lines) + "\n")


def parse() -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True, help="NIfTI file")
    parser.add_argument("--label", type=Path, help="NIfTI file")
    parser.add_argument("--window", type=int, nargs=3, help="default: the checkpoint's patch size")
    parser.add_argument("--stride", type=int, nargs=3, default=(18, 18, 4), help="0 0 0 leaves this side out")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    return parser.parse_args()


def make_sides(
    bundle: InferenceBundle, options: InferenceOptions, stride: tuple[int, ...], device: torch.device
) -> dict[str, Side]:
    """Functions from a preprocessed image (C, X, Y, Z) to class scores (K, X, Y, Z)."""
    network = bundle.network

    @torch.no_grad()
    def windows(image: Tensor, overlap: float | list[float], scores: Side, at_once: int = 1, **more: Any) -> Tensor:
        images = image[None].to(device)
        return sliding_window_inference(images, options.patch_size, at_once, scores, overlap=overlap, **more)[0]

    def logits(images: Tensor) -> Tensor:
        return network(images).logits

    def as_ours(images: Tensor) -> Tensor:
        with autocast(options.amp, device):
            return logits(images)

    def alike(image: Tensor) -> Tensor:
        with fast_layout(network, device):
            return windows(image, spread(image), as_ours, options.windows_at_once(), **weighted)

    def spread(image: Tensor) -> list[float]:
        """Overlap along each axis that brings MONAI's windows to where ours are."""
        overlaps = []
        for size, window in zip(image.shape[1:], options.patch_size, strict=True):
            step = max(np.diff(window_starts(max(size, window), window, options.overlap)), default=0)
            overlaps.append(1 - (step + 0.5) / window if step else 0.0)  # MONAI rounds the step down
        return overlaps

    plain = dataclasses.replace(options, sigma=1e6)
    weighted: dict[str, Any] = {"mode": "gaussian", "sigma_scale": options.sigma}
    strided = [max(0.0, 1 - step / size) for step, size in zip(stride, options.patch_size, strict=True)]
    sides: dict[str, Side] = {
        "ours": lambda image: sliding_window_probabilities(network, image, options, device),
        "ours plain": lambda image: sliding_window_probabilities(network, image, plain, device),
        "monai": lambda image: windows(image, options.overlap, logits),
        "monai spread": lambda image: windows(image, spread(image), logits),
        "monai weighted": lambda image: windows(image, spread(image), logits, **weighted),
        "monai alike": alike,
    }
    if all(stride):
        sides[STRIDE] = lambda image: windows(image, strided, lambda images: logits(images).softmax(1))
    return sides


def dice(first: np.ndarray, second: np.ndarray, num_classes: int) -> float:
    """Mean Dice in % over the foreground classes of two label maps (X, Y, Z)."""
    maps = [label_map.astype(np.uint8) for label_map in (first, second)]
    figures = segmentation_metrics(*maps, num_classes=num_classes, spacing=(1.0, 1.0, 1.0))
    return 100.0 * float(np.mean([found.dice for found in figures.values()]))


if __name__ == "__main__":
    main()
