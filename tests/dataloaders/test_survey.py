"""What labelled cases say about the patch and the range of a CT, by hand."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BallSource
from helpers_runs import small_config

from dataloaders.base import Grid, SourceOptions, TrainingDefaults, Volume
from dataloaders.checked_cases import warn_of_odd_voxels
from dataloaders.say_once import warn_once
from dataloaders.survey import Survey, fitting_patch, structure_range, survey_grids
from myutils.config import RunConfig
from myutils.fitting import fit_to_cases, require_headers
from myutils.resolving import resolve_config
from networks.base import NETWORKS


class ScanSource(BallSource):
    """Scans of 0..999 along X in a label of everything but the first 100 rows; case ``n`` is shifted by 1000 n."""

    modality, defaults = "ct", TrainingDefaults()

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        ramp = np.broadcast_to(np.arange(1000, dtype=np.float32)[:, None, None], (1000, 4, 3))
        number = int(case_id[4:])
        spacing = (1.0, 2.0, 3.0 + number)
        label = (ramp >= 100).astype(np.uint8) if number < 2 else np.zeros(ramp.shape, np.uint8)
        self.label_reads.append(case_id)
        return Volume(case_id, ramp[None] + 1000 * number, label, np.diag([*spacing, 1.0]), spacing)

    def grid(self, case_id: str) -> Grid:
        return Grid((1000, 4, 3), np.diag([1.0, 2.0, 3.0 + int(case_id[4:]), 1.0]))


def survey_of(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Survey:
    x, y, z = (size * step for size, step in zip(shape, spacing, strict=True))
    return Survey((x, y, z), spacing)


def test_survey_is_the_median_and_the_percentiles_inside_the_structures() -> None:
    source, cases = ScanSource(), ["ball00", "ball01", "ball02"]
    found = survey_grids([source.grid(case_id) for case_id in cases], "stored")
    assert found.extent == (1000.0, 8.0, 12.0)
    assert found.spacing == (1.0, 2.0, 4.0)
    values = np.concatenate([np.arange(100, 1000), np.arange(1100, 2000)]).repeat(12)
    assert structure_range(source, cases) == pytest.approx(np.percentile(values, (0.5, 99.5)), abs=0.01)


def test_nothing_labelled_gives_no_range() -> None:
    assert structure_range(ScanSource(), ["ball02"]) is None


@pytest.mark.parametrize(
    ("shape", "spacing", "patch"),
    [
        ((35, 50, 36), (1.0, 1.0, 1.0), (32, 48, 32)),  # a hippocampus: the whole case, without padding
        ((183, 140, 88), (0.625, 0.625, 0.625), (64, 64, 64)),  # a large case is cut to a cube
        ((512, 512, 100), (0.8, 0.8, 2.5), (96, 96, 24)),  # 77, 77 and 60 mm
        ((320, 320, 18), (0.6, 0.6, 3.6), (128, 128, 16)),  # few thick slices: 64^3 voxels in all
        ((9, 30, 20), (1.0, 1.0, 1.0), (16, 24, 16)),  # two strides where the case is longer than one
        ((7, 30, 20), (1.0, 1.0, 1.0), (8, 24, 16)),  # one where it is not
    ],
)
def test_fitting_patch_by_hand(shape: tuple, spacing: tuple, patch: tuple) -> None:
    found = fitting_patch(survey_of(shape, spacing), None)
    assert found == patch
    assert np.prod(found) <= 64**3


def test_fitting_patch_is_a_multiple_of_what_the_network_divides_by() -> None:
    source = BallSource()  # 16 voxels and more
    for model, part in (("unet_3d", 8), ("vnet", 16)):
        config = small_config(source, model=model, patch_size=None)
        patch = fit_to_cases(config, source, source.case_ids()[:2]).patch_size
        network = NETWORKS.get(model)(1, 2)
        assert patch is not None and network.stride == (part,) * 3 and not any(size % part for size in patch)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, (-5.0, 105.0)), (1 / 65535, (-5 / 65535, 105 / 65535))])
def test_a_range_keeps_its_digits_whatever_the_unit(scale: float, expected: tuple[float, float]) -> None:
    source = BallSource()

    def load(case_id: str, *, with_label: bool = True) -> Volume:
        volume = BallSource.load(source, case_id, with_label=with_label)
        values = np.where(np.arange(volume.image.size) % 2, -5.0, 105.0).reshape(volume.image.shape) * scale
        return dataclasses.replace(volume, image=values.astype(np.float32))

    source.load = load  # type: ignore[method-assign]
    assert structure_range(source, ["ball00"]) == pytest.approx(expected, rel=1e-4)


def test_a_network_that_divides_by_more_gets_its_least_patch() -> None:
    found = fitting_patch(survey_of((200, 200, 200), (1.0, 1.0, 1.0)), None, parts=(32, 32, 64))
    assert found == (64, 64, 128)  # more than 64^3 voxels, but twice its parts


def test_fitting_patch_of_resampled_cases() -> None:
    survey = survey_of((35, 50, 36), (1.0, 1.0, 1.0))
    assert fitting_patch(survey, (2.0, 1.0, 1.0)) == (16, 48, 32)
    assert fitting_patch(survey_of((183, 140, 88), (0.625,) * 3), (2.5, 2.5, 2.5)) == (40, 32, 16)


def test_a_customary_patch_is_cut_down_to_the_cases_alone() -> None:
    usual = (112, 112, 80)
    assert fitting_patch(survey_of((183, 140, 88), (0.625,) * 3), None, usual) == usual
    assert fitting_patch(survey_of((46, 35, 22), (2.5,) * 3), None, usual) == (48, 40, 24)


def test_only_what_is_open_is_filled() -> None:
    source = ScanSource()
    chosen = fit_to_cases(resolve_config(RunConfig(), source), source, ["ball00"])
    assert (chosen.flat_levels, chosen.patch_size) == ((0, 1, 1), (1000, 4, 4))
    assert chosen.ct_range == pytest.approx((104.0, 995.0), abs=1)
    given = fit_to_cases(small_config(source, ct_range=(-100.0, 200.0)), source, ["ball00"])
    assert (given.patch_size, given.ct_range) == ((16, 16, 16), (-100.0, 200.0))
    assert fit_to_cases(resolve_config(RunConfig(modality="mr"), source), source, ["ball00"]).ct_range is None


def test_cases_are_not_read_where_nothing_is_open() -> None:
    source = ScanSource()
    fit_to_cases(small_config(source, ct_range=(0.0, 1.0)), source, ["ball00"])
    fit_to_cases(small_config(source, modality="mr"), source, ["ball00"])
    assert not source.label_reads


@pytest.mark.parametrize(
    ("patch", "steps", "idle"), [((16, 16, 8), 1, False), ((16, 8, 8), 1, True), ((8,) * 3, 2, True)]
)
def test_quarter_turns_without_effect_are_named_where_nothing_is_open(
    patch: tuple[int, int, int], steps: float, idle: bool, caplog: pytest.LogCaptureFixture
) -> None:
    source = BallSource()
    source.grid = lambda _: Grid((20, 18, 16), np.diag([1.0, steps, 1.0, 1.0]))  # type: ignore[method-assign]
    fit_to_cases(small_config(source, modality="mr", rotate90=True, patch_size=patch), source, ["ball00"])
    assert ("--rotate90" in caplog.text) == idle


@pytest.mark.parametrize(
    ("patch", "fitting"),
    [((24, 20, 16), None), ((16, 16, 8), None), ((48, 16, 32), "24 16 16"), ((32, 32, 16), "24 20 16")],
)
def test_a_patch_that_no_case_fills_is_named(
    patch: tuple[int, int, int], fitting: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """20 x 18 x 16 voxels of 1, 2 and 1 mm, and a network that divides the axes by 8, 4 and 8 then."""
    source = BallSource()
    config = small_config(source, patch_size=patch, orientation=None)
    assert fit_to_cases(config, source, ["ball00"]).patch_size == patch
    assert ("is padding" in caplog.text) == (fitting is not None)
    if fitting is not None:
        limit = "no labelled case has more than 20 x 18 x 16 voxels, the rest is padding"
        assert f"--patch_size {' '.join(map(str, patch))}: {limit}; {fitting} shows as much of them" in caplog.text


def test_a_ct_without_any_structure_keeps_percentiles_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    source = ScanSource()
    with caplog.at_level(logging.WARNING):
        chosen = fit_to_cases(small_config(source), source, ["ball02"])
    assert chosen.ct_range is None and "no structure" in caplog.text


def test_a_range_for_mr_is_refused() -> None:
    with pytest.raises(ValueError, match="--ct_range: these data are mr; add --modality ct"):
        resolve_config(RunConfig(ct_range=(0.0, 1.0)), BallSource.from_options(SourceOptions()))


def test_a_network_that_computes_with_values_in_its_constructor_gets_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Swin's do, of which MONAI has one: it cannot be built without weights, to ask for its stride."""

    class Dropping(NETWORKS.get("unet_3d")):  # type: ignore[misc]
        def __init__(self, *sizes: int, **more: Any) -> None:
            super().__init__(*sizes, **more)
            self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]

    monkeypatch.setattr(NETWORKS, "get", lambda name: Dropping)
    source = BallSource()
    monkeypatch.setattr(source, "defaults", TrainingDefaults())
    assert fit_to_cases(small_config(source, patch_size=None), source, ["ball00"]).patch_size == (16, 16, 16)
    with pytest.raises(RuntimeError, match="meta"), torch.device("meta"):
        Dropping(1, 2)


@pytest.mark.parametrize("look", [require_headers, warn_of_odd_voxels])
def test_a_case_whose_voxels_are_of_another_unit_is_named(look: Callable, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()

    class Metres(BallSource):
        def grid(self, case_id: str) -> Grid:
            scale = 0.001 if case_id == "ball02" else 1.0
            return Grid((20, 18, 16), np.diag([scale, 2 * scale, scale, 1.0]))

    source = Metres()
    look(source, source.case_ids())
    assert "voxels 100 times as large as the others' or as small, 0.001 x 0.002 x 0.001 mm in 'ball02'" in caplog.text
    caplog.clear()
    look(source, ["ball00", "ball01"])
    assert not caplog.text
