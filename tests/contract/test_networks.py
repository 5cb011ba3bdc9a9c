"""Every registered network keeps the contract: a new file in networks/ is tested on arrival."""

from __future__ import annotations

import pytest
import torch

from networks.base import NETWORKS


@pytest.mark.parametrize("name", NETWORKS.names())
@pytest.mark.parametrize("size", [(16, 16, 16), (17, 9, 21)])
def test_network_returns_logits_and_features_of_the_input_size(name: str, size: tuple[int, int, int]) -> None:
    network = NETWORKS.get(name)(2, 3)
    output = network(torch.randn(1, 2, *size))
    assert output.logits.shape == (1, 3, *size)
    assert output.features.shape == (1, network.feature_dim, *size)


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


def test_network_refuses_wrong_channels() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 1, X, Y, Z\)"):
        NETWORKS.get("unet_3d")(1, 2)(torch.zeros(1, 3, 16, 16, 16))


def test_network_refuses_a_single_class() -> None:
    with pytest.raises(ValueError, match="at least 1 channel and 2 classes"):
        NETWORKS.get("unet_3d")(1, 1)


def test_unknown_network_gets_a_hint() -> None:
    with pytest.raises(ValueError, match="did you mean 'vnet'"):
        NETWORKS.get("vnett")
