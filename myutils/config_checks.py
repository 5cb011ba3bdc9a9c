"""Limits of settings that hold for any data: checked when a configuration is made, before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# name: (lowest allowed, highest allowed, what it must be)
RANGES: dict[str, tuple[float, float]] = {
    "cache_gb": (0, float("inf")),
    "val_num": (0, float("inf")),
    "labelnum": (1, float("inf")),
    "num_classes": (2, 256),
    "consistency": (0, float("inf")),
    "consistency_rampup": (0, float("inf")),
    "uncertainty_passes": (2, float("inf")),
    "strong_views": (1, 8),
    "paste_unlabeled": (0, 1),
    "perturbed_share": (0, 1),
    "decoders": (2, float("inf")),
    "warmup_iteration": (0, float("inf")),
    "ema_decay": (0, 1),
    "confidence_threshold": (0, 0.9999),
    "contrastive_weight": (0, float("inf")),
    "intra_weight": (0, float("inf")),
    "inter_weight": (0, float("inf")),
    "elements_per_class": (1, float("inf")),
    "prototype_samples": (1, float("inf")),
    "memory_interval": (1, float("inf")),
    "embedding_dim": (1, float("inf")),
    "dfp_start_iter": (0, float("inf")),
    "dfp_reconstruct_interval": (1, float("inf")),
    "selector_train_iter": (0, float("inf")),
    "max_store": (1, float("inf")),
    "ema_alpha": (0, 1),
    "anchor_weight": (0, float("inf")),
    "compact_weight": (0, float("inf")),
    "separation_weight": (0, float("inf")),
    "consistency_o": (0, float("inf")),
    "max_iteration": (1, float("inf")),
    "batch_size": (1, float("inf")),
    "labeled_bs": (1, float("inf")),
    "base_lr": (1e-12, float("inf")),
    "weight_decay": (0, float("inf")),
    "grad_clip": (1e-12, float("inf")),
    "affine_share": (0, 1),
    "affine_angle": (0, 180),
    "affine_scale": (0, 1),
    "foreground_share": (0, 1),
    "seed": (0, 2**31 - 1),
    "num_workers": (0, 256),
    "profile": (0, float("inf")),
    "log_every": (1, float("inf")),
    "save_every": (1, float("inf")),
    "image_every": (1, float("inf")),
    "overlap": (0, 0.9),
    "tta_views": (1, 64),
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse values that are impossible whatever the data, naming the flag, the value and the limit.

    Args:
        settings: Every setting of a run by its flag's name; None where it is left open.
    """
    for name, (low, high) in RANGES.items():
        value = settings[name]
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            limit = f"at least {low:g}" if high == float("inf") else f"in {low:g}..{high:g}"
            raise ValueError(f"--{name} {value}: must be {limit}")
    labeled_bs, batch_size, exp = settings["labeled_bs"], settings["batch_size"], settings["exp"]
    if labeled_bs is not None and labeled_bs >= max(2, batch_size):
        raise ValueError(
            f"--labeled_bs {labeled_bs}: must be below --batch_size {batch_size}, so that a step has "
            "unlabelled patches too"
        )
    if settings["tta_flips"] and settings["tta_views"] > 1:
        raise ValueError(
            f"mirrored inputs together with {settings['tta_views']} views: these are mirrored already; choose one"
        )
    for name in ("patch_size", "spacing", "voxel_size"):
        value = settings[name]
        if value is not None and not all(0 < part < math.inf for part in value):
            raise ValueError(f"--{name} {' '.join(map(str, value))}: every value must be finite and above 0")
    if settings["flat_levels"] is not None and min(settings["flat_levels"]) < 0:
        raise ValueError(f"--flat_levels {' '.join(map(str, settings['flat_levels']))}: every value must be at least 0")
    ct_range = settings["ct_range"]
    if ct_range is not None and not -math.inf < ct_range[0] < ct_range[1] < math.inf:
        raise ValueError(
            f"--ct_range {ct_range[0]:g} {ct_range[1]:g}: the low value must be below the high one, both finite"
        )
    axes = settings["flip_axes"] or ()
    if not set(axes) <= {0, 1, 2} or len(set(axes)) != len(axes):
        raise ValueError(f"--flip_axes {' '.join(map(str, axes))}: axes are 0, 1 and 2, each at most once")
    if exp is not None and (exp in ("", "..") or Path(exp).name != exp):
        raise ValueError(f"--exp {exp!r}: a plain folder name; put the parent folder into --output_dir")
