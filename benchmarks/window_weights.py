"""Weights of the windows over a volume: Dice with several, beside MONAI's two, on training cases without a label.

    python -m benchmarks.window_weights --checkpoint runs/a/last.pt runs/b/last.pt --cases 56

The cases are the first unlabelled ones of each run: training never read their labels, and no test case is touched, so
that weights may be chosen here. ``--held_out`` scores those that the run's split leaves out, its test cases: to report,
not to choose by. Without mirroring. Printed per checkpoint: mean Dice of the cases, in percent, and its difference to
MONAI's constant weights, the default of its call, with the standard deviation over the cases. ``--scores`` keeps what
each case has with the first of ``--sigmas``, for paired tests; runs that differ in their seed are a row::

    python -m benchmarks.window_weights --sigmas 0.25 --cases 56 --checkpoint runs/la/*/last.pt --scores unlabeled.csv
    python -m benchmarks.kept_scores unlabeled.csv --baseline best
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import monai
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from benchmarks.comparison_tables import Scores
from benchmarks.kept_scores import KeptRow, write_rows
from dataloaders.base import CaseSource, Volume
from dataloaders.splits import make_test_ids
from myutils.build import build_source
from myutils.checkpoint import InferenceBundle, load_for_inference
from myutils.distributed import autocast, start_process_group
from myutils.evaluation import score_case
from myutils.inference import InferenceOptions, evaluation_mode, label_map_from, sliding_window_probabilities
from myutils.inference_flags import InferenceFlags, inference_options
from myutils.metrics import CaseMetrics

WINDOWS_AT_ONCE = 4
CASES = 50


def main() -> None:
    """Score and print."""
    settings = parse()
    if settings.cases is None and not settings.held_out:
        settings.cases = CASES
    sys.stdout.write(f"torch {torch.__version__}, monai {monai.__version__}, {platform.machine()}, Dice %\n")
    kept: dict[str, KeptRow] = {}
    for path in settings.checkpoint:
        run = loaded(path, settings)
        scores = scores_of(run, settings.sigmas)
        dice = {name: 100 * KeptRow(name, (), {0: found}, {}).case_values("dice")[0] for name, found in scores.items()}
        sys.stdout.write(f"{path}, {len(run.cases)} cases\n")
        for name, found in dice.items():
            gap = found - dice["monai constant"]
            spread = gap.std(ddof=1) if len(gap) > 1 else 0.0
            sys.stdout.write(f"  {name:16s}{found.mean():8.2f}{gap.mean():+8.2f} +- {spread:.2f}\n")
        if settings.scores is not None:
            add_row(kept, path, run, scores[next(iter(scores))])
            write_rows(settings.scores, kept.values())  # so far, for there may be hours to come


def parse() -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--cases", type=int, help="how many to score; else 50 unlabelled training cases, or all that are held out"
    )
    parser.add_argument("--held_out", action="store_true", help="score the run's test cases instead")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.125, 0.1875, 0.25, 0.3, 100.0])
    parser.add_argument("--scores", type=Path, help="CSV file to write, for benchmarks.kept_scores")
    return parser.parse_args()


def cases_with_label(source: CaseSource, bundle: InferenceBundle, limit: int | None, *, held_out: bool) -> list[str]:
    """The first unlabelled training cases of a run, or its test cases, that have a label after all."""
    pool = bundle.split.unlabeled
    if held_out:
        pool = make_test_ids(source, bundle.config.split_request(), bundle.split)
    known = set(source.labeled_ids())
    return [case_id for case_id in pool if case_id in known][:limit]


class Loaded(NamedTuple):
    """A run to score: its network and preprocessing, its own windows without mirroring, and the cases with labels."""

    bundle: InferenceBundle
    options: InferenceOptions
    cases: list[Volume]
    patients: dict[str, str]
    device: torch.device


def loaded(path: Path, settings: argparse.Namespace) -> Loaded:
    """The run of a checkpoint, with the cases that ``--cases`` and ``--held_out`` ask for."""
    _, device = start_process_group()
    bundle = load_for_inference(path, device)
    options = inference_options(bundle, InferenceFlags(flips=False).apply_to(bundle.config), device)
    source = build_source(bundle.config)
    ids = cases_with_label(source, bundle, settings.cases, held_out=settings.held_out)
    if not ids:
        raise SystemExit(f"{path}: none of these cases has a label to score with")
    cases = [source.load(case_id, with_label=True) for case_id in ids]
    return Loaded(bundle, options, cases, {case_id: source.patient(case_id) for case_id in ids}, device)


def scores_of(run: Loaded, sigmas: Sequence[float]) -> Mapping[str, Scores]:
    """The figures of each case and class by the name of the weights, those of ``sigmas`` first."""
    bundle, options, device = run.bundle, run.options, run.device
    network = bundle.network

    def logits(windows: Tensor) -> Tensor:
        with autocast(options.amp, device):
            return network(windows).logits.float()

    def ours(image: Tensor, sigma: float) -> Tensor:
        return sliding_window_probabilities(network, image, dataclasses.replace(options, sigma=sigma), device)

    def by_monai(image: Tensor, mode: str) -> Tensor:
        with evaluation_mode(network), torch.no_grad():
            window, overlap = options.patch_size, options.overlap
            inputs = image[None].to(device)
            merged = sliding_window_inference(inputs, window, WINDOWS_AT_ONCE, logits, overlap, mode)[0]
            return merged.softmax(0).cpu()  # restored as probabilities, as ours are

    sides: dict[str, Callable[[Tensor], Tensor]] = {}
    sides |= {f"sigma {sigma:g}": partial(ours, sigma=sigma) for sigma in sigmas}
    sides |= {f"monai {mode}": partial(by_monai, mode=mode) for mode in ("gaussian", "constant")}
    scores: dict[str, dict[tuple[str, int], CaseMetrics]] = {name: {} for name in sides}
    for volume in run.cases:
        image = torch.from_numpy(bundle.preprocess(volume).image)
        for name, side in sides.items():
            found = label_map_from(bundle.preprocess.restore(side(image).numpy(), volume))
            result = score_case(volume, found, bundle.num_classes, run.patients[volume.case_id])
            scores[name] |= {(volume.case_id, class_id): figures for class_id, figures in result.metrics.items()}
    return scores


def add_row(rows: dict[str, KeptRow], path: Path, run: Loaded, scores: Scores) -> None:
    """Keep the scores of a checkpoint in the row of its run's name, by its seed.

    Raises:
        SystemExit: If the row has that seed.
    """
    name = re.sub(r"_\d+labels_seed\d+$", "", path.resolve().parent.name)
    row, seed = rows.get(name, KeptRow(name, (), {}, {})), run.bundle.config.seed
    if seed in row.by_seed:
        raise SystemExit(f"{path}: {name!r} has seed {seed} already; --scores takes one checkpoint of a run")
    rows[name] = KeptRow(name, (), {**row.by_seed, seed: scores}, {**row.stated, **run.patients})


if __name__ == "__main__":
    main()
