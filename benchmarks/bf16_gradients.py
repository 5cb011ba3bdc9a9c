"""How far bf16 gradients are from those of float32 on this machine, parameter by parameter.

    python -m benchmarks.bf16_gradients --patch_size 32 32 16

A network is trained for a few steps in float32; then the same batch gives a gradient in float32 and, several times,
under bf16 autocast. Rounding alone leaves a cosine of about 0.99 for each parameter, the same in each call: less, or
another value from call to call, is a kernel at fault, such as the one that ``networks/layers.py`` avoids. Printed: the
cosine of the whole gradient, that of Muon's orthogonal steps, and the parameters that are furthest off.
"""

from __future__ import annotations

import argparse
import platform
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from benchmarks.step_cost import all_labeled, make_batch
from myutils.distributed import autocast, start_process_group
from myutils.losses.segmentation import dice_ce_loss
from myutils.muon import is_kernel, orthogonal
from networks.base import NETWORKS, make_network
from networks.layers import mend_layers

CALLS, SHOWN = 3, 4


def main() -> None:
    """Train, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patch_size", type=int, nargs=3, default=(32, 32, 16))
    parser.add_argument("--model", default="unet_3d")
    parser.add_argument("--flat_levels", type=int, nargs=3, default=(0, 0, 0))
    parser.add_argument("--steps", type=int, default=30, help="training steps before the comparison")
    settings = parser.parse_args()
    _, device = start_process_group()
    torch.manual_seed(0)
    network = make_network(NETWORKS.get(settings.model), 1, 2, tuple(settings.flat_levels))
    mend_layers(network)
    network.to(device).train()
    batch = all_labeled(make_batch(tuple(settings.patch_size), 2, device))
    images, labels = batch.image_l, batch.label_l
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(settings.steps):
        gradients(network, images + 0.1 * torch.randn_like(images), labels, "no")
        optimizer.step()
    exact = gradients(network, images, labels, "no")
    sys.stdout.write(f"torch {torch.__version__}, {platform.machine()}, {device}, {settings.model}, {images.shape}\n")
    for _ in range(CALLS):
        report(network, exact, gradients(network, images, labels, "bf16"))


def gradients(network: nn.Module, images: Tensor, labels: Tensor, amp: str) -> dict[str, Tensor]:
    """Gradient of Dice + cross-entropy for each parameter, float32."""
    network.zero_grad(set_to_none=True)
    with autocast(amp, images.device):
        logits = network(images).logits
    dice_ce_loss(logits, labels).backward()
    return {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}


def report(network: nn.Module, exact: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """One line for the whole, and one for each of the parameters that are furthest off."""
    alike = {name: cosine(value, found[name]) for name, value in exact.items()}
    kernels = [name for name, value in network.named_parameters() if is_kernel(value)]
    steps = [
        torch.cat([step.flatten() for step in orthogonal([gradient[name].flatten(1) for name in kernels])])
        for gradient in (exact, found)
    ]
    whole = [torch.cat([gradient[name].flatten() for name in exact]) for gradient in (exact, found)]
    sys.stdout.write(f"gradient {cosine(*whole):.4f}, orthogonal steps {cosine(*steps):.4f}; lowest:")
    for name in sorted(alike, key=lambda name: alike[name])[:SHOWN]:
        sys.stdout.write(f" {name} {alike[name]:.4f}")
    sys.stdout.write("\n")


def cosine(first: Tensor, second: Tensor) -> float:
    """Cosine of two tensors' values."""
    return float(cosine_similarity(first.flatten(), second.flatten(), 0))


if __name__ == "__main__":
    main()
