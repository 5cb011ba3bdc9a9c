"""Whole volumes through a network: sliding windows with Gaussian weights, views to average over, label maps.

Image and network meet on the network's device; stitched volumes move to the CPU where they would crowd it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from scipy import ndimage
from torch import Tensor

from dataloaders.base import Volume
from dataloaders.preprocess import Preprocess
from myutils.distributed import autocast, resolve_amp
from myutils.inference_views import View, make_views, seen_from, seen_places
from networks.base import SegmentationNetwork

AMP_CHOICES = ("auto", "no", "bf16", "fp16")
STITCH_LIMIT_BYTES = 4 * 1024**3
_SLAB = 16  # voxels along X that are worked on at a time where a whole volume would be copied


@dataclass(frozen=True)
class InferenceOptions:
    """How a volume is cut, run and put together.

    Attributes:
        patch_size: Window size along X, Y, Z in voxels.
        overlap: Share of a window that its neighbour covers too, 0 <= overlap < 1.
        flips: Image axes (0, 1, 2) that views are mirrored along.
        views: Views whose probabilities are averaged: 0 for all mirrored ones (one alone without ``flips``), else the
            image itself and that many less one that are turned and scaled too.
        window_batch: Windows per forward pass.
        amp: "no", "bf16", "fp16" or "auto" (what the device is fast at); logits are accumulated in float32 always.
    """

    patch_size: tuple[int, int, int]
    overlap: float = 0.5
    flips: tuple[int, ...] = ()
    views: int = 0
    window_batch: int = 4
    amp: str = "no"

    def __post_init__(self) -> None:
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size {self.patch_size}: need three sizes of at least 1 voxel")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap {self.overlap}: pass a value in [0, 1), such as 0.5")
        if len(set(self.flips)) != len(self.flips) or not set(self.flips) <= {0, 1, 2}:
            raise ValueError(f"flips {self.flips}: pass each of the axes 0, 1, 2 at most once")
        if self.views < 0:
            raise ValueError(f"views {self.views}: pass 0 or more")
        if self.window_batch < 1:
            raise ValueError(f"window_batch {self.window_batch}: pass at least 1")
        if self.amp not in AMP_CHOICES:
            raise ValueError(f"amp {self.amp!r}: pass one of {', '.join(AMP_CHOICES)}")


def sliding_window_probabilities(
    network: SegmentationNetwork, image: Tensor, options: InferenceOptions, device: torch.device
) -> Tensor:
    """Class probabilities of a preprocessed image.

    Args:
        network: On ``device``; put into evaluation mode for the call, its mode is restored afterwards.
        image: Image (C, X, Y, Z), float32, of any size; one smaller than the window is padded with its
            least value, as training patches are.
        options: Windows, overlap, flips, precision.
        device: Where the network runs.

    Returns:
        Probabilities (K, X, Y, Z), float32, on the CPU.

    Raises:
        ValueError: If the image is not (C, X, Y, Z) with the network's channels, or the network returns values that
            are not finite.
    """
    if image.ndim != 4 or image.shape[0] != network.in_channels:
        raise ValueError(f"image has shape {tuple(image.shape)}; this network takes ({network.in_channels}, X, Y, Z)")
    images = image[None].float()  # (1, C, X, Y, Z)
    if images.numel() // network.in_channels * (network.num_classes + 1) * 4 <= STITCH_LIMIT_BYTES:
        images = images.to(device)
    total: Tensor | None = None
    views = make_views(options.flips, options.views)
    with evaluation_mode(network), torch.no_grad():
        for number, view in enumerate(views):
            # Whole volumes of K classes are the largest thing here: one is held, while further views are added three.
            probs = _stitched_logits(network, seen_from(view, images), options, device)
            for slab in probs.split(_SLAB, dim=2):
                slab.copy_(slab.softmax(1))
            total = probs if total is None else _add_view(total, probs, view, number)
    if total is None or not bool(total.sum().isfinite()):
        raise ValueError("the network returned values that are not finite; the image or the weights are damaged")
    return total[0].div_(len(views)).cpu()  # (K, X, Y, Z)


def _add_view(total: Tensor, probs: Tensor, view: View, before: int) -> Tensor:
    """``total`` (1, K, X, Y, Z), the sum of ``before`` views, plus the probabilities of one more, put back in place.

    A voxel that the view does not show gets the mean of the views before.
    """
    if view.matrix is None:
        return total.add_(seen_from(view, probs))
    for start in range(0, total.shape[2], _SLAB):
        rows = slice(start, min(start + _SLAB, total.shape[2]))
        found, inside = seen_places(view, probs, rows)
        part = total[:, :, rows]
        part.add_(found.where(inside, part / before))
    return total


def _stitched_logits(
    network: SegmentationNetwork, images: Tensor, options: InferenceOptions, device: torch.device
) -> Tensor:
    amp = resolve_amp(options.amp, device)

    def logits_only(windows: Tensor) -> Tensor:
        with autocast(amp, device):
            logits = network(windows).logits
        return logits.float()

    stitched = sliding_window_inference(
        images,
        roi_size=options.patch_size,
        sw_batch_size=options.window_batch,
        predictor=logits_only,
        overlap=options.overlap,
        mode="gaussian",
        cval=float(images.min()),
        sw_device=device,
        device=images.device,
    )
    if not isinstance(stitched, Tensor):
        raise TypeError(f"sliding windows returned {type(stitched).__name__}; expected one tensor of logits")
    return stitched


@contextmanager
def evaluation_mode(network: torch.nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode and give every submodule its own mode back afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def predict_probabilities(
    network: SegmentationNetwork,
    volume: Volume,
    preprocess: Preprocess,
    options: InferenceOptions,
    device: torch.device,
) -> np.ndarray:
    """Class probabilities (K, X, Y, Z), float32, of a raw case on its own grid."""
    prepared = preprocess(volume)
    probs = sliding_window_probabilities(network, torch.from_numpy(np.array(prepared.image)), options, device)
    return preprocess.restore(probs.numpy(), volume)


def label_map_from(probabilities: np.ndarray, *, keep_largest: bool = False) -> np.ndarray:
    """The most probable class of each voxel (X, Y, Z), uint8, from probabilities (K, X, Y, Z)."""
    label_map = np.empty(probabilities.shape[1:], dtype=np.uint8)
    for start in range(0, len(label_map), _SLAB):
        label_map[start : start + _SLAB] = probabilities[:, start : start + _SLAB].argmax(0)
    return largest_component(label_map) if keep_largest else label_map


def predict_label_map(
    network: SegmentationNetwork,
    volume: Volume,
    preprocess: Preprocess,
    options: InferenceOptions,
    device: torch.device,
    *,
    keep_largest: bool = False,
) -> np.ndarray:
    """Class ids (X, Y, Z), uint8, of a raw case on its own grid."""
    probabilities = predict_probabilities(network, volume, preprocess, options, device)
    return label_map_from(probabilities, keep_largest=keep_largest)


def largest_component(label_map: np.ndarray, connectivity: int = 3) -> np.ndarray:
    """Keep the largest connected part of each class and set the rest to background.

    Args:
        label_map: Class ids (X, Y, Z), integer.
        connectivity: 1 connects voxels that share a face, 2 also those with a common edge, 3 with a common corner.

    Returns:
        A new map of the same shape and type; of parts of equal size the first in array order stays.
    """
    kept = np.zeros_like(label_map)
    touching = ndimage.generate_binary_structure(label_map.ndim, connectivity)
    for class_id, box in enumerate(ndimage.find_objects(label_map.astype(np.int32, copy=False)), start=1):
        if box is None:
            continue
        parts, _ = ndimage.label(label_map[box] == class_id, structure=touching)
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        kept[box][parts == sizes.argmax()] = class_id
    return kept
