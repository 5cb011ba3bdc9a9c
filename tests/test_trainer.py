"""The training loop: resuming, purity of a step, non-finite losses, interruption, logs, validation."""

from __future__ import annotations

import json
import signal
import weakref
from pathlib import Path

import pytest
import torch
from conftest import BallSource
from helpers_runs import (
    assert_same_weights,
    random_batch,
    resumed_run,
    small_trainer,
    spoil_consistency,
    whole_and_resumed,
)

from dataloaders.base import Volume
from myutils.distributed import RankInfo
from myutils.finite_watch import NonFiniteLossError
from myutils.trainer import Trainer, TrainingInterrupted

CPU = torch.device("cpu")


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainer.method.state_dict().items()}


@pytest.mark.parametrize(
    ("method", "optimizer", "amp"),
    [
        ("mean_teacher", "adamw", "no"),
        pytest.param("mean_teacher", "adamw", "bf16", marks=pytest.mark.slow),  # seconds a step where it is emulated
        pytest.param("best", "muon", "bf16", marks=pytest.mark.slow),
        ("supervised", "sgd", "no"),
    ],
)
def test_trainer_resumes_bit_identically(tmp_path: Path, method: str, optimizer: str, amp: str) -> None:
    whole, resumed = whole_and_resumed(
        tmp_path, method=method, optimizer=optimizer, amp=amp, muon_interval=4, batch_size=2
    )
    assert_same_weights(whole, resumed)
    states = zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True)
    for ours, theirs in states:
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), key


def test_a_step_s_output_is_gone_when_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, logits = Trainer.train_step, []

    def watched(trainer: Trainer, *given: object) -> object:
        assert all(last() is None for last in logits)
        output = step(trainer, *given)  # type: ignore[arg-type]
        logits.append(weakref.ref(output.logits_l))
        return output

    monkeypatch.setattr(Trainer, "train_step", watched)
    small_trainer(BallSource(), tmp_path, log_every=3).fit()
    assert len(logits) == 4


def test_sgd_trains_through_a_warm_up_that_leaves_parameters_without_gradient(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, method="cps", optimizer="sgd", warmup_iteration=2)
    assert trainer.fit().step == 4


def test_a_run_without_the_newer_settings_can_be_resumed(tmp_path: Path) -> None:
    first = small_trainer(BallSource(), tmp_path, method="best", max_iteration=4, save_every=2)
    first._stop_now = lambda done: done == 2  # type: ignore[method-assign]
    with pytest.raises(TrainingInterrupted):
        first.fit()
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    for name in ("paste_unlabeled", "perturbed_share", "feature_perturbation", "checkpoint_activations", "compile"):
        del content["config"][name]
    content["optimizer"]["param_groups"][0]["fused"] = None
    torch.save(content, tmp_path / "last.pt")
    resumed = resumed_run(tmp_path)
    assert resumed.optimizer.param_groups[0]["fused"]
    assert resumed.fit().step == 4


def test_trainer_gives_the_same_weights_for_any_number_of_workers(tmp_path: Path) -> None:
    alone = small_trainer(BallSource(), tmp_path / "a", num_workers=0)
    helped = small_trainer(BallSource(), tmp_path / "b", num_workers=2)
    alone.fit()
    helped.fit()
    assert_same_weights(alone, helped)


def test_trainer_depends_on_the_seed(tmp_path: Path) -> None:
    first = small_trainer(BallSource(), tmp_path / "a", seed=0)
    second = small_trainer(BallSource(), tmp_path / "b", seed=1)
    first.fit()
    second.fit()
    assert not torch.equal(
        first.method.student.branch.classifier.weight, second.method.student.branch.classifier.weight
    )


def test_trainer_never_reads_labels_of_unlabelled_cases(tmp_path: Path) -> None:
    source = BallSource()
    trainer = small_trainer(source, tmp_path, max_iteration=8)
    source.label_reads.clear()
    trainer.fit()
    assert set(source.label_reads) == set(trainer.state.split.labeled)
    assert len(trainer.state.split.unlabeled) > 2


def test_trainer_warms_up_on_labelled_patches_alone(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, warmup_iteration=2)
    shares = [len(batch.image_u) for batch in trainer.loader(0)]
    assert shares == [0, 0, 2, 2]
    assert trainer.fit().step == 4


def test_trainer_stops_at_a_non_finite_loss_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, save_every=1, max_iteration=5)
    spoil_consistency(trainer, step=2)
    with pytest.raises(
        NonFiniteLossError, match=r"step 2: loss term consistency not finite; cases: ball\d\d, .*last\.pt"
    ):
        trainer.fit()
    kept = resumed_run(tmp_path)
    assert kept.state.step == 2
    assert all(torch.isfinite(value).all() for value in kept.method.state_dict().values())


def test_trainer_names_step_term_and_cases_of_non_finite_features(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, use_contrastive_prototype=True)
    with torch.no_grad():
        next(trainer.method.student.parameters()).fill_(1e38)  # finite weights, features that overflow
    with pytest.raises(NonFiniteLossError, match=r"step 0: the prototype term's features .*class 0.*cases: l0, l1, u0"):
        trainer.train_step(trainer.method, random_batch(), 0)


