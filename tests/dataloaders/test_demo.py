"""The demo cohort: deterministic cases, a cache that is reused and repaired, and what it says without its template."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import data_makers as make
import numpy as np
import pytest

from dataloaders import demo, demo_template
from dataloaders.base import SourceOptions
from dataloaders.demo import DemoCohort
from dataloaders.demo_cohort import CohortSettings, CohortSimulator, exponential, smooth_field
from dataloaders.demo_template import CLASS_NAMES, Template, build_template

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import sys
from pathlib import Path
import data_makers as make
from dataloaders import demo
demo.build_template = make.blob_template
source = demo.DemoCohort(Path(sys.argv[1]), make.TINY_COHORT, training_cases=3, test_cases=1)
print(int(sum(source.load(case_id, with_label=True).image.sum() for case_id in source.case_ids())))
"""


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts the blobs in place of the brain and records each time that a template is asked for."""
    calls: list[str] = []

    def build() -> Template:
        calls.append("template")
        return make.blob_template()

    monkeypatch.setattr(demo, "build_template", build)
    return calls


def tiny(cache: Path) -> DemoCohort:
    return DemoCohort(cache, make.TINY_COHORT, training_cases=2, test_cases=1)


def test_case_depends_on_seed_and_number_alone() -> None:
    first = CohortSimulator(make.blob_template(), make.TINY_COHORT)
    again = CohortSimulator(make.blob_template(), make.TINY_COHORT)
    forward = [first.case(k) for k in range(3)]
    backward = [again.case(k) for k in (2, 1, 0)][::-1]
    for (image, label), (image_again, label_again) in zip(forward, backward, strict=True):
        assert np.array_equal(image, image_again) and np.array_equal(label, label_again)
    assert not np.array_equal(forward[0][0], forward[1][0])
    other = CohortSettings(make.TINY_COHORT.shape, make.TINY_COHORT.voxel_mm, seed=1)
    assert not np.array_equal(CohortSimulator(make.blob_template(), other).case(0)[0], forward[0][0])


def test_case_has_scanner_types_and_ranges() -> None:
    image, label = CohortSimulator(make.blob_template(), make.TINY_COHORT).case(0)
    assert image.shape == label.shape == (12, 10, 8)
    assert image.dtype == np.int16 and image.min() >= 0 and image.max() <= 4095
    assert label.dtype == np.uint8 and label.max() < len(CLASS_NAMES)
    assert image[label > 0].mean() > 5 * image[label == 0].mean()


def test_strength_zero_gives_one_anatomy_mirrored_or_not() -> None:
    settings = CohortSettings(make.TINY_COHORT.shape, make.TINY_COHORT.voxel_mm, strength=0.0)
    simulator = CohortSimulator(make.blob_template(), settings)
    labels = [simulator.case(k)[1] for k in range(4)]
    for label in labels[1:]:
        assert min((label != labels[0]).mean(), (label[::-1] != labels[0]).mean()) < 0.02


def test_lesions_need_white_matter() -> None:
    template = make.blob_template()
    template.labels[template.labels == 4] = 3
    _, label = CohortSimulator(template, make.TINY_COHORT).case(0)
    assert 4 not in label


def test_grid_is_centred_on_the_origin() -> None:
    affine = CohortSettings(shape=(9, 11, 8), voxel_mm=2.0).affine
    assert affine.tolist() == [[2, 0, 0, -8], [0, 2, 0, -10], [0, 0, 2, -7], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    "wrong", [{"shape": (7, 8, 8)}, {"shape": (8, 8)}, {"voxel_mm": 0.0}, {"strength": -1.0}, {"seed": -1}]
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"demo (shape|voxel_mm)"):
        CohortSettings(**wrong)


def test_exponential_of_a_constant_field_is_the_field() -> None:
    velocity = np.ones((3, 6, 6, 6)) * np.reshape([1.0, -2.0, 0.5], (3, 1, 1, 1))
    assert np.allclose(exponential(velocity), velocity)


def test_exponential_has_the_opposite_field_as_inverse() -> None:
    grid = np.indices((20, 20, 20)) - 9.5
    bump = np.exp(-(grid**2).sum(0) / 30)
    velocity = np.stack([1.5 * bump, -bump, 0.5 * bump])
    there, back = exponential(velocity), exponential(-velocity)
    at = np.rint(np.indices((20, 20, 20)) + there).astype(int).clip(0, 19)
    left = there + back[:, at[0], at[1], at[2]]
    assert np.abs(there).max() > 1 and np.abs(left).max() < 0.3  # nearest voxel of the way back


def test_smooth_field_has_unit_deviation() -> None:
    field = smooth_field(np.random.default_rng(0), (12, 10, 8), 4)
    assert field.shape == (12, 10, 8) and field.std() == pytest.approx(1, abs=1e-4)


def test_cohort_brings_a_train_and_a_test_list(tmp_path: Path, built: list[str]) -> None:
    source = tiny(tmp_path)
    assert source.official_train() == ("demo000", "demo001") and source.official_test() == ("demo002",)
    assert source.case_ids() == ["demo000", "demo001", "demo002"] == source.labeled_ids()
    volume = source.load("demo001", with_label=True)
    image, label = CohortSimulator(make.blob_template(), make.TINY_COHORT).case(1)
    assert np.array_equal(volume.image[0], image) and np.array_equal(volume.label, label)
    assert volume.spacing == pytest.approx((16.0, 16.0, 16.0))


def test_cache_is_reused(tmp_path: Path, built: list[str]) -> None:
    tiny(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    tiny(tmp_path)
    assert built == ["template"] and files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    DemoCohort(tmp_path, CohortSettings((12, 10, 8), 16.0, seed=3), training_cases=2, test_cases=1)
    assert built == ["template"] * 2 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["missing", "short", "manifest", "no manifest"])
def test_incomplete_cache_is_made_again(tmp_path: Path, built: list[str], damage: str) -> None:
    before = tiny(tmp_path).load("demo001", with_label=False).image
    image, manifest = next(tmp_path.glob("*/images/demo001.nii.gz")), next(tmp_path.glob("*/manifest.json"))
    if damage == "missing":
        image.unlink()
    elif damage == "short":
        image.write_bytes(image.read_bytes()[:-10])
    elif damage == "manifest":
        manifest.write_text('["not", "sizes"]')
    else:
        manifest.unlink()
    after = tiny(tmp_path).load("demo001", with_label=False).image
    assert built == ["template"] * 2 and np.array_equal(before, after)
    assert len(list(tmp_path.iterdir())) == 1  # no half-made folder is left


def test_failure_while_making_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Template:
        raise FileNotFoundError("no template")

    monkeypatch.setattr(demo, "build_template", fail)
    with pytest.raises(FileNotFoundError, match="no template"):
        tiny(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_slower_process_takes_the_cohort_of_the_faster(tmp_path: Path, built: list[str]) -> None:
    original = demo._write_cohort

    def overtaken(folder: Path, settings: CohortSettings, cases: int) -> None:
        original(folder, settings, cases)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo, "_write_cohort", original)
            tiny(tmp_path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_write_cohort", overtaken)
        source = tiny(tmp_path)
    assert built == ["template"] * 2 and len(list(tmp_path.iterdir())) == 1
    assert source.load("demo000", with_label=True).label is not None


def test_folder_that_cannot_be_put_in_place_is_an_error(
    tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(f"no right to write {target.name}")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match="no right to write demo-"):
        tiny(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_at_once_share_one_cohort(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    path = f"{ROOT}:{ROOT / 'tests'}"
    workers = [
        subprocess.Popen(command, cwd=ROOT, env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    sums = [worker.communicate(timeout=60)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert sums[0] == sums[1] and int(sums[0]) > 0
    assert len(list(tmp_path.iterdir())) == 1


def test_manifest_lists_every_file(tmp_path: Path, built: list[str]) -> None:
    tiny(tmp_path)
    folder = next(tmp_path.iterdir())
    sizes = json.loads((folder / "manifest.json").read_text())
    names = {f"{kind}/demo00{k}.nii.gz" for kind in ("images", "labels") for k in range(3)}
    assert set(sizes) == names | {"classes.txt"}
    assert all((folder / name).stat().st_size == size for name, size in sizes.items())


def test_dataset_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the demo makes its own data; name the format"):
        DemoCohort.from_options(SourceOptions(root=tmp_path, cache_dir=tmp_path))


def test_from_options_makes_the_default_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[CohortSettings, int]] = []

    def write(folder: Path, settings: CohortSettings, cases: int) -> None:
        asked.append((settings, cases))
        make.write_nifti(folder / "images/demo000.nii.gz", make.counting_image())
        (folder / "classes.txt").write_text("\n".join(CLASS_NAMES))
        (folder / "manifest.json").write_text("{}")

    monkeypatch.setattr(demo, "_write_cohort", write)
    source = DemoCohort.from_options(SourceOptions(cache_dir=tmp_path))
    assert asked == [(CohortSettings(), 32)]
    assert len(source.official_train()) == 24 and len(source.official_test()) == 8


def test_without_nilearn_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_template.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install nilearn"):
        tiny(tmp_path)


def test_nilearn_without_the_volumes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("nilearn", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(demo_template.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="lacks mni_icbm152_t1"):
        build_template()


def test_template_finer_than_its_source_is_refused() -> None:
    with pytest.raises(ValueError, match="stored at 1 mm; pass 1 or more"):
        build_template(0.5)


@pytest.mark.slow
def test_default_case_shows_all_six_structures_in_plausible_sizes() -> None:
    template = build_template()
    assert template.voxel_mm == 2.0 and template.t1.shape == template.labels.shape
    assert template.t1.min() >= 0 and 0.9 < template.t1.max() <= 1.01
    settings = CohortSettings()
    simulator = CohortSimulator(template, settings)
    for index in range(2):
        _, label = simulator.case(index)
        litres = np.bincount(label.ravel(), minlength=7) * settings.voxel_mm**3 / 1e6
        assert label.shape == (48, 56, 48) and (litres[1:] > 0.005).all()
        assert 0.7 < litres[1:].sum() < 2.2  # a brain
        assert litres[3] > litres[5] > litres[6]  # cortex, cerebellum, brainstem
