"""What a training says at its start of settings that cannot have their effect."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import BallSource
from helpers_runs import small_trainer

from myutils.announce import describe

PLAIN = {"copy_paste": False, "feature_perturbation": False}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "best"}, None),
        ({"method": "best", "copy_paste": False}, None),
        ({"method": "best", "feature_perturbation": False}, None),
        ({"method": "best", **PLAIN, "strong_intensity": 0.5}, None),
        ({"method": "best", **PLAIN}, "--strong_views 2: no intensity"),
        ({"method": "best", **PLAIN, "strong_intensity": 0.5, "augment": False}, "--strong_views 2: no intensity"),
        ({"method": "fixmatch", "strong_views": 3, "strong_intensity": 0}, "--strong_views 3: no intensity"),
        ({"method": "mean_teacher", **PLAIN, "strong_intensity": 0}, None),  # has one view
        ({"method": "mean_teacher", "elements_per_class": 32}, None),
        ({"method": "mean_teacher", "elements_per_class": 33}, "33: never full, a step draws 32 labelled voxels"),
        ({"method": "best", "elements_per_class": 33}, None),  # has no memory
        ({"method": "supervised", "use_contrastive_prototype": True, "elements_per_class": 64}, None),
        ({"method": "supervised", "use_contrastive_prototype": True, "elements_per_class": 65}, "draws 64 labelled"),
    ],
)
def test_settings_that_cannot_have_their_effect_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], words: str | None
) -> None:
    trainer = small_trainer(BallSource(), tmp_path, prototype_samples=64, **settings)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        describe(trainer)
    assert len(caplog.messages) == (words is not None)
    assert words is None or words in caplog.messages[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"flip_axes": (0, 2), "orientation": "ras"}, "mirrored along X and Z (--flip_axes)"),
        ({"flip_axes": (1,), "orientation": "stored"}, "mirrored along the second stored axis (--flip_axes)"),
        ({"flip_axes": (), "orientation": "ras"}, "mirrored along no axis (--flip_axes)"),
    ],
)
def test_the_axes_that_patches_are_mirrored_along_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], words: str
) -> None:
    with caplog.at_level(logging.INFO):
        describe(small_trainer(BallSource(), tmp_path, **settings))
    assert f"patches are {words}" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"flip_axes": (0,), "orientation": "ras"}, True),
        ({"flip_axes": (0,), "orientation": "stored"}, False),  # nobody knows which axis is left-right
        ({"flip_axes": (1,), "orientation": "ras"}, False),
    ],
)
def test_a_class_of_one_side_that_is_mirrored_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], said: bool
) -> None:
    source = BallSource()
    source.class_names = ("background", "vertebra_L1", "adrenal_L")
    with caplog.at_level(logging.WARNING):
        describe(small_trainer(source, tmp_path, **settings))
    assert ("mirrored, 'adrenal_L' is on the other side" in caplog.text) == said
