"""Connected components: which classes are one in the labels, and the largest component in a prediction."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

logger = logging.getLogger(__name__)

_FEWEST_SHOWN = 4  # cases; that a class is one component in fewer may be chance
_ONE_COMPONENT = 0.99  # of the voxels; specks of an unsteady hand do not count
_SPECKS = 0.1  # of a class's voxels in a prediction; more that is removed is named


class Components(NamedTuple):
    """What labels say about the components of classes.

    Attributes:
        shown: In how many cases each class is.
        single: Classes that are one component in all of these, four at least, as organs are and lesions are not.
    """

    shown: tuple[int, ...]
    single: tuple[int, ...]


def survey_components(labels: Iterable[np.ndarray], num_classes: int) -> Components:
    """Look at class ids (X, Y, Z), one case after the other."""
    shown, single = [0] * num_classes, [True] * num_classes
    for label in labels:
        for class_id, box in enumerate(ndimage.find_objects(label.astype(np.int32), num_classes - 1), start=1):
            shown[class_id] += box is not None
            if box is not None and single[class_id]:
                _, sizes = _components(label[box] == class_id)
                single[class_id] = bool(sizes.max() >= _ONE_COMPONENT * sizes.sum())
    return Components(tuple(shown), tuple(k for k in range(1, num_classes) if single[k] and shown[k] >= _FEWEST_SHOWN))


def largest_component(label_map: np.ndarray, classes: Collection[int]) -> np.ndarray:
    """Keep the largest component of some classes, connected at corners too; the rest of them is background.

    Args:
        label_map: Class ids (X, Y, Z), integer.
        classes: Ids of the classes; the others stay as they are.

    Returns:
        A map of the same shape and type; of components of equal size the first in array order stays.
    """
    if not classes:
        return label_map
    kept = label_map.copy()
    boxes = ndimage.find_objects(label_map.astype(np.int32, copy=False), max(classes))
    for class_id in classes:
        box = boxes[class_id - 1]
        if box is None:
            continue
        components, sizes = _components(label_map[box] == class_id)
        kept[box][(components > 0) & (components != 1 + sizes.argmax())] = 0
    return kept


def cut_to_largest(
    label_map: np.ndarray, classes: Collection[int], class_names: Sequence[str], path: Path
) -> np.ndarray:
    """``largest_component`` of a scan at ``path``, with a warning where it takes more than specks of a class."""
    kept = largest_component(label_map, classes)
    for class_id in classes:
        before, after = (int(np.count_nonzero(ids == class_id)) for ids in (label_map, kept))
        if before - after > _SPECKS * before:
            logger.warning(
                "%s: of %s, %d of %d voxels lay apart from the largest component and were removed; where there may be "
                "two of it, pass --no-largest_component",
                path,
                class_names[class_id],
                before - after,
                before,
            )
    return kept


def name_kept_components(classes: Iterable[int], class_names: Sequence[str]) -> None:
    """Log the classes of which predictions hold the largest component alone, where there are any."""
    names = [class_names[class_id] for class_id in classes]
    if names:
        logger.info("predictions: the largest component alone of %s (--no-largest_component)", ", ".join(names))


def _components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each voxel's component, from 1, and the voxels of each; 0 is outside."""
    numbers, _ = ndimage.label(mask, structure=ndimage.generate_binary_structure(mask.ndim, mask.ndim))
    return numbers, np.bincount(numbers.ravel())[1:]
