"""Evaluation: scores on the case's own grid, CSV, summary with counts, table."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its usual name
import torch
from conftest import BallSource
from helpers_runs import PointwiseNetwork
from torch import Tensor

from dataloaders.base import Volume
from dataloaders.error_text import DeviceError
from dataloaders.nifti_folder import NiftiFolder
from dataloaders.preprocess import Preprocess
from myutils import evaluation
from myutils.evaluation import CaseResult, DamagedCasesError, evaluate_cases, score_case, summarise
from myutils.evaluation_folder import CSV_COLUMNS, refuse_other_results, write_cases_csv, write_summary_json
from myutils.inference import InferenceOptions
from myutils.metrics import CaseMetrics
from myutils.score_table import format_table
from networks.base import SegmentationOutput

CPU = torch.device("cpu")
OPTIONS = InferenceOptions((16, 16, 16))
NAMES = ("background", "ball", "core")
MISSED = CaseMetrics(0.0, 0.0, math.inf, math.inf)


def threshold_network(low: float, high: float) -> PointwiseNetwork:
    """Classes 0, 1, 2 below, between and above two thresholds of the normalised image; exact on clean ball images."""

    def segment(images: Tensor) -> SegmentationOutput:
        classes = (images > low).long() + (images > high).long()
        logits = 20.0 * torch.nn.functional.one_hot(classes[:, 0], 3).movedim(-1, 1).float()
        return SegmentationOutput(logits, images)

    return PointwiseNetwork(segment, num_classes=3)


class CleanSource(BallSource):
    """Images that are their labels, all of one patient."""

    def patient(self, case_id: str) -> str:
        return "somebody"

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        volume = super().load(case_id, with_label=True)
        return Volume(
            case_id, np.asarray(volume.label)[None].astype(np.float32), volume.label, volume.affine, volume.spacing
        )


def network_for(source: BallSource) -> PointwiseNetwork:
    """Thresholds between the normalised values of the three classes of the first case."""
    values = np.unique(Preprocess("mr")(source.load("ball00", with_label=True)).image)
    return threshold_network(float(values[:2].mean()), float(values[1:].mean()))


def result(case_id: str, first: CaseMetrics, second: CaseMetrics) -> CaseResult:
    return CaseResult(case_id, {1: first, 2: second}, {1: 1.0, 2: 2.0}, {1: 1.5, 2: 0.0}, case_id)


def two_results() -> list[CaseResult]:
    return [
        result("a", CaseMetrics(0.9, 0.8, 2.0, 1.0), CaseMetrics(0.5, 0.4, 4.0, 3.0)),
        result("b", CaseMetrics(0.7, 0.6, 4.0, 2.0), MISSED),
    ]


def test_exact_network_scores_one_and_saves_its_label_maps(tmp_path: Path) -> None:
    source = CleanSource()
    results = evaluate_cases(
        network_for(source), source, ["ball00"], Preprocess("mr"), OPTIONS, CPU, save_dir=tmp_path, progress=False
    )
    assert results[0].metrics == {1: CaseMetrics(1.0, 1.0, 0.0, 0.0), 2: CaseMetrics(1.0, 1.0, 0.0, 0.0)}
    volume = source.load("ball00", with_label=True)
    label = np.asarray(volume.label)
    assert results[0].truth_ml[2] == pytest.approx((label == 2).sum() * 2.0 / 1000)  # 1 x 2 x 1 mm voxels
    assert results[0].prediction_ml == results[0].truth_ml and results[0].patient == "somebody"
    saved = nib.load(tmp_path / "ball00.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj), label)
    np.testing.assert_array_equal(saved.affine, volume.affine)
    assert saved.get_data_dtype() == np.uint8 and saved.header.get_xyzt_units()[0] == "mm"
    assert int(saved.header["sform_code"]) == int(saved.header["qform_code"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ball00.nii.gz"]


def test_label_map_of_a_scan_that_states_no_place_states_none(tmp_path: Path) -> None:
    volume, (image, label) = BallSource().load("ball00", with_label=True), ("images", "labels")
    assert volume.label is not None
    for folder, voxels in ((image, volume.image[0]), (label, volume.label)):
        (tmp_path / folder).mkdir()
        scan = nib.Nifti1Image(voxels, None)
        nib.save(scan, tmp_path / folder / "unplaced.nii.gz")
        scan.set_sform(scan.header.get_base_affine(), code=1)  # where nibabel takes the other to lie
        nib.save(scan, tmp_path / folder / "placed.nii.gz")
    source = NiftiFolder(tmp_path, num_classes=3)
    network, ids = threshold_network(0.5, 1.5), ["placed", "unplaced"]
    evaluate_cases(network, source, ids, Preprocess("mr"), OPTIONS, CPU, save_dir=tmp_path / "out", progress=False)
    for name, codes in (("placed", 1), ("unplaced", 0)):
        files = (sitk.ReadImage(str(tmp_path / folder / f"{name}.nii.gz")) for folder in (image, "out"))
        places = [(file.GetOrigin(), file.GetDirection(), file.GetSpacing(), file.GetSize()) for file in files]
        assert places[0] == places[1]
        header: Any = nib.load(tmp_path / "out" / f"{name}.nii.gz").header
        assert int(header["qform_code"]) == int(header["sform_code"]) == codes


def test_distances_are_in_mm_of_the_original_grid_with_resampling() -> None:
    source = BallSource()
    preprocess = Preprocess("mr", spacing=(2.0, 2.0, 2.0))
    (scored,) = evaluate_cases(
        threshold_network(-9.0, 99.0), source, ["ball01"], preprocess, OPTIONS, CPU, progress=False
    )
    volume = source.load("ball01", with_label=True)
    everything = np.ones(volume.image.shape[1:], np.uint8)  # the network calls every voxel class 1
    assert scored == score_case(volume, everything, 3, "ball01")
    assert scored.metrics[2] == MISSED and scored.prediction_ml[1] == pytest.approx(everything.size * 2.0 / 1000)


def test_volumes_of_sheared_voxels_are_right_and_their_distances_named(caplog: pytest.LogCaptureFixture) -> None:
    label, tilt = np.zeros((4, 4, 4), np.uint8), math.radians(25)
    label[1:3, 1:3, 1:3] = 1
    image, spacing = label[None].astype(np.float32), (0.5, 0.5, 5.0)
    square, turned, sheared = (np.diag([*spacing, 1.0]) for _ in range(3))
    sheared[1:3, 2] = 5 * math.sin(tilt), 5 * math.cos(tilt)  # slices that follow a tilted gantry
    turned[1:3, 1:3] = [[0.5 * math.cos(tilt), -5 * math.sin(tilt)], [0.5 * math.sin(tilt), 5 * math.cos(tilt)]]
    for affine in (square, turned, np.eye(4)):  # the last says nothing about the voxels' size
        scored = score_case(Volume("straight", image, label, affine, spacing), label, 2, "one")
        assert scored.truth_ml[1] == pytest.approx(8 * 0.5 * 0.5 * 5 / 1000)
    assert not caplog.text
    for _ in range(2):
        scored = score_case(Volume("tilted", image, label, sheared, spacing), label, 2, "one")
    assert scored.truth_ml[1] == scored.prediction_ml[1] == pytest.approx(8 * abs(np.linalg.det(sheared)) / 1000)
    assert caplog.text.count("case tilted: its axes are 25 degrees off right angles") == 1


def test_training_mode_survives_and_bad_requests_are_named() -> None:
    source, network = CleanSource(), threshold_network(0.0, 1.0).train()
    evaluate_cases(network, source, ["ball00"], Preprocess("mr"), OPTIONS, CPU, progress=False)
    assert network.training
    with pytest.raises(ValueError, match="split is empty"):
        evaluate_cases(network, source, [], Preprocess("mr"), OPTIONS, CPU, progress=False)
    two_channels = BallSource(channels=2)
    with pytest.raises(ValueError, match="case ball00: image has shape"):
        evaluate_cases(network, two_channels, ["ball00"], Preprocess("mr"), OPTIONS, CPU, progress=False)
    with pytest.raises(ValueError, match="case ball00 has no label"):
        score_case(BallSource().load("ball00", with_label=False), np.zeros((20, 18, 16), np.uint8), 3, "ball00")


@pytest.mark.parametrize("error", [MemoryError("9.3 GiB"), RuntimeError("can't allocate 9.3 GiB")])
def test_a_case_too_large_for_the_memory_is_named_and_others_are_scored(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, predict = CleanSource(), evaluation.predict_label_map

    def predict_small(network: PointwiseNetwork, volume: Volume, *arguments: Any, **options: Any) -> np.ndarray:
        if volume.case_id == "ball01":
            raise error
        return predict(network, volume, *arguments, **options)

    monkeypatch.setattr(evaluation, "predict_label_map", predict_small)
    ids = ["ball00", "ball01", "ball02"]
    with pytest.raises(DamagedCasesError, match=r"1 of 3 cases cannot be scored: case ball01: .*9\.3 GiB") as caught:
        evaluate_cases(network_for(source), source, ids, Preprocess("mr"), OPTIONS, CPU, progress=False)
    assert [result.case_id for result in caught.value.results] == ["ball00", "ball02"]


def test_a_gpu_that_failed_is_no_damaged_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> np.ndarray:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(evaluation, "predict_label_map", fail)
    source = CleanSource()
    with pytest.raises(DeviceError, match="illegal memory access"):
        evaluate_cases(network_for(source), source, ["ball00"], Preprocess("mr"), OPTIONS, CPU, progress=False)


def test_csv_has_a_row_per_case_and_class_and_keeps_inf(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cases.csv"
    write_cases_csv(path, two_results(), NAMES)
    lines = path.read_text().splitlines()
    assert lines[0] == "case,class,dice,jaccard,hd95_mm,assd_mm,truth_ml,prediction_ml,class_name,patient"
    assert tuple(lines[0].split(",")) == CSV_COLUMNS
    assert lines[4] == "b,2,0,0,inf,inf,2,0,core,b"
    rows = list(csv.DictReader(lines))
    assert [(row["case"], row["class"]) for row in rows] == [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    assert float(rows[0]["dice"]) == 0.9 and math.isinf(float(rows[3]["hd95_mm"]))


def test_summary_has_values_by_hand() -> None:
    summary = summarise(two_results(), NAMES)
    assert summary["n_cases"] == 2 and summary["classes"]["2"]["name"] == "core"
    ball, core, mean = summary["classes"]["1"], summary["classes"]["2"], summary["mean"]
    assert ball["dice"] == {"mean": pytest.approx(0.8), "sd": pytest.approx(math.sqrt(0.02)), "n": 2, "n_missed": 0}
    assert core["dice"]["mean"] == pytest.approx(0.25) and core["dice"]["n_missed"] == 0
    assert core["hd95_mm"] == {"mean": 4.0, "sd": None, "n": 1, "n_missed": 1}
    assert mean["dice"]["mean"] == pytest.approx((0.7 + 0.35) / 2)
    assert mean["hd95_mm"]["mean"] == pytest.approx((3.0 + 4.0) / 2)  # case b: its finite class alone
    assert mean["hd95_mm"]["n"] == 2 and mean["hd95_mm"]["n_missed"] == 1


def test_a_class_that_no_case_shows_is_not_in_the_mean() -> None:
    """It would count as 100 % where nothing is predicted, and as 0 % for one wrong voxel."""
    results = [
        CaseResult(name, {1: CaseMetrics(0.5, 0.4, 3.0, 1.0), 2: second}, {1: 1.0, 2: 0.0}, {1: 1.0, 2: 0.0}, name)
        for name, second in (("a", CaseMetrics(1.0, 1.0, 0.0, 0.0)), ("b", MISSED))
    ]
    summary = summarise(results, NAMES)
    assert summary["absent"] == ["2"] and summary["classes"]["2"]["dice"]["mean"] == 0.5
    assert summary["mean"]["dice"]["mean"] == 0.5 and summary["mean"]["hd95_mm"]["mean"] == 3.0
    assert summary["mean"]["hd95_mm"]["n_missed"] == 0
    assert format_table(summary).splitlines()[-1] == "no case shows 2 core: not in the mean"
    one = [CaseResult("a", results[0].metrics, {1: 1.0, 2: 1.0}, {1: 1.0, 2: 0.0}, "a"), results[1]]
    assert summarise(one, NAMES)["absent"] == [] and summarise(one, NAMES)["mean"]["dice"]["mean"] == 0.5
    nothing = [CaseResult("a", {1: MISSED, 2: MISSED}, {1: 0.0, 2: 0.0}, {1: 1.0, 2: 0.0}, "a")]
    assert summarise(nothing, NAMES)["mean"]["dice"]["mean"] == 0.0  # all of them count, for there is no other


def test_summary_is_strict_json_even_if_everything_was_missed(tmp_path: Path) -> None:
    summary = summarise([result("a", MISSED, MISSED)], NAMES)
    assert summary["mean"]["assd_mm"] == {"mean": None, "sd": None, "n": 0, "n_missed": 2}
    write_summary_json(tmp_path / "summary.json", summary)
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == summary and "Infinity" not in text and "NaN" not in text
    with pytest.raises(ValueError, match="at least one case"):
        summarise([], NAMES)


def test_a_summary_of_before_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "summary.json", Path.write_text
    write_summary_json(path, {"n_cases": 1})

    def write_half(path: Path, text: str, encoding: str) -> int:
        write(path, text[:5], encoding)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space left"):
        write_summary_json(path, {"n_cases": 2})
    assert json.loads(path.read_text()) == {"n_cases": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ['{"n_ca', "[]", "\0"])
def test_a_summary_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=r"summary\.json cannot be read .*; delete it"):
        refuse_other_results(tmp_path, {"checkpoint": "run/last.pt"})


def test_table_is_aligned_and_complete() -> None:
    summary = summarise(two_results(), NAMES)
    lines = format_table(summary).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[1].split() == ["class", "n", "Dice", "%", "Jaccard", "%", "HD95", "mm", "ASSD", "mm", "missed"]
    ball = lines[3].split()
    assert ball[:3] == ["1", "ball", "2"] and ball[3:6] == ["80.00", "±", "14.14"]
    assert lines[4].split()[-1] == "1" and lines[-1].split()[0] == "mean"
    empty = format_table(summarise([result("a", MISSED, MISSED)], NAMES))
    assert " - " in empty and "nan" not in empty and "inf" not in empty


def test_table_shows_a_baseline_and_the_gain_in_dice() -> None:
    ours = summarise(two_results(), NAMES)
    worse = [result(r.case_id, CaseMetrics(0.6, 0.5, 5.0, 3.0), MISSED) for r in two_results()]
    table = format_table(ours, summarise(worse, NAMES), name="mean_teacher")
    lines = table.splitlines()
    assert "mean_teacher" in lines[0] and "supervised only" in lines[0]
    assert lines[1].split().count("HD95") == 2 and lines[1].endswith("Dice gain")
    assert lines[3].split()[-1] == "+20.00" and lines[4].split()[-1] == "+25.00"
    assert len({len(line) for line in lines[1:]}) == 1


def test_equal_reasons_are_told_once() -> None:
    reasons = {"a": "case a: damaged", "b": "case b: damaged", "c": "case c: empty"}
    assert str(DamagedCasesError(reasons, [])).endswith("scored: cases 'a', 'b': damaged; case c: empty")
