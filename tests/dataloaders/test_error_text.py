"""What an error says: a check's own text, and the place of what no check foresaw."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataloaders import error_text
from dataloaders.error_text import DeviceError, message_of, pass_on_device_error, reason_of

HERE = re.escape(str(Path(__file__)))


@pytest.fixture(autouse=True)
def own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file stands for a new one of the project."""
    monkeypatch.setattr(error_text, "_OWN", (str(Path(__file__)),))


def check() -> None:
    raise ValueError(
        "patch 7 is too small\n"
        "pass 8"
    )  # fmt: skip


def misfit() -> None:
    np.zeros(3) + np.zeros(4)


def misfit_in_a_library() -> None:
    np.stack([np.zeros(3), np.zeros(4)])


def caught(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as info:
        call()
    return info.value


def line_of(call: Callable[[], None]) -> int:
    return call.__code__.co_firstlineno + 1


def test_the_text_of_a_check_stays_as_it_is() -> None:
    assert message_of(caught(check)) == "patch 7 is too small\npass 8"
    assert reason_of(caught(check)) == "patch 7 is too small pass 8"


@pytest.mark.parametrize("call", [misfit, misfit_in_a_library])
def test_what_no_check_foresaw_is_placed_in_the_projects_own_code(call: Callable[[], None]) -> None:
    text = message_of(caught(call))
    assert re.search(rf"\(ValueError at {HERE}, line {line_of(call)}\)$", text), text
    assert text.startswith(("operands could not be broadcast", "all input arrays must have the same shape"))


def test_files_and_memory_are_not_placed() -> None:
    assert message_of(caught(Path("/no/such/file").read_text)) == "[Errno 2] No such file or directory: '/no/such/file'"
    assert message_of(MemoryError()) == "MemoryError"


class Cases:
    """A data set of one case, in which ``call`` goes wrong."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        self.call()


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
@pytest.mark.parametrize("call", [misfit, misfit_in_a_library])
def test_an_error_of_a_worker_keeps_its_place(call: Callable[[], None]) -> None:
    error = caught(lambda: next(iter(DataLoader(Cases(call), num_workers=1))))
    text = message_of(error)
    assert re.search(rf"^ValueError: .* \(ValueError at {HERE}, line {line_of(call)}\)$", text), text


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_a_check_in_a_worker_is_not_placed() -> None:
    def refuse() -> None:
        raise ValueError("case 7 has no voxels; export it again")

    text = message_of(caught(lambda: next(iter(DataLoader(Cases(refuse), num_workers=1)))))
    assert text == "ValueError: case 7 has no voxels; export it again"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory\nCompile with ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("the scan is damaged"),
        ValueError("CUDA error: of a user's own"),
    ],
)
def test_a_full_gpu_has_not_failed(error: Exception) -> None:
    pass_on_device_error(error)
    with pytest.raises(DeviceError, match=r"^CUDA error: an illegal memory access was encountered; start again"):
        pass_on_device_error(RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel ..."))
