"""Weights of the windows over a volume: Dice with several, beside MONAI's two, on training cases without a label.

    python -m benchmarks.window_weights --checkpoint runs/a/last.pt runs/b/last.pt --cases 56

The cases are the first unlabelled ones of each run: training never read their labels, and no test case is touched, so
that weights may be chosen here. ``--held_out`` scores those that the run's split leaves out, its test cases: to report,
not to choose by. Without mirroring. Printed per checkpoint: mean Dice of the cases, in percent, and its difference to
MONAI's constant weights, the default of its call, with the standard deviation over the cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import monai
import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from benchmarks.inference_speed import dice
from dataloaders.base import Volume
from dataloaders.splits import make_test_ids
from myutils.build import build_source
from myutils.checkpoint import InferenceBundle, load_for_inference
from myutils.distributed import autocast, start_process_group
from myutils.inference import InferenceOptions, evaluation_mode, label_map_from, sliding_window_probabilities
from myutils.inference_flags import InferenceFlags, inference_options

WINDOWS_AT_ONCE = 4
CASES = 50


def main() -> None:
    """Score and print."""
    settings = parse()
    if settings.cases is None and not settings.held_out:
        settings.cases = CASES
    sys.stdout.write(f"torch {torch.__version__}, monai {monai.__version__}, {platform.machine()}, Dice %\n")
    for path in settings.checkpoint:
        scores = scores_of(path, settings)
        usual = np.array(scores["monai constant"])
        sys.stdout.write(f"{path}, {len(usual)} cases\n")
        for name, found in scores.items():
            gap = np.array(found) - usual
            spread = gap.std(ddof=1) if len(gap) > 1 else 0.0
            sys.stdout.write(f"  {name:16s}{np.mean(found):8.2f}{gap.mean():+8.2f} +- {spread:.2f}\n")


def parse() -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--cases", type=int, help="how many to score; else 50 unlabelled training cases, or all that are held out"
    )
    parser.add_argument("--held_out", action="store_true", help="score the run's test cases instead")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.125, 0.1875, 0.25, 0.3, 100.0])
    return parser.parse_args()


def cases_with_label(path: Path, bundle: InferenceBundle, limit: int | None, *, held_out: bool) -> list[Volume]:
    """The first unlabelled training cases of a run, or its test cases, that have a label after all, with it."""
    source, pool = build_source(bundle.config), bundle.split.unlabeled
    if held_out:
        pool = make_test_ids(source, bundle.config.split_request(), bundle.split)
    known = set(source.labeled_ids())
    ids = [case_id for case_id in pool if case_id in known][:limit]
    if not ids:
        raise SystemExit(f"{path}: none of these cases has a label to score with")
    return [source.load(case_id, with_label=True) for case_id in ids]


class Loaded(NamedTuple):
    """A run to score: its network and preprocessing, its own windows without mirroring, and the cases with labels."""

    bundle: InferenceBundle
    options: InferenceOptions
    cases: list[Volume]
    device: torch.device


def loaded(path: Path, settings: argparse.Namespace) -> Loaded:
    """The run of a checkpoint, with the cases that ``--cases`` and ``--held_out`` ask for."""
    _, device = start_process_group()
    bundle = load_for_inference(path, device)
    options = inference_options(bundle, InferenceFlags(flips=False).apply_to(bundle.config), device)
    cases = cases_with_label(path, bundle, settings.cases, held_out=settings.held_out)
    return Loaded(bundle, options, cases, device)


def scores_of(path: Path, settings: argparse.Namespace) -> dict[str, list[float]]:
    """Dice of each case in percent, the mean over classes, by the name of the weights."""
    bundle, options, volumes, device = loaded(path, settings)
    network = bundle.network
    images = [torch.from_numpy(bundle.preprocess(volume).image) for volume in volumes]

    def logits(windows: Tensor) -> Tensor:
        with autocast(options.amp, device):
            return network(windows).logits.float()

    def ours(image: Tensor, sigma: float) -> Tensor:
        return sliding_window_probabilities(network, image, dataclasses.replace(options, sigma=sigma), device)

    def by_monai(image: Tensor, mode: str) -> Tensor:
        with evaluation_mode(network), torch.no_grad():
            window, overlap = options.patch_size, options.overlap
            inputs = image[None].to(device)
            return sliding_window_inference(inputs, window, WINDOWS_AT_ONCE, logits, overlap, mode)[0].cpu()

    sides: dict[str, Callable[[Tensor], Tensor]] = {}
    sides |= {f"sigma {sigma:g}": partial(ours, sigma=sigma) for sigma in settings.sigmas}
    sides |= {f"monai {mode}": partial(by_monai, mode=mode) for mode in ("gaussian", "constant")}
    scores: dict[str, list[float]] = {name: [] for name in sides}
    for image, volume in zip(images, volumes, strict=True):
        for name, side in sides.items():
            found = label_map_from(bundle.preprocess.restore(side(image).numpy(), volume))
            scores[name].append(dice(found, np.asarray(volume.label), bundle.num_classes))
    return scores


if __name__ == "__main__":
    main()
