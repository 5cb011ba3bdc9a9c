"""Devices, ranks and precision on a machine without CUDA."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from dataloaders.say_once import warn_once
from myutils import distributed
from myutils.distributed import (
    RankInfo,
    any_rank,
    autocast,
    broadcast_object,
    mean_over_ranks,
    peak_memory_mb,
    resolve_amp,
    select_device,
    start_process_group,
    stop_process_group,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """So many cards; returns those that were made the current one."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    return current


@pytest.mark.usefixtures("no_cuda")
def test_select_device_says_that_it_takes_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert select_device() == CPU
    assert len(caplog.messages) == 1 and "CPU" in caplog.messages[0]


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("gpu", [0, 3, -1])
def test_select_device_refuses_a_gpu_that_is_not_there(gpu: int) -> None:
    with pytest.raises(ValueError, match=rf"--gpu {gpu}: this machine has 0 CUDA devices; leave the flag out"):
        select_device(gpu)


def test_select_device_takes_the_asked_or_the_ranks_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    current = pretend_cuda(monkeypatch, 2)
    assert select_device() == torch.device("cuda", 0)
    assert select_device(1) == torch.device("cuda", 1)
    assert select_device(None, local_rank=1) == torch.device("cuda", 1)
    assert select_device(None, local_rank=3) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="--gpu 2: this machine has 2 CUDA devices"):
        select_device(2)
    assert current == [0, 1, 1, 1]


@pytest.mark.usefixtures("no_cuda")
def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    info, device = start_process_group()
    assert info == RankInfo(0, 1, 0) and info.is_main and device == CPU
    assert not torch.distributed.is_initialized()
    stop_process_group()


def test_collectives_of_one_process_change_nothing() -> None:
    values = torch.tensor([1.0, 2.0])
    assert mean_over_ranks(values) is values
    assert broadcast_object("run") == "run"
    assert any_rank(True, CPU) and not any_rank(False, CPU)
    distributed.barrier()
    assert not RankInfo(1, 2, 1).is_main


@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_resolve_amp_keeps_what_was_asked_for(amp: str) -> None:
    assert resolve_amp(amp, CPU) == amp and resolve_amp(amp, CUDA) == amp


def test_resolve_amp_takes_fp16_on_cuda_only() -> None:
    assert resolve_amp("fp16", CUDA) == "fp16"
    with pytest.raises(ValueError, match="--amp fp16: needs a CUDA device; on the CPU use --amp bf16 or --amp no"):
        resolve_amp("fp16", CPU)


@pytest.mark.parametrize("fast", [True, False])
def test_emulated_bf16_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fast: bool
) -> None:
    monkeypatch.setattr(distributed, "_cpu_has_bf16", lambda: fast)
    warn_once.cache_clear()
    for amp, device in (("no", CPU), ("auto", CPU), ("bf16", CUDA), ("bf16", CPU), ("bf16", CPU)):
        resolve_amp(amp, device)
    assert ["no bf16 instructions" in record.message for record in caplog.records] == [True] * (not fast)


@pytest.mark.parametrize(("fast", "expected"), [(True, "bf16"), (False, "no")])
def test_resolve_amp_auto_asks_the_device(monkeypatch: pytest.MonkeyPatch, fast: bool, expected: str) -> None:
    monkeypatch.setattr(distributed, "_cpu_has_bf16", lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast and not including_emulation)
    assert resolve_amp("auto", CPU) == expected and resolve_amp("auto", CUDA) == expected


def test_autocast_computes_in_the_stated_precision() -> None:
    left, right = torch.randn(4, 4), torch.randn(4, 4)
    with autocast("bf16", CPU):
        assert (left @ right).dtype == torch.bfloat16
    with autocast("no", CPU):
        assert (left @ right).dtype == torch.float32
    assert isinstance(autocast("no", CPU), nullcontext)
    assert autocast("fp16", CPU).fast_dtype == torch.float16


def test_start_process_group_refuses_one_gpu_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--gpu 0: with torchrun each process takes the GPU of its own rank"):
        start_process_group(gpu=0)


def test_processes_that_share_a_gpu_are_told_how_many_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device_ids: list[int]) -> None:
        assert device_ids == [1]
        raise torch.distributed.DistBackendError("NCCL error in: x.cpp:1\nDuplicate GPU detected : rank 1 and rank 0")

    monkeypatch.setattr(distributed.dist, "barrier", fail)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"(?s)NCCL: .*Duplicate GPU detected.*at most 1 here \(--nproc_per_node 1\)"):
        distributed._require_own_gpu(torch.device("cuda", 1))


def test_a_rank_that_fails_alone_does_not_wait_for_the_others_over_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[bool] = []
    monkeypatch.setattr(distributed, "in_group", lambda: True)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: left.append(True))
    for backend, expected in (("nccl", []), ("gloo", [True])):
        monkeypatch.setattr(distributed.dist, "get_backend", lambda backend=backend: backend)
        distributed.stop_process_group(failed=True)
        assert left == expected


def test_peak_memory_where_the_system_does_not_state_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: "Name: python\nVmRSS: 100 kB\n")  # as in a sandbox
    assert peak_memory_mb(torch.device("cpu")) > 10


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory_mb(torch.device("cpu"))
    held = torch.ones(64 << 20)  # 256 MB of float32
    after = peak_memory_mb(torch.device("cpu"))
    assert before > 10
    assert after >= before
    assert after > held.numel() * 4 / 2**20
