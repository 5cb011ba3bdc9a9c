"""Patches: crops, views, seeds and what is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import BallSource

from dataloaders import patches
from dataloaders.base import Volume
from dataloaders.case_cache import CaseCache, PreparedCase
from dataloaders.checked_cases import KeptCases
from dataloaders.patches import PatchDataset, collate
from dataloaders.preprocess import Preprocess
from dataloaders.samplers import SampleKey
from dataloaders.transforms import (
    AugmentOptions,
    affine_crop,
    apply_gamma,
    change_intensity,
    choose_corner,
    crop,
    mirror_and_turn,
    random_affine,
    turns_quarterly,
)

PATCH = (8, 8, 8)


def test_choose_corner_reaches_every_offset_and_no_other() -> None:
    rng = np.random.default_rng(0)
    corners = np.stack([choose_corner((10, 8, 6), PATCH, rng) for _ in range(300)])
    assert set(corners[:, 0]) == {0, 1, 2}  # the last offset included
    assert set(corners[:, 1]) == {0}
    assert set(corners[:, 2]) == {-2, -1, 0}  # a small volume lies anywhere in the patch


def test_choose_corner_holds_the_target() -> None:
    rng = np.random.default_rng(0)
    target = np.array([19, 0, 10])
    for _ in range(50):
        corner = choose_corner((20, 20, 20), PATCH, rng, target)
        assert (corner <= target).all() and (target < corner + 8).all() and (corner >= 0).all()
    inner = np.stack([choose_corner((20, 20, 20), PATCH, rng, np.array([10, 9, 11])) for _ in range(200)])
    for axis, target_voxel in enumerate((10, 9, 11)):  # up to a quarter of the patch to either side of its middle
        assert set(target_voxel - inner[:, axis]) == {2, 3, 4, 5, 6}


def test_crop_pads_outside_with_the_fill_value() -> None:
    array = np.arange(8.0).reshape(1, 2, 2, 2)
    patch = crop(array, np.array([-1, 0, 0]), (3, 2, 3), fill=-5)
    assert patch.shape == (1, 3, 2, 3)
    assert (patch[0, 0] == -5).all() and (patch[0, :, :, 2] == -5).all()
    assert np.array_equal(patch[0, 1:, :, :2], array[0])


def test_outside_is_each_channels_own_background() -> None:
    channels = np.stack([np.full((2, 2, 2), 1.0), np.full((2, 2, 2), 7.0)])
    fill, corner = np.array([1.0, 7.0])[:, None, None, None], np.array([-1, 0, 0])
    for patch in (
        crop(channels, corner, (4, 4, 4), fill),
        affine_crop(channels, 1.5 * np.eye(3), corner, (4, 4, 4), order=1, fill=fill),
    ):
        assert np.allclose(patch[0], 1.0) and np.allclose(patch[1], 7.0)


def test_affine_crop_by_identity_is_a_crop() -> None:
    array = np.random.default_rng(0).normal(size=(2, 9, 9, 9)).astype(np.float32)
    corner = np.array([1, 0, -2])
    expected = crop(array, corner, PATCH, fill=0)
    assert np.allclose(affine_crop(array, np.eye(3), corner, PATCH, order=1, fill=0), expected, atol=1e-6)


def test_affine_crop_by_a_shift_of_scale_keeps_the_centre() -> None:
    array = np.zeros((9, 9, 9))
    array[4, 4, 4] = 1
    grown = affine_crop(array, np.eye(3) * 0.5, np.zeros(3, dtype=int), (9, 9, 9), order=1, fill=0)
    assert grown[4, 4, 4] == 1 and grown[3, 4, 4] == pytest.approx(0.5)


def test_random_affine_is_a_rotation_times_a_scale() -> None:
    options = AugmentOptions(PATCH, max_scale=0.1)
    matrix = random_affine(np.random.default_rng(3), options)
    scale = np.cbrt(np.linalg.det(matrix))
    assert np.exp(-0.1) <= scale <= np.exp(0.1)
    assert np.allclose(matrix @ matrix.T, scale**2 * np.eye(3))


def test_random_affine_turns_in_space_not_in_voxels() -> None:
    options, spacing = AugmentOptions(PATCH, max_scale=0.1), (0.5, 1.0, 4.0)
    plain = random_affine(np.random.default_rng(3), options)
    thick = random_affine(np.random.default_rng(3), options, spacing)
    step = np.diag(spacing)
    assert np.allclose(step @ thick @ np.linalg.inv(step), plain)  # in mm the same
    assert np.array_equal(random_affine(np.random.default_rng(3), options, (0.7, 0.7, 0.7)), plain)


def test_turned_patches_of_thick_slices_keep_their_slices() -> None:
    class Slices(BallSource):
        """The number of its slice in each voxel."""

        def load(self, case_id: str, *, with_label: bool) -> Volume:
            image = np.broadcast_to(np.arange(4, dtype=np.float32), (1, 32, 32, 4)).copy()
            return Volume(case_id, image, None, np.diag([1, 1, 8, 1.0]), (1.0, 1.0, 8.0))

    options = AugmentOptions((32, 32, 4), affine_share=1.0, max_scale=0.0, intensity=False, flip_axes=())
    cache = CaseCache(Slices(), Preprocess("mr"))
    normalised = cache.get("ball00", with_label=False).volume.image[0, 0, 0]
    steepest = []
    for seed in range(8):
        image = PatchDataset(cache, options)[SampleKey("ball00", False, seed)]["image"][0].numpy()
        inner = image[4:-4, 4:-4, 1:3]
        steepest.append(np.abs(np.diff(inner, axis=0)).max() / (normalised[1] - normalised[0]))
    assert 0 < max(steepest) < 0.1  # slices from one voxel to its neighbour; tan 12 degrees / 8 is 0.03


def test_mirror_and_turn_treats_image_and_label_alike_and_keeps_forbidden_axes() -> None:
    label = np.arange(512).reshape(PATCH)
    options = AugmentOptions(PATCH, flip_axes=(0,), rotate90=False)
    seen = set()
    for seed in range(20):
        image, turned = mirror_and_turn([label[None], label], np.random.default_rng(seed), options)
        assert np.array_equal(image[0], turned)
        seen.add(turned.tobytes())
    assert seen == {label.tobytes(), np.ascontiguousarray(label[::-1]).tobytes()}


def test_quarter_turns_need_square_patches_of_square_voxels(caplog: pytest.LogCaptureFixture) -> None:
    image = np.arange(4 * 4 * 2, dtype=np.float32).reshape(1, 4, 4, 2)
    options = AugmentOptions((4, 4, 2), flip_axes=(), rotate90=True)
    for spacing, turned in (((0.7, 0.72, 5.0), True), ((3.0, 1.0, 1.0), False)):
        found = [mirror_and_turn([image], np.random.default_rng(seed), options, spacing)[0] for seed in range(8)]
        assert any(not np.array_equal(patch, image) for patch in found) == turned
    assert turns_quarterly((8, 8, 4), (1, 1, 5)) and not turns_quarterly((8, 16, 4), (1, 1, 1))


def test_kept_cases_are_read_once_up_to_a_limit() -> None:
    source = BallSource()
    first = source.load("ball00", with_label=True)
    assert first.label is not None
    kept = KeptCases(source, first.image.nbytes + first.label.nbytes)
    source.label_reads.clear()
    for _ in range(2):
        for case_id in ("ball00", "ball01"):
            kept.load(case_id)
    assert source.label_reads == ["ball00", "ball01", "ball01"]


def test_change_intensity_follows_chance_and_size_and_keeps_the_input() -> None:
    image = np.random.default_rng(0).normal(size=(1, *PATCH)).astype(np.float32)
    before = image.copy()
    gaps = []
    for chance, size in ((0.2, 0.5), (0.8, 0.5), (0.8, 1.0)):
        rngs = [np.random.default_rng(seed) for seed in range(40)]
        changed = [change_intensity(image, rng, chance=chance, size=size) for rng in rngs]
        assert all(c.dtype == np.float32 and c.shape == image.shape for c in changed)
        gaps.append(np.mean([np.abs(c - image).mean() for c in changed]))
    assert np.array_equal(image, before)
    assert gaps[1] > 2 * gaps[0] and gaps[2] > 1.5 * gaps[1]


def test_apply_gamma_by_hand() -> None:
    image = np.array([0.0, 1.0, 4.0], dtype=np.float32).reshape(1, 3, 1, 1)
    assert apply_gamma(image, 2.0).ravel().tolist() == pytest.approx([0.0, 0.25, 4.0])
    assert np.array_equal(apply_gamma(np.ones((2, 2, 2), np.float32), 2.0), np.ones((2, 2, 2)))


def dataset(source: BallSource, **changes: object) -> PatchDataset:
    return PatchDataset(CaseCache(source, Preprocess("mr")), AugmentOptions(PATCH, **changes))


def test_dataset_gives_the_same_patch_for_the_same_key() -> None:
    key = SampleKey("ball00", True, 11)
    first, second = dataset(BallSource())[key], dataset(BallSource())[key]
    assert torch.equal(first["image"], second["image"]) and torch.equal(first["label"], second["label"])
    other = dataset(BallSource())[SampleKey("ball00", True, 12)]
    assert not torch.equal(first["image"], other["image"])


def test_intensities_of_labelled_patches_change_little_and_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(patches, "change_intensity", lambda image, rng, **how: asked.append(how) or image)
    for changes in ({"strong_intensity": 0.7}, {"strong_intensity": 0.7, "intensity": False}):
        made = dataset(BallSource(), **changes)
        assert made[SampleKey("ball00", True, 3)] and made[SampleKey("ball00", False, 3)]
    sizes = {"spacing": BallSource().load("ball00", with_label=False).spacing}
    assert asked == [{"chance": 0.2, "size": 0.5} | sizes, {"chance": 0.8, "size": 0.7} | sizes]


def test_dataset_views_share_their_geometry() -> None:
    for changes in ({"intensity": False}, {"strong_intensity": 0.0}):
        sample = dataset(BallSource(), **changes)[SampleKey("ball00", False, 3)]
        assert torch.equal(sample["image"], sample["strong"][0])
    varied = dataset(BallSource())[SampleKey("ball00", False, 3)]
    assert torch.equal(varied["image"], sample["image"]) and not torch.equal(varied["strong"], sample["strong"])


def test_collate_puts_the_first_strong_view_of_all_patches_first() -> None:
    keys = [SampleKey("ball00", True, 0), SampleKey("ball06", False, 1), SampleKey("ball07", False, 2)]
    one, two = (dataset(BallSource(), strong_views=views) for views in (1, 2))
    batch, single = (collate([made[key] for key in keys]) for made in (two, one))
    assert batch.image_u.shape == (2, 1, *PATCH) and batch.image_u_strong.shape == (4, 1, *PATCH)
    assert torch.equal(batch.image_u_strong[:2], single.image_u_strong)  # more views do not change the first
    assert not torch.equal(batch.image_u_strong[2:], single.image_u_strong)
    samples = [two[key]["strong"] for key in keys[1:]]
    assert torch.equal(batch.image_u_strong, torch.stack([samples[i][v] for v in (0, 1) for i in (0, 1)]))


def test_dataset_never_reads_the_label_of_an_unlabelled_key() -> None:
    source = BallSource()
    sample = dataset(source)[SampleKey("ball01", False, 3)]
    assert source.label_reads == [] and "label" not in sample


def test_dataset_centres_unlabelled_crops_where_a_guide_has_its_structure() -> None:
    source = BallSource(size=(40, 40, 40))
    cache, options = CaseCache(source, Preprocess("mr")), AugmentOptions(PATCH, foreground_share=1.0, intensity=False)
    shares = {}
    for guides in ((), ("ball00",)):
        source.label_reads.clear()
        patches = PatchDataset(cache, options, guides)
        images = [patches[SampleKey("ball01", False, seed)]["image"] for seed in range(40)]
        shares[guides] = float(np.mean([float((image > 1.0).float().mean()) for image in images]))
        assert set(source.label_reads) <= set(guides)
    assert shares[("ball00",)] > 1.3 * shares[()]


def test_dataset_maps_a_guides_voxel_to_the_same_relative_place() -> None:
    source = BallSource()
    patches = PatchDataset(CaseCache(source, Preprocess("mr")), AugmentOptions(PATCH), ("ball00",))
    volume = Volume("x", np.zeros((1, 10, 80, 40), np.float32), None, np.eye(4), (1.0, 1.0, 1.0))
    guide = patches._cache.get("ball00", with_label=True)
    size = np.array(guide.volume.image.shape[1:])
    for seed in range(20):
        place = patches._target(PreparedCase(volume, (), 0.0), np.random.default_rng(seed))
        assert place is not None
        assert ((place >= 0) & (place < (10, 80, 40))).all()
        relative = (place + 0.5) / (10, 80, 40)
        candidates = (np.concatenate(guide.targets) + 0.5) / size
        assert np.abs(candidates - relative).max(1).min() < 0.06


class Unread(np.ndarray):
    """An array that must not be gone through as a whole."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: object, **more: object) -> object:
        small = [np.asarray(each) for each in inputs if isinstance(each, np.ndarray)]
        if any(each.size > 2 * 16**3 for each in small):
            raise AssertionError(f"{ufunc.__name__}.{method} over the whole volume")
        return getattr(ufunc, method)(*(np.asarray(x) if isinstance(x, Unread) else x for x in inputs), **more)


