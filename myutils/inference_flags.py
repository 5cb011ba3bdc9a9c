"""Flags that evaluation and prediction share; what is not given comes from the checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from myutils.build import build_inference, kept_components
from myutils.checkpoint import InferenceBundle
from myutils.config import RunConfig
from myutils.distributed import is_main_rank, resolve_amp
from myutils.flags import SuggestingParser, add_flags, check_limits, given_flags, option
from myutils.inference import InferenceOptions
from myutils.run_log import setup_logging
from myutils.script_start import refusals

INFERENCE = "inference"


@dataclass(frozen=True)
class InferenceFlags:
    """How to run the network of a checkpoint, or those of several, on whole volumes."""

    checkpoint: tuple[Path, ...] | None = option(
        None, help="last.pt or best.pt of a run; several segment together; else none, it is required", group="files"
    )
    overlap: float | None = option(
        None, help="overlap of neighbouring windows; else the checkpoint's", low=0, high=0.9, group=INFERENCE
    )
    flips: bool | None = option(
        None,
        help="average over all mirrored inputs, along the axes of training, or over nothing; else the checkpoint's",
        group=INFERENCE,
    )
    views: int | None = option(
        None,
        help="average over this many views, the others turned, scaled and, but for --no-flips, mirrored; else the "
        "checkpoint's",
        low=1,
        high=64,
        group=INFERENCE,
    )
    largest_component: bool | None = option(
        None, help="keep the largest component of every class, or all; else the checkpoint's", group=INFERENCE
    )
    gpu: int | None = option(None, help="number of the CUDA device; else 0, or the CPU without one", group=INFERENCE)
    amp: str | None = option(
        None,
        help="autocast; else no if the checkpoint was trained so, auto otherwise",
        group=INFERENCE,
        choices=("auto", "no", "bf16", "fp16"),
    )

    def apply_to(self, config: RunConfig) -> RunConfig:
        """The checkpoint's configuration with the given flags in it.

        Raises:
            ValueError: If a value is out of range.
        """
        check_limits(self)
        settings: dict[str, Any] = {
            "overlap": self.overlap,
            "tta_flips": False if self.views is not None and self.flips is None else self.flips,
            "flip_axes": () if self.flips is False else None,  # views are turned and scaled alone then
            "tta_views": 1 if self.views is None and self.flips is not None else self.views,
            "largest_component": self.largest_component,
            "gpu": self.gpu,
            # A run from a GPU is to be used on the CPU too, which refuses fp16 and may crawl in bf16.
            "amp": self.amp if self.amp is not None else ("no" if config.amp == "no" else "auto"),
        }
        return dataclasses.replace(config, **{name: value for name, value in settings.items() if value is not None})


logger = logging.getLogger(__name__)

F = TypeVar("F", bound=InferenceFlags)
J = TypeVar("J")


def start(
    flags_class: type[F], prepare: Callable[[F], J], argv: Sequence[str] | None, *, prog: str, usage: str, doc: str
) -> J:
    """Parse the command line and prepare the job.

    A start that ``prepare`` refuses ends the process with code 2, one that is stopped with 130.

    Args:
        flags_class: All flags of the script.
        prepare: Checks the flags and makes the job; raises ``ValueError`` or ``OSError``.
        argv: Arguments; None for those of the process.
        prog: Name of the script.
        usage: One line.
        doc: The script's docstring; the help shows it up to the mention of ``--help``.
    """
    parser = SuggestingParser(prog=prog, usage=usage, description=doc.partition("``--help``")[0].replace("::", ":"))
    add_flags(parser, flags_class)
    flags = flags_class(**given_flags(parser, argv))
    setup_logging(is_main=True)
    try:
        with refusals(parser):
            job = prepare(flags)
    except KeyboardInterrupt:
        logger.info("stopped before the first case; nothing was written")
        raise SystemExit(130) from None
    setup_logging(is_main=is_main_rank())
    return job


def inference_options(bundle: InferenceBundle, config: RunConfig, device: torch.device) -> InferenceOptions:
    """Sliding-window settings of ``config``, which ``InferenceFlags.apply_to`` gave.

    Raises:
        ValueError: If flips are asked for and the network was trained without any, or ``amp`` does not fit the device.
    """
    if config.tta_flips and not bundle.flip_axes:
        raise ValueError("--flips: the network was trained without mirroring along any axis; leave the flag out")
    return build_inference(config, resolve_amp(config.amp, device))


def other_settings(bundle: InferenceBundle, options: InferenceOptions, kept: Sequence[int]) -> str:
    """What of a prediction is not the checkpoint's own choice, as ``overlap=0.75,flips=no``; else ``own``.

    Precision is left out, which ``--amp auto`` takes from the device.
    """
    usual = build_inference(bundle.config, options.amp)
    amounts = {0: "no", bundle.facts.num_classes - 1: "all"}
    given, own = (
        {
            "overlap": f"{chosen.overlap:.6g}",
            "flips": "".join(map(str, chosen.flips)) or "no",  # axes
            "views": str(chosen.views or "no"),
            "largest": amounts.get(len(classes), "some"),
        }
        for chosen, classes in ((options, kept), (usual, kept_components(bundle.config, bundle.facts)))
    )
    return ",".join(f"{name}={value}" for name, value in given.items() if value != own[name]) or "own"
