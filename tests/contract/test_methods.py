"""Every registered method keeps the contract, with and without the prototype term."""

from __future__ import annotations

import random
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BallSource
from helpers_runs import (
    assert_same_weights,
    batch_for,
    random_batch,
    small_config,
    small_method,
    small_trainer,
    whole_and_resumed,
)
from torch import nn

from myutils.build import DataFacts, build_method, build_network
from myutils.config import RunConfig
from myutils.methods.base import METHODS, LossTerm, Method, StepOutput, unread_flags
from myutils.prototype_forms import LOSS_FORMS
from myutils.prototype_term import PrototypeTerm
from networks.base import NETWORKS, Branch, SegmentationNetwork

CASES = [(name, prototypes) for name in METHODS.names() for prototypes in (False, True)]
RESUMED = ("bcp", "cov_dfp", "cps")  # two phases, pools, a second network; test_trainer.py has the mean teacher
RESUMED_SLOWLY = [name for name in METHODS.names() if name not in RESUMED]


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


def teachers(method: Method) -> list[nn.Module]:
    """The modules that follow the student by an average: no loss may move them."""
    whole = [method.inference_network(), getattr(method, "teacher", None)]
    projection = None if method.prototypes is None else method.prototypes.teacher_projection
    return [module for module in (*whole, projection) if module is not None and module is not method.student]


@pytest.mark.parametrize(("name", "prototypes"), CASES)
def test_method_sends_every_weighted_term_into_the_student_only(name: str, prototypes: bool) -> None:
    method = make(name, prototypes, confidence_threshold=0.0)
    for number in range(3):  # fills memories and pools
        step(method, number)
    output = step(method, 3)
    for term_name, term in output.terms.items():
        method.zero_grad(set_to_none=True)
        term.value.backward(retain_graph=True)
        learner = method if term_name in method.probes else method.student
        reached = [p for p in learner.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert reached, f"{term_name} moves nothing of the {type(learner).__name__}"
        taught = [key for module in teachers(method) for key, p in module.named_parameters() if p.grad is not None]
        assert taught == [], f"{term_name} moves the teacher"


@pytest.mark.parametrize(("name", "prototypes"), CASES)
def test_method_optimizes_everything_trainable_once_and_selectors_slowly(name: str, prototypes: bool) -> None:
    method = make(name, prototypes)
    groups = method.parameter_groups(0.1)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in method.parameters() if parameter.requires_grad}
    assert all(group["lr"] == pytest.approx(0.1 * group["lr_scale"]) for group in groups)
    if method.prototypes is not None:
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        assert all(rates[id(p)] == pytest.approx(0.01) for p in method.prototypes.selector_parameters())


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


@pytest.mark.parametrize("name", [*RESUMED, *(pytest.param(n, marks=pytest.mark.slow) for n in RESUMED_SLOWLY)])
def test_method_resumes_bit_identically(name: str, tmp_path: Path) -> None:
    """State outside ``state_dict()``, and draws that the step does not seed, part the two runs."""
    passes = {"uncertainty_passes": 2} if name == "ua_mt" else {}  # instead of 8, for the time
    stages = {"dfp_start_iter": 1, "selector_train_iter": 1, "dfp_reconstruct_interval": 2} if name == "cov_dfp" else {}
    settings = {"method": name, "batch_size": 2, "patch_size": (8, 8, 8)} | passes | stages
    assert_same_weights(*whole_and_resumed(tmp_path, **settings))


@pytest.mark.parametrize("name", METHODS.names())
def test_method_draws_with_torch_alone(name: str) -> None:
    method = make(name, True)
    states = []
    for number in range(3):
        states.append((random.getstate(), str(np.random.get_state())))  # noqa: NPY002 - what must not move
        step(method, number)
        method.after_step(number)
    assert states[0] == states[2], "the trainer seeds torch at each step, and nothing else"


@pytest.mark.parametrize(("name", "prototypes"), CASES)
def test_method_averages_its_teacher_which_evaluates(name: str, prototypes: bool) -> None:
    method = make(name, prototypes)
    step(method)
    networks = [module for module in method.modules() if isinstance(module, SegmentationNetwork)]
    frozen = [network for network in networks if not any(p.requires_grad for p in network.parameters())]
    assert not any(module.training for network in frozen for module in network.modules())
    moving = [method.inference_network(), getattr(method, "teacher", None), method.prototypes]
    before = [[p.clone() for p in module.parameters()] for module in moving if module is not None]
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.1 * parameter.requires_grad  # the optimizer's part
    for number in range(10):
        method.after_step(number)
    after = [list(module.parameters()) for module in moving if module is not None]
    for old, new in zip(chain(*before), chain(*after), strict=True):
        assert not torch.equal(old, new), "call super().after_step(step)"


