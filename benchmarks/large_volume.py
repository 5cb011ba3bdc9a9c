"""Peak memory of segmenting one large volume on the CPU, from the raw image to its label map.

    python -m benchmarks.large_volume --size 512 512 400 --classes 5

The image is random and the network untrained: neither changes the memory. Printed: seconds, and the peak of the process
above what it held with the image read and the network built, beside what a single map of all class probabilities needs.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import numpy as np
import torch

from dataloaders.base import Volume
from dataloaders.preprocess import Preprocess
from myutils.build import DataFacts, build_network
from myutils.config import RunConfig
from myutils.distributed import peak_memory_mb, resolve_amp, start_process_group
from myutils.inference import InferenceOptions, predict_label_map


def main() -> None:
    """Measure and print."""
    settings = parse()
    _, device = start_process_group()
    config = RunConfig(model=settings.model, patch_size=tuple(settings.patch_size))
    facts = DataFacts(settings.classes, 1, tuple(f"class {i}" for i in range(settings.classes)), "mr", ())
    network = build_network(config, facts).to(device)
    rng = np.random.default_rng(0)
    image = np.empty(settings.size, dtype=np.float32)
    for row in image:
        rng.random(dtype=np.float32, out=row)
    volume = Volume("large", image[None], None, np.eye(4), (1.0, 1.0, 1.0))
    options = InferenceOptions(tuple(settings.patch_size), amp=resolve_amp("auto", device))
    held = peak_memory_mb(torch.device("cpu"))
    started = time.perf_counter()
    label_map = predict_label_map(network, volume, Preprocess("mr"), options, device)
    seconds = time.perf_counter() - started
    peak = peak_memory_mb(torch.device("cpu")) - held
    voxels = math.prod(label_map.shape)
    sys.stdout.write(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device.type}, {settings.model}, volume "
        f"{label_map.shape}, {settings.classes} classes, window {options.patch_size}, {options.amp}: {seconds:.0f} s\n"
        f"peak above the {held:.0f} MB of process and image: {peak:.0f} MB\n"
        f"image {voxels * 4 / 2**20:.0f} MB, label map {voxels / 2**20:.0f} MB, "
        f"one map of all probabilities {voxels * 4 * settings.classes / 2**20:.0f} MB\n"
    )


def parse() -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, default=(512, 512, 400))
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--model", default="unet_3d")
    parser.add_argument("--patch_size", type=int, nargs=3, default=(112, 112, 80))
    return parser.parse_args()


if __name__ == "__main__":
    main()
