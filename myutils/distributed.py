"""Devices and ranks: the only place that names a device or talks to the process group's set-up."""

from __future__ import annotations

import gc
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dataloaders.say_once import warn_once
from myutils.host_memory import keep_freed_blocks

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A rank may wait for another that segments a large volume; the default of 10 minutes would end such a run.
COLLECTIVE_TIMEOUT = timedelta(hours=4)


@dataclass(frozen=True)
class RankInfo:
    """This process among all: ``rank`` in 0..world_size - 1, ``local_rank`` on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the terminal."""
        return self.rank == 0


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far in MB: allocated on a CUDA device, else resident in this process; NaN where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    stated = status.read_text().partition("VmHWM:")[2].split() if status.exists() else []
    if stated:  # ru_maxrss starts at what the parent process held
        return int(stated[0]) / 1024
    if sys.platform == "win32":
        return float("nan")
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def select_device(gpu: int | None = None, local_rank: int | None = None) -> torch.device:
    """The CUDA device ``gpu`` (or that of the local rank), else the CPU with one log line that says so.

    On the CPU freed memory stays with the process from then on (``keep_freed_blocks``).

    Raises:
        ValueError: If a GPU number was asked for that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is not None and not 0 <= gpu < count:
        raise ValueError(f"--gpu {gpu}: this machine has {count} CUDA devices; leave the flag out to use the CPU")
    if count == 0:
        keep_freed_blocks()
        logger.info("device: CPU (%d threads); no CUDA device found", torch.get_num_threads())
        return torch.device("cpu")
    index = gpu if gpu is not None else (local_rank or 0) % count
    torch.cuda.set_device(index)  # what torch asks about "the" device, such as its types, is asked about this one
    logger.info("device: CUDA %d, %s", index, torch.cuda.get_device_name(index))
    return torch.device("cuda", index)


def start_process_group(gpu: int | None = None) -> tuple[RankInfo, torch.device]:
    """Join the process group that ``torchrun`` announces in the environment, or stay alone.

    Returns:
        This process's rank and its device; NCCL on CUDA, gloo on the CPU.

    Raises:
        ValueError: If one GPU is named for several processes, or shared by them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return RankInfo(), select_device(gpu)
    if gpu is not None:
        raise ValueError(
            f"--gpu {gpu}: with torchrun each process takes the GPU of its own rank; leave the flag out and choose "
            "devices with CUDA_VISIBLE_DEVICES"
        )
    if "RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but RANK is not set; start with torchrun")
    info = RankInfo(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0")))
    device = select_device(gpu, info.local_rank)
    join_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        _require_own_gpu(device)
    return info, device


def _require_own_gpu(device: torch.device) -> None:
    """Raise a ValueError where the first message over NCCL fails, as it does where two processes share a GPU."""
    try:
        dist.barrier(device_ids=[device.index])  # older torch guesses another
    except dist.DistBackendError as error:
        reason, count = f"the processes cannot talk over NCCL: {str(error).strip()}", torch.cuda.device_count()
        if "Duplicate GPU" in reason:
            reason += f"; each needs a GPU of its own: start at most {count} here (--nproc_per_node {count})"
        raise ValueError(reason) from error


def join_group(backend: str, **place: Any) -> None:
    """Join a process group, so that ``stop_process_group`` ends its threads.

    DDP imports ``torch._dynamo`` when it is first made. Imported while there is a group, that keeps the group for good,
    and gloo's threads, still running as the process ends, abort it now and then after all work is done.

    Args:
        backend: "nccl" or "gloo".
        place: Rank, world size and meeting point where the environment does not name them.
    """
    importlib.import_module("torch._dynamo")
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, **place)


def in_group() -> bool:
    """Whether this process is one of several ranks that can talk to each other."""
    return dist.is_available() and dist.is_initialized()


def stop_process_group(*, failed: bool = False) -> None:
    """Leave the process group, if one was joined.

    A rank that ``failed`` alone does not take leave over NCCL, which may wait for ranks that wait for this one: they
    end when ``torchrun`` sees it gone.
    """
    if in_group() and not (failed and dist.get_backend() == "nccl"):
        gc.collect()  # DDP modules lie in reference cycles, and each holds the group
        dist.destroy_process_group()


