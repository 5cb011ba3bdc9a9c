"""Checkpointed networks: the same gradients from less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_runs import batch_for, small_config
from torch import Tensor

from myutils.build import DataFacts, build_method
from networks.base import NETWORKS, SegmentationNetwork
from networks.checkpointing import checkpoint_blocks, is_checkpointed
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
def test_checkpointed_networks_have_the_same_gradients_from_less_memory(name: str) -> None:
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


def test_copies_are_checkpointed_and_blocks_are_not_twice() -> None:
    network = NETWORKS.get("unet_3d")(1, 2)
    assert not is_checkpointed(network) and not is_checkpointed(network.fresh_copy())
    checkpoint_blocks(network)
    checkpoint_blocks(network)
    assert is_checkpointed(copy.deepcopy(network)) and is_checkpointed(network.fresh_copy())
    assert type(network.encoder[0]).__name__ == "CheckpointedSequential"  # not CheckpointedCheckpointed...


@pytest.mark.parametrize("method", ["best", "mc_net", "cps"])
def test_the_flag_reaches_every_network_of_a_method(method: str, ball_source: object) -> None:
    config = small_config(ball_source, method=method, checkpoint_activations=True)  # type: ignore[arg-type]
    built = build_method(config, DataFacts.of(ball_source))  # type: ignore[arg-type]
    networks = [module for module in built.modules() if isinstance(module, SegmentationNetwork)]
    assert networks and all(is_checkpointed(network) for network in networks)
    built(batch_for(built), 3).total().backward()
    assert all(parameter.grad is not None for parameter in networks[0].parameters() if parameter.requires_grad)
