"""Whole volumes through a network: sliding windows with Gaussian weights, views to average over, label maps.

Contract: a label map needs memory for the image, itself and a band of probabilities, whatever the number of classes;
turned views (``--tta_views``), resampling (``--spacing``) and ``--probabilities`` need whole maps of all classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataloaders.base import Volume
from dataloaders.geometry import READ_ERRORS, Spacing
from dataloaders.preprocess import Preprocess
from myutils.distributed import autocast, resolve_amp
from myutils.inference_views import View, make_views, seen_from, seen_places, slabs
from myutils.pseudo_labels import most_probable
from myutils.sliding_window import stitched_rows
from networks.base import Segmenter
from networks.ensemble import log_of_mean

SCAN_ERRORS = (*READ_ERRORS, RuntimeError, MemoryError)  # of one scan, be it damaged or too large for the memory
AMP_CHOICES = ("auto", "no", "bf16", "fp16")
DEVICE_LIMIT_BYTES = 4 * 1024**3  # of an image and a band of scores that may lie on the network's device
_VOXELS_AT_ONCE = 2**20
_SMALLEST_SIGMA = 0.05  # below, weights underflow where no window is near


@dataclass(frozen=True)
class InferenceOptions:
    """How a volume is cut, run and put together.

    Attributes:
        patch_size: Window size along X, Y, Z in voxels.
        overlap: Share of a window that its neighbour covers too, 0 <= overlap < 1.
        flips: Image axes (0, 1, 2) that views are mirrored along.
        views: Views whose probabilities are averaged: 0 for all mirrored ones (one alone without ``flips``), else the
            image itself and that many less one that are turned and scaled too.
        sigma: Standard deviation of a window's Gaussian weights, as a share of the window, >= 0.05. nnU-Net (Isensee
            et al. 2021) and MONAI take 0.125, which scores a supervised network 0.2 Dice lower (docs/search.md).
        window_batch: Windows per forward pass; None for up to four, as many as hold a million voxels.
        amp: "no", "bf16", "fp16" or "auto" (what the device is fast at); logits are accumulated in float32 always.
    """

    patch_size: tuple[int, int, int]
    overlap: float = 0.5
    flips: tuple[int, ...] = ()
    views: int = 0
    sigma: float = 0.25
    window_batch: int | None = None
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
        if not self.sigma >= _SMALLEST_SIGMA:
            raise ValueError(f"sigma {self.sigma}: pass a share of the window from {_SMALLEST_SIGMA} on, such as 0.25")
        if self.window_batch is not None and self.window_batch < 1:
            raise ValueError(f"window_batch {self.window_batch}: pass at least 1")
        if self.amp not in AMP_CHOICES:
            raise ValueError(f"amp {self.amp!r}: pass one of {', '.join(AMP_CHOICES)}")

    def windows_at_once(self) -> int:
        """Windows per forward pass; more of a large size would take memory and no less time."""
        return self.window_batch or max(1, min(4, _VOXELS_AT_ONCE // math.prod(self.patch_size)))


def _probability_rows(
    network: Segmenter, image: Tensor, options: InferenceOptions, device: torch.device, spacing: Spacing
) -> Iterator[tuple[slice, Tensor]]:
    """Class probabilities of a preprocessed image, a few rows along X at a time, so that no whole map need be held.

    Args:
        network: On ``device``; put into evaluation mode meanwhile, its mode is restored afterwards.
        image: Image (C, X, Y, Z), float32, of any size; one smaller than the window is padded with its
            least value, as training patches are.
        options: Windows, overlap, flips, precision.
        device: Where the network runs.
        spacing: Voxel size of the image in mm, which turned views need.

    Yields:
        Rows of the image, in order, and their probabilities (K, rows, Y, Z), float32, where they were computed.

    Raises:
        ValueError: If the image is not (C, X, Y, Z) with the network's channels, or the network returns values that
            are not finite.

    Note:
        Until it is exhausted or closed, gradients are off and the network is in evaluation mode. Windows are put
        together by the mean of their log-probabilities, which is the softmax of the mean of logits. Views that are
        mirrored are averaged window by window, as probabilities; turned ones need whole maps.
    """
    if image.ndim != 4 or image.shape[0] != network.in_channels:
        raise ValueError(f"image has shape {tuple(image.shape)}; this network takes ({network.in_channels}, X, Y, Z)")
    views = make_views(options.flips, options.views, spacing)
    with evaluation_mode(network), fast_layout(network, device), torch.no_grad():
        rows = _averaged_maps if options.views else _averaged_windows
        for place, probs in rows(network, image.float(), views, options, device):
            if not bool(probs.sum().isfinite()):
                raise ValueError(
                    "the network returned values that are not finite; the image or the weights are damaged"
                )
            yield place, probs


def _averaged_windows(
    network: Segmenter, image: Tensor, views: list[View], options: InferenceOptions, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of probabilities; each window is seen in every view at once."""
    amp = resolve_amp(options.amp, device)

    def logits(windows: Tensor) -> Tensor:
        with autocast(amp, device):
            return network(windows).logits

    def mean_log_probs(windows: Tensor) -> Tensor:
        each = (seen_from(view, logits(seen_from(view, windows)).float().softmax(1)) for view in views)
        return log_of_mean(each, len(views))

    band = options.patch_size[0] * math.prod(image.shape[2:])
    if (image.numel() + band * network.num_classes) * 4 <= DEVICE_LIMIT_BYTES:
        image = image.to(device)
    for rows, values in stitched_rows(
        mean_log_probs if len(views) > 1 else logits,
        image,
        network.num_classes,
        window=options.patch_size,
        overlap=options.overlap,
        sigma=options.sigma,
        window_batch=options.windows_at_once(),
        device=device,
    ):
        yield rows, values.softmax(0)


