"""Muon against naive loops, and what it leaves to AdamW."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import BallSource
from helpers_runs import small_config
from torch import Tensor, nn

from myutils import muon
from myutils.build import DataFacts, build_method, build_optimizer
from myutils.muon import Muon, is_kernel, orthogonal, split_kernels
from networks.base import NETWORKS
from networks.unet3d import UNet3D


def naive(matrix: Tensor) -> Tensor:
    """The published iteration, on the matrix itself."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(3, 20), (20, 3), (16, 432)])
def test_orthogonal_is_the_published_iteration(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    assert torch.allclose(orthogonal([matrix])[0].double(), naive(matrix), atol=1e-5)


@pytest.mark.parametrize("lowest", [-2, -4, -8])
@pytest.mark.parametrize("rank", [2, 16])
def test_iterating_on_the_gram_matrix_stays_exact_for_what_is_nearly_singular(rank: int, lowest: int) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(16, 300), full_matrices=False)
    matrix = u[:, :rank] @ torch.diag(torch.logspace(0, lowest, rank)) @ vh[:rank]
    error = orthogonal([matrix])[0].double() - naive(matrix)
    assert torch.linalg.matrix_norm(error, 2) < 5e-3


def test_singular_values_end_near_one_and_directions_stay() -> None:
    u, _, vh = torch.linalg.svd(torch.randn(8, 30), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -2, 8)) @ vh
    found = u.mT @ orthogonal([matrix])[0] @ vh.mT
    values = found.diagonal()
    assert values.min() > 0.6 and values.max() < 1.3
    assert (found - values.diag()).abs().max() < 1e-4


def test_matrices_of_any_shapes_at_once_are_as_each_alone() -> None:
    matrices = [torch.randn(4, 9), torch.randn(9, 4), torch.randn(4, 30), torch.randn(6, 7), 1e-3 * torch.randn(4, 4)]
    for matrix, found in zip(matrices, orthogonal(matrices), strict=True):
        assert torch.allclose(found, orthogonal([matrix])[0], atol=1e-5)


def test_a_zero_matrix_stays_zero() -> None:
    assert orthogonal([torch.zeros(3, 5)])[0].abs().max() == 0


def test_kernels_are_what_mixes_channels_and_voxels() -> None:
    network = UNet3D(1, 3)
    names = {name for name, parameter in network.named_parameters() if is_kernel(parameter)}
    assert "encoder.0.0.0.weight" not in names  # one input channel
    assert "branch.classifier.weight" not in names  # one voxel
    assert {"encoder.0.1.0.weight", "encoder.3.1.0.weight", "branch.decoder.upsample.0.weight"} <= names
    assert all(name.endswith("weight") for name in names)


def test_kernels_have_three_times_the_rate_now_and_in_a_schedule() -> None:
    parameters = list(UNet3D(1, 3).parameters())
    rest, kernels = split_kernels([{"params": parameters, "lr": 0.01, "lr_scale": 0.5}])
    assert len(rest["params"]) + len(kernels["params"]) == len(parameters)
    assert (rest["kernels"], rest["lr"], rest["lr_scale"]) == (False, 0.01, 0.5)
    assert (kernels["kernels"], kernels["lr"], kernels["lr_scale"]) == (True, pytest.approx(0.03), 1.5)


@pytest.mark.parametrize("model", NETWORKS.names())
def test_the_first_layer_is_no_kernel_whatever_the_channels(model: str) -> None:
    chosen = []
    for channels in (1, 2, 4):
        source = BallSource(channels=channels)
        method = build_method(small_config(source, method="supervised", model=model), DataFacts.of(source))
        optimizer = build_optimizer(method.config, method)
        kernels = {id(p) for group in optimizer.param_groups if group["kernels"] for p in group["params"]}
        chosen.append({name for name, parameter in method.named_parameters() if id(parameter) in kernels})
    assert chosen[0] == chosen[1] == chosen[2] != set()