@pytest.mark.parametrize("name", [name for name in METHODS.names() if METHODS.get(name).uses_strong_views])
def test_method_takes_several_strong_views(name: str) -> None:
    assert torch.isfinite(step(make(name, True, strong_views=2)).total())


@pytest.mark.parametrize("name", [name for name in METHODS.names() if METHODS.get(name).deepens])
def test_method_trains_the_classifiers_of_coarse_levels_on_labelled_patches(name: str) -> None:
    method = small_method(name, deep_supervision=True)
    for batch in (batch_for(method), random_batch(4, 0)):  # a step of its own, and one of labelled patches alone
        method.zero_grad(set_to_none=True)
        term = method(batch, 3).terms["deep_supervision"]
        term.value.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.deep.parameters())
        reached = {key.split(".")[0] for key, p in method.student.named_parameters() if p.grad is not None}
        assert "encoder" in reached
        assert all(p.grad is None for p in method.student.branch.classifier.parameters())


@pytest.mark.parametrize("name", METHODS.names())
def test_method_takes_a_warm_up_step(name: str) -> None:
    method = make(name, True)
    method.train()
    output = method(random_batch(labeled=4, unlabeled=0), 0)
    output.total().backward()
    method.after_step(0)
    assert "consistency" not in output.terms
    assert torch.isfinite(output.total())
    # Heads of the method's own may be idle: DDP is told to look for them.
    busy = [m for m in method.modules() if isinstance(m, SegmentationNetwork | Branch | PrototypeTerm)]
    assert [p.shape for module in busy for p in module.parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("model", NETWORKS.names())
@pytest.mark.parametrize("name", METHODS.names())
def test_method_runs_multi_channel_with_every_network(name: str, model: str) -> None:
    source = BallSource(channels=2)
    levels = NETWORKS.get(model)(2, 3).coarse_dims
    changes = {} if levels else {"deep_supervision": False}  # which best has by default
    config = small_config(source, method=name, model=model, use_contrastive_prototype=True, **changes)
    method = build_method(config, DataFacts.of(source))
    output = method(batch_for(method, channels=2), 0)
    assert torch.isfinite(output.total()) and "contrastive_loss" in output.terms


@pytest.mark.parametrize("name", METHODS.names())
def test_method_segments_with_its_inference_network_alone(name: str) -> None:
    method = make(name, False)
    assert method.inference_network()(torch.randn(1, 1, 16, 16, 16)).logits.shape == (1, 3, 16, 16, 16)


@pytest.mark.parametrize("name", [name for name in METHODS.names() if not METHODS.get(name).on_host])
def test_method_step_never_makes_the_host_wait(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device every read of a value, and every shape that depends on one, is an error."""
    changes = {"use_contrastive_prototype": True, "memory_interval": 1, "warmup_iteration": 0, "dfp_start_iter": 0}
    trainer = small_trainer(BallSource(), tmp_path, method=name, selector_train_iter=2, **changes)
    batch = batch_for(trainer.method)
    trainer.train_step(trainer.method, batch, 0)  # moments are made; cov_dfp builds its pools, where a step may wait
    meta = torch.device("meta")
    trainer.method.to(meta)
    trainer.device, trainer.watch.eager = meta, False  # as on a GPU
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # unknown to that device
    for number in (1, 3):  # the second and the third stage of cov_dfp
        assert trainer.train_step(trainer.method, batch.to(meta), number).total().device == meta
    with pytest.raises(RuntimeError):
        trainer.watch.check()  # reads, and is for the steps that log


class Recorder:
    """A configuration that notes which of its settings are read."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self.seen = config, set()

    def __getattr__(self, name: str) -> object:
        self.seen.add(name)
        return getattr(self._config, name)


@pytest.mark.parametrize("name", METHODS.names())
def test_method_names_the_flags_that_it_reads(name: str) -> None:
    source, kind = BallSource(), METHODS.get(name)
    config = small_config(source, method=name, use_contrastive_prototype=False, dfp_start_iter=1, selector_train_iter=1)
    facts = DataFacts.of(source)
    recorder = Recorder(config)
    method = kind(build_network(config, facts), recorder)
    for number in range(4):
        step(method, number)
        method.after_step(number)
    unread = unread_flags(kind, prototypes=False)
    common = {"consistency_rampup", "strong_views"}  # read for every method; of use to those with unlabelled patches
    assert not unread & recorder.seen - common, "name these in the attribute reads"
    assert not kind.reads - recorder.seen, "reads names what the method does not read"


def test_step_output_applies_each_weight_once() -> None:
    output = StepOutput({"a": LossTerm(torch.tensor(2.0), 0.1), "b": LossTerm(torch.tensor(3.0), 1.0)})
    assert output.total().item() == pytest.approx(3.2)
