"""Whether anything grows with the number of steps: step time and peak memory early and late in one training.

    python -m benchmarks.endurance --steps 5000 -- --patch_size 16 16 16

One training of the demo's data, or of what the flags after ``--`` name. Printed: the median seconds per step of the
second tenth of the training and of the last one, the process's peak memory at the end of each, and the ratios. The
first tenth is left out: the first steps fill caches, and the learned parts start late.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.trainer_process import TRAINER, run_to_end
from myutils.run_log import read_metrics


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="at least 20")
    parser.add_argument("flags", nargs="*", help="flags of the trainer, after --")
    settings = parser.parse_args()
    if settings.steps < 20:
        parser.error(f"--steps {settings.steps}: at least 20")
    tenth = settings.steps // 10
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, TRAINER, *settings.flags, "--no-evaluate", "--no-baseline"]
        command += ["--output_dir", folder, "--exp", "run", "--max_iteration", str(settings.steps)]
        command += ["--log_every", str(max(1, tenth // 10))]
        run_to_end("endurance: the training", command)
        steps, seconds = read_metrics(Path(folder) / "run", "Train/seconds_per_step")
        _, memory = read_metrics(Path(folder) / "run", "Train/peak_memory_mb")
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads, {settings.steps} steps"]
    parts = []
    for first, last in ((tenth, 2 * tenth), (settings.steps - tenth, settings.steps)):
        chosen = [index for index, step in enumerate(steps) if first < step <= last]
        parts.append((statistics.median(seconds[index] for index in chosen), memory[chosen[-1]]))
        lines.append(f"steps {first + 1} to {last}: {parts[-1][0]:.4f} s per step, peak {parts[-1][1]:.0f} MB")
    (before, held), (after, holds) = parts
    lines.append(f"late to early: {after / before:.2f} of the time, {holds / held:.2f} of the memory")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