@pytest.mark.parametrize("out", [4, 60])  # wide and tall matrices
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_step_worked_out_by_hand(out: int, layout: torch.memory_format) -> None:
    kernel = nn.Parameter(torch.randn(out, 2, 3, 3, 3).to(memory_format=layout))
    before, gradient = kernel.detach().clone(), torch.randn_like(kernel)
    optimizer = Muon(split_kernels([{"params": [kernel], "lr": 0.01, "lr_scale": 1.0}]), weight_decay=0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    kernel.grad = gradient.clone()
    optimizer.step()
    first = before * (1 - 0.01 * 0.5) - 0.01 * 0.2 * max(54, out) ** 0.5 * naive(gradient.flatten(1)).view_as(before)
    assert torch.allclose(kernel.double(), first.double(), atol=1e-5)
    assert kernel.grad is None
    second = torch.randn_like(gradient)
    kernel.grad = second.clone()
    optimizer.step()
    average = 0.95 * 0.05 * gradient + 0.05 * second
    direction = naive((0.05 * second + 0.95 * average).flatten(1)).view_as(before)
    expected = first * (1 - 0.01 * 0.5) - 0.01 * 0.2 * max(54, out) ** 0.5 * direction
    assert torch.allclose(kernel.double(), expected.double(), atol=1e-5)


def move(kernel: Tensor, average: Tensor, gradient: Tensor, far: float) -> Tensor:
    """A step of ``far`` times the rate 0.01 with a weight decay of 0.5; ``average`` knows the gradient already."""
    direction = naive((0.05 * gradient + 0.95 * average).flatten(1)).view_as(kernel)
    return kernel * (1 - 0.01 * far * 0.5) - 0.01 * far * 0.2 * kernel[0].numel() ** 0.5 * direction


def test_kernels_that_take_turns_move_as_far_as_their_gradients_are_many() -> None:
    kernels = [nn.Parameter(torch.randn(4, 2, 3, 3, 3)) for _ in range(3)]
    optimizer = Muon(split_kernels([{"params": kernels, "lr": 0.01, "lr_scale": 1.0}]), weight_decay=0.5, interval=3)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    expected = [kernel.detach().double() for kernel in kernels]
    averages, waiting = [torch.zeros_like(value) for value in expected], [0, 0, 0]
    for step in range(7):
        if step == 4:  # as from a checkpoint
            stored = copy.deepcopy(optimizer.state_dict())
            optimizer = Muon(split_kernels([{"params": kernels, "lr": 0.01, "lr_scale": 1.0}]), 0.5, interval=3)
            optimizer.load_state_dict(stored)
        for index, kernel in enumerate(kernels):
            kernel.grad = torch.randn_like(kernel)
            averages[index] = 0.95 * averages[index] + 0.05 * kernel.grad.double()
            waiting[index] += 1
            if (index + step + 1) % 3 == 0:
                expected[index] = move(expected[index], averages[index], kernel.grad.double(), far=waiting[index])
                waiting[index] = 0
        optimizer.step()
        for kernel, value in zip(kernels, expected, strict=True):
            assert torch.allclose(kernel.double(), value, atol=1e-5)


def test_a_kernel_with_a_gradient_in_every_second_step_alone_takes_its_turn_too() -> None:
    kernels = [nn.Parameter(torch.randn(4, 2, 3, 3, 3)) for _ in range(2)]
    optimizer = Muon(split_kernels([{"params": kernels, "lr": 0.01, "lr_scale": 1.0}]), 0.5, interval=2)
    before = [kernel.detach().clone() for kernel in kernels]
    for step in range(4):
        for kernel in kernels:
            kernel.grad = torch.randn_like(kernel) if step % 2 == 0 else None
        optimizer.step()
    assert not any(torch.equal(kernel, value) for kernel, value in zip(kernels, before, strict=True))


def test_the_state_of_runs_before_turns_is_taken_up() -> None:
    kernel = nn.Parameter(torch.randn(4, 2, 3, 3, 3))
    optimizer = Muon(split_kernels([{"params": [kernel], "lr": 0.01, "lr_scale": 1.0}]), 0.5)
    optimizer.state[kernel] = {"step": torch.zeros(()), "momentum": torch.zeros_like(kernel)}
    before, kernel.grad = kernel.detach().clone(), torch.randn_like(kernel)
    optimizer.step()
    assert not torch.equal(kernel, before)


def test_everything_else_takes_the_steps_of_adamw() -> None:
    layers = [nn.Sequential(nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4, affine=True), nn.Conv3d(4, 4, 3)) for _ in "ab"]
    layers[1].load_state_dict(layers[0].state_dict())
    groups = [[{"params": list(layer.parameters()), "lr": 0.01, "lr_scale": 1.0}] for layer in layers]
    optimizers = [Muon(split_kernels(groups[0]), 0.1), torch.optim.AdamW(groups[1], weight_decay=0.1, fused=True)]
    for _ in range(3):
        images = torch.randn(2, 1, 9, 9, 9)
        for layer in layers:
            layer.zero_grad()
            layer(images).square().mean().backward()
        layers[0][0].weight.grad.copy_(layers[1][0].weight.grad)  # the kernels part, and with them these gradients
        layers[0][1].weight.grad.copy_(layers[1][1].weight.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(layers[0][0].weight, layers[1][0].weight)
    assert torch.equal(layers[0][1].weight, layers[1][1].weight)
    assert not torch.allclose(layers[0][2].weight, layers[1][2].weight)


def test_kernels_without_a_gradient_stay() -> None:
    layers = nn.ModuleList(nn.Conv3d(2, 2, 3) for _ in range(2))
    optimizer = Muon(split_kernels([{"params": list(layers.parameters()), "lr": 0.1, "lr_scale": 1.0}]), 0.1)
    before = layers[1].weight.detach().clone()
    layers[0](torch.randn(1, 2, 4, 4, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(layers[1].weight, before)
    assert not torch.equal(layers[0].weight, before)


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_gradient_scaler_skips_steps_that_overflowed_without_a_wait(
    monkeypatch: pytest.MonkeyPatch, unscaled: bool
) -> None:
    layers = [nn.Conv3d(2, 2, 3) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    groups = [[{"params": list(layer.parameters()), "lr": 0.1, "lr_scale": 1.0}] for layer in layers]
    scaled, plain = (Muon(split_kernels(group), 0.1) for group in groups)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (float("inf"), 1.0, float("nan"), 2.0):
        images = torch.randn(1, 2, 4, 4, 4)
        before = {name: value.clone() for name, value in layers[0].state_dict().items()}
        kernel = layers[0].weight
        momentum = scaled.state[kernel].get("momentum", torch.zeros_like(kernel)).clone()
        scaled.zero_grad()
        scaler.scale(factor * layers[0](images).square().sum()).backward()
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "item", lambda _: pytest.fail("a wait for the device"))
            if unscaled:
                scaler.unscale_(scaled)
            scaler.step(scaled)
        scaler.update()
        if factor in (1.0, 2.0):
            plain.zero_grad()
            (factor * layers[1](images).square().sum()).backward()
            plain.step()
            for ours, theirs in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5) and not torch.equal(ours, torch.zeros_like(ours))
        else:
            assert all(torch.equal(value, before[name]) for name, value in layers[0].state_dict().items())
            assert torch.equal(scaled.state[kernel]["momentum"], momentum)


@pytest.mark.parametrize("fails", [False, True])
def test_products_are_whole_float32_whatever_was_asked_for_elsewhere(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    seen, found = [], muon._factors

    def spy(matrices: list[Tensor]) -> list[Tensor]:
        seen.append(torch.get_float32_matmul_precision())
        if fails:
            raise RuntimeError("as if out of memory")
        return found(matrices)

    monkeypatch.setattr("myutils.muon._factors", spy)
    kernel = nn.Parameter(torch.randn(4, 2, 3, 3, 3))
    optimizer = Muon(split_kernels([{"params": [kernel], "lr": 0.1, "lr_scale": 1.0}]), 0.1)
    kernel.grad = torch.randn_like(kernel)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    try:
        with pytest.raises(RuntimeError, match="memory") if fails else nullcontext():
            optimizer.step()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]