def test_trainer_stops_at_a_non_finite_gradient_before_it_reaches_the_weights(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path)
    before = weights(trainer)
    trainer.method.student.branch.classifier.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLossError, match=r"step 0: the gradient not finite; cases: l0, l1, u0"):
        trainer.train_step(trainer.method, random_batch(), 0)
    after = weights(trainer)
    assert [key for key in before if "student" in key and not torch.equal(before[key], after[key])] == []


def test_trainer_writes_a_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path)

    def kill(*args: object) -> object:
        raise RuntimeError("killed")

    trainer.train_step = kill  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit()
    resumed = resumed_run(tmp_path)
    assert resumed.state.step == 0
    resumed.fit()
    whole = small_trainer(BallSource(), tmp_path / "whole")
    whole.fit()
    assert_same_weights(whole, resumed)


def test_trainer_reads_labels_of_labelled_and_validation_cases_alone(tmp_path: Path) -> None:
    source = BallSource()
    trainer = small_trainer(source, tmp_path, labelnum=4, val_num=1)
    trainer.read_labels()
    assert source.label_reads == [*trainer.state.split.labeled, *trainer.state.split.val]


def test_trainer_saves_on_ctrl_c(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, max_iteration=50)
    original = trainer.train_step

    def press(*args: object) -> object:
        if trainer.state.step == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    trainer.train_step = press  # type: ignore[method-assign]
    with pytest.raises(TrainingInterrupted):
        trainer.fit()
    assert resumed_run(tmp_path).state.step == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_trainer_names_a_class_that_resampling_removes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = BallSource()
    load = source.load

    def thin(case_id: str, *, with_label: bool = True) -> Volume:
        volume = load(case_id, with_label=with_label)
        if volume.label is not None:
            volume.label[:] = volume.label == 1
            volume.label[1, 1, 1] = 2  # a single voxel of the last class, between those of the coarse grid
        return volume

    source.load = thin  # type: ignore[method-assign]
    trainer = small_trainer(source, tmp_path, spacing=(4.0, 4.0, 4.0), patch_size=(8, 8, 8))
    trainer.read_labels()
    assert f"--spacing leaves no voxel of {source.class_names[2]} in any labelled case" in caplog.text


def test_trainer_logs_every_part_with_its_weight(tmp_path: Path) -> None:
    small_trainer(BallSource(), tmp_path, use_contrastive_prototype=True, image_every=2).fit()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4]
    expected = {"Loss/contrastive_loss", "Loss/intra_loss", "Loss/inter_loss", "Loss/total_prototype_loss"}
    expected |= {"Loss/supervised", "Loss/consistency", "Weight/consistency", "Train/lr", "Train/dice"}
    expected |= {"Memory/fill", "Train/confidence", "Train/gate_share"}
    assert expected <= set(entries[-1])
    assert list((tmp_path / "tensorboard").glob("events*"))
    parts = sum(entries[-1][f"Loss/{n}"] * entries[-1][f"Weight/{n}"] for n in ("contrastive_loss", "intra_loss"))
    parts += entries[-1]["Loss/inter_loss"] * entries[-1]["Weight/inter_loss"]
    assert entries[-1]["Loss/total_prototype_loss"] == pytest.approx(parts, abs=1e-4)


def test_trainer_drops_log_entries_beyond_the_checkpoint(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, save_every=2, max_iteration=4)
    trainer.fit()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "Loss/total": 1.0}\n{"step": 10, "Lo')
    resumed_run(tmp_path).fit()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4]


def test_trainer_trains_selectors_and_fills_the_memory(tmp_path: Path) -> None:
    trainer = small_trainer(
        BallSource(), tmp_path, use_learned_selector=True, use_contrastive_prototype=True, confidence_threshold=0.0
    )
    before = weights(trainer)
    trainer.fit()
    after = weights(trainer)
    moved = {key for key in before if "selector" in key and not torch.equal(before[key], after[key])}
    assert any("feature" in key for key in moved) and any("memory" in key for key in moved)
    assert trainer.method.prototypes is not None and trainer.method.prototypes.memory_fill() > 0


@pytest.mark.slow  # seconds a step where bf16 is emulated
def test_trainer_bf16_step_is_finite(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, amp="bf16")
    output = trainer.train_step(trainer.method, random_batch(), 0)
    assert torch.isfinite(output.total()) and output.total().dtype == torch.float32


def test_trainer_refuses_fp16_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--amp fp16: needs a CUDA device"):
        small_trainer(BallSource(), tmp_path, amp="fp16")


class NanSource(BallSource):
    """One case holds NaN voxels."""

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        volume = super().load(case_id, with_label=with_label)
        volume.image[0, 0, 0, 0] = float("nan")
        return volume


def test_trainer_names_a_case_with_nan_voxels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ball\d\d"):
        small_trainer(NanSource(), tmp_path).fit()


def test_trainer_refuses_a_batch_that_its_ranks_cannot_share_before_it_writes(tmp_path: Path) -> None:
    state = small_trainer(BallSource(), tmp_path).state
    with pytest.raises(ValueError, match="--labeled_bs 2 and 2 unlabelled patches cannot be shared by 3 processes"):
        Trainer(state, BallSource(), tmp_path, RankInfo(0, 3, 0), CPU)
    assert not list(tmp_path.iterdir())


def test_trainer_refuses_a_mean_teacher_without_unlabelled_cases(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no unlabelled case is left for mean_teacher; pass a lower --labelnum"):
        small_trainer(BallSource(cases=4, labeled=4), tmp_path, labelnum=3)  # the fourth is held out
