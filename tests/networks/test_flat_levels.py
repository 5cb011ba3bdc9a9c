"""Networks for thick slices: levels that neither look nor halve along the axis of the slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BallSource
from helpers_runs import small_config, small_trainer
from torch import nn

from dataloaders.base import Grid, Volume
from dataloaders.survey import Survey, fitting_flat_levels, fitting_patch
from myutils.build import DataFacts, build_network
from myutils.checkpoint import load_for_inference
from myutils.fitting import fit_to_cases
from myutils.resolving import resolve_config
from networks.base import NETWORKS, make_network

# Sizes along Z of the kernels with two flat levels, from the finest level to the coarsest and back, without those that
# halve or mix channels alone. The decoder of MONAI's DynUNet has the kernels of the level below.
KERNELS = {
    "unet_3d": [1, 1, 1, 1, 3, 3, 3, 3, 3, 3, 1, 1, 1, 1],
    "vnet": [1, 1, 1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 1, 1, 1],
    "dynunet": [1, 1, 1, 1, 3, 3, 3, 3, 3, 3, 3, 3, 1, 1],
}


def kernels_along(network: nn.Module, axis: int) -> list[int]:
    """Sizes of the kernels that mix voxels, along one axis, in the order in which they are used."""
    sizes: list[int] = []
    layers = [m for m in network.modules() if type(m) is nn.Conv3d and max(m.kernel_size) == 3]
    hooks = [layer.register_forward_hook(lambda m, *_: sizes.append(m.kernel_size[axis])) for layer in layers]
    network(torch.randn(1, network.in_channels, 16, 16, 16))
    for hook in hooks:
        hook.remove()
    return sizes


@pytest.mark.parametrize("name", KERNELS)
def test_flat_levels_keep_the_slices_and_look_at_one(name: str) -> None:
    usual, network = NETWORKS.get(name)(1, 2), make_network(NETWORKS.get(name), 1, 2, (0, 0, 2))
    assert network.stride == (usual.stride[0], usual.stride[1], usual.stride[2] // 4)
    output = network(torch.randn(1, 1, 32, 32, 10))
    assert output.logits.shape == (1, 2, 32, 32, 10)
    depth = network.pad(torch.zeros(1, 1, 32, 32, 10)).shape[-1]
    sizes = [tuple(level.shape[2:]) for level in reversed(output.coarse)]
    assert sizes[:2] == [(16, 16, depth), (8, 8, depth)]
    assert all(size[2] == depth // 2 ** (level + 1) for level, size in enumerate(sizes[2:]))
    assert set(kernels_along(network, 0)) == {3} == set(kernels_along(usual, 2))
    assert kernels_along(network, 2) == KERNELS[name]
    assert network(torch.randn(1, 1, 21, 9, 3)).logits.shape == (1, 2, 21, 9, 3)


@pytest.mark.parametrize(("name", "levels"), [("unet_3d", 4), ("vnet", 5), ("dynunet", 4)])
def test_as_many_flat_levels_as_levels_are_a_2d_network(name: str, levels: int) -> None:
    network = make_network(NETWORKS.get(name), 1, 2, (0, 0, levels))
    assert network.stride[2] == 1 and set(kernels_along(network, 2)) == {1}
    for wrong in ((0, 0, levels + 1), (levels, levels, levels)):
        with pytest.raises(ValueError, match=f"--flat_levels .*the network has {levels} levels; pass at most {levels}"):
            make_network(NETWORKS.get(name), 1, 2, wrong)
    survey = Survey((30.0, 40.0, 9.0), (1.0, 1.0, 1.0))
    assert fitting_patch(survey, None, parts=(8, 8, 1)) == (24, 40, 9)
    assert fitting_patch(survey, None, (112, 112, 80), (8, 8, 1)) == (32, 40, 9)


def test_networks_without_flat_levels_refuse_them_and_are_given_none() -> None:
    with pytest.raises(ValueError, match="--flat_levels 0 0 2: SegResNet3D has none; pass 0 0 0"):
        make_network(NETWORKS.get("segresnet"), 1, 2, (0, 0, 2))
    source = Thick()
    config = fit_to_cases(resolve_config(small_config(source, model="segresnet"), source), source, ["ball00"])
    assert config.flat_levels == (0, 0, 0)


@pytest.mark.parametrize(
    ("spacing", "flat"),
    [
        ((0.625, 0.625, 0.625), (0, 0, 0)),
        ((0.7, 0.7, 1.37), (0, 0, 0)),
        ((0.8, 0.8, 2.5), (0, 0, 1)),
        ((1.5, 1.5, 10.0), (0, 0, 2)),  # 10 mm against 1.5, 3, 6: slices join in at the third level
        ((6.0, 0.7, 1.5), (3, 0, 1)),
        ((0.3, 0.3, 6.0), (0, 0, 3)),  # 20 times, and no network has many more levels
        ((1.25, 1.25, 5.0), (0, 0, 2)),
    ],
)
def test_fitting_flat_levels_by_hand(spacing: tuple, flat: tuple) -> None:
    assert fitting_flat_levels(spacing) == flat


def test_a_patch_of_thick_slices_needs_no_padding() -> None:
    cine = Survey((324.0, 384.0, 100.0), (1.5, 1.5, 10.0))  # 216 x 256 x 10 voxels
    assert fitting_patch(cine, None, parts=(8, 8, 2)) == (160, 160, 10)
    assert fitting_patch(cine, None) == (128, 128, 16)
    assert fitting_patch(cine, None, (112, 112, 80), (8, 8, 2)) == (112, 112, 10)
    assert fitting_patch(Survey((9.0, 30.0, 2.0), (1.0, 1.0, 2.0)), None, parts=(8, 8, 1)) == (16, 24, 1)


class Thick(BallSource):
    """Balls in sagittal slices, four times as thick as wide: the first stored axis runs up."""

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        volume = super().load(case_id, with_label=with_label)
        return Volume(case_id, volume.image, volume.label, self.grid(case_id).affine, (4.0, 1.0, 1.0))

    def grid(self, case_id: str) -> Grid:
        return Grid((20, 18, 16), np.array([[0.0, 1, 0, 0], [0, 0, 1, 0], [4, 0, 0, 0], [0, 0, 0, 1]]))


@pytest.mark.parametrize(
    ("changes", "flat"),
    [({}, (0, 0, 2)), ({"orientation": "stored"}, (2, 0, 0)), ({"spacing": (2.0, 1.0, 1.0)}, (1, 0, 0))],
)
def test_flat_levels_follow_the_voxels_that_the_network_sees(changes: dict, flat: tuple) -> None:
    source = Thick()
    config = fit_to_cases(small_config(source, **changes), source, ["ball00", "ball01"])
    assert config.flat_levels == flat and not source.label_reads
    assert build_network(config, DataFacts.of(source)).flat_levels == flat
    given = fit_to_cases(small_config(source, flat_levels=(0, 0, 0), **changes), source, ["ball00"])
    assert given.flat_levels == (0, 0, 0)


@pytest.mark.parametrize("method", ["best", "mc_net"])
def test_a_flat_network_trains_and_comes_back_from_its_checkpoint(tmp_path: Path, method: str) -> None:
    source = Thick()
    patch = (16, 16, 4)
    trainer = small_trainer(source, tmp_path, method=method, flat_levels=(0, 0, 2), patch_size=patch, max_iteration=2)
    trainer.fit()
    bundle = load_for_inference(tmp_path / "last.pt", torch.device("cpu"))
    assert bundle.network.flat_levels == (0, 0, 2)
    images = torch.randn(1, 1, *patch)
    with torch.no_grad():
        found = bundle.network.eval()(images).logits
        expected = trainer.method.inference_network().eval()(images).logits
    assert torch.equal(found, expected)


def test_negative_flat_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="--flat_levels 0 0 -1: every value must be at least 0"):
        small_config(BallSource(), flat_levels=(0, 0, -1))
