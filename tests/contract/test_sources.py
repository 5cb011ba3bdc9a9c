"""Every registered data source keeps the contract: a new file in dataloaders/ is tested on arrival."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from source_makers import MAKERS, Instance

from dataloaders.base import SOURCES, SourceOptions


@pytest.fixture(params=sorted(MAKERS))
def instance(request: pytest.FixtureRequest, tmp_path: Path) -> Instance:
    return MAKERS[request.param](tmp_path)


def test_every_registered_source_has_a_maker() -> None:
    assert {name.split(",")[0] for name in MAKERS} == set(SOURCES.names()), (
        "add a maker for the new source to source_makers.py, so that its contract is tested"
    )


def test_source_states_its_classes_and_channels(instance: Instance) -> None:
    source = instance.source
    assert source.num_classes == len(source.class_names) >= 2 and source.in_channels >= 1
    assert source.class_names[0] == "background" and len(set(source.class_names)) == source.num_classes
    assert source.modality in ("mr", "ct") and set(source.flip_axes) <= {0, 1, 2}


def test_source_lists_each_case_once_and_hands_out_copies(instance: Instance) -> None:
    source = instance.source
    ids = source.case_ids()
    assert ids and len(set(ids)) == len(ids)
    source.case_ids().clear()
    source.labeled_ids().clear()
    assert source.case_ids() == ids and source.labeled_ids()


def test_labeled_and_listed_ids_are_case_ids_in_order(instance: Instance) -> None:
    source = instance.source
    ids, labeled = source.case_ids(), source.labeled_ids()
    assert labeled == [case_id for case_id in ids if case_id in set(labeled)]
    assert {*(source.official_train() or ()), *(source.official_test() or ())} <= set(ids)


def test_volume_has_the_stated_types_and_shapes(instance: Instance) -> None:
    source = instance.source
    for case_id in source.case_ids():
        volume = source.load(case_id, with_label=case_id in source.labeled_ids())
        assert volume.case_id == case_id and volume.image.dtype == np.float32
        assert volume.image.ndim == 4 and volume.image.shape[0] == source.in_channels
        assert volume.affine.shape == (4, 4) and volume.affine.dtype == np.float64
        assert volume.affine[3].tolist() == [0, 0, 0, 1]
        assert volume.spacing == pytest.approx(np.linalg.norm(volume.affine[:3, :3], axis=0))
        if case_id in source.labeled_ids():
            assert volume.label is not None and volume.label.dtype == np.uint8
            assert volume.label.shape == volume.image.shape[1:] and 0 < volume.label.max() < source.num_classes
        else:
            assert volume.label is None


def test_headers_say_what_the_voxels_are(instance: Instance) -> None:
    source = instance.source
    for case_id in source.case_ids():
        volume, grid = source.load(case_id, with_label=False), source.grid(case_id)
        assert grid.shape == volume.image.shape[1:]
        assert grid.affine == pytest.approx(volume.affine, abs=1e-5)
        assert source.header_channels(case_id) == volume.image.shape[0]


def test_load_without_label_opens_no_label(instance: Instance) -> None:
    source = instance.source
    case_id = source.labeled_ids()[0]
    before = source.load(case_id, with_label=False)
    instance.remove_label(case_id)
    after = source.load(case_id, with_label=False)
    assert before.label is None and after.label is None
    assert np.array_equal(after.image, before.image)
    with pytest.raises(FileNotFoundError):
        source.load(case_id, with_label=True)


def test_label_of_an_unlabeled_case_is_a_missing_file(instance: Instance) -> None:
    source = instance.source
    for case_id in set(source.case_ids()) - set(source.labeled_ids()):
        with pytest.raises(FileNotFoundError, match=case_id):
            source.load(case_id, with_label=True)


def test_unknown_case_id_is_refused_by_name(instance: Instance) -> None:
    first = instance.source.case_ids()[0]
    with pytest.raises(FileNotFoundError, match=rf"'no_such_case' is not in .*{first}"):
        instance.source.load("no_such_case", with_label=False)


def test_source_survives_the_way_to_a_loader_worker(instance: Instance) -> None:
    source = instance.source
    case_id = source.case_ids()[-1]
    copy = pickle.loads(pickle.dumps(source))
    image = copy.load(case_id, with_label=False).image
    assert np.array_equal(image, source.load(case_id, with_label=False).image)


@pytest.mark.parametrize("name", [name for name in SOURCES.names() if name != "demo"])
def test_source_that_reads_files_asks_for_an_existing_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--dataset_path"):
        SOURCES.get(name).from_options(SourceOptions())
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        SOURCES.get(name).from_options(SourceOptions(root=tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        SOURCES.get(name).from_options(SourceOptions(root=tmp_path, num_classes=2, voxel_size=(1.0, 1.0, 1.0)))


def test_unknown_source_gets_a_hint() -> None:
    with pytest.raises(ValueError, match="did you mean 'decathlon'"):
        SOURCES.get("decathalon")
