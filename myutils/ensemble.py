"""Checkpoints that segment together: one network that averages theirs, and all that they trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch

from dataloaders.splits import TrainingSplit
from myutils.checkpoint import InferenceBundle, load_for_inference
from networks.ensemble import Ensemble


def load_together(paths: Sequence[Path], device: torch.device) -> InferenceBundle:
    """As ``load_for_inference``; several checkpoints become one network, the mean of their probabilities.

    The configuration is the first one's, the step the earliest, classes that are one component are so for all, and
    every case that any of them trained on is a training case.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a checkpoint comes twice or is damaged, or they do not see scans alike.
    """
    twice = [path for number, path in enumerate(paths) if path.resolve() in {p.resolve() for p in paths[:number]}]
    if twice:
        raise ValueError(f"--checkpoint names {twice[0]} twice; leave one out")
    bundles = [load_for_inference(path, device) for path in paths]
    first = bundles[0]
    for path, other in zip(paths[1:], bundles[1:], strict=True):
        for (name, expected), (_, found) in zip(_must_agree(first), _must_agree(other), strict=True):
            if found != expected:
                raise ValueError(
                    f"{path} was trained with {name} {found}, {paths[0]} with {expected}; only runs with the same can "
                    "segment together (a setting that was fitted to other labelled cases can be given as a flag)"
                )
    if len(bundles) == 1:
        return first
    single = set.intersection(*(set(bundle.facts.single_components) for bundle in bundles))
    return dataclasses.replace(
        first,
        network=Ensemble([bundle.network for bundle in bundles]),
        facts=dataclasses.replace(first.facts, single_components=tuple(sorted(single))),
        split=joined_splits([bundle.split for bundle in bundles]),
        step=min(bundle.step for bundle in bundles),
    )


def joined_splits(splits: Sequence[TrainingSplit]) -> TrainingSplit:
    """Every case in the closest role that it has in any split: labelled, else unlabelled, else validation."""
    labeled = dict.fromkeys(chain.from_iterable(split.labeled for split in splits))
    unlabeled = dict.fromkeys(chain.from_iterable(split.unlabeled for split in splits))
    val = dict.fromkeys(chain.from_iterable(split.val for split in splits))
    return TrainingSplit(
        tuple(labeled),
        tuple(case_id for case_id in unlabeled if case_id not in labeled),
        tuple(case_id for case_id in val if case_id not in labeled and case_id not in unlabeled),
    )


def _must_agree(bundle: InferenceBundle) -> Iterator[tuple[str, object]]:
    """What decides how a scan comes to the network and what its classes mean, by the name of the flag or fact."""
    yield "image channels", bundle.in_channels
    yield "classes", ", ".join(bundle.class_names)
    for field in dataclasses.fields(bundle.preprocess):
        yield f"--{field.name}", getattr(bundle.preprocess, field.name)
    yield "--patch_size", bundle.config.patch_size
    yield "--flip_axes", bundle.flip_axes
