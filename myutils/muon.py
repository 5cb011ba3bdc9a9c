"""Muon: steps of convolution kernels made orthogonal, so that no direction of a layer learns faster than another.

Sources: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (the method, the polynomial); Liu et al. 2025,
arXiv:2502.16982 (weight decay, and the step's size, with which AdamW's rates fit).

Deviation: the Newton-Schulz iteration runs on the small Gram matrix, X_5 = q(X X^T) X, in float32: a third of the time,
and the same within 0.005 of 1. ``torch.optim.Muon`` takes two-dimensional parameters alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_KERNEL_RATE = 3.0  # times the rate of the rest; 1 and 10 on development cases: docs/search.md
_MARK = "kernels"  # the setting that marks their groups
_POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # a + b x^2 + c x^4 times x moves 0.001..1 to 0.7..1.2 in five steps
_STEPS = 5
_SMALLEST = 1e-14  # squared norm; a kernel without a gradient stays where it is
_RMS = 0.2  # of a step's entries, what AdamW's have in practice


def is_kernel(parameter: nn.Parameter, channels: int = 1) -> bool:
    """Whether it is the weight of a 3D convolution that mixes features and voxels: all but the outermost ones do.

    Args:
        parameter: Any of a network.
        channels: Channels of the images, which are no features: what takes so many is the first layer.
    """
    return parameter.ndim == 5 and parameter.shape[1] > channels and parameter[0, 0].numel() > 1


def split_kernels(groups: list[dict[str, Any]], channels: int = 1) -> list[dict[str, Any]]:
    """The same parameters, kernels in groups of their own after the others, as ``Muon`` takes them."""

    def chosen_of(group: dict[str, Any], kernels: bool) -> list[nn.Parameter]:
        return [parameter for parameter in group["params"] if is_kernel(parameter, channels) == kernels]

    rest = [{**group, "params": chosen_of(group, False), _MARK: False} for group in groups]
    kernels = [
        {**group, "params": chosen, _MARK: True, **{rate: _KERNEL_RATE * group[rate] for rate in ("lr", "lr_scale")}}
        for group in groups
        if (chosen := chosen_of(group, True))
    ]
    return rest + kernels


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with ``kernels``: these take Muon's steps.

    A kernel (out, in, x, y, z) is a matrix (out, in * x * y * z), that of a transposed convolution (in, out, x, y, z)
    one (in, out * x * y * z). Its step is the momentum with all singular values near 1, scaled to a root mean square of
    0.2, as large as AdamW's. The kernels' gradients are used up.

    Args:
        groups: Those of ``split_kernels``.
        weight_decay: Decoupled, as in AdamW.
        momentum: Share of the old momentum that a step keeps.
        interval: A kernel moves with every ``interval``-th of its gradients, as many times as far; all enter its
            momentum. The kernels take turns, so that each step costs about the same, and the first turn of most comes
            sooner, with fewer gradients and as far as these.
    """

    def __init__(
        self, groups: list[dict[str, Any]], weight_decay: float, momentum: float = 0.95, interval: int = 1
    ) -> None:
        super().__init__(groups, weight_decay=weight_decay, fused=True)
        self.momentum, self.interval = momentum, interval

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; ``closure`` is AdamW's.

        As AdamW's fused steps, these follow a gradient scaler without a wait for the device: it leaves ``found_inf``,
        1 for a step that must change nothing, and ``grad_scale``, None where the gradients have their own size.
        """
        overflow: Tensor | None = getattr(self, "found_inf", None)
        counts = 1.0 if overflow is None else 1.0 - overflow
        for group in self.param_groups:
            if group[_MARK]:
                rate = counts * group["lr"]
                moves = self._moves(group["params"], counts)
                with _full_precision():
                    factors = _factors([move for _, move, _ in moves])
                    for (kernel, move, gradients), factor in zip(moves, factors, strict=True):
                        lr = rate * gradients
                        kernel.mul_(1 - lr * group["weight_decay"])
                        factor *= -lr * _RMS * max(move.shape) ** 0.5
                        pair = (factor, move) if len(factor) == len(move) else (move, factor)
                        if kernel.is_contiguous():
                            kernel.view(len(kernel), -1).addmm_(*pair)  # the step, without a map of it
                        else:  # laid out channels last, say
                            kernel.add_((pair[0] @ pair[1]).view(kernel.shape))
        return super().step(closure)

    def _moves(self, kernels: list[nn.Parameter], counts: Tensor | float) -> list[tuple[nn.Parameter, Tensor, int]]:
        """Kernels whose turn it is, their momentum as matrices (out, in * x * y * z), gradients since the last turn."""
        moves = []
        for index, kernel in enumerate(kernels):
            if kernel.grad is None:
                continue
            state = self.state[kernel]
            if not state:  # AdamW asks for every "step"
                state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(kernel), "turn": index, "gradients": 0}
            gradient = self._unscaled(kernel.grad, counts)
            kernel.grad = None  # AdamW passes those without one by
            average = state["momentum"].lerp_(gradient, counts * (1 - self.momentum))
            turn = state.get("turn", 0)  # runs of before have none
            state["turn"], state["gradients"] = (turn + 1) % self.interval, state.get("gradients", turn) + 1
            if state["turn"] == 0:
                nesterov = torch.lerp(gradient, average, self.momentum)
                moves.append((kernel, nesterov.flatten(1), state["gradients"]))
                state["gradients"] = 0
        return moves

    def _unscaled(self, gradient: Tensor, counts: Tensor | float) -> Tensor:
        """The gradient in its own size, zero where it overflowed."""
        if not isinstance(counts, Tensor):
            return gradient
        scale = getattr(self, "grad_scale", None)
        return (gradient if scale is None else gradient / scale).where(counts > 0, 0.0)


def orthogonal(matrices: list[Tensor]) -> list[Tensor]:
    """For each matrix (rows, columns) = U S V^T, of any shapes, about U V^T: singular values 0.7 to 1.2.

    Those below a thousandth of the Frobenius norm stay smaller; a zero matrix stays zero.
    """
    factors = zip(_factors(matrices), matrices, strict=True)
    return [factor @ matrix if len(factor) == len(matrix) else matrix @ factor for factor, matrix in factors]


def _factors(matrices: list[Tensor]) -> list[Tensor]:
    """For each matrix what makes it orthogonal, times its shorter side: (rows, rows) or (columns, columns)."""
    alike: dict[int, list[int]] = defaultdict(list)  # by the size of their Gram matrices, to iterate together
    for index, matrix in enumerate(matrices):
        alike[min(matrix.shape)].append(index)
    found = list(matrices)
    for indices in alike.values():
        grams = torch.stack([_gram(matrices[index]) for index in indices])  # (n, side, side)
        squares = grams.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=_SMALLEST)  # of the Frobenius norms
        for index, factor in zip(indices, _polynomial(grams / squares) * squares.rsqrt(), strict=True):
            found[index] = factor
    return found


def _gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix


def _polynomial(grams: Tensor) -> Tensor:
    """q(G) of Gram matrices G = X X^T (n, rows, rows) with a trace of 1: q(G) X is the iteration's result."""
    a, b, c = _POLYNOMIAL
    once = a * torch.eye(grams.shape[1], device=grams.device, dtype=grams.dtype)
    factor = total = torch.baddbmm(once + b * grams, grams, grams, alpha=c)
    for _ in range(_STEPS - 1):
        grams = factor @ grams @ factor
        factor = torch.baddbmm(once + b * grams, grams, grams, alpha=c)
        total = factor @ total
    return total


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products in whole float32: with TF32, which some containers ask for, Gram matrices lose their small values."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
