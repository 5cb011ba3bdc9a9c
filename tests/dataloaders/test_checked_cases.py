"""What a reader must not get wrong in silence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import BallSource

from dataloaders.base import Grid, Volume
from dataloaders.case_cache import CaseCache
from dataloaders.checked_cases import grid_of, load_case, require_sound
from dataloaders.preprocess import Preprocess

LABEL = np.zeros((2, 3, 4), np.uint8)
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


class OneVolume(BallSource):
    """Gives one volume, whatever is asked for."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        sound = {"case_id": "a", "image": np.zeros((1, 2, 3, 4), np.float32), "label": LABEL, "affine": AFFINE}
        self.volume = Volume(**{**sound, "spacing": (1.0, 2.0, 3.0), **changes})

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        return self.volume


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"case_id": "b"}, "case 'b'; give the one that was asked for"),
        ({"image": np.zeros((2, 3, 4), np.float32)}, r"image \(2, 3, 4\) of float32; give \(1, X, Y, Z\)"),
        ({"image": np.zeros((2, 2, 3, 4), np.float32)}, r"give \(1, X, Y, Z\) of float32"),
        ({"image": np.zeros((1, 2, 3, 4))}, "of float64; give"),
        ({"spacing": (1.0, 1.0, 1.0)}, "voxels of 1 x 2 x 3 mm; give one"),
        ({"affine": AFFINE[:3, :3]}, r"an affine \(3, 3\); give a regular"),
        ({"affine": np.ones(4)}, r"an affine \(4,\); give a regular"),
        ({"affine": np.diag([1.0, 2.0, 0.0, 1.0])}, r"an affine \(4, 4\); give a regular"),
        ({"label": None}, "no label; read it"),
        ({"label": LABEL.transpose(2, 1, 0)}, r"a label \(4, 3, 2\) of uint8; give \(2, 3, 4\)"),
        ({"label": LABEL.astype(np.float32)}, "of float32; give"),
        ({"label": LABEL + np.uint8(3)}, r"class id 3; give 0\.\.2"),
    ],
)
def test_a_volume_that_breaks_its_contract_is_refused(changes: dict[str, Any], fault: str) -> None:
    assert load_case(OneVolume(), "a", with_label=True).label is LABEL
    with pytest.raises(ValueError, match=f"case a: OneVolume.load gave .*{fault}"):
        load_case(OneVolume(**changes), "a", with_label=True)


@pytest.mark.parametrize("affine", [AFFINE[:3, :3], np.ones(4), np.diag([1.0, 2.0, 0.0, 1.0])])
def test_a_header_that_breaks_its_contract_is_refused(affine: np.ndarray) -> None:
    assert grid_of(OneVolume(), "a").shape == (2, 3, 4)
    with pytest.raises(ValueError, match=r"case a: OneVolume.grid gave a shape \(2, 3, 4\) and an affine .*; give"):
        grid_of(OneVolume(affine=affine), "a")
    source = OneVolume()
    source.grid = lambda _: Grid((2, 3), AFFINE)  # type: ignore[method-assign, arg-type]
    with pytest.raises(ValueError, match=r"OneVolume.grid gave a shape \(2, 3\) and"):
        grid_of(source, "a")


def test_a_label_that_was_not_asked_for_never_comes_to_a_training() -> None:
    assert load_case(OneVolume(label=None), "a", with_label=False).label is None
    with pytest.raises(ValueError, match=r"case a: .* a label that was not asked for"):
        CaseCache(OneVolume(), Preprocess("mr")).get("a", with_label=False)


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("case_ids", lambda: ["a", "b", "a"], "case_ids of BallSource holds 'a' more than once"),
        ("case_ids", lambda: ["a", "M\udcfcller"], r"not UTF-8.* 'M\\udcfcller'; rename these files"),  # Latin-1
        ("labeled_ids", lambda: ["ball00", "c"], "labeled_ids of BallSource names 'c', which case_ids does not"),
        ("class_names", ("background", "ball"), "has 2 names for num_classes 3"),
        ("modality", "mri", "modality 'mri'"),
        ("flip_axes", (1, 3), r"flip_axes \(1, 3\)"),
    ],
)
def test_a_source_that_breaks_its_contract_is_refused(name: str, value: Any, fault: str) -> None:
    source = BallSource()
    require_sound(source)
    setattr(source, name, value)
    with pytest.raises(ValueError, match=fault):
        require_sound(source)
