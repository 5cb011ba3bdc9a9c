"""Checkpoints: everything survives the round trip, a failed write keeps the older file, wrong files are named."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BallSource
from helpers_runs import random_batch, small_config, small_trainer

from dataloaders.error_text import DeviceError
from dataloaders.splits import TrainingSplit
from myutils import checkpoint
from myutils.build import DataFacts
from myutils.checkpoint import RunState, load_for_inference, read_checkpoint, write_checkpoint

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def make_state(step: int = 3) -> RunState:
    source = BallSource()
    split = TrainingSplit(("ball00", "ball01"), ("ball02",), ())
    return RunState(small_config(source, flip_axes=(0, 2)), DataFacts.of(source), split, step=step, best_dice=0.25)


def test_checkpoint_survives_the_round_trip(tmp_path: Path) -> None:
    tensors = {"method": {"weight": torch.arange(3.0)}, "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}}}
    write_checkpoint(tmp_path / "last.pt", make_state(), tensors)
    state, found = read_checkpoint(tmp_path / "last.pt")
    assert state == make_state()
    assert state.config.flip_axes == (0, 2) and isinstance(state.config.output_dir, Path)
    assert torch.equal(found["method"]["weight"], torch.arange(3.0))
    assert found["optimizer"]["state"][0]["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_checkpoint_is_read_without_running_code_from_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last.pt", make_state(), {})
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert set(content) == {"format", "config", "facts", "split", "step", "best_dice", "validates"}


def half_written(content: Any, file: Any) -> None:
    file.write(b"half a checkpoint")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_failed_write_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    write_checkpoint(path, make_state(step=3), {})
    monkeypatch.setattr(checkpoint.torch, "save", half_written)
    advice = r"free space.*or copy .* elsewhere and pass that --output_dir; it has the checkpoint of before"
    with pytest.raises(OSError, match=rf"last\.pt.*No space left.*{advice}"):
        write_checkpoint(path, make_state(step=4), {})
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert read_checkpoint(path)[0].step == 3


def test_failed_first_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.torch, "save", half_written)
    with pytest.raises(OSError, match="free space") as caught:
        write_checkpoint(tmp_path / "last.pt", make_state(), {})
    assert "still at" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_failed_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(content: Any, file: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(DeviceError, match="illegal memory access was encountered; start again, on another GPU"):
        write_checkpoint(tmp_path / "last.pt", make_state(), {})
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys, torch
sys.path.insert(0, "tests")
from pathlib import Path
from test_checkpoint import make_state
from myutils.checkpoint import write_checkpoint
path = Path(sys.argv[1])
write_checkpoint(path, make_state(), {"method": torch.zeros(1000)})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # from here no file grows beyond 100 kB
try:
    write_checkpoint(path, make_state(step=4), {"method": torch.zeros(100_000)})
except OSError as error:
    print(error)
"""


@pytest.mark.slow
def test_write_that_the_system_cuts_short_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=120)
    assert f"cannot write {path}" in result.stdout and "free space" in result.stdout, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert read_checkpoint(path)[0].step == 3


def test_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.pt; pass the path of a last\.pt"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(tmp_path)  # a folder


@pytest.mark.parametrize("keep", [0, 10, 3000])
def test_damaged_checkpoint_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "last.pt"
    write_checkpoint(path, make_state(), {"method": torch.zeros(4000)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"last\.pt is damaged"):
        read_checkpoint(path)


def test_two_flipped_bytes_are_found(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    write_checkpoint(path, make_state(), {"method": torch.zeros(4000)})
    content = bytearray(path.read_bytes())
    middle = content.find(bytes(8000))  # within the zeros
    content[middle + 4000 : middle + 4002] = b"ab"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.pt is damaged"):
        read_checkpoint(path)


class Stranger:
    """A class that no checkpoint of ours holds."""


def test_pickled_object_is_refused_without_advice_to_trust_it(tmp_path: Path) -> None:
    torch.save({"model": Stranger()}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="no checkpoint of this project") as caught:
        read_checkpoint(tmp_path / "foreign.pt")
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_a_checkpoint_that_finds_no_memory_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise error("DefaultCPUAllocator: can't allocate memory")

    write_checkpoint(tmp_path / "last.pt", make_state(), {})
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(OSError, match=r"no memory left \(DefaultCPUAllocator: .* memory\); free some"):
        read_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {"format": 99}])
def test_foreign_file_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="no checkpoint of this project, or of another version"):
        read_checkpoint(tmp_path / "foreign.pt")


def test_incomplete_and_newer_content_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "whole.pt", make_state(), {})
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    changed = {
        "split": {key: value for key, value in whole.items() if key != "split"},
        "colour": whole | {"config": whole["config"] | {"colour": 1}},
        "digest": whole | {"split": whole["split"] | {"labeled": ["other"]}},
    }
    for word, content in changed.items():
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match=rf"odd\.pt does not hold a whole run.*{word}"):
            read_checkpoint(tmp_path / "odd.pt")


def test_network_for_inference_is_the_teacher_in_evaluation_mode(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, max_iteration=2)
    trainer.fit()
    bundle = load_for_inference(tmp_path / "last.pt", CPU)
    trained = trainer.method.inference_network().eval()
    images = random_batch().image_l
    assert not bundle.network.training and bundle.step == 2
    assert torch.equal(bundle.network(images).logits, trained(images).logits)
    assert (bundle.num_classes, bundle.in_channels, bundle.class_names) == (3, 1, ("background", "ball", "core"))
    assert bundle.flip_axes == trainer.state.config.flip_axes


def test_weights_of_another_version_are_refused_in_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last.pt", make_state(), {"method": {"other.weight": torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"last\.pt: the weights do not fit") as caught:
        load_for_inference(tmp_path / "last.pt", CPU)
    assert "\n" not in str(caught.value)
