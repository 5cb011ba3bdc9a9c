"""What a patch shows: classes as they are, the background outside, turns that its voxels allow, its own structures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import BallSource

from dataloaders.base import Volume
from dataloaders.case_cache import CaseCache
from dataloaders.patches import PatchDataset
from dataloaders.preprocess import Preprocess
from dataloaders.samplers import SampleKey
from dataloaders.transforms import AugmentOptions


class EvenClasses(BallSource):
    """Classes 0, 2 and 4: between two of them is none."""

    num_classes = 5
    class_names = ("background", "one", "ball", "three", "core")

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        volume = super().load(case_id, with_label=with_label)
        return volume if volume.label is None else replace(volume, label=2 * volume.label)


def test_a_turned_label_has_no_class_between_two() -> None:
    options = AugmentOptions((12, 12, 12), affine_share=1.0, foreground_share=1.0)
    patches = PatchDataset(CaseCache(EvenClasses(), Preprocess("mr")), options)
    for seed in range(3):
        assert set(patches[SampleKey("ball00", True, seed)]["label"].unique().tolist()) == {0, 2, 4}


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("affine_share", [0.0, 1.0])
def test_beyond_a_small_volume_is_the_least_value_of_its_image(affine_share: float, labeled: bool) -> None:
    cache = CaseCache(BallSource(size=(4, 4, 4), channels=2), Preprocess("mr"))
    least = cache.get("ball00", with_label=labeled).volume.image.min((1, 2, 3))
    patches = PatchDataset(cache, AugmentOptions((8, 8, 8), affine_share=affine_share, intensity=False))
    image = patches[SampleKey("ball00", labeled, 0)]["image"].numpy()
    assert least.max() < -1 and np.median(image, (1, 2, 3)) == pytest.approx(least)  # 7 voxels in 8 lie outside
    assert image.min((1, 2, 3)) == pytest.approx(least)


def test_a_patch_of_voxels_that_are_not_square_is_not_turned() -> None:
    cache = CaseCache(BallSource(size=(8, 8, 4)), Preprocess("mr"))  # voxels of 1 x 2 x 1 mm
    image = cache.get("ball00", with_label=False).volume.image
    options = AugmentOptions((8, 8, 4), flip_axes=(), rotate90=True, affine_share=0.0)
    patches = PatchDataset(cache, options)
    for seed in range(8):
        assert np.array_equal(patches[SampleKey("ball00", False, seed)]["image"].numpy(), image)


def test_a_labelled_patch_is_centred_on_its_own_structure_not_a_guides() -> None:
    source = BallSource()
    patches = PatchDataset(CaseCache(source, Preprocess("mr")), AugmentOptions((8, 8, 8)), guides=("ball00",))
    case = patches._cache.get("ball03", with_label=True)
    for seed in range(20):
        voxel = patches._target(case, np.random.default_rng(seed))
        assert voxel is not None and case.volume.label is not None and case.volume.label[tuple(voxel)] > 0
    assert source.label_reads == ["ball03"]


def test_a_rare_class_is_a_centre_as_often_as_another() -> None:
    patches = PatchDataset(CaseCache(BallSource(), Preprocess("mr")), AugmentOptions((8, 8, 8)))
    case = patches._cache.get("ball03", with_label=True)
    label = np.asarray(case.volume.label)
    sizes = np.bincount(label.ravel())[1:]
    assert sizes.max() > 3 * sizes.min()
    centres = [patches._target(case, np.random.default_rng(seed)) for seed in range(200)]
    counts = np.bincount([label[tuple(centre)] for centre in centres if centre is not None], minlength=3)
    assert counts[0] == 0 and counts[1:].min() > 70  # of 200, where by size it were at most 50
