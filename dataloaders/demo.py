"""The embedded data set: a cohort simulated from the ICBM152 template, made on first use and kept as NIfTI files.

It is simulated from one real average brain and is no clinical evidence; ``dataloaders.demo_template`` names the source
and its licence.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import nibabel as nib

from dataloaders.base import SOURCES, CaseSource, Grid, SourceOptions, TrainingDefaults, Volume
from dataloaders.demo_cohort import CohortSettings, CohortSimulator
from dataloaders.demo_template import CLASS_NAMES, build_template
from dataloaders.error_text import unwritable
from dataloaders.nifti_folder import NiftiFolder

logger = logging.getLogger(__name__)

GENERATOR = 1  # raise when cases of equal settings come out differently
MANIFEST = "manifest.json"
TRAINING_CASES, TEST_CASES = 24, 8


@SOURCES.register("demo")
class DemoCohort(CaseSource):
    """24 training and 8 test cases of six brain structures.

    Args:
        cache_dir: Where the files are kept; one sub-folder per settings.
        settings: Size, difficulty and seed of the cohort.
        training_cases: Number of training cases.
        test_cases: Number of test cases.
    """

    num_classes = len(CLASS_NAMES)
    in_channels = 1
    class_names = CLASS_NAMES
    flip_axes = (0,)  # the brain is symmetric from left to right, and in no other direction
    defaults = TrainingDefaults(patch_size=(40, 40, 40), max_iteration=480, labelnum=4)

    def __init__(
        self,
        cache_dir: Path,
        settings: CohortSettings | None = None,
        *,
        training_cases: int = TRAINING_CASES,
        test_cases: int = TEST_CASES,
    ) -> None:
        self._training = tuple(f"demo{index:03d}" for index in range(training_cases))
        self._test = tuple(f"demo{index:03d}" for index in range(training_cases, training_cases + test_cases))
        folder = cohort_folder(cache_dir, settings or CohortSettings(), training_cases + test_cases)
        self._files = NiftiFolder(folder)

    @classmethod
    def from_options(cls, options: SourceOptions) -> DemoCohort:
        """Build from ``--cache_dir``; the demo takes no other data flag."""
        if options.root is not None:
            raise ValueError(
                f"--dataset_path {options.root}: the demo makes its own data; name the format of yours with "
                "--dataset_name, or leave the flag out"
            )
        if options.num_classes not in (None, cls.num_classes):
            raise ValueError(f"--num_classes {options.num_classes}: the demo has {cls.num_classes}; leave the flag out")
        return cls(options.cache_dir)

    def case_ids(self) -> list[str]:
        """Training cases, then test cases."""
        return [*self._training, *self._test]

    def labeled_ids(self) -> list[str]:
        """All cases: the simulation knows every label."""
        return self.case_ids()

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        """Read one case from the cache."""
        return self._files.load(case_id, with_label=with_label)

    def grid(self, case_id: str) -> Grid:
        """From the header."""
        return self._files.grid(case_id)

    def official_train(self) -> tuple[str, ...]:
        """The training cases."""
        return self._training

    def official_test(self) -> tuple[str, ...]:
        """The test cases."""
        return self._test


def cohort_folder(cache_dir: Path, settings: CohortSettings, cases: int) -> Path:
    """The folder of a cohort, made where it is missing or incomplete; safe against another process doing the same."""
    identity = {"generator": GENERATOR, "cases": cases, **asdict(settings)}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir / f"demo-{name}"
    if is_complete(folder):
        return folder
    started = time.perf_counter()
    logger.info("making the demo cohort, %d cases, once (kept in %s)", cases, folder)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".demo-", dir=cache_dir))
    except OSError as error:
        raise unwritable("--cache_dir", cache_dir, error) from error
    fresh.chmod(0o755)  # mkdtemp makes it private, but a cache may be shared
    try:
        _write_cohort(fresh, settings, cases)
        if folder.exists() and not is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            fresh.rename(folder)
        except OSError:  # another process was faster; its files are the same
            if not is_complete(folder):
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    logger.info("made it in %.0f s", time.perf_counter() - started)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether every file of the manifest is there in its full size."""
    try:
        sizes: dict[str, int] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _write_cohort(folder: Path, settings: CohortSettings, cases: int) -> None:
    simulator = CohortSimulator(build_template(), settings)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()

    def write(index: int) -> None:
        image, labels = simulator.case(index)
        for kind, array in (("images", image), ("labels", labels)):
            nifti = nib.Nifti1Image(array, settings.affine)
            nifti.header.set_xyzt_units("mm")
            nib.save(nifti, folder / kind / f"demo{index:03d}.nii.gz")

    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        list(pool.map(write, range(cases)))
    (folder / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n", encoding="utf-8")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
