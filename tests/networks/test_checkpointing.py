"""Checkpointed networks: copies, and the flag. That they save memory is in tests/contract, for every network."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_runs import batch_for, small_config
from torch import Tensor, nn

from myutils.build import DataFacts, build_method
from networks.base import NETWORKS, SegmentationNetwork
from networks.checkpointing import checkpoint_blocks, is_checkpointed


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


def test_blocks_may_be_called_with_keywords() -> None:
    class Scaled(nn.Module):
        def forward(self, image: Tensor, *, by: float) -> Tensor:
            return by * image

    network = nn.Module()
    network.blocks = nn.ModuleList([Scaled()])
    checkpoint_blocks(network)
    image = torch.ones(3, requires_grad=True)
    network.blocks[0](image, by=2.0).sum().backward()
    assert image.grad is not None and image.grad.tolist() == [2.0, 2.0, 2.0]
