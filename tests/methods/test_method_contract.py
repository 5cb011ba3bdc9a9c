"""What a new method or network gets wrong is named at its first step, not trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from conftest import BallSource
from helpers_runs import PointwiseNetwork, random_batch, small_config, small_method, small_trainer
from torch import Tensor, nn

from myutils.build import DataFacts, build_network
from myutils.methods.base import METHODS, LossTerm, StepOutput
from myutils.methods.step_output import fingerprint, require_gradients, require_pictures, require_terms, warn_if_still
from networks.base import NETWORKS, SegmentationOutput, make_network

LOSS = torch.ones(2, 3, requires_grad=True)


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        (LOSS.mean(), r"a step gave a Tensor; return StepOutput\("),
        (StepOutput({}), "a step gave no loss term"),
        (StepOutput({"a": LOSS.mean()}), "loss term 'a' is a Tensor; return LossTerm"),  # type: ignore[dict-item]
        (StepOutput({"a": LossTerm(0.5, 1.0)}), "loss term 'a' is a float; return LossTerm"),  # type: ignore[arg-type]
        (StepOutput({"a": LossTerm(LOSS, 1.0)}), r"loss term 'a' has shape \(2, 3\); return a scalar"),
        (StepOutput({"total": LossTerm(LOSS.mean(), 1.0)}, {"lr": LOSS.mean()}), "'total', 'lr': the log has values"),
        (
            StepOutput({"a": LossTerm(LOSS.mean(), 1.0)}, {"b": torch.zeros(1)}),
            r"scalar 'b' has shape \(1,\); return one number",
        ),
        (StepOutput({"a": LossTerm(LOSS.mean(), float("nan"))}), "loss term 'a' has the weight nan"),
        (StepOutput({"a": LossTerm(LOSS.mean().detach(), 1.0)}), "loss term 'a' has no gradient"),
    ],
)
def test_an_output_that_breaks_the_contract_is_refused(output: Any, fault: str) -> None:
    require_terms(StepOutput({"a": LossTerm(LOSS.mean(), 0.0)}), "mine")
    with pytest.raises(ValueError, match=f"--method mine: {fault}"):
        require_terms(output, "mine")
    method = small_method("supervised")
    method.supervised_losses = lambda *_: output
    with pytest.raises(ValueError, match="--method supervised: "):
        method(random_batch(4, 0), 0)


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        ({"logits_l": torch.zeros(2, 3, 8, 8, 8)}, None),
        ({"logits_l": torch.zeros(4, 3, 8, 8, 8)}, r"logits_l \(4, 3, 8, 8, 8\) beside labels \(2, 8, 8, 8\)"),
        (
            {"logits_l": torch.zeros(2, 3, 8, 8, 8), "labels_l": torch.zeros(1, 8, 8, 8)},
            r"beside labels \(1, 8, 8, 8\)",
        ),
        ({"pseudo_labels": torch.zeros(2, 8, 8, 8)}, None),
        ({"pseudo_labels": torch.zeros(2, 3, 8, 8, 8)}, r"pseudo_labels \(2, 3, 8, 8, 8\); return \(2, 8, 8, 8\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(made: dict[str, Any], fault: str | None) -> None:
    output, batch = StepOutput({"a": LossTerm(LOSS.mean(), 1.0)}, **made), random_batch(2, 2, size=8)
    if fault is None:
        require_pictures(output, batch, "mine")
        return
    with pytest.raises(ValueError, match=f"--method mine: .*{fault}"):
        require_pictures(output, batch, "mine")


def test_a_parameter_that_takes_no_part_is_named_at_the_first_step(tmp_path: Path) -> None:
    trainer = small_trainer(BallSource(), tmp_path, warmup_iteration=1)
    trainer.method.forgotten = nn.Linear(2, 2)
    trainer.train_step(trainer.method, random_batch(4, 0), 0)  # a warm-up leaves heads idle
    with pytest.raises(ValueError, match=r"MeanTeacher does not train 'forgotten.weight', 'forgotten.bias': "):
        trainer.train_step(trainer.method, random_batch(), 1)


def test_a_parameter_that_the_optimizer_does_not_have_is_named() -> None:
    layer = nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    require_gradients(layer, layer.parameters())
    with pytest.raises(ValueError, match="Linear does not train 'bias'"):
        require_gradients(layer, [layer.weight])


def test_a_network_that_never_moves_is_named_after_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_trainer(BallSource(), tmp_path / "a").fit()
    assert "has not moved" not in caplog.text
    trainer = small_trainer(BallSource(), tmp_path / "b")
    trainer.method.after_step = lambda step: None  # type: ignore[method-assign]
    trainer.fit()
    assert caplog.text.count("the network that segments has not moved in this training") == 1
    layer = nn.Linear(2, 1)
    before = fingerprint(layer)
    with torch.no_grad():
        layer.bias += 1e-3
    caplog.clear()
    warn_if_still(layer, before)
    assert not caplog.text


def test_defaults_of_settings_that_there_are_not_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS.get("mean_teacher"), "defaults", MappingProxyType({"consistancy": 0.5}))
    with pytest.raises(ValueError, match=r"MeanTeacher.defaults has 'consistancy'; known: consistency, "):
        small_config(BallSource(), method="mean_teacher")


@pytest.mark.parametrize(
    ("logits", "features", "fault"),
    [
        ((3, 16), (1, 16), r"logits have shape \(1, 3, 16, 16, 16\); expected \(B, num_classes 2, 16, 16, 16\)"),
        ((2, 8), (1, 16), r"logits have shape \(1, 2, 8, 8, 8\)"),
        ((2, 16), (4, 16), r"features have shape \(1, 4, 16, 16, 16\); expected \(B, feature_dim 1, "),
    ],
)
def test_a_network_of_other_widths_or_sizes_is_refused(
    logits: tuple[int, int], features: tuple[int, int], fault: str
) -> None:
    def output(images: Tensor) -> SegmentationOutput:
        found = (torch.zeros(1, width, size, size, size) for width, size in (logits, features))
        return SegmentationOutput(*found)

    with pytest.raises(ValueError, match=f"PointwiseNetwork: {fault}"):
        PointwiseNetwork(output, 2)(torch.zeros(1, 1, 16, 16, 16))


def test_a_network_that_is_not_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS.get("unet_3d")(1, 2)
    network.branch.decoder = nn.Conv3d(1, 1, 1)
    network.branch.decoder.forward = lambda encoded: encoded[0]
    with pytest.raises(ValueError, match="Conv3d gave a tensor; return the list"):
        network(torch.zeros(1, 1, 16, 16, 16))
    build: Callable[..., Any] = NETWORKS.get("vnet")

    def without_stride(*sizes: int) -> Any:
        made = build(*sizes)
        del made.stride
        return made

    with pytest.raises(ValueError, match="VNet sets no stride; its constructor has to"):
        make_network(without_stride, 1, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "value", "fault"),
    [
        ("stride", 8, r"has stride 8; give whole numbers for X, Y and Z, as \(8, 8, 8\)"),
        ("stride", (8, 8), r"has stride \(8, 8\); give"),
        ("stride", (8.0, 8.0, 8.0), r"has stride \(8\.0, 8\.0, 8\.0\); give"),
        ("branch", nn.Identity(), r"\.branch is a Identity; give a Branch"),
    ],
)
def test_a_network_whose_parts_are_of_another_kind_is_refused(part: str, value: object, fault: str) -> None:
    class Odd(NETWORKS.get("unet_3d")):  # type: ignore[misc]
        def __init__(self, in_channels: int, num_classes: int) -> None:
            super().__init__(in_channels, num_classes)
            setattr(self, part, value)

    with pytest.raises(ValueError, match=f"Odd ?{fault}"):
        make_network(Odd, 1, 2)


def test_a_network_whose_outputs_are_not_as_stated_is_refused() -> None:
    network = NETWORKS.get("unet_3d")(1, 2)
    network.coarse_dims = network.coarse_dims[::-1]
    with pytest.raises(
        ValueError, match=r"UNet3D: .* coarse levels have \(64, 32\) channels; its coarse_dims are \(32, 64\)"
    ):
        network(torch.zeros(1, 1, 16, 16, 16))
    network = NETWORKS.get("unet_3d")(1, 2)
    network.branch.classifier.forward = lambda features: (features, features)
    with pytest.raises(ValueError, match=r"Conv3d gave a tuple; return the logits alone"):
        network(torch.zeros(1, 1, 16, 16, 16))


def test_a_network_that_cannot_be_built_or_run_by_every_method_is_refused() -> None:
    kind = NETWORKS.get("unet_3d")

    class Asking(kind):  # type: ignore[misc, valid-type]
        def __init__(self, in_channels: int, num_classes: int, depth: int) -> None:
            super().__init__(in_channels, num_classes)

    class Narrow(kind):  # type: ignore[misc, valid-type]
        def __init__(self, in_channels: int, num_classes: int) -> None:
            super().__init__(in_channels, num_classes)

    class Forwarding(kind):  # type: ignore[misc, valid-type]
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).logits

    with pytest.raises(ValueError, match=r"Asking\(in_channels, num_classes\): missing .*'depth'; give every other"):
        make_network(Asking, 1, 2)
    with pytest.raises(ValueError, match=r"Narrow\(in_channels, num_classes, flat_levels\): got an unexpected"):
        make_network(Narrow, 1, 2, (0, 0, 1))
    with pytest.raises(ValueError, match=r"Forwarding has a forward of its own.* write encode and set branch"):
        make_network(Forwarding, 1, 2)


def test_batch_normalisation_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    config, facts = small_config(BallSource()), DataFacts.of(BallSource())
    build_network(config, facts)
    assert "batch normalisation" not in caplog.text
    kind = NETWORKS.get("unet_3d")

    class Normalised(kind):  # type: ignore[misc, valid-type]
        def __init__(self, in_channels: int, num_classes: int) -> None:
            super().__init__(in_channels, num_classes)
            self.extra = nn.BatchNorm3d(4)

    monkeypatch.setattr(NETWORKS, "get", lambda name: Normalised)
    build_network(dataclasses.replace(config, model="mine"), facts)
    assert "mine has batch normalisation" in caplog.text
