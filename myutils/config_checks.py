"""What settings must be together or part by part, for any data; limits of single numbers stand at their flags.

``check_settings`` refuses what is impossible, ``idle_flags`` names what does nothing.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

_AFFINE = {"affine_angle", "affine_scale"}
_LONGEST_NAME = 255  # bytes


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse values that are impossible whatever the data, naming the flag, the value and the limit.

    Args:
        settings: Every setting of a run by its flag's name; None where it is left open.
    """
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
    try:
        re.compile(settings["patient_pattern"] or "")
    except re.error as error:
        raise ValueError(f"--patient_pattern {settings['patient_pattern']!r}: no regular expression: {error}") from None
    axes = settings["flip_axes"] or ()
    if not set(axes) <= {0, 1, 2} or len(set(axes)) != len(axes):
        raise ValueError(f"--flip_axes {' '.join(map(str, axes))}: axes are 0, 1 and 2, each at most once")
    if exp is not None and (exp in ("", "..") or Path(exp).name != exp):
        raise ValueError(f"--exp {exp!r}: a plain folder name; put the parent folder into --output_dir")
    if exp is not None and (size := len(os.fsencode(exp))) > _LONGEST_NAME:
        raise ValueError(f"--exp: a name of {size} bytes, folders have at most {_LONGEST_NAME}; choose a shorter one")


def idle_flags(settings: Mapping[str, Any]) -> dict[str, Set[str]]:
    """Flags that change nothing beside the other settings of a run, by the reason: "with --no-augment".

    Args:
        settings: As of ``check_settings``, with ``labeled_bs`` filled.
    """
    boxes = {"paste_unlabeled"} if settings["feature_perturbation"] else {"paste_unlabeled", "perturbed_share"}
    rules: list[tuple[bool, str, Set[str]]] = [
        (not settings["augment"], "with --no-augment", {"affine_share", *_AFFINE, "strong_intensity"}),
        (not settings["affine_share"], "with --affine_share 0", _AFFINE),
        (not settings["copy_paste"], "with --no-copy_paste", boxes),
        (settings["batch_size"] - settings["labeled_bs"] == 1, "with one unlabelled patch a step", {"paste_unlabeled"}),
        (not settings["use_dfp"], "with --no-use_dfp", {"anchor_weight", "num_eigenvectors", "ema_alpha"}),
        (settings["optimizer"] != "muon", f"with --optimizer {settings['optimizer']}", {"muon_interval"}),
        (settings["spacing"] is None, "without --spacing", {"interpolation"}),
        (settings["labeled_list"] is not None, "with --labeled_list", {"labelnum"}),
        (settings["val_list"] is not None, "with --val_list", {"val_num"}),
    ]
    return {reason: flags for holds, reason, flags in rules if holds}
