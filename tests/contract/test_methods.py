"""Every registered method keeps the contract, with and without the prototype term."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from conftest import BallSource
from helpers_runs import batch_for, random_batch, small_config

from myutils.build import DataFacts, build_method
from myutils.finite_watch import FiniteWatch
from myutils.methods.base import METHODS, LossTerm, Method, StepOutput
from myutils.prototype_forms import LOSS_FORMS

CASES = [(name, prototypes) for name in METHODS.names() for prototypes in (False, True)]


def make(name: str, prototypes: bool, **changes: object) -> Method:
    torch.manual_seed(0)
    source = BallSource()
    config = small_config(
        source, method=name, use_contrastive_prototype=prototypes, use_learned_selector=True, **changes
    )
    return build_method(config, DataFacts.of(source))


def step(method: Method, number: int = 3) -> StepOutput:
    method.train()
    return method(batch_for(method), number)


@pytest.mark.parametrize(("name", "prototypes"), CASES)
def test_method_sends_every_weighted_term_into_the_student_only(name: str, prototypes: bool) -> None:
    method = make(name, prototypes, confidence_threshold=0.0)
    for number in range(3):  # fills memories and pools
        step(method, number)
    output = step(method, 3)
    for term_name, term in output.terms.items():
        if term_name == "dfp_selector":  # trains a network of its own on features without gradient
            continue
        method.zero_grad(set_to_none=True)
        term.value.backward(retain_graph=True)
        reached = [p for p in method.student.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert reached, f"{term_name} does not move the student"
    frozen = [key for key, p in method.named_parameters() if not p.requires_grad and p.grad is not None]
    assert frozen == []


@pytest.mark.parametrize(("name", "prototypes"), CASES)
def test_method_optimizes_everything_trainable_once_and_selectors_slowly(name: str, prototypes: bool) -> None:
    method = make(name, prototypes)
    groups = method.parameter_groups(0.1)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in method.parameters() if parameter.requires_grad}
    assert len(groups) == 1 + prototypes + (name == "cov_dfp")
    assert [group["lr"] for group in groups if group["lr"] != 0.1] == [pytest.approx(0.01)] * prototypes


@pytest.mark.parametrize(("name", "prototypes"), CASES)
def test_method_uses_every_trainable_parameter_in_every_step(name: str, prototypes: bool) -> None:
    method = make(name, prototypes, confidence_threshold=0.9999)  # nothing passes the gate: heads must stay attached
    for number in range(2):
        method.zero_grad(set_to_none=True)
        step(method, number).total().backward()
        missing = [key for key, p in method.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []


@pytest.mark.parametrize("form", LOSS_FORMS)
def test_every_loss_form_uses_every_selector(form: str) -> None:
    """A parameter without a gradient stops training on several ranks at the second step."""
    method = make("mean_teacher", True, prototype_loss=form)
    step(method, 1).total().backward()
    assert [key for key, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(("name", "prototypes"), CASES)
def test_method_state_round_trip_gives_the_same_loss(name: str, prototypes: bool) -> None:
    first, second = make(name, prototypes), make(name, prototypes)
    step(first, 0)
    first.after_step(0)
    second.load_state_dict(first.state_dict())
    losses = []
    for method in (first, second):
        torch.manual_seed(7)
        losses.append(step(method, 1).total().item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", METHODS.names())
def test_method_takes_a_warm_up_step(name: str) -> None:
    method = make(name, True)
    method.train()
    output = method(random_batch(labeled=4, unlabeled=0), 0)
    output.total().backward()
    method.after_step(0)
    assert "consistency" not in output.terms
    assert torch.isfinite(output.total())
    idle = [key for key, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert all(key.startswith("selector.") for key in idle), idle  # cov_dfp's, which has no pools yet


@pytest.mark.parametrize("name", METHODS.names())
def test_method_runs_multi_channel(name: str) -> None:
    source = BallSource(channels=2)
    config = small_config(source, method=name)
    method = build_method(config, DataFacts.of(source))
    output = method(batch_for(method, channels=2), 0)
    assert torch.isfinite(output.total())


@pytest.mark.parametrize("name", METHODS.names())
def test_method_inference_network_needs_no_gradient_graph_of_the_teacher(name: str) -> None:
    method = make(name, False)
    assert method.inference_network()(torch.randn(1, 1, 16, 16, 16)).logits.shape == (1, 3, 16, 16, 16)


HOST_STEPS = {"bcp": "connected components of pseudo-labels, as published", "dtc": "distance transforms, as published"}


@pytest.mark.parametrize("name", [name for name in METHODS.names() if name not in HOST_STEPS])
def test_method_step_never_makes_the_host_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device every read of a value, and every shape that depends on one, is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # unknown to that device
    method = make(name, True).to("meta").train()
    batch = batch_for(method)
    watch = FiniteWatch(eager=False, advice=str)
    for number in (0, 3):
        output = method(batch.to(torch.device("meta")), number)
        output.total().backward()
        watch.record(number, (), {key: term.value for key, term in output.terms.items()})
        method.after_step(number)


def test_step_output_applies_each_weight_once() -> None:
    output = StepOutput({"a": LossTerm(torch.tensor(2.0), 0.1), "b": LossTerm(torch.tensor(3.0), 1.0)})
    assert output.total().item() == pytest.approx(3.2)
