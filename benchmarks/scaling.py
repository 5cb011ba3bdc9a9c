"""Steps per second over ranks: the trainer under ``torchrun`` with 1, 2, ... processes, in turn.

    python -m benchmarks.scaling --ranks 1,2 --threads 2 --rounds 3 -- --patch_size 64 64 48

The threads are shared out among the ranks, so that every setting has the same cores; the batch is the same over all
ranks (strong scaling), or with ``--weak`` that much on each. On CUDA each rank has its own device and threads matter
little. Printed: the median over rounds of the median seconds per step, steps and patches per second, and the
efficiency: patches per second against the first setting, divided by the ratio of ranks on CUDA, where ranks add
devices.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.trainer_process import TRAINER, run_to_end
from myutils.run_log import read_metrics

WARM_UP, LOG_EVERY = 5, 5  # steps


def main() -> None:
    """Measure and print."""
    settings = parse()
    seconds: dict[int, list[float]] = {ranks: [] for ranks in settings.ranks}
    for _ in range(settings.rounds):
        for ranks in settings.ranks:
            seconds[ranks].append(seconds_per_step(settings, ranks))
    cuda = torch.cuda.is_available()
    first = settings.ranks[0]
    lines = [f"torch {torch.__version__}, {settings.threads} threads in all, {settings.rounds} rounds, in turn"]
    lines.append(
        f"{'ranks':>5s}{'threads each':>14s}{'batch':>7s}{'s per step':>12s}{'steps/s':>9s}{'patches/s':>11s}"
        f"{'efficiency':>12s}"
    )
    medians = {ranks: statistics.median(found) for ranks, found in seconds.items()}
    rates = {ranks: batch_of(settings, ranks) / median for ranks, median in medians.items()}
    for ranks, rate in rates.items():
        efficiency = rate / rates[first] / (ranks / first if cuda else 1)
        lines.append(
            f"{ranks:5d}{threads_of(settings, ranks):14d}{batch_of(settings, ranks):7d}"
            f"{medians[ranks]:12.4f}{1 / medians[ranks]:9.3f}{rate:11.2f}{efficiency:12.2f}"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def parse() -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of all ranks together")
    parser.add_argument("--batch_size", type=int, default=4, help="of all ranks; with --weak of each")
    parser.add_argument("--weak", action="store_true", help="the batch grows with the ranks")
    parser.add_argument("--steps", type=int, default=25, help=f"of each run, {WARM_UP} of them to warm up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="flags of the trainer, after --")
    settings = parser.parse_args()
    if settings.steps < WARM_UP + LOG_EVERY:
        parser.error(f"--steps {settings.steps}: at least {WARM_UP + LOG_EVERY}")
    return settings


def threads_of(settings: argparse.Namespace, ranks: int) -> int:
    """Threads of each rank."""
    return max(1, settings.threads // ranks)


def batch_of(settings: argparse.Namespace, ranks: int) -> int:
    """Patches of a step over all ranks."""
    return int(settings.batch_size * (ranks if settings.weak else 1))


def seconds_per_step(settings: argparse.Namespace, ranks: int) -> float:
    """Median seconds per step of one short training after its first steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [TRAINER, *settings.flags, "--no-evaluate", "--no-baseline"]
        command += ["--output_dir", folder, "--exp", "run", "--max_iteration", str(settings.steps)]
        command += ["--log_every", str(LOG_EVERY), "--batch_size", str(batch_of(settings, ranks))]
        run_to_end(f"scaling: {ranks} ranks", command, {"OMP_NUM_THREADS": str(threads_of(settings, ranks))})
        steps, seconds = read_metrics(Path(folder) / "run", "Train/seconds_per_step")
    return statistics.median(value for step, value in zip(steps, seconds, strict=True) if step > WARM_UP)


if __name__ == "__main__":
    main()
