"""Where a run is written down: TensorBoard, ``metrics.jsonl``, the progress bar's line, and pictures."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dataloaders.patches import Batch
from myutils.methods.base import StepOutput
from myutils.overlay import class_colours, richest_slice
from myutils.progress import ProgressBar
from myutils.run_folder import hold
from myutils.whole_files import whole_file

_PICTURE_ROWS = 192  # at least half of this


class RunLog:
    """Writer of one run, which it holds until it is closed; silent on ranks other than 0.

    Args:
        folder: The run's folder.
        first_step: Steps done before; entries beyond it, left by a run that was killed, are dropped.
        enabled: Whether this rank writes.

    Raises:
        ValueError: If another process trains in the folder.
    """

    def __init__(self, folder: Path, first_step: int = 0, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._path = folder / "metrics.jsonl"
        if not enabled:
            return
        with _named_errors(folder):
            self._lock = hold(folder)
            _drop_after(self._path, first_step)
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add one line to ``metrics.jsonl`` and one point per value to TensorBoard."""
        if not self.enabled:
            return
        rounded = {key: round(value, 6) if math.isfinite(value) else None for key, value in values.items()}
        with _named_errors(self._path.parent):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **rounded}) + "\n")
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def pictures(self, step: int, batch: Batch, output: StepOutput) -> None:
        """The first labelled patch as the network saw it, its label and the prediction.

        The first unlabelled one as the teacher saw it, as the student did (with what was pasted), and its pseudo-label.
        """
        if not self.enabled or output.logits_l is None:
            return
        colours = class_colours(output.logits_l.shape[1])
        image = (batch.image_l if output.images_l is None else output.images_l)[0, 0]
        label = output.truth(batch)[0]
        shown = [(image, None), (image, label), (image, output.logits_l[0].argmax(0))]
        self._writer.add_image("labeled/image_label_prediction", _panel(shown, label, colours), step)
        if output.pseudo_labels is not None and len(batch.image_u):
            image, label = batch.image_u[0, 0], output.pseudo_labels[0]
            seen = (batch.image_u_strong if output.images_u is None else output.images_u)[0, 0]
            shown = [(image, None), (seen, None), (image, label)]
            self._writer.add_image("unlabeled/weak_strong_pseudo", _panel(shown, label, colours), step)

    def close(self) -> None:
        """Flush everything to the disk."""
        if self.enabled:
            with _named_errors(self._path.parent):
                self._writer.close()
            self._lock.close()


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    """Add to a full disk's error, which names no file, where it happened and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write the log in {folder}: {error}; free space there, or make it writable") from error


def step_scalars(output: StepOutput, lr: float) -> dict[str, Tensor | float]:
    """Names and values of one step as they appear in the log: each loss raw, its weight, and what the method adds."""
    values: dict[str, Tensor | float] = {"Loss/total": output.total().detach()}
    prototype_parts = []
    for name, term in output.terms.items():
        values[f"Loss/{name}"] = term.value.detach()
        values[f"Weight/{name}"] = term.weight
        if name in ("contrastive_loss", "intra_loss", "inter_loss"):
            prototype_parts.append(term.weight * term.value.detach())
    if prototype_parts:
        values["Loss/total_prototype_loss"] = torch.stack(prototype_parts).sum()
    values |= {f"Train/{name}": value for name, value in output.scalars.items()}
    values["Train/lr"] = lr
    return values


def _panel(shown: list[tuple[Tensor, Tensor | None]], chosen_by: Tensor, colours: np.ndarray) -> np.ndarray:
    """X-Y slices of images (X, Y, Z) side by side, enlarged, with classes in colour: (3, rows, columns) in 0..1.

    The slice is the one where ``chosen_by`` (X, Y, Z) shows most.
    """
    place = richest_slice(chosen_by.cpu().numpy().clip(min=0), 2)
    tiles = []
    for image, label in shown:
        plane = image[..., place].detach().float().cpu().numpy()
        grey = (plane - plane.min()) / max(float(np.ptp(plane)), 1e-6)
        tile = np.repeat(grey[None], 3, axis=0)  # (3, X, Y)
        if label is not None:
            classes = label[..., place].cpu().numpy().clip(min=0)
            tile = np.where(classes > 0, 0.5 * tile + 0.5 * np.moveaxis(colours[classes], -1, 0), tile)
        tiles.append(tile.transpose(0, 2, 1)[:, ::-1])  # X to the right, Y up
    panel = np.concatenate(tiles, axis=2)
    times = max(1, _PICTURE_ROWS // panel.shape[1])
    return panel.repeat(times, axis=1).repeat(times, axis=2)


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    if kept == lines:
        return
    with whole_file(path) as partial:  # a full disk leaves the old file
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be cut short
        return float("inf")


def read_metrics(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one scalar in a run's ``metrics.jsonl``; empty lists where it never occurs."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    entries = [json.loads(line) for line in lines if _step_of(line) < float("inf")]
    found = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def setup_logging(*, is_main: bool) -> None:
    """Log to the terminal on rank 0, only warnings elsewhere."""
    level = logging.INFO if is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", force=True)


def step_bar(name: str, first: int, last: int, *, disable: bool) -> tqdm[Any]:
    """A bar of the steps from ``first`` to ``last``; where nobody watches it, a line now and then."""
    least, most = (0.2, 10.0) if sys.stderr.isatty() else (10.0, 60.0)
    often: dict[str, Any] = {"mininterval": least, "maxinterval": most}
    return ProgressBar(total=last, initial=first, desc=name, unit="step", disable=disable, **often)
