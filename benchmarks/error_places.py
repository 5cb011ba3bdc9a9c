"""Where a network errs: the Dice that voxels near the true surface cost it, and those further away.

    python -m benchmarks.error_places --held_out --checkpoint runs/a/last.pt runs/b/last.pt

What lies at the surface is a matter of how it is drawn, what lies further away of what is found at all. The cases are
those of ``benchmarks.window_weights``, with the run's own windows, without mirroring and with all components. Printed
per checkpoint: mean Dice in percent over classes and cases, and the points of the 100 that wrong voxels within one
voxel (the largest edge of it) of the true surface take, those within two, and the rest. Where several checkpoints have
the same cases: the mean Dice of each pair against each other.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from benchmarks.inference_speed import dice
from benchmarks.window_weights import loaded
from dataloaders.base import Volume
from myutils.inference import label_map_from, sliding_window_probabilities

LIMITS = (1.0, 2.0)  # voxels


def main() -> None:
    """Segment, count and print."""
    settings = parse()
    found: dict[Path, dict[str, np.ndarray]] = {}
    for path in settings.checkpoint:
        cases, found[path] = segmented(path, settings)
        lost = np.mean([points_lost(found[path][case.case_id], case) for case in cases], axis=0)
        near, next_to, rest = lost
        sys.stdout.write(
            f"{path}, {len(cases)} cases: Dice {100 - lost.sum():.2f}, lost within {LIMITS[0]:g} voxel of the surface "
            f"{near:.2f}, within {LIMITS[1]:g} {next_to:.2f}, further away {rest:.2f}\n"
        )
    for (one, maps), (other, others) in itertools.combinations(found.items(), 2):
        if maps.keys() == others.keys():
            classes = 1 + max(labels.max() for labels in (*maps.values(), *others.values()))
            agreement = np.mean([dice(maps[name], others[name], classes) for name in maps])
            sys.stdout.write(f"{one} and {other}: {agreement:.2f}\n")


def parse() -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, nargs="+", required=True)
    parser.add_argument("--cases", type=int, help="unlabelled training cases to score; else all")
    parser.add_argument("--held_out", action="store_true", help="score the run's test cases instead")
    return parser.parse_args()


def segmented(path: Path, settings: argparse.Namespace) -> tuple[list[Volume], dict[str, np.ndarray]]:
    """The cases, and the label maps (X, Y, Z) that a checkpoint gives them, by case id."""
    bundle, options, cases, _, device = loaded(path, settings)
    maps = {}
    for case in cases:
        image = torch.from_numpy(bundle.preprocess(case).image)
        probabilities = sliding_window_probabilities(bundle.network, image, options, device)
        maps[case.case_id] = label_map_from(bundle.preprocess.restore(probabilities.numpy(), case))
    return cases, maps


def points_lost(found: np.ndarray, case: Volume) -> np.ndarray:
    """Points (3,) of Dice that errors within one voxel of the true surface take, within two, and beyond.

    A class's Dice is 100 less its wrong voxels, in percent of the voxels of both masks, so that the points add up; the
    mean over the classes that either map has.
    """
    assert case.label is not None
    rows = []
    present = np.union1d(found, case.label)
    for class_id in present[present > 0]:
        truth, guess = case.label == class_id, found == class_id
        steps = np.array(case.spacing) / max(case.spacing)  # in voxels of the largest edge
        inside, outside = (ndimage.distance_transform_edt(mask, steps) for mask in (truth, ~truth))
        distances = np.maximum(inside, outside)[truth != guess] if truth.any() else np.full(guess.sum(), np.inf)
        counts = np.histogram(distances, [0, *np.nextafter(LIMITS, np.inf), np.inf])[0]
        rows.append(100 * counts / (truth.sum() + guess.sum()))
    return np.mean(rows, axis=0) if rows else np.zeros(len(LIMITS) + 1)


if __name__ == "__main__":
    main()
