"""Checkpoints: everything of a run in one file, written whole or not at all, read without running code from it."""

from __future__ import annotations

import dataclasses
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataloaders.error_text import pass_on_device_error
from dataloaders.preprocess import Preprocess
from dataloaders.splits import TrainingSplit
from myutils.build import DataFacts, build_method, build_preprocess
from myutils.config import RunConfig
from myutils.methods.base import Method
from myutils.whole_files import whole_file
from networks.base import Segmenter

FORMAT = 1


@dataclass
class RunState:
    """What a checkpoint holds beside weights: enough to resume, to evaluate and to predict.

    Attributes:
        config: The resolved configuration.
        facts: Classes, channels and names of the data.
        split: Training cases.
        step: Steps done.
        best_dice: Best validation Dice so far, 0..1; -1 before the first validation.
        validates: Whether the validation of this step is still to come.
    """

    config: RunConfig
    facts: DataFacts
    split: TrainingSplit
    step: int = 0
    best_dice: float = -1.0
    validates: bool = False


@dataclass(frozen=True)
class InferenceBundle:
    """A network ready to segment, with what it needs to know."""

    network: Segmenter
    config: RunConfig
    preprocess: Preprocess
    facts: DataFacts
    split: TrainingSplit
    step: int

    @property
    def num_classes(self) -> int:
        """Classes with the background."""
        return self.facts.num_classes

    @property
    def in_channels(self) -> int:
        """Image channels."""
        return self.facts.in_channels

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""
        return self.facts.class_names

    @property
    def flip_axes(self) -> tuple[int, ...]:
        """Axes of plausible mirroring, as trained."""
        return self.config.flip_axes or ()


def write_checkpoint(path: Path, state: RunState, tensors: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all, flushed to the disk before it takes its name.

    Args:
        path: Target; an older file there stays intact until the rename.
        state: The run's state.
        tensors: ``state_dict()`` of method, optimizer and scaler by name.

    Raises:
        OSError: If the disk is full or the folder cannot be written; the older file is kept. Or if the GPU failed.
    """
    content = {
        "format": FORMAT,
        "config": state.config.to_dict(),
        "facts": {key: _listed(value) for key, value in dataclasses.asdict(state.facts).items()},
        "split": state.split.to_dict(),
        "step": state.step,
        "best_dice": state.best_dice,
        "validates": state.validates,
        **tensors,
    }
    try:
        with whole_file(path) as partial, partial.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        pass_on_device_error(error)
        reason = str(error).partition("\n")[0]
        advice = "or use another --output_dir"
        if path.exists():
            advice = f"or copy {path.parent} elsewhere and pass that --output_dir; it has the checkpoint of before"
        raise OSError(f"cannot write {path}: {reason}; free space there, or make it writable, {advice}") from error


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


Stored = tuple[RunState, dict[str, Any]]


def read_checkpoint(path: Path) -> Stored:
    """Read a checkpoint; returns its state and the tensors by name, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be opened, or does not fit into memory.
        ValueError: If it is damaged or not a checkpoint of this project.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; pass the path of a last.pt or best.pt")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch does not look at the checksums
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error}; use another copy") from error
    except Exception as error:  # torch and pickle raise nearly anything, with advice to trust the file that is not ours
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            raise OSError(f"cannot read {path}: no memory left ({error}); free some and try again") from error
        reason = type(error).__name__
        raise ValueError(f"{path} is damaged, or no checkpoint of this project ({reason}); use another copy") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this project, or of another version (format {FORMAT} expected)")
    try:
        state = RunState(
            config=RunConfig.from_dict(content.pop("config")),
            facts=DataFacts.from_dict(content.pop("facts")),
            split=TrainingSplit.from_dict(content.pop("split")),
            step=content.pop("step"),
            best_dice=content.pop("best_dice"),
            validates=content.pop("validates", False),  # runs of before validated first
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold a whole run of this version ({error}); use another") from error
    return state, content


def load_weights(method: Method, tensors: dict[str, Any], path: Path) -> None:
    """Load a checkpoint's weights into ``method``.

    Raises:
        ValueError: If they do not fit, because another version wrote them.
    """
    try:
        method.load_state_dict(tensors["method"])
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: the weights do not fit this version's {type(method).__name__} ({reason})") from error


def load_for_inference(path: Path, device: torch.device) -> InferenceBundle:
    """Rebuild the network that a checkpoint's method segments with, in evaluation mode on ``device``."""
    state, tensors = read_checkpoint(Path(path))
    method = build_method(state.config, state.facts)
    load_weights(method, tensors, Path(path))
    try:
        network = method.inference_network().to(device).eval()
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"cannot use {path}: no memory left on {device} ({reason}); free some and try again") from error
    return InferenceBundle(network, state.config, build_preprocess(state.config), state.facts, state.split, state.step)
