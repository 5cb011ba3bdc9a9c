"""Layers in place of torch's: right bfloat16 weight gradients on the CPU, and the same instance normalisation."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import BallSource
from helpers_runs import small_config
from torch import nn
from torch.nn import functional

from myutils.build import DataFacts, build_method
from myutils.distributed import resolve_amp
from networks.base import NETWORKS, make_network
from networks.layers import (
    ChannelsLastConv3d,
    GroupedInstanceNorm3d,
    GuardedConv3d,
    SharedDropout3d,
    has_channels_last,
    mend_layers,
)

LAST = torch.channels_last_3d


def spoil_memory() -> None:
    """Leave large numbers in freed memory, for kernels that read what they have not written."""
    blocks = [torch.full((size,), 1e30) for size in (1_000, 30_000, 1_000_000)]
    del blocks


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 3, 1), (1, 3, 3)])
@pytest.mark.parametrize("size", [(2, 2, 2), (2, 4, 3), (3, 2, 2), (4, 4, 4), (8, 8, 1), (1, 8, 8), (8, 2, 2)])
def test_guarded_convolution_has_the_right_gradient_under_autocast(size: tuple, kernel: tuple) -> None:
    torch.manual_seed(0)
    convolution = GuardedConv3d(16, 16, kernel, padding=[side // 2 for side in kernel], bias=False)
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
    mend_layers(network)
    plain = [module for module in network.modules() if type(module) is nn.Conv3d]
    assert plain == [] and any(isinstance(module, GuardedConv3d) for module in network.modules())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


LARGEST = "vnet"  # seconds a step where bf16 is emulated
SIZES = [
    pytest.param(name, flat_levels, size, marks=[pytest.mark.slow] * (name == LARGEST))
    for name in NETWORKS.names()
    for flat_levels, size in (((0, 0, 0), (16, 16, 16)), ((0, 0, 1), (16, 16, 8)))
    if NETWORKS.get(name).takes_flat_levels or not any(flat_levels)
]


@pytest.mark.parametrize(("name", "flat_levels", "size"), SIZES)
def test_networks_have_finite_bf16_gradients_at_the_smallest_size(name: str, flat_levels: tuple, size: tuple) -> None:
    network = make_network(NETWORKS.get(name), 1, 2, flat_levels)
    mend_layers(network)
    emulated = resolve_amp("auto", torch.device("cpu")) == "no"
    for _ in range(1 if emulated else 3):  # emulated, each takes seconds and none reads spoilt memory
        spoil_memory()
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(torch.randn(1, 1, *size)).logits
        logits.float().square().mean().backward()
        assert max(parameter.grad.abs().max() for parameter in network.parameters()) < 1e4


@pytest.mark.parametrize("affine", [True, False])
def test_instance_normalisation_is_that_of_torch(affine: bool) -> None:
    torch.manual_seed(0)
    plain = nn.InstanceNorm3d(3, affine=affine)
    if affine:
        nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    mended = nn.Sequential(copy.deepcopy(plain))
    mend_layers(mended)
    assert type(mended[0]) is GroupedInstanceNorm3d
    images = torch.randn(2, 3, 5, 4, 3, requires_grad=True)
    upstream = torch.randn(2, 3, 5, 4, 3)
    gradients = []
    for norm in (plain, mended):
        torch.testing.assert_close(norm(images), plain(images))
        inputs = [images, *norm.parameters()]
        gradients.append(torch.autograd.grad(norm(images), inputs, upstream))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("upstream_last", [True, False])
def test_instance_normalisation_is_the_same_with_channels_last(affine: bool, upstream_last: bool) -> None:
    torch.manual_seed(0)
    norm = GroupedInstanceNorm3d(3, affine=affine)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    images, upstream = torch.randn(2, 3, 5, 4, 3), torch.randn(2, 3, 5, 4, 3)
    found = []
    for maps in (images, images.contiguous(memory_format=LAST)):
        inputs = [maps.requires_grad_(), *norm.parameters()]
        output = norm(maps)
        given = upstream.contiguous(memory_format=LAST) if upstream_last else upstream
        found.append([output, *torch.autograd.grad(output, inputs, given)])
    assert has_channels_last(found[1][0]) and has_channels_last(found[1][1])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_channels_last_keep_their_digits_beside_a_large_mean() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 4, 16, 16, 16, dtype=torch.float64) + 1000
    expected = functional.group_norm(images, 4)
    maps = images.float().contiguous(memory_format=LAST)
    assert (GroupedInstanceNorm3d(4)(maps) - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("name", NETWORKS.names())
def test_a_network_computes_the_same_with_channels_last(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS.get(name)(1, 2).eval()  # without dropout
    images = torch.randn(2, 1, 32, 32, 32)
    found, layouts = [], []
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(lambda _, inputs, output: layouts.append(has_channels_last(output)))
    for last in (False, True):
        mend_layers(network, channels_last=last)
        network.zero_grad()
        layouts.clear()
        output = network(images)
        assert any(layouts) == last
        (output.logits.square().mean() + output.features.square().mean()).backward()
        gradients = [parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None]
        found.append((output.logits, output.features, torch.cat(gradients)))
    for ours, theirs, tolerance in zip(*found, (1e-4, 1e-4, 0.05), strict=True):  # rounding turns a few LeakyReLUs over
        assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_only_maps_that_are_larger_than_the_weights_are_laid_out() -> None:
    network = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1))  # 1,728 weights
    mend_layers(network, channels_last=True)
    assert has_channels_last(network(torch.randn(2, 8, 8, 8, 8)))
    assert not has_channels_last(network(torch.randn(2, 8, 4, 4, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        assert not has_channels_last(network(torch.randn(2, 8, 8, 8, 8)))


@pytest.mark.parametrize(
    ("cpu", "name", "expected"),
    [
        ("AVX2", "unet_3d", ChannelsLastConv3d),
        ("AVX2", "segresnet", GuardedConv3d),
        ("AVX512", "unet_3d", GuardedConv3d),
    ],
)
def test_the_layout_follows_the_cpu_and_the_network(
    cpu: str, name: str, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    network = NETWORKS.get(name)(1, 2)
    mend_layers(network)
    assert {type(module) for module in network.modules() if isinstance(module, nn.Conv3d)} == {expected}
    # Whose graph the other layout would break, in a second network and in the parts of one too.
    for method in ("supervised", "cps", "mc_net"):
        if method == "mc_net" and name != "unet_3d":
            continue
        config = small_config(BallSource(), method=method, model=name, compile=True)
        compiled = build_method(config, DataFacts.of(BallSource()))
        assert {type(module) for module in compiled.modules() if isinstance(module, nn.Conv3d)} == {GuardedConv3d}


def test_running_statistics_are_left_to_torch() -> None:
    network = nn.Sequential(nn.InstanceNorm3d(2, track_running_stats=True))
    mend_layers(network)
    assert type(network[0]) is nn.InstanceNorm3d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.3, 0.5, 1.0])
def test_dropout_of_channels_is_that_of_torch(probability: float, dtype: torch.dtype) -> None:
    plain = nn.Dropout3d(probability)
    mended = nn.Sequential(copy.deepcopy(plain))
    mend_layers(mended)
    assert type(mended[0]) is SharedDropout3d
    maps = torch.randn(3, 8, 2, 3, 4, dtype=dtype)
    outputs = []
    for module in (plain, mended):
        torch.manual_seed(0)
        outputs.append(module(maps))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], maps)
    assert torch.equal(mended.eval()(maps), maps)
