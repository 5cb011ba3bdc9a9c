"""One picture of a run: slices with labels and predictions side by side, and the loss curves below.

matplotlib is imported where something is drawn: a training draws at its end, and need not start later for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PANEL_INCHES = 2.6
INK, MUTED = "#222222", "#777777"
CURVE_COLOURS = ("#1f6fb4", "#d1603d", "#3b8f5a", "#8661a8", "#b08a1e", "#4b4b4b")


@dataclass(frozen=True)
class OverlayCase:
    """One row of the picture.

    Attributes:
        title: Text at the left of the row, such as the case id.
        image: One channel (X, Y, Z).
        maps: Label maps (X, Y, Z) by heading, drawn in this order, such as {"truth": ..., "prediction": ...}.
        spacing: Voxel size along X, Y, Z in mm, for the aspect.
        notes: Text under a map by its heading, such as {"prediction": "Dice 91.2 %"}.
    """

    title: str
    image: np.ndarray
    maps: Mapping[str, np.ndarray]
    spacing: Sequence[float] = (1.0, 1.0, 1.0)
    notes: Mapping[str, str] = field(default_factory=dict)


Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def save_overlay(
    path: Path,
    cases: Sequence[OverlayCase],
    *,
    class_names: Sequence[str],
    loss_curves: Curves | None = None,
    plane: int = 2,
) -> None:
    """Write a PNG: a row per case with the image and each label map on it, a legend, and loss curves.

    Args:
        path: File to write.
        cases: Rows; the slice with the most classes, then the most foreground, of the first map is shown.
        class_names: Names of all classes, the background first.
        loss_curves: (steps, values) by name, in one panel below; None for none.
        plane: Image axis the slices are perpendicular to.

    Raises:
        ValueError: If there is no case, or a map differs from its image in shape.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    _check_cases(cases)
    columns = 1 + max(len(case.maps) for case in cases)
    curve_height = 2.4 if loss_curves else 0.0
    heights = [PANEL_INCHES * _aspect_of(case, plane) for case in cases]
    legend_height = 0.35 * (1 + (len(class_names) - 2) // max(1, 2 * columns))
    total_height = sum(heights) + 0.35 * len(cases) + legend_height + curve_height + 0.3
    figure = Figure(figsize=(PANEL_INCHES * columns + 0.4, total_height), facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.06)
    FigureCanvasAgg(figure)  # no pyplot: nothing global, nothing to close
    blocks: Any = figure.subfigures(
        3 if loss_curves else 2, 1, height_ratios=_shares(heights, legend_height, curve_height)
    )
    grid: Any = blocks[0].subplots(len(cases), columns, squeeze=False, height_ratios=heights)
    colours = class_colours(len(class_names))
    for index, case in enumerate(cases):
        named = index == 0 or list(case.maps) != list(cases[index - 1].maps)
        _draw_case(grid[index], case, colours, plane, named=named)
    _draw_legend(blocks[1], class_names, colours, 2 * columns)
    if loss_curves:
        _draw_curves(blocks[2], loss_curves)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def class_colours(num_classes: int) -> np.ndarray:
    """One RGB colour per class (K, 3); the background is black and never drawn."""
    from matplotlib import colormaps

    colormap: Any = colormaps["tab10" if num_classes <= 11 else "tab20"]
    base = np.array(colormap.colors)
    foreground = base[np.arange(max(0, num_classes - 1)) % len(base)]
    return np.concatenate([np.zeros((1, 3)), foreground])  # (K, 3)


def richest_slice(label_map: np.ndarray, plane: int) -> int:
    """Index of the slice with the most classes and, among those, the most foreground; the middle if there is none."""
    planes = np.moveaxis(label_map, plane, 0)
    if not planes.any():
        return len(planes) // 2
    classes = np.unique(label_map)
    present = sum((planes == class_id).any((1, 2)).astype(int) for class_id in classes if class_id)
    filled = (planes != 0).mean((1, 2))
    return int(np.argmax(present + filled))


def _check_cases(cases: Sequence[OverlayCase]) -> None:
    if not cases:
        raise ValueError("no case to draw; pass at least one")
    for case in cases:
        for name, label_map in case.maps.items():
            if case.image.ndim != 3 or label_map.shape != case.image.shape:
                raise ValueError(
                    f"{case.title}: {name} has shape {label_map.shape}, the image {case.image.shape}; both must be "
                    "the same (X, Y, Z)"
                )


def _shares(heights: Sequence[float], legend: float, curves: float) -> list[float]:
    return [sum(heights) + 0.35 * len(heights), legend] + ([curves] if curves else [])


def _in_plane(case: OverlayCase, plane: int) -> tuple[float, float]:
    """Voxel size in mm along the horizontal and the vertical axis of a slice."""
    horizontal, vertical = (float(step) for axis, step in enumerate(case.spacing) if axis != plane)
    return horizontal, vertical


def _aspect_of(case: OverlayCase, plane: int) -> float:
    """Height of a slice over its width, held within bounds that keep the layout readable."""
    across, up = (size for axis, size in enumerate(case.image.shape) if axis != plane)
    horizontal, vertical = _in_plane(case, plane)
    return float(np.clip(up * vertical / (across * horizontal), 0.4, 1.6))


def _draw_case(row: Sequence[Any], case: OverlayCase, colours: np.ndarray, plane: int, *, named: bool) -> None:
    reference = next(iter(case.maps.values()), np.zeros(case.image.shape, np.uint8))
    index = richest_slice(reference, plane)
    # Array axes as they are, X to the right and Y up: no left or right is implied that the affine did not give.
    picture = np.take(case.image, index, axis=plane).T.astype(np.float32)
    low, high = np.percentile(picture[np.isfinite(picture)], (0.5, 99.5)) if np.isfinite(picture).any() else (0.0, 1.0)
    horizontal, vertical = _in_plane(case, plane)
    for axes in row:
        axes.set_axis_off()
    for axes, heading in zip(row, ["image", *case.maps], strict=False):
        shown = {"origin": "lower", "aspect": vertical / horizontal, "interpolation": "nearest"}
        axes.imshow(picture, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), **shown)
        if named:
            axes.set_title(heading, fontsize=10, color=INK, pad=4)
        if heading in case.maps:
            _draw_labels(axes, np.take(case.maps[heading], index, axis=plane).T, colours, shown)
        note = case.title if heading == "image" else case.notes.get(heading)
        if note:
            axes.text(0.5, -0.02, note, transform=axes.transAxes, ha="center", va="top", fontsize=8, color=MUTED)


def _draw_labels(axes: Any, labels: np.ndarray, colours: np.ndarray, shown: dict[str, Any]) -> None:
    """Translucent fill with a solid line on the class borders; ``labels`` is (rows, columns)."""
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    border[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    border[:-1] |= labels[1:] != labels[:-1]
    alpha = np.where(labels == 0, 0.0, np.where(border, 0.9, 0.4))
    fill = colours[np.clip(labels, 0, len(colours) - 1).astype(int)]  # (rows, columns, 3)
    axes.imshow(np.concatenate([fill, alpha[..., None]], axis=2), **shown)


def _draw_legend(block: Any, class_names: Sequence[str], colours: np.ndarray, columns: int) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=tuple(colours[i]), label=class_names[i]) for i in range(1, len(class_names))]
    if handles:
        block.legend(handles=handles, loc="center", ncols=min(columns, len(handles)), frameon=False, fontsize=9)


def _draw_curves(block: Any, curves: Curves) -> None:
    axes = block.subplots()
    for (name, (steps, values)), colour in zip(curves.items(), CURVE_COLOURS * len(curves), strict=False):
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, label=name, color=colour, linewidth=1.4, marker=marker)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.set_ylabel("loss", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, ncols=3)
