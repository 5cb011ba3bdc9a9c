"""The run log: one line per entry, entries beyond the checkpoint dropped, a full disk named."""

from __future__ import annotations

import errno
import io
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_runs import BrokenStream, random_batch, small_method
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm.contrib.logging import logging_redirect_tqdm

from myutils.methods.base import LossTerm, StepOutput
from myutils.progress import show
from myutils.run_log import RunLog, read_metrics, setup_logging, step_bar, step_scalars


def test_scalars_go_to_the_file_and_to_tensorboard(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.scalars(1, {"Loss/total": 0.12345678})
    log.scalars(2, {"Loss/total": 0.5, "Train/lr": 0.01})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "Loss/total": 0.123457}
    assert read_metrics(tmp_path, "Loss/total") == ([1, 2], [0.123457, 0.5])
    assert read_metrics(tmp_path, "Train/lr") == ([2], [0.01])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("Loss/total")] == [1, 2]


def test_one_process_at_a_time_writes_a_run(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    with pytest.raises(ValueError, match="another process trains in"):
        RunLog(tmp_path)
    log.close()
    RunLog(tmp_path).close()


def test_resumed_log_drops_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"st')
    log = RunLog(tmp_path, first_step=2)
    log.scalars(3, {"a": 9.0})
    log.close()
    assert read_metrics(tmp_path, "a") == ([1, 2, 3], [1, 2, 9.0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "metrics.jsonl", "tensorboard"]


def test_numbers_that_json_cannot_hold_are_null_and_left_out_of_curves(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.scalars(1, {"a": float("nan"), "b": float("inf")})
    log.scalars(2, {"a": 1.0})
    log.close()
    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"step": 1, "a": None, "b": None}
    assert read_metrics(tmp_path, "a") == ([2], [1.0])


def test_metrics_of_a_run_that_logged_nothing_are_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path, "a") == ([], [])


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, enabled=False)
    log.scalars(1, {"a": 1.0})
    log.pictures(1, random_batch(), StepOutput({}, {}))
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_names_the_folder_and_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path)

    def full(*args: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match=r"cannot write the log in .*No space left on device; free space there") as e:
            log.scalars(1, {"a": 1.0})
    assert str(tmp_path) in str(e.value)
    log.close()


def test_pictures_show_what_the_network_saw_and_was_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mix of two patches is shown as such, beside its own labels."""
    shown: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def keep(panels: list, *_: object) -> np.ndarray:
        shown.extend(panels)
        return np.zeros((3, 2, 2), np.float32)

    monkeypatch.setattr("myutils.run_log._panel", keep)
    method, batch, log = small_method("bcp", warmup_iteration=2), random_batch(), RunLog(tmp_path)
    for step in (0, 2):
        shown.clear()
        output = method(batch, step)
        log.pictures(step, batch, output)
        assert output.images_l is not None and output.labels_l is not None
        assert not torch.equal(output.images_l, batch.image_l)
        assert torch.equal(shown[0][0], output.images_l[0, 0]) and torch.equal(shown[1][1], output.labels_l[0])


def test_pictures_show_image_label_prediction_and_pseudo_label(tmp_path: Path) -> None:
    batch = random_batch(size=8)
    logits = torch.randn(2, 3, 8, 8, 8)
    output = StepOutput({}, {}, logits_l=logits, pseudo_labels=torch.randint(0, 3, (2, 8, 8, 8)))
    log = RunLog(tmp_path)
    log.pictures(5, batch, output)
    log.pictures(6, random_batch(unlabeled=0, size=8), StepOutput({}, {}, logits_l=logits))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    labeled = events.Images("labeled/image_label_prediction")
    assert [picture.step for picture in labeled] == [5, 6]
    assert (labeled[0].width, labeled[0].height) == (3 * 192, 192)
    panel = np.asarray(Image.open(io.BytesIO(labeled[0].encoded_image_string)).convert("RGB")).astype(int)
    coloured = [(np.ptp(tile, axis=2) > 0).mean() for tile in np.split(panel, 3, axis=1)]
    assert coloured[0] == 0 and min(coloured[1:]) > 0.3  # the image alone is grey
    assert [picture.step for picture in events.Images("unlabeled/weak_strong_pseudo")] == [5]


def test_step_scalars_hold_each_loss_raw_and_its_weight_beside() -> None:
    terms = {
        "supervised": LossTerm(torch.tensor(2.0), 1.0),
        "contrastive_loss": LossTerm(torch.tensor(3.0), 0.1),
        "intra_loss": LossTerm(torch.tensor(4.0), 0.5),
    }
    values = step_scalars(StepOutput(terms, {"gate_share": torch.tensor(0.25)}), lr=0.01)
    assert float(values["Loss/total"]) == pytest.approx(2.0 + 0.3 + 2.0)
    assert float(values["Loss/contrastive_loss"]) == 3.0 and values["Weight/contrastive_loss"] == 0.1
    assert float(values["Loss/total_prototype_loss"]) == pytest.approx(0.3 + 2.0)
    assert float(values["Train/gate_share"]) == 0.25 and values["Train/lr"] == 0.01


def test_only_the_main_rank_logs_below_warnings() -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        setup_logging(is_main=False)
        assert root.level == logging.WARNING
        setup_logging(is_main=True)
        assert root.level == logging.INFO
    finally:
        root.handlers[:] = before
        root.setLevel(level)


def test_a_bar_goes_on_where_nobody_can_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", BrokenStream(errno.EPIPE))
    with step_bar("mean_teacher", 0, 3, disable=False) as bar:
        for step in range(3):
            bar.update()
            bar.set_postfix({"loss": str(step)})
    assert bar.n == 3


@pytest.mark.parametrize("stream", [None, BrokenStream(errno.EPIPE)])
def test_results_that_cannot_be_shown_are_named_once(
    stream: BrokenStream | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    show("a table")
    show("a path")
    sys.stdout.close()
    why = "Broken pipe" if stream else "Bad file descriptor"
    assert caplog.messages == [f"standard output: {why}; results are in files alone"]


def test_log_lines_take_the_place_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    log = logging.Logger("test")
    log.addHandler(logging.StreamHandler(sys.stderr))
    with step_bar("mean_teacher", 0, 3, disable=False) as bar, logging_redirect_tqdm([log]):
        bar.refresh()
        log.warning("a case is damaged")
    cleared, _, after = shown.getvalue().partition("a case is damaged\n")
    assert cleared.endswith("\r") and "mean_teacher" in after  # the bar is taken away, and drawn again below
