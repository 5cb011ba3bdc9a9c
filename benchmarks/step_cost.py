"""What a training step costs: any method against a bare loop, in one process, in turn, step by step.

    python -m benchmarks.step_cost --patch_size 64 64 48 --row "no prototypes=--method mean_teacher
        --no-use_contrastive_prototype" --row "prototypes=--method mean_teacher" --rounds 14

``bare loop`` is the same network with the same batch and precision: forward, Dice + cross-entropy, backward, an SGD
step and nothing else. The other sides are whole steps of the trainer, as ``--row NAME=FLAGS`` describes them; patches
are made beforehand, so that neither reading nor augmentation is in any figure. A round is ``--memory_interval`` steps
of each, one of them with a refill of the prototype memory. Printed: seconds per step as the mean over a round's steps
of each one's median over rounds, the same of the least times, the ratios to the first two sides, and with
``--memory`` the peak memory of each side in processes of its own. The steps are those of the second half of a training,
past every warm-up and with the pools of ``cov_dfp``.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch

from dataloaders.base import TrainingDefaults
from dataloaders.patches import Batch
from dataloaders.splits import TrainingSplit
from myutils.build import DataFacts, build_network
from myutils.checkpoint import RunState
from myutils.config import RunConfig
from myutils.distributed import RankInfo, autocast, peak_memory_mb, resolve_amp, start_process_group
from myutils.flags import SuggestingParser, add_flags, given_flags
from myutils.losses.segmentation import dice_ce_loss
from myutils.resolving import resolve_config
from myutils.trainer import Trainer
from networks.layers import mend_layers

BARE, SUPERVISED = "bare loop", "supervised"
DEFAULT_ROWS = ("mean teacher=--method mean_teacher --no-use_contrastive_prototype", "with prototypes=")
_STEPS = 10_000  # of the training whose second half is measured
_MEMORY_RUNS = 3  # the heap is laid out a little differently in each
Step = Callable[[int], None]


def main() -> None:
    """Measure and print."""
    settings = parse()
    sides = {BARE: ""} | dict(row.split("=", 1) for row in [f"{SUPERVISED}=--method supervised", *settings.row])
    if settings.only:
        sides = {settings.only: sides[settings.only]}
    _, device = start_process_group()
    libraries = peak_memory_mb(device)  # what the process holds before it has a network
    steps = {name: make_side(name, flags, settings, device) for name, flags in sides.items()}
    interval = RunConfig().memory_interval
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(interval)] for name in steps}
    for number in range((settings.rounds + 1) * interval):
        for name, step in steps.items():
            wait_for(device)
            started = time.perf_counter()
            step(_STEPS // 2 + number)
            wait_for(device)
            if number >= interval:  # the first round warms up
                seconds[name][number % interval].append(time.perf_counter() - started)
    if settings.only:
        sys.stdout.write(f"{peak_memory_mb(device) - libraries:.0f}\n")
        return
    memory = {name: peak_of(name) for name in sides} if settings.memory else {}
    report(settings, seconds, memory)


def parse() -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patch_size", type=int, nargs=3, default=(64, 64, 48))
    parser.add_argument("--model", default="unet_3d")
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--classes", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds")
    parser.add_argument("--row", action="append", metavar="NAME=FLAGS", help="one more side; repeatable")
    parser.add_argument("--memory", action="store_true", help="peak memory of each side, in its own process")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    settings.row = settings.row or list(DEFAULT_ROWS)
    settings.patch_size = tuple(settings.patch_size)
    return settings


def make_side(name: str, flags: str, settings: argparse.Namespace, device: torch.device) -> Step:
    """A function that runs one step of a side."""
    classes = settings.classes
    parser = SuggestingParser(prog=f"--row {name}")
    add_flags(parser, RunConfig)
    common = {"labelnum": 2, "max_iteration": _STEPS, "patch_size": settings.patch_size, "model": settings.model}
    asked = RunConfig(**(common | {"amp": settings.amp} | given_flags(parser, shlex.split(flags))))
    made_up = SimpleNamespace(defaults=TrainingDefaults(), modality="mr", flip_axes=(0, 1, 2), stores_voxel_size=True)
    config = resolve_config(asked, made_up)  # type: ignore[arg-type]
    facts = DataFacts(classes, 1, ("background", *(f"class {i}" for i in range(1, classes))), "mr", (0, 1, 2))
    batch = make_batch(settings.patch_size, classes, device)
    if name == BARE:
        return bare_loop(config, facts, all_labeled(batch), device)
    state = RunState(config, facts, TrainingSplit(("a", "b"), ("c", "d"), ()))
    trainer = Trainer(state, None, Path(tempfile.gettempdir()), RankInfo(), device)  # type: ignore[arg-type]
    if trainer.method.uses_unlabeled:
        views = config.strong_views or 1
        batch = dataclasses.replace(batch, image_u_strong=batch.image_u_strong.repeat(views, 1, 1, 1, 1))
    else:
        batch = all_labeled(batch)

    def step(number: int) -> None:
        trainer.train_step(trainer.method, batch, number)

    return step


def bare_loop(
    config: RunConfig, facts: DataFacts, batch: Batch, device: torch.device, *, channels_last: bool | None = None
) -> Step:
    """Forward, loss, backward, SGD; ``channels_last`` as of ``mend_layers``."""
    network = build_network(config, facts).to(device).train()
    mend_layers(network, channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    amp = resolve_amp(config.amp, device)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(amp, device):
            logits = network(batch.image_l).logits
        dice_ce_loss(logits, batch.label_l).backward()
        optimizer.step()

    return step


def make_batch(patch: tuple[int, int, int], classes: int, device: torch.device) -> Batch:
    """Two labelled and two unlabelled patches with blocky labels, so that every class has thousands of voxels."""
    coarse = torch.randint(0, classes, (2, 1, *(max(1, n // 8) for n in patch))).float()
    label = torch.nn.functional.interpolate(coarse, size=patch, mode="nearest")[:, 0].long()
    image = label.unsqueeze(1).float() + 0.3 * torch.randn(2, 1, *patch)
    batch = Batch(image, label, image.flip(0), image.flip(0) + 0.1, ("a", "b"), ("c", "d"))
    return batch.to(device)


def all_labeled(batch: Batch) -> Batch:
    """As many patches, all of them labelled."""
    image, label = batch.image_l.repeat(2, 1, 1, 1, 1), batch.label_l.repeat(2, 1, 1, 1)
    nothing = image[:0]
    return dataclasses.replace(batch, image_l=image, label_l=label, image_u=nothing, image_u_strong=nothing)


def wait_for(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(name: str) -> float:
    """Peak memory in MB of one side above the loaded libraries: the median of processes that run it alone."""
    command = [sys.executable, "-m", "benchmarks.step_cost", *sys.argv[1:], "--only", name, "--rounds", "1"]
    runs = [subprocess.run(command, check=True, capture_output=True, encoding="utf-8") for _ in range(_MEMORY_RUNS)]
    return statistics.median(float(run.stdout.split()[-1]) for run in runs)


def report(settings: argparse.Namespace, seconds: dict[str, list[list[float]]], memory: dict[str, float]) -> None:
    """Print one line per side."""
    typical = {name: statistics.mean(map(statistics.median, phases)) for name, phases in seconds.items()}
    least = {name: statistics.mean(map(min, phases)) for name, phases in seconds.items()}
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    patch = "x".join(map(str, settings.patch_size))
    lines = [
        f"torch {torch.__version__}, {machine}, {settings.model}, patch {patch}, batch 4 (2 labelled), "
        f"{settings.classes} classes, --amp {settings.amp}, {settings.rounds} rounds",
        f"{'side':24s}{'s per step':>12s}{'least':>9s}{'to bare':>9s}{'least':>9s}"
        f"{'to supervised':>15s}{'peak MB':>9s}",
    ]
    for name, value in typical.items():
        ratios = (value / typical[BARE], least[name] / least[BARE], value / typical[SUPERVISED])
        peak = f"{memory[name]:9.0f}" if memory else f"{'-':>9s}"
        lines.append(
            f"{name:24s}{value:12.4f}{least[name]:9.4f}{ratios[0]:9.3f}{ratios[1]:9.3f}{ratios[2]:15.3f}{peak}"
        )
    names = list(typical)
    for before, after in pairwise(names[2:]):
        share = (1 - typical[before] / typical[after], 1 - least[before] / least[after])
        lines.append(f"share of {after!r} that {before!r} has not: {share[0]:.1%} (by the least times {share[1]:.1%})")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