@pytest.mark.parametrize("labeled", [True, False])
def test_dataset_never_goes_through_a_whole_volume_for_a_patch(labeled: bool) -> None:
    cache = CaseCache(BallSource(size=(40, 40, 40)), Preprocess("mr"))
    kept = cache.get("ball00", with_label=labeled)
    volume = replace(kept.volume, image=kept.volume.image.view(Unread))
    cache._cases[("ball00", labeled)] = replace(kept, volume=volume)
    with pytest.raises(AssertionError, match=r"minimum\.reduce"):
        volume.image.min()
    patches = PatchDataset(cache, AugmentOptions((16, 16, 16)))
    for seed in range(8):  # with and without an affine change
        assert patches[SampleKey("ball00", labeled, seed)]["image"].shape == (1, 16, 16, 16)


def test_dataset_oversamples_foreground() -> None:
    source = BallSource(size=(40, 40, 40))
    share = {}
    for foreground_share in (0.0, 1.0):
        made = dataset(source, foreground_share=foreground_share)
        hits = [bool((made[SampleKey("ball00", True, seed)]["label"] > 0).any()) for seed in range(40)]
        share[foreground_share] = np.mean(hits)
    assert share[1.0] == 1.0 and share[0.0] < 0.9


def test_collate_puts_labelled_patches_first_and_carries_no_other_label() -> None:
    made = dataset(BallSource())
    batch = collate([made[SampleKey("ball00", True, 0)], made[SampleKey("ball07", False, 1)]])
    assert batch.image_l.shape == (1, 1, *PATCH) and batch.label_l.shape == (1, *PATCH)
    assert batch.image_u.shape == batch.image_u_strong.shape == (1, 1, *PATCH)
    assert batch.cases_l == ("ball00",) and batch.cases_u == ("ball07",)
    assert not hasattr(batch, "label_u")