def data_parallel(module: nn.Module, device: torch.device, *, find_unused_parameters: bool) -> nn.Module:
    """The module behind DDP, which takes the mean of the ranks' gradients.

    Args:
        module: On ``device``, with the same weights on every rank.
        device: This rank's.
        find_unused_parameters: Whether a step may leave parameters without a gradient.
    """
    # Buffers need no broadcast: the memory is gathered before it is written, the teacher averages equal weights.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the older name
    settings: dict[str, Any] = {buffers: False, "find_unused_parameters": find_unused_parameters}
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None, **settings)


def broadcast_object(value: Any) -> Any:
    """Rank 0's picklable ``value`` on every rank; the value itself where there is one process."""
    if not in_group():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def is_main_rank() -> bool:
    """Whether this process is rank 0, or alone."""
    return not in_group() or dist.get_rank() == 0


def own_share(items: Sequence[T]) -> list[T]:
    """The items that this rank works on: every N-th of N ranks, all of them where there is one process."""
    if not in_group():
        return list(items)
    return list(items[dist.get_rank() :: dist.get_world_size()])


def join_shares(share: Sequence[T]) -> list[T]:
    """What the ranks made of their ``own_share``, one picklable object per item, in the order of the items.

    Every rank must call it; each gets all.
    """
    if not in_group():
        return list(share)
    shares: list[Sequence[T]] = [()] * dist.get_world_size()
    dist.all_gather_object(shares, list(share))
    longest = max(map(len, shares))
    return [part[index] for index in range(longest) for part in shares if index < len(part)]


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all ranks; unchanged where there is one process."""
    if not in_group():
        return values
    return _added_up(values) / dist.get_world_size()


def _added_up(values: torch.Tensor) -> torch.Tensor:
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor; its gradient is the sum of every rank's gradient."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return _added_up(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _added_up(gradient)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks, on the graph of each rank's part; unchanged where there is one process.

    Every rank must call it, in the same order as the others. Each rank's loss is then that of all, and the mean of the
    ranks' gradients, which DDP takes, is the gradient of that one loss.
    """
    return torch.as_tensor(_SumOverRanks.apply(values)) if in_group() else values


def concat_ranks(values: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The tensors of all ranks along ``dim``, rank 0's first; unchanged where there is one process.

    Every rank must call it with a tensor of the same shape and type.
    """
    if not in_group():
        return values
    values = values.contiguous()
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    return torch.cat(gathered, dim=dim)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true on at least one rank; every rank must call it."""
    if not in_group():
        return flag
    found = torch.tensor([float(flag)], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def barrier() -> None:
    """Wait for all ranks."""
    if in_group():
        dist.barrier()


def resolve_amp(amp: str, device: torch.device) -> str:
    """Turn "auto" into "bf16" or "no": bf16 where the device has instructions for it.

    Warns once of bf16 on a CPU without them.

    Raises:
        ValueError: If fp16 is asked for on the CPU.
    """
    on_cuda = device.type == "cuda"
    if amp == "fp16" and not on_cuda:
        raise ValueError("--amp fp16: needs a CUDA device; on the CPU use --amp bf16 or --amp no")
    if amp == "bf16" and not on_cuda and not _cpu_has_bf16():
        warn_once(
            logger,
            "--amp bf16: this CPU has no bf16 instructions and may take 70 times as long as in float32; pass --amp "
            "auto, which takes float32 here",
        )
    if amp != "auto":
        return amp
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else _cpu_has_bf16()
    return "bf16" if fast else "no"


def _cpu_has_bf16() -> bool:
    # Private names in torch 2.x; absent ones mean "unknown", for which float32 is the safe answer.
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(check() for check in checks if check is not None)


def autocast(amp: str, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast context of a resolved ``--amp`` value; no context for "no"."""
    if amp == "no":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if amp == "bf16" else torch.float16)
