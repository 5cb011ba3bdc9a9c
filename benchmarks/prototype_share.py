"""Share of a mean-teacher step that the prototype term takes, selectors on, refills of the memory included.

    python -m benchmarks.prototype_share --patch_size 64 64 48 --rounds 5

Both trainers live in one process and take turns; a turn is ``--memory_interval`` steps, so that each holds one refill
(a refill runs the labelled patches through the teacher). Printed: median seconds per step of both, and the share
(with - without) / with.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from dataloaders.patches import Batch
from dataloaders.splits import TrainingSplit
from myutils.build import OPTIMIZER_DEFAULTS, DataFacts
from myutils.checkpoint import RunState
from myutils.config import RunConfig
from myutils.distributed import RankInfo, start_process_group
from myutils.trainer import Trainer


def make_trainer(prototypes: bool, patch: tuple[int, int, int], classes: int, device: torch.device) -> Trainer:
    """A mean-teacher trainer on made-up data facts, with or without the term."""
    lr, decay = OPTIMIZER_DEFAULTS["adamw"]
    config = RunConfig(
        labelnum=2,
        max_iteration=10_000,
        patch_size=patch,
        modality="mr",
        flip_axes=(0, 1, 2),
        use_contrastive_prototype=prototypes,
        use_learned_selector=True,
        base_lr=lr,
        labeled_bs=2,
        weight_decay=decay,
    )
    names = ("background", *(f"class {index}" for index in range(1, classes)))
    facts = DataFacts(classes, 1, names, "mr", (0, 1, 2))
    state = RunState(config, facts, TrainingSplit(("a", "b"), ("c", "d"), ()))
    return Trainer(state, None, Path(tempfile.gettempdir()), RankInfo(), device)  # type: ignore[arg-type]


def make_batch(patch: tuple[int, int, int], classes: int, device: torch.device) -> Batch:
    """Two labelled and two unlabelled patches with blocky labels, so that every class has thousands of voxels."""
    coarse = torch.randint(0, classes, (2, 1, *(max(1, n // 8) for n in patch))).float()
    label = torch.nn.functional.interpolate(coarse, size=patch, mode="nearest")[:, 0].long()
    image = label.unsqueeze(1).float() + 0.3 * torch.randn(2, 1, *patch)
    batch = Batch(image, label, image.flip(0), image.flip(0) + 0.1, ("a", "b"), ("c", "d"))
    return dataclasses.replace(batch.to(device))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patch_size", type=int, nargs=3, default=(64, 64, 48))
    parser.add_argument("--classes", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each side")
    settings = parser.parse_args()
    _, device = start_process_group()
    patch = tuple(settings.patch_size)
    trainers = {name: make_trainer(name == "with", patch, settings.classes, device) for name in ("without", "with")}
    batch = make_batch(patch, settings.classes, device)
    turn = trainers["with"].state.config.memory_interval
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    steps = dict.fromkeys(trainers, 0)
    for number in range(settings.rounds + 1):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            for _ in range(turn):
                trainer.train_step(trainer.method, batch, steps[name])
                steps[name] += 1
            if number > 0:  # the first turn warms up
                seconds[name].append((time.perf_counter() - started) / turn)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(f"patch {patch}, batch 4 (2 labelled), {settings.classes} classes, autocast {trainers['with'].amp}")
    for name, value in median.items():
        print(f"{name:8s} prototypes: {value:.3f} s per step (min {min(seconds[name]):.3f})")
    ratio = median["with"] / median["without"]
    print(f"share of the step: {1 - 1 / ratio:.1%} (ratio {ratio:.3f})")


if __name__ == "__main__":
    main()
