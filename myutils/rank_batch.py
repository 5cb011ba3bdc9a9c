"""One batch over all ranks: random draws and rows as one process with the whole batch would have them.

Contract: the ranks' seeds are equal, and row i of rank r is row i * N + r of the whole batch of N ranks, as
``StepSampler`` deals patches out; where there is one process nothing is sent and nothing more is drawn. All but
``draw_rows`` are collective: every rank calls them, in the same order, with rows of equal shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from myutils.distributed import concat_ranks, in_group


def rank_count() -> int:
    """Number of ranks N, 1 where there is one process."""
    return dist.get_world_size() if in_group() else 1


def draw_rows(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """This rank's part of one draw for the whole batch.

    Args:
        draw: Called with the number of rows of the whole batch; returns as many.
        rows: Rows of this rank.
    """
    return draw(rows * rank_count())[dist.get_rank() :: rank_count()] if in_group() else draw(rows)


def fetch_rows(rows: Tensor, wanted: Tensor) -> Tensor:
    """The rows that this rank's part of the whole batch asks for, wherever they are; without gradient.

    What is sent does not grow with the number of ranks: each gets the rows that it asked for and no others.

    Args:
        rows: This rank's rows (R, ...).
        wanted: For each row of the whole batch the number of the row that it wants, in 0..R * N - 1: int64 on the host
            (B * N,), equal on all ranks.

    Returns:
        (B, ...).
    """
    if not in_group():
        return rows.detach()[wanted.to(rows.device, non_blocking=True)]
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = rows.detach().contiguous()
    found = rows.new_empty(len(wanted) // world, *rows.shape[1:])
    messages = []
    for asking, source in enumerate(wanted.tolist()):
        asks, has = asking % world, source % world
        if asks == has == rank:
            found[asking // world] = rows[source // world]
        elif has == rank:
            messages.append(dist.P2POp(dist.isend, rows[source // world], asks))
        elif asks == rank:
            messages.append(dist.P2POp(dist.irecv, found[asking // world], has))
    for message in dist.batch_isend_irecv(messages) if messages else ():
        message.wait()
    return found


def all_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks (R * N, ...), rank 0's first, on the graph of each rank's own.

    What is made of them must be the same on every rank: each then has the loss of the whole batch, and the mean of the
    ranks' gradients, which DDP takes, is its gradient.
    """
    return torch.as_tensor(_AllRows.apply(rows)) if in_group() else rows


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        return concat_ranks(rows.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        first = dist.get_rank() * ctx.count
        return gradient[first : first + ctx.count] * dist.get_world_size()
