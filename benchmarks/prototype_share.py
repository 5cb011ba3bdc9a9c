"""Share of a mean-teacher step that the prototype term takes, selectors on, refills of the memory included.

    python -m benchmarks.prototype_share --patch_size 64 64 48 --rounds 20

Both trainers live in one process and take turns, step by step. A round is ``--memory_interval`` steps of each, of which
the first refills the memory (it runs the labelled patches through the teacher). Printed: seconds per step of both, as
the mean over a round's steps of each one's median over rounds, and the share (with - without) / with.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from dataloaders.base import TrainingDefaults
from dataloaders.patches import Batch
from dataloaders.splits import TrainingSplit
from myutils.build import DataFacts, resolve_config
from myutils.checkpoint import RunState
from myutils.config import RunConfig
from myutils.distributed import RankInfo, start_process_group
from myutils.trainer import Trainer


def make_trainer(prototypes: bool, patch: tuple[int, int, int], classes: int, device: torch.device) -> Trainer:
    """A mean-teacher trainer on made-up data facts, with or without the term."""
    asked = RunConfig(
        labelnum=2,
        max_iteration=10_000,
        patch_size=patch,
        use_contrastive_prototype=prototypes,
        use_learned_selector=True,
    )
    made_up = SimpleNamespace(defaults=TrainingDefaults(), modality="mr", flip_axes=(0, 1, 2))
    config = resolve_config(asked, made_up)  # type: ignore[arg-type]
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
    return batch.to(device)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patch_size", type=int, nargs=3, default=(64, 64, 48))
    parser.add_argument("--classes", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds")
    settings = parser.parse_args()
    _, device = start_process_group()
    patch = tuple(settings.patch_size)
    trainers = {name: make_trainer(name == "with", patch, settings.classes, device) for name in ("without", "with")}
    batch = make_batch(patch, settings.classes, device)
    interval = trainers["with"].state.config.memory_interval
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(interval)] for name in trainers}
    for step in range((settings.rounds + 1) * interval):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            trainer.train_step(trainer.method, batch, step)
            if step >= interval:  # the first round warms up
                seconds[name][step % interval].append(time.perf_counter() - started)
    typical = {name: statistics.mean(map(statistics.median, phases)) for name, phases in seconds.items()}
    least = {name: statistics.mean(map(min, phases)) for name, phases in seconds.items()}
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(f"patch {patch}, batch 4 (2 labelled), {settings.classes} classes, autocast {trainers['with'].amp}")
    for name, value in typical.items():
        print(f"{name:8s} prototypes: {value:.3f} s per step (least {least[name]:.3f})")
    for name, times in (("share of the step", typical), ("by the least times", least)):
        print(f"{name}: {1 - times['without'] / times['with']:.1%} (ratio {times['with'] / times['without']:.3f})")


if __name__ == "__main__":
    main()
