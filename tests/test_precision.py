"""The guard against wrong bfloat16 weight gradients on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.base import NETWORKS
from networks.precision import GuardedConv3d, guard_convolutions


def spoil_memory() -> None:
    """Leave large numbers in freed memory, for kernels that read what they have not written."""
    blocks = [torch.full((size,), 1e30) for size in (1_000, 30_000, 1_000_000)]
    del blocks


@pytest.mark.parametrize("size", [(2, 2, 2), (2, 4, 3), (3, 2, 2), (4, 4, 4)])
def test_guarded_convolution_has_the_right_gradient_under_autocast(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    convolution = GuardedConv3d(16, 16, 3, padding=1, bias=False)
    images, upstream = torch.randn(2, 16, *size), torch.randn(2, 16, *size)
    convolution(images).backward(upstream)
    expected = convolution.weight.grad.clone()
    for _ in range(3):
        spoil_memory()
        convolution.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            output = convolution(images)
        output.backward(upstream.to(output.dtype))
        assert (convolution.weight.grad - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS.names())
def test_guard_reaches_every_convolution_and_changes_no_weight(name: str) -> None:
    network = NETWORKS.get(name)(1, 2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    guard_convolutions(network)
    plain = [module for module in network.modules() if type(module) is nn.Conv3d]
    assert plain == [] and any(isinstance(module, GuardedConv3d) for module in network.modules())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS.names())
def test_networks_have_finite_bf16_gradients_at_the_smallest_size(name: str) -> None:
    network = NETWORKS.get(name)(1, 2)
    guard_convolutions(network)
    for _ in range(3):
        spoil_memory()
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(torch.randn(1, 1, 16, 16, 16)).logits
        logits.float().square().mean().backward()
        assert max(parameter.grad.abs().max() for parameter in network.parameters()) < 1e4
