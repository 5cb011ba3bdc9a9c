"""The network contract: any input size in, logits and last decoder features of the same size out.

A network is an encoder and a branch (decoder and classifier), so that a method may add branches or change what the
encoder hands over, with any network.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from myutils.registry import Registry
from networks.checkpointing import checkpoint_blocks, is_checkpointed
from networks.layers import ChannelsLastConv3d, mend_layers

Triple = tuple[int, int, int]

_FEWEST_DEEPEST = 8  # voxels at the bottleneck; with four V-Net loses 0.3 to 0.5 Dice (docs/results.md)


class SegmentationOutput(NamedTuple):
    """What a branch makes of a batch.

    Attributes:
        logits: (B, K, X, Y, Z).
        features: Last decoder features (B, E, X, Y, Z).
        coarse: Features (B, E_l, X_l, Y_l, Z_l) of the decoder's other levels, the coarsest first, of the padded input;
            empty where no gradient is recorded, unless the branch ``keeps_coarse``.
    """

    logits: Tensor
    features: Tensor
    coarse: tuple[Tensor, ...] = ()

    def patches(self, chosen: slice) -> SegmentationOutput:
        """The outputs of some patches of the batch."""
        return self._map(lambda value: value[chosen])

    def repeat(self, times: int) -> SegmentationOutput:
        """The outputs of the whole batch, that many times after each other."""
        return self if times == 1 else self._map(lambda value: value.repeat(times, 1, 1, 1, 1))

    def detach(self) -> SegmentationOutput:
        """The same values without a graph."""
        return self._map(Tensor.detach)

    def _map(self, change: Callable[[Tensor], Tensor]) -> SegmentationOutput:
        return SegmentationOutput(change(self.logits), change(self.features), tuple(map(change, self.coarse)))


class Decoder(nn.Module, ABC):
    """From encoder features, the finest first, to those of every decoder level, the coarsest first.

    A subclass says how a level joins what comes from below with the encoder's features of its size.
    """

    def forward(self, encoded: list[Tensor]) -> list[Tensor]:
        """Features (B, E_l, X_l, Y_l, Z_l) of each level; the last have the input's size."""
        *skips, features = encoded
        levels = []
        for level, skip in enumerate(reversed(skips)):
            features = self.join(level, features, skip)
            levels.append(features)
        return levels

    @abstractmethod
    def join(self, level: int, features: Tensor, skip: Tensor) -> Tensor:
        """Features of ``level``, 0 for the coarsest, from those of the level below and the encoder's of its size."""


class Branch(nn.Module):
    """Decoder and classifier: what turns an encoder's features into a segmentation.

    Args:
        decoder: A ``Decoder``, or any module that maps as it does.
        classifier: Maps these to logits (B, K, X, Y, Z), voxel by voxel.

    Attributes:
        keeps_coarse: Whether coarse features are handed out where no gradient is recorded too: they hold memory.
    """

    keeps_coarse: bool = False

    def __init__(self, decoder: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.classifier = classifier

    def forward(self, encoded: list[Tensor]) -> SegmentationOutput:
        """Logits and decoder features."""
        levels = self.decoder(encoded)
        if isinstance(levels, Tensor):
            raise ValueError(f"{type(self.decoder).__name__} gave a tensor; return the list of its levels' features")
        *coarse, features = levels
        logits = self.classifier(features)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{type(self.classifier).__name__} gave a {type(logits).__name__}; return the logits alone"
            )
        wanted = self.keeps_coarse or torch.is_grad_enabled()
        return SegmentationOutput(logits, features, tuple(coarse) if wanted else ())


