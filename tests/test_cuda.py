"""What only a CUDA device shows: steps that never wait, equal resumes, fp16, NCCL, the results of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BallSource
from helpers_runs import assert_same_weights, batch_for, small_trainer, whole_and_resumed

from myutils import build
from myutils.distributed import concat_ranks, mean_over_ranks
from myutils.inference import predict_label_map
from myutils.methods.base import METHODS
from myutils.report import evaluate_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Every wait of the CPU for the device is an error inside ``torch.cuda.set_sync_debug_mode``."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    ("name", "amp"),
    [(name, "bf16") for name in METHODS.names() if not METHODS.get(name).on_host] + [("mean_teacher", "fp16")],
)
def test_a_step_never_waits_for_the_device(tmp_path: Path, name: str, amp: str) -> None:
    changes = {"use_contrastive_prototype": True, "memory_interval": 1, "amp": amp, "warmup_iteration": 0}
    changes["dfp_start_iter"] = 0  # its pools, built in the first step, are the one place where a step may wait
    trainer = small_trainer(BallSource(), tmp_path, CUDA, method=name, **changes)
    batch = batch_for(trainer.method).to(CUDA)
    trainer.train_step(trainer.method, batch, 0)  # kernels are chosen and moments made in the first step
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    trainer.train_step(trainer.method, batch, 1)


@pytest.mark.parametrize("amp", ["no", "bf16", "fp16"])
def test_resume_is_bit_identical_on_the_device(tmp_path: Path, amp: str) -> None:
    assert_same_weights(*whole_and_resumed(tmp_path, CUDA, amp=amp))


def test_losses_are_those_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    changes = {"method": "supervised", "max_iteration": 3}
    trainers = [small_trainer(BallSource(), tmp_path / device.type, device, **changes) for device in (CUDA, CPU)]
    batch = batch_for(trainers[0].method)
    losses = []
    for trainer in trainers:
        own = batch.to(trainer.device)
        losses.append([trainer.train_step(trainer.method, own, step).total().item() for step in range(3)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_a_run_trains_and_scores_on_the_device(tmp_path: Path) -> None:
    source = BallSource()
    trainer = small_trainer(source, tmp_path, CUDA, method="best", max_iteration=30, amp="auto", image_every=10)
    trainer.fit()
    results, _ = evaluate_run(tmp_path, source, ["ball03", "ball04"], CUDA)
    assert [result.case_id for result in results] == ["ball03", "ball04"]
    volume = source.load("ball04", with_label=False)
    maps = []
    for device in (CUDA, CPU):
        network = trainer.method.inference_network().to(device)
        config = trainer.state.config
        options, preprocess = build.build_inference(config, "no"), build.build_preprocess(config)
        maps.append(predict_label_map(network, volume, preprocess, options, device))
    assert (maps[0] == maps[1]).mean() > 0.999


def test_one_rank_over_nccl_equals_none(tmp_path: Path) -> None:
    alone = small_trainer(BallSource(), tmp_path / "alone", CUDA, max_iteration=3)
    alone.fit()
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        values = torch.arange(6.0, device=CUDA).reshape(2, 3)
        assert torch.equal(concat_ranks(values), values)
        assert torch.equal(mean_over_ranks(values), values)
        grouped = small_trainer(BallSource(), tmp_path / "group", CUDA, max_iteration=3)
        network = torch.nn.parallel.DistributedDataParallel(grouped.method, device_ids=[CUDA], broadcast_buffers=False)
        for step, batch in enumerate(grouped.loader(0)):
            grouped.train_step(network, batch.to(CUDA), step)
    finally:
        torch.distributed.destroy_process_group()
    ours, theirs = alone.method.state_dict(), grouped.method.state_dict()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-4, atol=1e-5, msg=key)
