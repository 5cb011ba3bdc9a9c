"""``--compile``: the same losses and gradients, for every network and every kind of branch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import BallSource
from helpers_runs import batch_for, small_config, small_trainer

from myutils import trainer
from myutils.build import DataFacts, build_method
from networks.base import NETWORKS
from networks.compiling import compile_networks


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Torch limits how often a function is compiled in one process."""
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mean_teacher", "mc_net"])
def test_compiled_networks_give_the_same_losses_and_gradients(method: str) -> None:
    torch.manual_seed(0)
    source = BallSource()
    plain = build_method(small_config(source, method=method), DataFacts.of(source))
    compiled = copy.deepcopy(plain)
    compile_networks(compiled, backend="eager")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    batch, found = batch_for(plain), []
    for built in (plain, compiled):
        torch.manual_seed(1)
        loss = built(batch, 3).total()
        loss.backward()
        found.append([loss, *(p.grad for p in built.student.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", NETWORKS.names())
def test_every_network_can_be_compiled(model: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS.get(model)(1, 2).eval()
    images = torch.randn(1, 1, 16, 16, 16)
    expected = network(images)
    compile_networks(network, backend="eager")
    torch.testing.assert_close(network(images), expected)


@pytest.mark.slow
def test_the_flag_compiles_the_method_and_a_run_ends_as_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []

    def with_fewer_passes(method: torch.nn.Module) -> None:
        compiled.append(method)
        compile_networks(method, backend="eager")

    monkeypatch.setattr(trainer, "compile_networks", with_fewer_passes)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")  # both with channels first
    runs = [small_trainer(BallSource(), tmp_path / str(flag), compile=flag, max_iteration=3) for flag in (False, True)]
    weights = [run.fit() and run.method.student.state_dict() for run in runs]
    assert compiled == [runs[1].method]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mean_teacher", "cps", "mc_net"])
def test_graphs_of_a_training_stay_whole_after_a_validation(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where maps have their channels last in a validation, the layers that they took could not be compiled."""
    ran: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        size = len(graph.graph.nodes)

        def run(*values: object) -> object:
            ran.append(size)
            return graph.forward(*values)

        return run

    monkeypatch.setattr(trainer, "compile_networks", partial(compile_networks, backend=counting))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    settings = {"method": method, "labelnum": 3, "val_num": 1, "save_every": 1, "memory_interval": 1}
    built = small_trainer(BallSource(), tmp_path, compile=True, use_contrastive_prototype=False, **settings)
    train_step, per_step = built.train_step, []

    def step(*args: object) -> object:
        ran.clear()
        output = train_step(*args)
        per_step.append(list(ran))
        return output

    built.train_step = step  # type: ignore[method-assign]
    built.fit()
    assert len(per_step) == 4 and per_step[0] and all(graphs == per_step[0] for graphs in per_step[1:])


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"--compile: no C\+\+ compiler 'no-such-compiler'"):
        compile_networks(NETWORKS.get("unet_3d")(1, 2))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"--compile: no C\+\+ compiler"):
        compile_networks(NETWORKS.get("unet_3d")(1, 2))
