"""The overlay picture: which slice is shown, how labels are drawn, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as pictures

from myutils.overlay import OverlayCase, class_colours, richest_slice, save_overlay

NAMES = ("background", "ball", "core")


def case(**changes: object) -> OverlayCase:
    label = np.zeros((12, 14, 10), np.uint8)
    label[3:9, 3:9, 4:8], label[5:7, 5:7, 6] = 1, 2
    settings = {"title": "case a", "image": label * 10.0, "maps": {"truth": label, "prediction": label}}
    return OverlayCase(**(settings | changes))


def test_richest_slice_has_most_classes_then_most_foreground() -> None:
    label = case().maps["truth"]
    assert richest_slice(label, 2) == 6
    one_class = np.minimum(label, 1)
    one_class[:, :, 5] = 1
    assert richest_slice(one_class, 2) == 5
    assert richest_slice(np.zeros((4, 4, 9), np.uint8), 2) == 4


def test_class_colours_are_distinct_and_enough() -> None:
    for count in (2, 7, 15):
        colours = class_colours(count)
        assert colours.shape == (count, 3) and len(np.unique(colours, axis=0)) == count
    assert class_colours(40).shape == (40, 3)


def test_picture_shows_labels_in_their_colours_and_curves(tmp_path: Path) -> None:
    curves = {"mean_teacher": ([1, 2, 3], [1.0, 0.5, 0.2]), "supervised": ([1, 2, 3], [1.1, 0.7, 0.4])}
    both = [case(), case(title="case b", notes={"prediction": "Dice 91 %"})]
    save_overlay(tmp_path / "with.png", both, class_names=NAMES, loss_curves=curves)
    save_overlay(tmp_path / "without.png", both, class_names=NAMES)
    with_curves, without = (pictures.imread(tmp_path / name) for name in ("with.png", "without.png"))
    assert with_curves.shape[0] > without.shape[0] and with_curves.shape[1] == without.shape[1]
    saturation = without[..., :3].max(-1) - without[..., :3].min(-1)
    assert (saturation > 0.3).any()  # a label was drawn in colour
    bare = [case(maps={}), case(maps={}, title="case b")]
    save_overlay(tmp_path / "bare.png", bare, class_names=NAMES[:1])
    picture = pictures.imread(tmp_path / "bare.png")
    assert (picture[..., :3].max(-1) - picture[..., :3].min(-1)).max() < 0.05


def test_thick_slices_are_drawn_in_their_true_proportion(tmp_path: Path) -> None:
    heights = {}
    for name, spacing in {"cubes": (1.0, 1.0, 1.0), "tall": (1.0, 1.3, 1.0)}.items():
        save_overlay(tmp_path / f"{name}.png", [case(spacing=spacing)], class_names=NAMES)
        heights[name] = pictures.imread(tmp_path / f"{name}.png").shape[0]
    assert heights["tall"] > heights["cubes"]


def test_missing_foreground_constant_and_nan_images_are_drawn(tmp_path: Path) -> None:
    empty = np.zeros((12, 14, 10), np.uint8)
    odd = np.full((12, 14, 10), np.nan)
    for image in (np.zeros(empty.shape), odd):
        save_overlay(tmp_path / "odd.png", [case(image=image, maps={"prediction": empty})], class_names=NAMES)
    assert (tmp_path / "odd.png").stat().st_size > 0


def test_bad_cases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        save_overlay(tmp_path / "x.png", [], class_names=NAMES)
    wrong = case(maps={"prediction": np.zeros((3, 3, 3), np.uint8)})
    with pytest.raises(ValueError, match=r"case a: prediction has shape \(3, 3, 3\)"):
        save_overlay(tmp_path / "x.png", [wrong], class_names=NAMES)
