"""Shared by tests: resolved configurations, trainers and batches on the small simulated data set."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BallSource
from torch import Tensor, nn

from benchmarks.comparison_tables import METRICS
from dataloaders.base import CaseSource
from dataloaders.patches import Batch
from dataloaders.splits import make_training_split
from myutils.build import DataFacts, build_method
from myutils.checkpoint import RunState, read_checkpoint
from myutils.config import RunConfig
from myutils.distributed import RankInfo
from myutils.methods.base import Method, StepOutput
from myutils.resolving import resolve_config
from myutils.trainer import Trainer
from networks.base import Branch, SegmentationNetwork, SegmentationOutput


class BrokenStream(io.StringIO):
    """A stream that cannot be written to: ``errno.EPIPE`` as a pipe without a reader, ``ENOSPC`` as on a full disk."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        self.write("")


class PointwiseNetwork(SegmentationNetwork):
    """A network whose output is a given function of the padded images, without weights."""

    def __init__(
        self, function: Callable[[Tensor], SegmentationOutput], num_classes: int, in_channels: int = 1
    ) -> None:
        super().__init__(in_channels, num_classes)
        self.feature_dim, self.stride = 1, (1, 1, 1)
        self.branch = PointwiseBranch(function)

    def encode(self, images: Tensor) -> list[Tensor]:
        return [images]


class PointwiseBranch(Branch):
    """Applies a function to the images that the encoder passed on."""

    def __init__(self, function: Callable[[Tensor], SegmentationOutput]) -> None:
        super().__init__(nn.Identity(), nn.Identity())
        self.function = function

    def forward(self, encoded: list[Tensor]) -> SegmentationOutput:
        return self.function(encoded[0])


def small_config(source: CaseSource, **changes: Any) -> RunConfig:
    """A resolved configuration that trains in about a second."""
    settings = {
        "dataset_name": "decathlon",
        "model": "unet_small",
        "labelnum": 2,
        "max_iteration": 4,
        "patch_size": (16, 16, 16),
        "amp": "no",
        "embedding_dim": 8,
        "elements_per_class": 4,
        "prototype_samples": 64,
        "log_every": 2,
        "save_every": 100,
        "consistency_rampup": 2,
        "confidence_threshold": 0.4,
    }
    return resolve_config(RunConfig(**(settings | changes)), source)


def small_trainer(source: CaseSource, folder: Path, device: torch.device | None = None, **changes: Any) -> Trainer:
    """A trainer of ``small_config``, its folder made."""
    config = small_config(source, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    state = RunState(config, DataFacts.of(source), make_training_split(source, config.split_request()))
    return Trainer(state, source, folder, RankInfo(), device or torch.device("cpu"))


def resumed_run(folder: Path, device: torch.device | None = None) -> Trainer:
    """The run of a ``small_trainer`` of ``BallSource``, from its last checkpoint."""
    stored = read_checkpoint(folder / "last.pt")
    return Trainer.resume(stored, BallSource(), folder, RankInfo(), device or torch.device("cpu"))


def whole_and_resumed(folder: Path, device: torch.device | None = None, **changes: Any) -> tuple[Trainer, Trainer]:
    """The same six steps twice: in one go, and killed at step 4 and resumed from step 3."""
    changes |= {"use_contrastive_prototype": True, "max_iteration": 6, "save_every": 3}
    whole = small_trainer(BallSource(), folder / "whole", device, **changes)
    whole.fit()
    broken = small_trainer(BallSource(), folder / "broken", device, **changes)
    original = broken.train_step

    def kill_at_four(*args: Any) -> StepOutput:
        if broken.state.step == 4:
            raise RuntimeError("killed")
        return original(*args)

    broken.train_step = kill_at_four  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="killed"):
        broken.fit()
    torch.randn(100)  # the world's random state moves on
    resumed = resumed_run(folder / "broken", broken.device)
    assert resumed.state.step == 3
    resumed.fit()
    return whole, resumed


def assert_same_weights(first: Trainer, second: Trainer) -> None:
    """Every tensor of both methods is equal to the last bit."""
    ours, theirs = first.method.state_dict(), second.method.state_dict()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def random_batch(
    labeled: int = 2, unlabeled: int = 2, channels: int = 1, classes: int = 3, size: int = 16, views: int = 1
) -> Batch:
    """A batch of noise with random labels, from torch's global generator."""
    shape = (size, size, size)
    return Batch(
        image_l=torch.randn(labeled, channels, *shape),
        label_l=torch.randint(0, classes, (labeled, *shape)),
        image_u=torch.randn(unlabeled, channels, *shape),
        image_u_strong=torch.randn(views * unlabeled, channels, *shape),
        cases_l=tuple(f"l{index}" for index in range(labeled)),
        cases_u=tuple(f"u{index}" for index in range(unlabeled)),
    )


def batch_for(method: Method, channels: int = 1) -> Batch:
    """Four patches as the trainer would give them to the method."""
    if not method.uses_unlabeled:
        return random_batch(4, 0, channels)
    return random_batch(2, 2, channels, views=method.config.strong_views or 1)


def spoil_consistency(trainer: Trainer, step: int) -> None:
    """Make the method's consistency loss NaN at ``step``."""
    original = trainer.method.forward

    def forward(batch: Batch, number: int) -> StepOutput:
        output = original(batch, number)
        if number == step:
            output.terms["consistency"].value = output.terms["consistency"].value * float("nan")
        return output

    trainer.method.forward = forward  # type: ignore[method-assign]


def small_method(name: str, **changes: Any) -> Any:
    """A method of ``small_config`` on balls, without prototypes, in training mode, from seed 0."""
    torch.manual_seed(0)
    source = BallSource()
    settings = {"method": name, "use_contrastive_prototype": False} | changes
    return build_method(small_config(source, **settings), DataFacts.of(source)).train()


def write_run(
    folder: Path,
    dice: dict[str, list[float]],
    hd95: float = 2.0,
    seconds: float = 0.5,
    absent: Collection[int] = (),
) -> Path:
    """A finished run with the given Dice per case and class; no case shows the classes that are ``absent``."""
    (folder / "test").mkdir(parents=True)
    with (folder / "test" / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["case", "class", *METRICS, "truth_ml"])
        writer.writeheader()
        for case, values in dice.items():
            for index, value in enumerate(values, start=1):
                row = {"case": case, "class": index, "dice": value, "jaccard": value / 2}
                writer.writerow(row | {"hd95_mm": hd95, "assd_mm": 1.0, "truth_ml": 2.0 * (index not in absent)})
    summary = {"mean": {"hd95_mm": {"n_missed": 1}}}
    (folder / "test" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    lines = [
        {"step": 10, "Train/seconds_per_step": seconds, "Train/peak_memory_mb": 100},
        {"step": 30, "Train/seconds_per_step": 2 * seconds, "Train/peak_memory_mb": 300},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder
