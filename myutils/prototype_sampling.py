"""Voxel sampling for the prototype losses: draw positions first, then read only those voxels.

Contract: positions index the flattened voxels (B * X * Y * Z in C order, or N); the only randomness is torch's
global generator of the device that holds the labels. ``quota`` counts the voxels of this process, but where keys are
given: then those of all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from myutils.distributed import concat_ranks
from myutils.rank_batch import draw_rows, rank_count
from networks.layers import has_channels_last

_PADDING_SLACK = 16
_CLASS_IDS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def shared_keys(patches: int, voxels: int, device: torch.device) -> Tensor:
    """Random keys (patches * voxels,) in 0..1 of this rank's patches, the same ones on any number of ranks."""
    return draw_rows(lambda rows: torch.rand(rows, voxels, device=device), patches).reshape(-1)


def sample_per_class(
    class_labels: Tensor,
    num_classes: int,
    quota: int,
    ignore_index: int,
    fixed_size: bool | None = None,
    keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw up to ``quota`` voxels of each class, uniformly and without replacement.

    Every voxel gets a random key, and the ``quota`` smallest keys of each class win. On the CPU, voxels whose key
    cannot win are dropped before the sort (10 ms instead of 90 for 800,000 voxels). On an accelerator the shapes
    may not depend on the values, or the host would have to wait: there the output has a fixed size, and unused
    slots point at an arbitrary voxel and carry the label ``ignore_index``.

    Args:
        class_labels: Class ids of any shape, N voxels in all; ``ignore_index`` marks voxels that are not drawn.
        num_classes: Number of classes K.
        quota: The largest number of voxels of one class.
        ignore_index: Label of voxels to leave out.
        fixed_size: Whether to return K * min(quota, N) slots whatever the labels; default on accelerators, and
            where several ranks draw together.
        keys: ``shared_keys`` (N,) for a draw from the voxels of all ranks, a collective call; None draws keys for these
            voxels alone.

    Returns:
        Flat positions (S,), grouped by class, and their labels (S,), both int64, S <= K * quota.

    Raises:
        ValueError: If an id is outside 0..K-1 (looked at on the CPU only; elsewhere such voxels are left out).
    """
    labels = class_labels.detach().reshape(-1)  # (N,)
    if not labels.numel():
        return labels.long(), labels.long()
    require_class_ids(labels, num_classes, ignore_index)
    codes = labels.long().where(labels != ignore_index, num_classes)  # (N,), K = left out
    together = keys is not None and rank_count() > 1
    if keys is None:
        keys = torch.rand(codes.shape, device=codes.device)  # (N,)
    if fixed_size is None:
        fixed_size = codes.device.type != "cpu" or together
    slots_per_class = min(quota, codes.numel())
    kept = None if codes.device.type != "cpu" else _likely_winners(codes, keys, num_classes, quota)
    if kept is not None:
        codes, keys = codes[kept], keys[kept]
    ordered, order = (codes.double() + keys).sort()  # by class, then by key
    edges = torch.arange(num_classes + 1, device=codes.device, dtype=ordered.dtype)
    starts = torch.searchsorted(ordered, edges)  # (K + 1,)
    slots = starts[:-1, None] + torch.arange(slots_per_class, device=codes.device)  # (K, quota)
    used = slots < starts[1:, None]
    positions = order[slots.clamp(max=codes.numel() - 1)]  # (K, quota)
    if together:
        used &= _among_the_smallest(keys[positions].where(used, torch.inf), quota)
    drawn = codes[positions].masked_fill(~used, ignore_index)
    positions = positions if kept is None else kept[positions]
    if fixed_size:
        return positions.reshape(-1), drawn.reshape(-1)
    return positions[used], drawn[used]


def _among_the_smallest(keys: Tensor, quota: int) -> Tensor:
    """Which keys (K, S) are among the ``quota`` smallest of their class over all ranks."""
    everyone = concat_ranks(keys, dim=1)  # (K, S * ranks)
    return keys <= everyone.sort(dim=1).values[:, min(quota, everyone.shape[1]) - 1, None]


def _likely_winners(codes: Tensor, keys: Tensor, num_classes: int, quota: int) -> Tensor:
    """Positions of the voxels (N,), at least one, whose key may be among the ``quota`` smallest of their class.

    The bound leaves more than 6 standard deviations of room, so that a class falls short of its quota about once
    in 10^9 draws; the draw stays uniform even then.
    """
    counts = torch.bincount(codes, minlength=num_classes + 1)  # (K + 1,)
    bound = (1.1 * quota + 6.0 * quota**0.5 + _PADDING_SLACK) / counts.clamp(min=1)
    bound[num_classes] = 0.0
    kept = (keys < bound.float().index_select(0, codes)).nonzero().squeeze(1)
    return kept if kept.numel() else kept.new_zeros(1)  # one voxel, left out where it has no class


def require_class_ids(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse labels (N,) outside 0..K-1 other than ``ignore_index``; only on the CPU, where looking is free."""
    if labels.dtype not in _CLASS_IDS:
        raise ValueError(f"class labels have dtype {labels.dtype}; pass integer class ids (int64)")
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index {ignore_index} is one of the ids 0..{num_classes - 1}; take another, such as -1"
        )
    if labels.device.type != "cpu" or not labels.numel():
        return
    low, high = torch.aminmax(labels)
    if low >= (-1 if ignore_index == -1 else 0) and high < num_classes:
        return  # the common case in one pass
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
    if wrong.numel():
        ids = sorted(set(wrong.tolist()))[:8]
        raise ValueError(
            f"class ids {ids} are outside 0..{num_classes - 1}; pass ids below num_classes ({num_classes}), "
            f"or {ignore_index} (ignore_index) for voxels without a class"
        )


def pick_voxels(volume: Tensor, positions: Tensor) -> Tensor:
    """Read rows of a dense map without copying or permuting the whole of it.

    Args:
        volume: (B, E, X, Y, Z) or (N, E).
        positions: Flat voxel positions (S,) as ``sample_per_class`` gives them.

    Returns:
        The voxels' vectors (S, E), on the graph of ``volume``.
    """
    if volume.ndim == 2:
        return volume[positions]
    if has_channels_last(volume):
        return volume.movedim(1, -1).flatten(0, 3).index_select(0, positions)
    width, size = volume.shape[1], max(1, volume[0, 0].numel())
    first = (positions // size) * (width * size) + positions % size  # of a voxel's values, a patch's lie in C order
    values = first[:, None] + size * torch.arange(width, device=positions.device)  # (S, E)
    return volume.flatten().index_select(0, values.flatten()).view(values.shape)  # half the time of volume[b, :, v]
