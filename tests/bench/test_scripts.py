"""The timing scripts run and print their figures; the figures themselves are never a test."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import BallSource
from helpers_runs import small_trainer
from helpers_scans import trained_run, write_cohort
from monai.inferers import sliding_window_inference
from torch import Tensor

from benchmarks import (
    data_speed,
    endurance,
    error_places,
    inference_speed,
    large_volume,
    layout_speed,
    metrics_speed,
    scaling,
    step_cost,
    window_weights,
)
from benchmarks.kept_scores import read_rows
from benchmarks.trainer_process import run_to_end
from dataloaders.base import Volume


def spied_windows(monkeypatch: pytest.MonkeyPatch, script: ModuleType) -> list[tuple[object, ...]]:
    """What a script asks of MONAI's sliding windows: how many at once, their size, the overlap and the weights."""
    asked: list[tuple[object, ...]] = []

    def spy(*args: Any, **more: Any) -> Tensor:
        given = inspect.signature(sliding_window_inference).bind(*args, **more).arguments
        overlap, mode = given["overlap"], str(given.get("mode", "constant"))
        at_once = f"{given['sw_batch_size']} at once"
        asked.append((at_once, given["roi_size"], tuple(overlap) if isinstance(overlap, list) else overlap, mode))
        return sliding_window_inference(*args, **more)  # type: ignore[return-value]

    monkeypatch.setattr(script, "sliding_window_inference", spy)
    return asked


@pytest.mark.slow
def test_step_cost_prints_every_side_and_its_ratios(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--patch_size", "16", "16", "16", "--classes", "3", "--rounds", "1"])
    step_cost.main()
    lines = capsys.readouterr().out.splitlines()
    figures = {line[:24].strip(): [float(word) for word in line[24:].split()[:5]] for line in lines[2:6]}
    assert list(figures) == ["bare loop", "supervised", "mean teacher", "with prototypes"]
    assert figures["bare loop"][2] == 1.0 and figures["supervised"][4] == 1.0
    assert all(value > 0 for values in figures.values() for value in values)
    assert lines[6].startswith("share of 'with prototypes' that 'mean teacher' has not")


def test_layout_speed_prints_both_sides_and_their_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--patch_size", "16", "16", "16", "--rounds", "1"])
    layout_speed.main()
    first, last, ratio = capsys.readouterr().out.splitlines()[1:]
    assert (first[:14], last[:13]) == ("channels first", "channels last")
    slow, fast = (float(line.split()[2]) for line in (first, last))
    assert float(ratio.split()[3].rstrip(",")) == pytest.approx(fast / slow, abs=0.05 * fast / slow + 0.05)


@pytest.mark.slow
def test_metrics_speed_prints_all_libraries_and_equal_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--rounds", "1"])
    metrics_speed.main()
    lines = capsys.readouterr().out.splitlines()
    gaps = {line.split()[0]: float(line.split()[-1]) for line in lines[1:]}
    assert set(gaps) == {"ours", "medpy", "monai"}
    assert max(gaps.values()) < 1e-4


def test_data_speed_prints_a_line_per_side_and_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--sizes", "24", "--patch_size", "16", "16", "16", "--rounds", "1", "--cases", "0"]
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    monkeypatch.setattr(data_speed, "COARSE", (8, 8, 5))
    data_speed.main()
    lines = capsys.readouterr().out.splitlines()[2:]
    sides = [line[:29].split(maxsplit=1)[1] for line in lines]
    assert sides == ["ours", "monai", "monai, crop first", *2 * ["ours", "monai", "scipy"]]
    assert lines[0].split()[-1] == "1.0" and all(float(line.split()[-2]) > 0 for line in lines)


def test_data_speed_resamples_alike_on_every_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_speed, "COARSE", (8, 8, 5))
    monkeypatch.setattr(data_speed, "FINE", (15, 15, 9))
    for sides in data_speed.resampling_sides().values():
        ours, monai, scipy = (np.asarray(side()) for side in sides.values())
        np.testing.assert_allclose(ours, scipy, atol=1e-5)
        assert ours.std() > 0.1 and monai.std() == pytest.approx(ours.std(), rel=0.2)
        assert np.abs(np.subtract(monai.shape[1:], ours.shape)).max() <= 1  # it keeps the corner voxels


