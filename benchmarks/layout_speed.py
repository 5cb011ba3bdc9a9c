"""Training steps of a bare loop with the channels of the maps first and last in memory, in one process, in turn.

    python -m benchmarks.layout_speed --patch_size 64 64 48 --model unet_3d

Float32, batch 4: forward, Dice + cross-entropy, backward, an SGD step, as the bare loop of ``benchmarks.step_cost``.
``networks.layers.channels_last_pays`` chooses between the two by the CPU. Printed: medians and least times of both
sides, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from benchmarks.step_cost import all_labeled, bare_loop, make_batch
from myutils.build import DataFacts
from myutils.config import RunConfig
from myutils.distributed import start_process_group

SIDES = {"channels first": False, "channels last": True}


def main() -> None:
    """Measure and print."""
    settings = parse()
    start_process_group()
    cpu, patch = torch.device("cpu"), tuple(settings.patch_size)
    config = RunConfig(model=settings.model, patch_size=patch, amp="no")
    facts = DataFacts(settings.classes, 1, tuple(map(str, range(settings.classes))), "mr", (0, 1, 2))
    batch = all_labeled(make_batch(patch, settings.classes, cpu))
    steps = {name: bare_loop(config, facts, batch, cpu, channels_last=last) for name, last in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(settings.rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step(number)
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    what = f"{settings.model}, patch {'x'.join(map(str, patch))}, {settings.classes} classes, {settings.rounds} rounds"
    kind = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    sys.stdout.write(f"torch {torch.__version__}, {kind}, {what}\n")
    for name, found in seconds.items():
        sys.stdout.write(f"{name:16s}{statistics.median(found):8.3f} s, least {min(found):.3f} s\n")
    first, last = seconds.values()
    ratio, least = statistics.median(last) / statistics.median(first), min(last) / min(first)
    sys.stdout.write(f"last to first: {ratio:.2f}, of the least times {least:.2f}\n")


def parse() -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="unet_3d")
    parser.add_argument("--patch_size", type=int, nargs=3, default=(64, 64, 48))
    parser.add_argument("--classes", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
