"""Every registered network keeps the contract: a new file in networks/ is tested on arrival."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from networks.base import NETWORKS, SegmentationNetwork, make_network
from networks.checkpointing import checkpoint_blocks
from networks.layers import mend_layers


def kept_bytes_and_gradients(network: SegmentationNetwork, images: Tensor) -> tuple[int, list[Tensor]]:
    """What the forward pass keeps for the backward one, without the weights, and the gradients."""
    weights = {parameter.data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if value.data_ptr() not in weights:
            kept[value.data_ptr()] = value.nbytes
        return value

    torch.manual_seed(0)  # of the dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output = network(images)
    loss = output.logits.square().mean() + output.features.mean()
    return sum(kept.values()), list(torch.autograd.grad(loss, list(network.parameters())))


@pytest.mark.parametrize("name", NETWORKS.names())
@pytest.mark.parametrize("size", [(16, 16, 16), (17, 9, 21)])
def test_network_returns_logits_and_features_of_the_input_size(name: str, size: tuple[int, int, int]) -> None:
    network = NETWORKS.get(name)(2, 3)
    output = network(torch.randn(1, 2, *size))
    assert output.logits.shape == (1, 3, *size)
    assert output.features.shape == (1, network.feature_dim, *size)


@pytest.mark.parametrize("name", NETWORKS.names())
@pytest.mark.parametrize(
    ("strides", "padded"),
    [
        ((4, 4, 1), (4, 4, 1)),
        ((3, 1, 3), (3, 1, 3)),
        ((2, 2, 1), (2, 2, 2)),
        ((1, 1, 3), (2, 2, 3)),
        ((1, 1, 1), (2, 2, 2)),
    ],
)
def test_input_is_padded_to_whole_strides_and_eight_voxels_at_the_bottleneck(
    name: str, strides: tuple[int, int, int], padded: tuple[int, int, int]
) -> None:
    network = NETWORKS.get(name)(1, 2)
    short = [count * step - (step > 1) for count, step in zip(strides, network.stride, strict=True)]
    expected = [count * step for count, step in zip(padded, network.stride, strict=True)]
    with torch.device("meta"):
        assert list(network.pad(torch.zeros(2, 1, *short)).shape[2:]) == expected


@pytest.mark.parametrize("name", NETWORKS.names())
def test_network_classifies_its_own_features(name: str) -> None:
    network = NETWORKS.get(name)(1, 2).eval()
    output = network(torch.randn(1, 1, 32, 32, 32))  # no padding: the features are the classifier's own input
    output.features.retain_grad()
    output.logits.sum().backward()
    assert output.features.grad is not None and output.features.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NETWORKS.names())
def test_network_runs_a_second_branch_on_the_same_encoder(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS.get(name)(1, 2).eval()
    other = network.fresh_copy().eval()
    images = torch.randn(1, 1, 17, 9, 21)
    own, second = network.run_branches(images, [network.branch, other.branch])
    assert torch.equal(own.logits, network(images).logits)
    assert second.logits.shape == own.logits.shape
    assert not torch.allclose(second.logits, own.logits)


@pytest.mark.parametrize("name", NETWORKS.names())
def test_network_decodes_changed_encoder_features(name: str) -> None:
    network = NETWORKS.get(name)(1, 2).eval()
    images = torch.randn(1, 1, 16, 16, 16)
    (doubled,) = network.run_branches(
        images, [network.branch], lambda levels: [level.repeat(2, 1, 1, 1, 1) for level in levels]
    )
    assert torch.allclose(doubled.logits[1], network(images).logits[0], atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS.names())
def test_network_trains_every_parameter(name: str) -> None:
    network = NETWORKS.get(name)(1, 2)
    network(torch.randn(2, 1, 16, 16, 16)).logits.square().mean().backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", NETWORKS.names())
def test_network_keeps_no_activation_after_the_step(name: str) -> None:
    network = NETWORKS.get(name)(1, 2)
    network(torch.randn(1, 1, 16, 16, 16))
    kept = [m for m in network.modules() if any(isinstance(v, torch.Tensor) for v in vars(m).values())]
    assert kept == []


@pytest.mark.parametrize("name", NETWORKS.names())
@pytest.mark.parametrize("size", [(16, 16, 16), (17, 9, 21)])
def test_network_hands_out_its_coarse_levels_the_coarsest_first(name: str, size: tuple[int, int, int]) -> None:
    network = NETWORKS.get(name)(1, 2)
    images = torch.randn(1, 1, *size)
    coarse, frame = network(images).coarse, network.pad(images).shape[2:]
    assert [level.shape[1] for level in coarse] == list(network.coarse_dims)
    sizes = [tuple(level.shape[2:]) for level in coarse]
    assert sizes == sorted(sizes)
    assert all(whole % part == 0 for size in sizes for whole, part in zip(frame, size, strict=True))
    with torch.no_grad():
        assert network(images).coarse == ()
        network.branch.keeps_coarse = True
        assert [tuple(level.shape[2:]) for level in network(images).coarse] == sizes


@pytest.mark.parametrize("name", [name for name in NETWORKS.names() if NETWORKS.get(name).takes_flat_levels])
def test_a_flat_level_neither_looks_nor_halves_along_its_axis(name: str) -> None:
    usual, flat = NETWORKS.get(name)(1, 2), make_network(NETWORKS.get(name), 1, 2, (0, 0, 1))
    assert flat.flat_levels == (0, 0, 1)
    assert flat.stride == (*usual.stride[:2], max(1, usual.stride[2] // 2))
    kernels: list[tuple[int, ...]] = []
    for layer in [module for module in flat.modules() if isinstance(module, nn.Conv3d)]:
        layer.register_forward_hook(lambda layer, *_: kernels.append(layer.kernel_size))
    output = flat(torch.randn(2, 1, 21, 9, 3))
    assert output.logits.shape == (2, 2, 21, 9, 3)
    first = next(kernel for kernel in kernels if max(kernel) > 1)
    assert first[2] == 1 < first[0]
    output.logits.square().mean().backward()
    assert [key for key, parameter in flat.named_parameters() if parameter.grad is None] == []
    shapes = [value.shape for value in flat.state_dict().values()]
    assert [value.shape for value in flat.fresh_copy().state_dict().values()] == shapes


@pytest.mark.parametrize("name", NETWORKS.names())
def test_network_has_the_same_gradients_from_less_memory_when_checkpointed(name: str) -> None:
    torch.manual_seed(0)
    plain = NETWORKS.get(name)(1, 2)
    mend_layers(plain)
    images = torch.randn(2, 1, 16, 16, 16)
    checkpointed = copy.deepcopy(plain)
    checkpoint_blocks(checkpointed)
    assert checkpointed.state_dict().keys() == plain.state_dict().keys()
    kept, expected = kept_bytes_and_gradients(plain, images)
    kept_less, found = kept_bytes_and_gradients(checkpointed, images)
    assert kept_less < 0.6 * kept
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_network_refuses_wrong_channels() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 1, X, Y, Z\)"):
        NETWORKS.get("unet_3d")(1, 2)(torch.zeros(1, 3, 16, 16, 16))


def test_network_refuses_a_single_class() -> None:
    with pytest.raises(ValueError, match="at least 1 channel and 2 classes"):
        NETWORKS.get("unet_3d")(1, 1)


def test_unknown_network_gets_a_hint() -> None:
    with pytest.raises(ValueError, match="did you mean 'vnet'"):
        NETWORKS.get("vnett")
