"""Normalisation by hand, and resampling of fields whose values are known at every point in space."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dataloaders.base import Volume
from dataloaders.preprocess import Preprocess, foreground_mask, z_score
from dataloaders.resampling import resample, resampled_affine

SLOPE = np.array([2.0, -1.0, 0.5])  # of a linear field, per mm


def volume_of(image: np.ndarray, affine: np.ndarray | None = None, label: np.ndarray | None = None) -> Volume:
    affine = np.eye(4) if affine is None else affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return Volume("case7", np.asarray(image, np.float32), label, affine, (spacing[0], spacing[1], spacing[2]))


def world(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Coordinates (X, Y, Z, 3) in mm of every voxel centre."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def framed(values: list[float]) -> np.ndarray:
    """(1, 4, 4, 4): the values along a line in the middle of zeros."""
    image = np.zeros((1, 4, 4, 4))
    image[0, 1, 1, : len(values)] = values
    return image


def test_mr_is_the_z_score_over_the_nonzero_foreground() -> None:
    image = Preprocess("mr")(volume_of(framed([1, 2, 3]))).image  # mean 2, variance 2/3
    deviation = np.sqrt(2 / 3)
    assert image.dtype == np.float32
    assert image[0, 1, 1, :3] == pytest.approx([-1 / deviation, 0, 1 / deviation])
    assert image[0, 0, 0, 0] == pytest.approx(-2 / deviation)  # the background is shifted along


def test_each_channel_is_normalised_alone() -> None:
    image = np.concatenate([framed([1, 3]), framed([10, 50])])
    normalised = Preprocess("mr")(volume_of(image)).image
    assert normalised[:, 1, 1, :2] == pytest.approx(np.array([[-1, 1], [-1, 1]]))


def test_ct_is_clipped_at_percentiles_of_the_body() -> None:
    image = np.full((1, 12, 12, 12), -1024.0)
    body = np.arange(1000.0).reshape(10, 10, 10)
    image[0, 1:11, 1:11, 1:11] = body
    normalised = Preprocess("ct")(volume_of(image)).image[0, 1:11, 1:11, 1:11]
    clipped = body.clip(0.005 * 999, 0.995 * 999)  # percentiles 0.5 and 99.5 of 0..999
    assert normalised == pytest.approx((clipped - clipped.mean()) / clipped.std(), abs=1e-5)
    assert normalised.flat[0] == normalised.flat[4] < normalised.flat[5]


def test_ct_that_is_taken_for_mr_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    air = volume_of(framed([-1024, 40]))
    Preprocess("ct", ct_range=(-100.0, 300.0))(air)
    Preprocess("mr")(volume_of(framed([-800, 40])))
    assert "Hounsfield" not in caplog.text
    for _ in range(2):
        Preprocess("mr")(air)
    assert caplog.text.count("values below -900, such as the air of CT in Hounsfield units, are normalised as MR") == 1


def test_ct_range_maps_the_same_value_to_the_same_number_in_every_case() -> None:
    preprocess = Preprocess("ct", ct_range=(-100.0, 300.0))
    for others in (-1000.0, 900.0):
        image = np.full((2, 3, 3, 3), others)
        image[:, 1, 1] = [-200.0, 100.0, 200.0]
        found = preprocess(volume_of(image)).image
        assert found.dtype == np.float32
        assert found[0, 1, 1] == pytest.approx([-2, 0, 1]) and found[1, 1, 1] == pytest.approx([-2, 0, 1])
        assert found[0, 0, 0, 0] == pytest.approx(np.sign(others) * 2)


def test_ct_without_any_foreground_is_zeros() -> None:
    assert not Preprocess("ct")(volume_of(np.full((1, 3, 3, 3), -1024.0))).image.any()


@pytest.mark.parametrize("value", [0.0, 7.0, 1e6, 0.1])
@pytest.mark.parametrize("modality", ["mr", "ct"])
def test_constant_image_gives_zeros(value: float, modality: str) -> None:
    assert not Preprocess(modality)(volume_of(np.full((1, 3, 3, 3), value))).image.any()


def test_a_constant_channel_is_named_once_per_case(caplog: pytest.LogCaptureFixture) -> None:
    image = np.concatenate([framed([1, 3]), np.full((1, 4, 4, 4), 7.0)])
    for preprocess in (Preprocess("mr"), Preprocess("ct", ct_range=(0.0, 1.0)), Preprocess("mr")):
        preprocess(replace(volume_of(image), case_id="blank"))
    assert [record.getMessage()[:47] for record in caplog.records] == [
        "case blank: every voxel of channel 1 is 7, so t"
    ]


def test_mask_image_is_scored_over_all_voxels() -> None:
    image = framed([5, 5])
    normalised = Preprocess("mr")(volume_of(image)).image
    assert normalised == pytest.approx((image - image.mean()) / image.std(), abs=1e-5)


def test_foreground_is_what_differs_from_equal_corners() -> None:
    channel = np.full((3, 3, 3), 4.0)
    channel[1, 1, 1] = 9
    assert foreground_mask(channel).sum() == 1
    channel[0, 0, 0] = 1  # corners differ: no border
    assert foreground_mask(channel).all()
    assert z_score(channel, channel[foreground_mask(channel)]).mean() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_voxels_are_refused_with_the_case(bad: float) -> None:
    with pytest.raises(ValueError, match="case case7: 2 voxels are NaN or infinite"):
        Preprocess("mr")(volume_of(framed([1, bad, bad])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modality": "pet"}, "modality 'pet': pass one of mr, ct"),
        ({"modality": "mr", "interpolation": "sinc"}, "pass one of linear, cubic"),
        ({"modality": "mr", "spacing": (1.0, 0.0, 1.0)}, "--spacing .* three positive numbers"),
        ({"modality": "mr", "spacing": (1.0, 1.0)}, "--spacing .* three positive numbers"),
        ({"modality": "mr", "spacing": (1.0, 1.0, float("inf"))}, "--spacing .* three positive numbers"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**arguments)


def test_without_spacing_the_grid_and_label_stay() -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    volume = volume_of(framed([1, 2]), np.diag([1.0, 2, 3, 1]), label)
    out = Preprocess("mr")(volume)
    assert out.label is label and out.affine is volume.affine and out.spacing == volume.spacing


OBLIQUE = np.array([[0.0, -1.5, 0, 10], [1.2, 0, 0, -20], [0, 0, 2.5, 5], [0, 0, 0, 1]])


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 3.0, 2.0), (1.2, 1.5, 2.5)])
def test_linear_ramp_keeps_its_values_in_the_world(order: int, spacing: tuple[float, float, float]) -> None:
    shape = (14, 13, 12)
    old_spacing = np.linalg.norm(OBLIQUE[:3, :3], axis=0)
    ratio = tuple(np.array(spacing) / old_spacing)
    size = tuple(round(count / step) for count, step in zip(shape, ratio, strict=True))
    sampled = resample(world(shape, OBLIQUE) @ SLOPE, size, ratio, order=order)
    affine = resampled_affine(OBLIQUE, shape, size, ratio)
    assert np.linalg.norm(affine[:3, :3], axis=0) == pytest.approx(spacing)
    points = world(size, affine)
    at = (points - OBLIQUE[:3, 3]) @ np.linalg.inv(OBLIQUE[:3, :3]).T  # in voxels of the old grid
    margin = 4 if order == 3 else 0  # beyond the border the border value continues, which a cubic spline sees earlier
    inner = ((at >= margin) & (at <= np.array(shape) - 1 - margin)).all(-1)
    assert inner.sum() >= 18 and np.allclose(sampled[inner], (points @ SLOPE)[inner], atol=0.01 if margin else 1e-9)


def test_call_resamples_image_label_and_affine_together() -> None:
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    ramp = (world((12, 12, 8), affine) @ SLOPE)[None]
    label = (ramp[0] > ramp.mean()).astype(np.uint8)
    out = Preprocess("mr", spacing=(2.0, 1.5, 1.0))(volume_of(ramp, affine, label))
    assert out.image.shape == (1, 6, 8, 16) and out.image.dtype == np.float32
    assert out.label is not None and out.label.shape == (6, 8, 16) and out.label.dtype == np.uint8
    assert out.spacing == (2.0, 1.5, 1.0) and np.linalg.norm(out.affine[:3, :3], axis=0) == pytest.approx(out.spacing)
    old_centre, new_centre = affine @ [5.5, 5.5, 3.5, 1], out.affine @ [2.5, 3.5, 7.5, 1]
    assert new_centre == pytest.approx(old_centre)
    expected = (world((6, 8, 16), out.affine) @ SLOPE - ramp.mean()) / ramp.std()
    inner = (slice(1, -1), slice(1, -1), slice(2, -2))
    assert np.allclose(out.image[0][inner], expected[inner], atol=1e-4)
    assert (out.label[inner] == (expected[inner] > 0)).mean() > 0.9


def test_cubic_splines_stay_within_the_range_of_the_image() -> None:
    image = np.zeros((1, 12, 12, 12), np.float32)
    image[:, 6:] = 1.0
    step = Volume("step", image, None, np.eye(4), (1.0, 1.0, 1.0))
    found = Preprocess("ct", spacing=(0.4, 1.0, 1.0), interpolation="cubic", ct_range=(0.0, 1.0))(step).image
    assert found.min() == -2.0 and found.max() == 2.0  # -2.4 and 2.4 beside the edge without


def test_spacing_that_leaves_hardly_a_voxel_is_refused() -> None:
    volume = volume_of(np.random.default_rng(0).normal(size=(1, 9, 8, 7)), np.diag([1.0, 1.5, 2.0, 1.0]))
    message = (
        r"case7: --spacing of 1 x 3.5 x 5 mm makes 9 x 3 x 3 voxels out of 9 x 8 x 7 of 1 x 1.5 x 2 mm, fewer than 4"
    )
    with pytest.raises(ValueError, match=message):
        Preprocess("mr", spacing=(1.0, 3.5, 5.0))(volume)
    assert Preprocess("mr", spacing=(1.0, 3.0, 5.0))(volume).image.shape == (1, 9, 4, 3)  # the last axis had 7


def test_spacing_that_makes_too_many_voxels_is_refused_before_they_are_made() -> None:
    volume = volume_of(np.random.default_rng(0).normal(size=(1, 60, 50, 40)))
    message = r"--spacing of 0.001 x .* makes 60000 x 50000 x 40000 voxels .* more than 2147483648 in all; .* a larger"
    with pytest.raises(ValueError, match=message):
        Preprocess("mr", spacing=(0.001, 0.001, 0.001))(volume)
    metres = volume_of(volume.image, np.diag([1000.0, 1000, 1000, 1]))
    with pytest.raises(ValueError, match=r"of 1000 x 1000 x 1000 mm.* mend the voxel size or its unit in the header"):
        Preprocess("mr", spacing=(1.0, 1.0, 1.0))(metres)
    Preprocess("mr")(metres)


def test_label_takes_the_nearest_class_and_no_other() -> None:
    label = np.zeros((8, 8, 8), np.uint8)
    label[4:] = 5
    out = Preprocess("mr", spacing=(0.5, 1.0, 1.0), interpolation="cubic")(volume_of(label[None], label=label))
    assert out.label is not None and set(np.unique(out.label)) == {0, 5}
    assert (out.label[:8] == 0).all() and (out.label[8:] == 5).all()


@pytest.mark.parametrize("spacing", [(2.0, 1.0, 3.0), (0.7, 0.9, 1.3), (1.0, 1.0, 50.0)])
@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_restore_gives_the_original_grid(spacing: tuple[float, float, float], interpolation: str) -> None:
    volume = volume_of(np.random.default_rng(0).normal(size=(1, 9, 7, 5)), np.diag([1.0, 1.5, 2.0, 1.0]))
    preprocess = Preprocess("mr", spacing=spacing, interpolation=interpolation)
    size = preprocess(volume).image.shape[1:]
    probabilities = np.stack([np.full(size, 0.25), np.full(size, 0.75)])
    restored = preprocess.restore(probabilities, volume)
    assert restored.shape == (2, 9, 7, 5) and restored.dtype == np.float32
    assert np.allclose(restored[1], 0.75) and np.allclose(restored.sum(0), 1)


def test_restore_puts_a_ramp_back_where_it_was() -> None:
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    volume = volume_of(np.zeros((1, 12, 12, 8)), affine)
    preprocess = Preprocess("mr", spacing=(2.0, 1.5, 1.0))
    working = preprocess(volume)
    ramp = world(working.image.shape[1:], working.affine) @ SLOPE
    restored = preprocess.restore(ramp[None].astype(np.float32), volume)[0]
    inner = (slice(2, -2),) * 3
    assert np.allclose(restored[inner], (world((12, 12, 8), affine) @ SLOPE)[inner], atol=1e-4)


def test_restore_of_some_rows_equals_those_of_the_whole() -> None:
    volume = volume_of(np.random.default_rng(0).normal(size=(1, 9, 7, 5)))
    for spacing in (None, (1.3, 0.8, 2.0)):
        preprocess = Preprocess("mr", spacing)
        probabilities = np.random.default_rng(0).random((2, *preprocess(volume).image.shape[1:]), dtype=np.float32)
        whole = preprocess.restore(probabilities, volume)
        parts = [preprocess.restore(probabilities, volume, rows) for rows in (slice(0, 4), slice(4, 9))]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-5)


def test_restore_without_spacing_changes_nothing_but_the_type() -> None:
    volume = volume_of(np.zeros((1, 3, 4, 5)))
    probabilities = np.random.default_rng(0).random((2, 3, 4, 5))
    restored = Preprocess("mr").restore(probabilities, volume)
    assert restored.dtype == np.float32 and np.allclose(restored, probabilities)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (3, 4, 5)])
def test_restore_refuses_another_grid(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"case case7: probabilities have shape .* expected \(K, 3, 4, 5\)"):
        Preprocess("mr").restore(np.zeros(shape), volume_of(np.zeros((1, 3, 4, 5))))


def test_probabilities_of_a_single_slice_that_is_turned_can_be_handed_to_torch() -> None:
    affine = np.diag([1.0, 1.0, -3.0, 1.0])
    volume = Volume("slice", np.ones((1, 6, 5, 1), np.float32), None, affine, (1.0, 1.0, 3.0))
    preprocess = Preprocess("mr", orientation="ras")
    restored = preprocess.restore(np.ones((2, 6, 5, 1), np.float32), volume)
    assert torch.from_numpy(restored).shape == (2, 6, 5, 1)