def _averaged_maps(
    network: Segmenter, image: Tensor, views: list[View], options: InferenceOptions, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of probabilities; the whole image is seen in one view after the other."""
    classes, untouched = network.num_classes, [View((), None)]
    if (2 * image.shape[0] + 3 * classes) * math.prod(image.shape[1:]) * 4 <= DEVICE_LIMIT_BYTES:
        image = image.to(device)

    def whole_map(view: View) -> Tensor:
        whole = image.new_empty(1, classes, *image.shape[1:])
        seen = seen_from(view, image[None])[0]
        for rows, values in _averaged_windows(network, seen, untouched, options, device):
            whole[0, :, rows] = values
        return whole

    total = whole_map(views[0])
    for number, view in enumerate(views[1:], start=1):
        total = _add_view(total, whole_map(view), view, number)
    for rows in slabs(image.shape[1]):
        yield rows, total[0, :, rows] / len(views)


def _add_view(total: Tensor, probs: Tensor, view: View, before: int) -> Tensor:
    """``total`` (1, K, X, Y, Z), the sum of ``before`` views, plus the probabilities of one more, put back in place.

    A voxel that the view does not show gets the mean of the views before.
    """
    for rows in slabs(total.shape[2]):
        found, inside = seen_places(view, probs, rows)
        part = total[:, :, rows]
        part.add_(found.where(inside, part / before))
    return total


def sliding_window_probabilities(
    network: Segmenter,
    image: Tensor,
    options: InferenceOptions,
    device: torch.device,
    spacing: Spacing = (1.0, 1.0, 1.0),
) -> Tensor:
    """Class probabilities (K, X, Y, Z), float32, on the CPU, of a preprocessed image; see ``_probability_rows``."""
    whole = torch.empty(network.num_classes, *image.shape[1:])
    for rows, probs in _probability_rows(network, image, options, device, spacing):
        whole[:, rows] = probs
    return whole


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


@contextmanager
def fast_layout(network: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """On the CPU, lay convolution weights out with channels last; they come back as they were.

    The maps follow the weights, and forward passes of large windows take a quarter less time. Backward passes in bf16
    take twice as long, so that training keeps its layout.
    """
    kept = [(p, p.data) for p in network.parameters() if p.ndim == 5] if device.type == "cpu" else []
    for parameter, weight in kept:
        parameter.data = weight.to(memory_format=torch.channels_last_3d)
    try:
        yield
    finally:
        for parameter, weight in kept:
            parameter.data = weight


def predict_probabilities(
    network: Segmenter,
    volume: Volume,
    preprocess: Preprocess,
    options: InferenceOptions,
    device: torch.device,
) -> np.ndarray:
    """Class probabilities (K, X, Y, Z), float32, of a raw case on its own grid."""
    prepared = preprocess(volume)
    image = torch.from_numpy(prepared.image)
    probs = sliding_window_probabilities(network, image, options, device, prepared.spacing)
    return preprocess.restore(probs.numpy(), volume)


def label_map_from(probabilities: np.ndarray) -> np.ndarray:
    """The most probable class of each voxel (X, Y, Z), uint8, from probabilities (K, X, Y, Z)."""
    label_map = np.empty(probabilities.shape[1:], dtype=np.uint8)
    for rows in slabs(len(label_map)):
        label_map[rows] = most_probable(torch.from_numpy(probabilities[:, rows]), 0).numpy()
    return label_map


def predict_label_map(
    network: Segmenter,
    volume: Volume,
    preprocess: Preprocess,
    options: InferenceOptions,
    device: torch.device,
) -> np.ndarray:
    """Class ids (X, Y, Z), uint8, of a raw case on its own grid."""
    prepared = preprocess(volume)
    arguments = (network, torch.from_numpy(prepared.image), options, device, prepared.spacing)
    if preprocess.spacing is None:
        label_map = np.empty(prepared.image.shape[1:], dtype=np.uint8)
        for rows, probs in _probability_rows(*arguments):
            label_map[rows] = most_probable(probs, 0).to(torch.uint8).cpu().numpy()  # of K maps one leaves the device
        label_map = np.ascontiguousarray(preprocess.turn_of(volume).back(label_map))
    else:
        label_map = np.empty(volume.image.shape[1:], dtype=np.uint8)
        whole = sliding_window_probabilities(*arguments).numpy()
        for rows in slabs(len(label_map)):
            label_map[rows] = label_map_from(preprocess.restore(whole, volume, rows))
    return label_map
