"""Sliding windows against a naive loop over voxels and windows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from myutils.sliding_window import _padded, axis_weights, stitched_rows, window_starts

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "window", "overlap", "expected"),
    [
        (8, 8, 0.5, [0]),
        (9, 8, 0.5, [0, 1]),
        (16, 8, 0.5, [0, 4, 8]),
        (206, 112, 0.5, [0, 47, 94]),
        (20, 8, 0.0, [0, 6, 12]),
        (4, 2, 0.9, [0, 1, 2]),
        (80, 40, 0.8, [0, 8, 16, 24, 32, 40]),
    ],
)
def test_windows_are_evenly_spaced_and_overlap_as_asked(
    size: int, window: int, overlap: float, expected: list[int]
) -> None:
    assert window_starts(size, window, overlap) == expected


def test_weights_are_gaussians_that_sum_to_one() -> None:
    starts = window_starts(21, 8, 0.5)
    parts = axis_weights(starts, 8, 21, 0.125)
    total = torch.zeros(21)
    for start, part in zip(starts, parts, strict=True):
        total[start : start + 8] += part
    torch.testing.assert_close(total, torch.ones(21))
    alone = axis_weights([0, 20], 8, 28, 0.125)[0]  # no neighbour: all of the weight, at the far ends too
    torch.testing.assert_close(alone, torch.ones(8))
    first, second = axis_weights([0, 4], 8, 12, 0.125)
    nearer = math.exp(-0.5 * (1.5 / 1.0) ** 2) / math.exp(-0.5 * (2.5 / 1.0) ** 2)  # voxel 5: centres 3.5 and 7.5
    assert float(first[5] / second[1]) == pytest.approx(nearer, rel=1e-4)


def window_score(window: Tensor) -> Tensor:
    """Two classes that depend on the place in the window: (B, 1, x, y, z) to (B, 2, x, y, z)."""
    ramp = torch.arange(window.shape[2], dtype=torch.float32)[:, None, None]
    return torch.cat([window * ramp, window.mean((2, 3, 4), keepdim=True) - window], 1)


@pytest.mark.parametrize("size", [(6, 6, 6), (13, 9, 7), (20, 4, 6), (3, 2, 11), (7, 6, 6)])
@pytest.mark.parametrize("window_batch", [1, 3, 50])
def test_rows_equal_a_naive_loop(size: tuple[int, int, int], window_batch: int) -> None:
    torch.manual_seed(0)
    image, window = torch.rand(1, *size) + 1, (6, 4, 6)
    low = [max(0, w - n) // 2 for w, n in zip(window, size, strict=True)]
    padded = torch.full((1, *(max(w, n) for w, n in zip(window, size, strict=True))), float(image.min()))
    inside = tuple(slice(start, start + n) for start, n in zip(low, size, strict=True))
    padded[(slice(None), *inside)] = image
    expected, weights = torch.zeros(2, *padded.shape[1:]), torch.zeros(padded.shape[1:])
    bells = [torch.exp(-0.5 * ((torch.arange(w) - (w - 1) / 2) / (w / 5)) ** 2) for w in window]
    bell = bells[0][:, None, None] * bells[1][:, None] * bells[2]
    starts = [window_starts(n, w, 0.5) for n, w in zip(padded.shape[1:], window, strict=True)]
    for x in starts[0]:
        for y in starts[1]:
            for z in starts[2]:
                box = (slice(x, x + 6), slice(y, y + 4), slice(z, z + 6))
                expected[(slice(None), *box)] += bell * window_score(padded[(slice(None), *box)][None])[0]
                weights[box] += bell
    expected = (expected / weights)[(slice(None), *inside)]
    found, covered = torch.zeros_like(expected), []
    for rows, values in stitched_rows(
        window_score, image, 2, window=window, overlap=0.5, sigma=0.2, window_batch=window_batch, device=CPU
    ):
        found[:, rows] = values
        covered += range(rows.start, rows.stop)
    assert covered == list(range(size[0]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window_batch", [1, 3])
def test_windows_that_show_nothing_are_scored_once(window_batch: int) -> None:
    torch.manual_seed(0)
    image = torch.tensor([-1.0, 4.0])[:, None, None, None].repeat(1, 20, 8, 9)
    image[:, 9:12, 2:4, 1:3] += torch.rand(2, 3, 2, 2)
    settings = {"window": (4, 4, 4), "overlap": 0.5, "sigma": 0.2, "device": CPU}
    seen: list[Tensor] = []

    def scores(windows: Tensor) -> Tensor:
        seen.extend(windows)
        return torch.cat([window_score(windows[:, :1]), windows[:, 1:] ** 2], 1)

    found = torch.zeros(3, 20, 8, 9)
    for rows, values in stitched_rows(scores, image, 3, window_batch=window_batch, **settings):  # type: ignore[arg-type]
        found[:, rows] = values
    background = torch.tensor([-1.0, 4.0])[:, None, None, None]
    shown = [bool((window != background).any()) for window in seen]
    assert sum(shown) == 3 * 2 * 2 and len(shown) == sum(shown) + 1  # of 9 * 3 * 4 windows
    noisy = image.clone()  # a least value elsewhere: no window is empty
    noisy[:, 0, 0, 0] -= 1e-6
    seen.clear()
    for rows, values in stitched_rows(scores, noisy, 3, window_batch=window_batch, **settings):  # type: ignore[arg-type]
        torch.testing.assert_close(found[:, rows], values, rtol=1e-4, atol=1e-4)
    assert len(seen) == 9 * 3 * 4


def test_no_whole_map_is_held() -> None:
    """Twice as long an image takes no larger store for the scores."""
    settings = {"window": (8, 4, 4), "overlap": 0.5, "sigma": 0.2, "window_batch": 2, "device": CPU}
    stores = []
    for length in (40, 80):
        pieces = list(stitched_rows(window_score, torch.rand(1, length, 4, 4), 2, **settings))  # type: ignore[arg-type]
        assert sum(values.shape[1] for _, values in pieces) == length
        stores.append({values.untyped_storage().nbytes() for _, values in pieces})
    assert stores[0] == stores[1] == {2 * 8 * 4 * 4 * 4}


@pytest.mark.parametrize(
    ("wrong", "message"), [({"overlap": 1.5}, "overlap 1.5: .* below 1"), ({"sigma": 0}, "sigma 0:")]
)
def test_impossible_windows_are_refused(wrong: dict, message: str) -> None:
    settings = {"window": (4, 4, 4), "overlap": 0.5, "sigma": 0.2, "window_batch": 2, "device": CPU} | wrong
    with pytest.raises(ValueError, match=message):
        next(stitched_rows(window_score, torch.rand(1, 8, 8, 8), 2, **settings))  # type: ignore[arg-type]


def test_padding_is_each_channels_least_value() -> None:
    image = torch.stack([torch.rand(3, 4, 5) + 2.0, torch.rand(3, 4, 5) - 7.0])
    padded, inner = _padded(image, (8, 4, 6))
    assert padded.shape == (2, 8, 4, 6) and torch.equal(padded[(slice(None), *inner)], image)
    assert torch.equal(padded.amin((1, 2, 3)), image.amin((1, 2, 3)))
    assert torch.equal(padded[:, 0, 0, 0], image.amin((1, 2, 3)))


def test_one_score_per_voxel_is_put_together_too() -> None:
    """The band's rows move within one block of memory, where PyTorch refuses to copy onto what it reads."""
    image = torch.arange(7.0)[None, :, None, None].expand(1, 7, 2, 2)
    settings = {"window": (4, 2, 2), "overlap": 0.75, "sigma": 0.2, "window_batch": 2, "device": CPU}
    found = stitched_rows(lambda windows: 2 * windows, image, 1, **settings)  # type: ignore[arg-type]
    pieces = [values.clone() for _, values in found]
    torch.testing.assert_close(torch.cat(pieces, 1), 2 * image)