class Segmenter(nn.Module, ABC):
    """Whatever gives class scores for images: a network, or several as one.

    Attributes:
        in_channels: Number of image channels C.
        num_classes: Number of classes K, the background included.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 2:
            raise ValueError(
                f"in_channels {in_channels} and num_classes {num_classes}: need at least 1 channel and 2 classes "
                "(background and one structure)"
            )
        self.in_channels = in_channels
        self.num_classes = num_classes

    @abstractmethod
    def forward(self, images: Tensor) -> SegmentationOutput:
        """Logits (B, K, X, Y, Z) and features of images (B, C, X, Y, Z) of any size."""


class SegmentationNetwork(Segmenter):
    """Base of all networks: pads the input to what the network divides by, runs it, and crops the output.

    Attributes:
        feature_dim: Width E of the last decoder features.
        coarse_dims: Widths E_l of the decoder's other levels, the coarsest first.
        stride: The network's total downsampling per axis; inputs are padded to a multiple of it.
        branch: The network's own decoder and classifier.
        takes_flat_levels: Whether the class can be built with ``flat_levels``: so many first levels, per axis, that
            neither convolve over nor downsample it. Slices twice as thick as a voxel is wide call for one, four times
            for two.
    """

    takes_flat_levels: ClassVar[bool] = False
    feature_dim: int
    coarse_dims: tuple[int, ...] = ()
    stride: Triple
    branch: Branch

    def __init__(self, in_channels: int, num_classes: int, flat_levels: Triple = (0, 0, 0)) -> None:
        super().__init__(in_channels, num_classes)
        self.flat_levels = flat_levels

    @abstractmethod
    def encode(self, images: Tensor) -> list[Tensor]:
        """Encoder features of images (B, C, X, Y, Z) whose sizes ``stride`` divides, the finest first."""

    def fresh_copy(self) -> SegmentationNetwork:
        """A network of the same kind with weights of its own, drawn from torch's global generator."""
        copy = make_network(type(self), self.in_channels, self.num_classes, self.flat_levels)
        mend_layers(copy, any(isinstance(module, ChannelsLastConv3d) for module in self.modules()))
        if is_checkpointed(self):
            checkpoint_blocks(copy)
        return copy

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Segment images (B, C, X, Y, Z) of any size.

        Returns:
            Logits (B, K, X, Y, Z) and features (B, E, X, Y, Z), of the input's size.

        Raises:
            ValueError: If the input is not 5-dimensional or has the wrong number of channels.
        """
        return self.run_branches(images, [self.branch])[0]

    def run_branches(
        self,
        images: Tensor,
        branches: Sequence[Branch],
        change: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> list[SegmentationOutput]:
        """As ``forward``, for several branches on one pass of the encoder.

        Args:
            images: (B, C, X, Y, Z) of any size.
            branches: Decoders with classifiers, of this network's kind.
            change: Applied to the encoder's features before they are decoded; it may change the batch size.
        """
        if images.ndim != 5 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected (B, {self.in_channels}, X, Y, Z) for this network"
            )
        size = images.shape[2:]
        encoded = self.encode(self.pad(images))
        outputs = [branch(change(encoded) if change else encoded) for branch in branches]
        missing = self._missing(size)
        self._require_shapes(outputs[0], tuple(n + gap for n, gap in zip(size, missing, strict=True)))
        if not any(missing):
            return outputs
        x, y, z = (slice(gap // 2, gap // 2 + n) for gap, n in zip(missing, size, strict=True))
        return [SegmentationOutput(o.logits[..., x, y, z], o.features[..., x, y, z], o.coarse) for o in outputs]

    def _require_shapes(self, output: SegmentationOutput, size: tuple[int, ...]) -> None:
        """Raise a ValueError where a branch's logits or features are not of the widths and the padded size stated."""
        for name, width, found in (
            ("num_classes", self.num_classes, output.logits),
            ("feature_dim", self.feature_dim, output.features),
        ):
            if tuple(found.shape[1:]) != (width, *size):
                kind = "logits" if found is output.logits else "features"
                raise ValueError(
                    f"{type(self).__name__}: {kind} have shape {tuple(found.shape)}; expected (B, {name} {width}, "
                    f"{', '.join(map(str, size))})"
                )
        widths = tuple(features.shape[1] for features in output.coarse)
        if output.coarse and widths != tuple(self.coarse_dims):
            stated = f"its coarse_dims are {self.coarse_dims}, the coarsest first"
            raise ValueError(f"{type(self).__name__}: the decoder's coarse levels have {widths} channels; {stated}")

    def pad(self, values: Tensor) -> Tensor:
        """Values (..., X, Y, Z) with zeros around them, as ``forward`` pads its input: to multiples of ``stride``.

        A small input gets more, so that eight voxels are left at the bottleneck.
        """
        missing = self._missing(values.shape[-3:])
        padding = [side for gap in missing[::-1] for side in (gap // 2, gap - gap // 2)]
        return functional.pad(values, padding) if any(missing) else values

    def _missing(self, size: torch.Size) -> list[int]:
        """Voxels that an input lacks along each axis."""
        deepest = [-(-n // step) for n, step in zip(size, self.stride, strict=True)]
        for axis in range(3):  # of few voxels instance normalisation leaves little: +1 and -1 of two, 0 of one
            if math.prod(deepest) < _FEWEST_DEEPEST:
                deepest[axis] = max(2, deepest[axis])
        return [count * step - n for count, step, n in zip(deepest, self.stride, size, strict=True)]


def make_network(
    kind: type[SegmentationNetwork], in_channels: int, num_classes: int, flat_levels: Triple = (0, 0, 0)
) -> SegmentationNetwork:
    """A network of a class, with flat levels where there are any.

    Raises:
        ValueError: If the class takes none, its constructor asks for more or leaves out what the contract asks for,
            or it has a ``forward`` of its own.
    """
    if any(flat_levels) and not kind.takes_flat_levels:
        raise ValueError(f"--flat_levels {' '.join(map(str, flat_levels))}: {kind.__name__} has none; pass 0 0 0")
    options = {"flat_levels": flat_levels} if any(flat_levels) else {}
    try:
        inspect.signature(kind).bind(in_channels, num_classes, **options)
    except TypeError as error:
        asked = ", ".join(("in_channels", "num_classes", *options))
        raise ValueError(
            f"{kind.__name__} is built as {kind.__name__}({asked}): {error}; give every other argument a default"
        ) from error
    network = kind(in_channels, num_classes, **options)
    if type(network).forward is not SegmentationNetwork.forward:
        raise ValueError(
            f"{type(network).__name__} has a forward of its own, which methods with several decoders go past; "
            "write encode and set branch"
        )
    absent = [name for name in ("feature_dim", "stride", "branch") if not hasattr(network, name)]
    if absent:
        raise ValueError(f"{type(network).__name__} sets no {', '.join(absent)}; its constructor has to")
    stride = network.stride
    if not (
        isinstance(stride, tuple) and len(stride) == 3 and all(isinstance(step, int) and step > 0 for step in stride)
    ):
        raise ValueError(
            f"{type(network).__name__} has stride {stride!r}; give whole numbers for X, Y and Z, as (8, 8, 8)"
        )
    if not isinstance(network.branch, Branch):
        raise ValueError(f"{type(network).__name__}.branch is a {type(network.branch).__name__}; give a Branch")
    return network


NETWORKS: Registry[type[SegmentationNetwork]] = Registry("model", "networks", SegmentationNetwork)
