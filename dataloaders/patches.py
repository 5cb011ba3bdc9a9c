"""Training patches: the data set that cuts them out of prepared cases, and the batch that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataloaders.case_cache import CaseCache, PreparedCase
from dataloaders.samplers import SampleKey
from dataloaders.transforms import (
    AugmentOptions,
    affine_crop,
    change_intensity,
    choose_corner,
    crop,
    mirror_and_turn,
    random_affine,
)


@dataclass
class Batch:
    """Patches of one step: Bl labelled, Bu unlabelled ones; there is no label of an unlabelled patch.

    Attributes:
        image_l: (Bl, C, X, Y, Z) float32.
        label_l: (Bl, X, Y, Z) int64.
        image_u: Weak views (Bu, C, X, Y, Z); Bu may be 0.
        image_u_strong: Strong views (V * Bu, C, X, Y, Z) of the same patches, the first of each, then the second of
            each; voxel by voxel the same geometry (weak-to-strong consistency: Sohn et al. 2020, arXiv:2001.07685).
        cases_l: Ids of the labelled cases.
        cases_u: Ids of the unlabelled cases.
    """

    image_l: Tensor
    label_l: Tensor
    image_u: Tensor
    image_u_strong: Tensor
    cases_l: tuple[str, ...]
    cases_u: tuple[str, ...]

    def _map(self, change: object) -> Batch:
        names = ("image_l", "label_l", "image_u", "image_u_strong")
        return replace(self, **{name: change(getattr(self, name)) for name in names})  # type: ignore[operator]

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; copies from pinned memory do not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; the loader calls it."""
        return self._map(lambda tensor: tensor.pin_memory())


class PatchDataset(Dataset[dict[str, object]]):
    """Cuts the patch that a ``SampleKey`` describes; the same key gives the same patch in any process.

    Args:
        cache: Where the cases come from.
        options: Patch size and random changes.
        guides: Ids of labelled cases. Where an unlabelled case has no voxels to centre a crop on, one is taken from a
            random guide, at the same relative place: scans of one protocol show an organ at roughly the same place.
            Empty: unlabelled crops lie anywhere.
    """

    def __init__(self, cache: CaseCache, options: AugmentOptions, guides: Sequence[str] = ()) -> None:
        self._cache, self._options, self._guides = cache, options, tuple(guides)

    def __getitem__(self, key: SampleKey) -> dict[str, object]:
        rng = np.random.default_rng(key.seed)
        case = self._cache.get(key.case_id, with_label=key.labeled)
        image, label = self._cut(case, rng)
        if label is not None:
            if self._options.intensity:
                image = change_intensity(image, rng, chance=0.2, size=0.5, spacing=case.volume.spacing)
            return {"case": key.case_id, "image": torch.from_numpy(image), "label": torch.from_numpy(label).long()}
        views = [self._strong(image, rng, case.volume.spacing) for _ in range(self._options.strong_views)]
        strong = np.stack(views)  # (V, C, X, Y, Z)
        return {"case": key.case_id, "image": torch.from_numpy(image), "strong": torch.from_numpy(strong)}

    def _strong(self, image: np.ndarray, rng: np.random.Generator, spacing: Sequence[float]) -> np.ndarray:
        size = self._options.strong_intensity if self._options.intensity else 0.0
        return change_intensity(image, rng, chance=0.8, size=size, spacing=spacing) if size else image

    def _cut(self, case: PreparedCase, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        """An image patch (C, X, Y, Z), and its label (X, Y, Z) where the case has one."""
        options, volume = self._options, case.volume
        target = self._target(case, rng) if rng.random() < options.foreground_share else None
        corner = choose_corner(volume.image.shape[1:], options.patch_size, rng, target)
        fill = case.outside[:, None, None, None]
        if rng.random() < options.affine_share:
            matrix = random_affine(rng, options, volume.spacing, volume.image.shape[1:])
            image = affine_crop(volume.image, matrix, corner, options.patch_size, order=1, fill=fill)
            label = volume.label
            if label is not None:
                label = affine_crop(label, matrix, corner, options.patch_size, order=0, fill=0)
        else:
            image = crop(volume.image, corner, options.patch_size, fill)
            label = None if volume.label is None else crop(volume.label, corner, options.patch_size, 0)
        arrays = [image] if label is None else [image, label]
        arrays = mirror_and_turn(arrays, rng, options, volume.spacing)
        return arrays[0], arrays[1] if len(arrays) > 1 else None

    def _target(self, case: PreparedCase, rng: np.random.Generator) -> np.ndarray | None:
        """A voxel (3,) of a random class of the case, or of a guide at the same relative place; None without any."""
        model = case
        if case.volume.label is None and self._guides:
            model = self._cache.get(self._guides[rng.integers(len(self._guides))], with_label=True)
        if not model.targets:
            return None
        of_class = model.targets[rng.integers(len(model.targets))]
        voxel = of_class[rng.integers(len(of_class))]
        here, there = np.array(case.volume.image.shape[1:]), np.array(model.volume.image.shape[1:])
        return voxel if model is case else (voxel + 0.5) * here // there


def collate(samples: list[dict[str, object]]) -> Batch:
    """Stack samples, labelled ones first, into a ``Batch``."""
    labeled = [sample for sample in samples if "label" in sample]
    unlabeled = [sample for sample in samples if "label" not in sample]
    image_l = _stack(labeled, "image")
    nothing = image_l.new_zeros((0, *image_l.shape[1:]))
    return Batch(
        image_l=image_l,
        label_l=_stack(labeled, "label"),
        image_u=_stack(unlabeled, "image") if unlabeled else nothing,
        image_u_strong=_stack(unlabeled, "strong").transpose(0, 1).flatten(0, 1) if unlabeled else nothing,
        cases_l=tuple(str(sample["case"]) for sample in labeled),
        cases_u=tuple(str(sample["case"]) for sample in unlabeled),
    )


def _stack(samples: list[dict[str, object]], name: str) -> Tensor:
    return torch.stack([sample[name] for sample in samples])  # type: ignore[misc]