def test_data_speed_has_patches_of_one_size_from_every_side() -> None:
    for side in data_speed.make_sides(24, (16, 12, 8)).values():
        patch: dict[str, Tensor] = side()  # type: ignore[assignment]
        assert patch["image"].shape == (1, 16, 12, 8) and patch["label"].shape[-3:] == (16, 12, 8)


@pytest.mark.slow
def test_data_speed_starts_a_training_twice_the_second_time_from_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[dict[Path, int]] = []

    def run(who: str, command: list[str]) -> None:
        run_to_end(who, command)
        cache = Path(command[command.index("--cache_dir") + 1])
        kept.append({path: path.stat().st_ino for path in cache.rglob("*") if path.is_file()})

    monkeypatch.setattr(data_speed, "run_to_end", run)
    assert all(seconds > 0 for seconds in data_speed.start_seconds(cases=5))
    first, again = kept
    assert len(first) >= 5 and first.items() <= again.items()  # none was written anew


@pytest.mark.slow
def test_endurance_prints_an_early_and_a_late_part(
    demo_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method", "supervised", "--patch_size", "16", "16", "16", "--cache_dir", str(demo_cache)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests want the cores
    monkeypatch.setattr(sys, "argv", ["x", "--steps", "20", "--", *flags])
    endurance.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("steps 3 to 4: ") and lines[2].startswith("steps 19 to 20: ")
    assert lines[3].startswith("late to early: ")


@pytest.mark.slow
def test_scaling_prints_a_line_per_number_of_ranks(
    demo_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method", "supervised", "--patch_size", "16", "16", "16", "--cache_dir", str(demo_cache)]
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # other tests want the cores
    monkeypatch.setattr(sys, "argv", ["x", "--threads", "2", "--rounds", "1", "--steps", "10", "--", *flags])
    scaling.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [words[:3] for words in lines] == [["1", "2", "4"], ["2", "1", "4"]]
    assert lines[0][-1] == "1.00" and all(float(words[3]) > 0 for words in lines)


def test_inference_speed_compares_every_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = BallSource()
    small_trainer(source, tmp_path, max_iteration=1, orientation="ras").fit()
    volume = source.load("ball00", with_label=True)
    mirror = np.diag([-1.0, -1.0, 1.0, 1.0])
    mirror[:2, 3] = [size - 1 for size in volume.image.shape[1:3]]  # as DICOM stores its slices
    for name, array in (("image", volume.image[0].astype("float32")), ("label", volume.label)):
        nib.save(nib.Nifti1Image(array, volume.affine), tmp_path / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(array[::-1, ::-1], volume.affine @ mirror), tmp_path / f"{name}_lps.nii.gz")
    given = ["--checkpoint", "last.pt", "--window", "16", "16", "16", "--stride", "4", "8", "8", "--rounds", "1"]
    monkeypatch.chdir(tmp_path)
    asked = spied_windows(monkeypatch, inference_speed)
    tables = []
    for stored in ("", "_lps"):
        files = ["--image", f"image{stored}.nii.gz", "--label", f"label{stored}.nii.gz"]
        monkeypatch.setattr(sys, "argv", ["x", *given, *files])
        inference_speed.main()
        lines = capsys.readouterr().out.splitlines()[2:]
        tables.append({line[:16].strip(): [float(word) for word in line[16:].split()] for line in lines})
    window, ours = (16, 16, 16), (1 - 4.5 / 16, 1 - 2.5 / 16, 0.0)  # windows at 0 and 4, 0 and 2, 0
    assert set(asked) == {
        ("1 at once", window, 0.5, "constant"),
        ("1 at once", window, ours, "constant"),
        ("1 at once", window, ours, "gaussian"),
        ("4 at once", window, ours, "gaussian"),
        ("1 at once", window, (0.75, 0.5, 0.5), "constant"),  # the stride
    }
    figures, turned = tables
    assert [*figures] == ["ours", "ours plain", "monai", "monai spread", "monai weighted", "monai alike", "stride"]
    assert [row[2:] for row in turned.values()] == [row[2:] for row in figures.values()]  # Dice, seconds aside
    assert figures["ours"][1] == 1 and figures["monai"][3] == 100 and figures["ours"][3] > 80
    for own, same in (("ours", "monai weighted"), ("ours", "monai alike"), ("ours plain", "monai spread")):  # rounding
        assert figures[own][2] == pytest.approx(figures[same][2], abs=0.2)


def test_large_volume_prints_its_peak(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--size", "24", "20", "16", "--patch_size", "16", "16", "16", "--classes", "3"]
    monkeypatch.setattr(sys, "argv", ["x", *sizes])
    large_volume.main()
    lines = capsys.readouterr().out.splitlines()
    assert "(24, 20, 16), 3 classes" in lines[0] and lines[1].startswith("peak above")


@pytest.mark.parametrize("held_out", [False, True])
def test_window_weights_scores_cases_whose_label_no_training_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], held_out: bool
) -> None:
    checkpoint = trained_run(write_cohort(tmp_path / "balls", labeled=8), tmp_path / "run")
    given = ["--checkpoint", str(checkpoint), "--cases", "2", "--sigmas", "0.25", "100"] + ["--held_out"] * held_out
    monkeypatch.setattr(sys, "argv", ["x", *given, "--scores", str(tmp_path / "scores.csv")])
    asked = spied_windows(monkeypatch, window_weights)
    window_weights.main()
    assert {overlap for *_, overlap, _ in asked} == {0.5} and {mode for *_, mode in asked} == {"gaussian", "constant"}
    _, title, *rows = capsys.readouterr().out.splitlines()
    figures = {row[:18].strip(): float(row[18:].split()[0]) for row in rows}
    for row in rows:
        gap = figures[row[:18].strip()] - figures["monai constant"]
        assert float(row[18:].split()[1]) == pytest.approx(gap, abs=0.011)
    (kept,) = read_rows([tmp_path / "scores.csv"])
    assert kept.name == checkpoint.parent.name and [*kept.by_seed] == [0] and len(kept.cases()) == 2 - held_out
    assert 100 * kept.case_values("dice").mean() == pytest.approx(figures["sigma 0.25"], abs=0.006)
    assert list(figures) == ["sigma 0.25", "sigma 100", "monai gaussian", "monai constant"]
    assert title == f"{checkpoint}, {1 if held_out else 2} cases" and rows[-1].endswith("+0.00 +- 0.00")
    assert figures["sigma 100"] == pytest.approx(figures["monai constant"], abs=0.5)


def test_error_places_share_out_what_is_missing_of_the_dice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained_run(write_cohort(tmp_path / "balls", labeled=8), tmp_path / "run")
    again = tmp_path / "again.pt"
    again.write_bytes(checkpoint.read_bytes())
    monkeypatch.setattr(sys, "argv", ["x", "--cases", "2", "--checkpoint", str(checkpoint), str(again)])
    error_places.main()
    first, second, pair = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{checkpoint}, 2 cases: Dice ") and first.split(":")[1] == second.split(":")[1]
    dice, near, next_to, rest = (float(word.rstrip(",")) for word in first.split(":")[1].split() if "." in word)
    assert dice + near + next_to + rest == pytest.approx(100, abs=0.03)
    assert pair == f"{checkpoint} and {again}: 100.00"


def test_error_places_measure_from_the_true_surface() -> None:
    label = np.zeros((12, 12, 6), np.uint8)
    label[2:6, 2:6, 1:5] = 1  # 64 voxels
    found = label.copy()
    found[2, 2, 1] = 0  # at the surface
    found[7, 3, 3] = 1  # the second voxel outside
    found[10, 10, 4] = 2  # a class that is not there
    case = Volume("a", label[None].astype(np.float32), label, np.eye(4), (1.0, 1.0, 1.0))
    lost = error_places.points_lost(found, case)
    np.testing.assert_allclose(lost, [100 / 128 / 2, 100 / 128 / 2, 50])
    thick = dataclasses.replace(case, spacing=(1.0, 1.0, 4.0))  # two thin voxels are half a thick one
    np.testing.assert_allclose(error_places.points_lost(found, thick), [100 / 128, 0, 50])
    np.testing.assert_array_equal(error_places.points_lost(label, case), 0)
