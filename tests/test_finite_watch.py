"""Non-finite steps: named exactly, also when the look comes later, and nothing of them is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import BallSource
from helpers_runs import resumed_run, small_trainer, spoil_consistency

from myutils.finite_watch import FiniteWatch, NonFiniteLossError
from myutils.methods.step_output import StepOutput

NO_TERM = {"use_contrastive_prototype": False}  # on the CPU it looks at its features in every step


def watch(*, eager: bool) -> FiniteWatch:
    return FiniteWatch(eager=eager, advice=lambda: "Do this.")


def values(first: float, second: float) -> dict[str, torch.Tensor]:
    return {"loss term a": torch.tensor(first), "loss term b": torch.tensor(second)}


def test_eager_watch_raises_at_the_record() -> None:
    found = watch(eager=True)
    found.record(3, ("x",), values(1.0, 2.0))
    message = r"^step 4: loss term b not finite; cases: x, y\. Do this\.$"
    with pytest.raises(NonFiniteLossError, match=message):
        found.record(4, ("x", "y"), values(1.0, float("inf")))


def test_deferred_watch_names_the_first_bad_step_of_many() -> None:
    found = watch(eager=False)
    for step in range(10):
        found.record(step, (f"case{step}",), values(float("nan") if step >= 6 else 1.0, 2.0))
    with pytest.raises(NonFiniteLossError, match="step 6: loss term a not finite; cases: case6"):
        found.check()
    found.check()  # what was looked at is forgotten


def test_deferred_watch_takes_terms_that_come_and_go() -> None:
    found = watch(eager=False)
    found.record(0, ("x",), {"loss term a": torch.tensor(1.0)})
    found.record(1, ("x",), values(1.0, float("-inf")))
    with pytest.raises(NonFiniteLossError, match="step 1: loss term b"):
        found.check()


def test_a_loss_scale_that_vanished_stops_the_training(tmp_path: Path) -> None:
    """Gradients in fp16 that overflow at every scale: no step would move the weights, and nobody would notice."""
    trainer = small_trainer(BallSource(), tmp_path, log_every=2)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-19)
    backward = trainer.backward

    def overflow(output: StepOutput) -> None:
        backward(output)
        next(iter(trainer.method.student.parameters())).grad.fill_(float("inf"))  # type: ignore[union-attr]

    trainer.backward = overflow  # type: ignore[method-assign]
    with pytest.raises(
        NonFiniteLossError, match=r"step 2: the gradient not finite in fp16 at any scale, 4\.8e-07; cases"
    ):
        trainer.fit()


def test_trainer_with_a_deferred_look_saves_nothing_of_a_bad_step(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, save_every=2, log_every=4, max_iteration=8, **NO_TERM)
    trainer.watch.eager = False
    spoil_consistency(trainer, step=2)
    with pytest.raises(NonFiniteLossError, match="step 2: loss term consistency"):
        trainer.fit()
    kept = resumed_run(tmp_path)
    assert kept.state.step == 2
    assert all(torch.isfinite(value).all() for value in kept.method.state_dict().values())
