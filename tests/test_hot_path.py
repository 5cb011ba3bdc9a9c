"""Nothing in a step reads a tensor on the host, which a GPU would wait for; test_cuda.py shows it on one."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from conftest import BallSource
from helpers_runs import batch_for, small_trainer
from torch import Tensor

from myutils.methods.base import METHODS

META = torch.device("meta")  # tensors without values: who reads one fails


@pytest.mark.parametrize("name", [name for name in METHODS.names() if not METHODS.get(name).on_host])
def test_a_step_reads_no_tensor_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changes = {"use_contrastive_prototype": True, "memory_interval": 1, "warmup_iteration": 0, "dfp_start_iter": 0}
    trainer = small_trainer(BallSource(), tmp_path, method=name, **changes)
    batch = batch_for(trainer.method)
    trainer.train_step(trainer.method, batch, 0)  # the pools of cov_dfp are built in the first step, which may read
    trainer.method.to(META)
    trainer.device, trainer.watch.eager = META, False  # as on a GPU
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # there is none without values
    output = trainer.train_step(trainer.method, batch.to(META), 1)
    assert output.total().device == META
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer.watch.check()  # which looks, and is for the steps that log


@pytest.mark.parametrize("read", [Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, bool, Tensor.nonzero])
def test_reading_a_tensor_without_values_fails(read: object) -> None:
    assert callable(read)
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        read(torch.ones(1, device=META))
