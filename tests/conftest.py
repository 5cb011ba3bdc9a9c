"""A small simulated data set for tests of everything that does not care about file formats."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloaders.base import CaseSource, SourceOptions, TrainingDefaults, Volume
from networks.base import NETWORKS, Triple
from networks.unet3d import UNet3D

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes at once, and those that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup with this one


@NETWORKS.register("unet_small")
class SmallUNet(UNet3D):
    """``unet_3d`` with fewer features, for tests that are not of the network: a fraction of the time."""

    def __init__(self, in_channels: int, num_classes: int, flat_levels: Triple = (0, 0, 0)) -> None:
        super().__init__(in_channels, num_classes, (8, 8, 16, 32), flat_levels)


class BallSource(CaseSource):
    """Noisy images of a ball (class 1) with a smaller, brighter core (class 2), one per case, made from its number.

    Args:
        cases: Number of cases; the first ``labeled`` of them have a label.
        labeled: Number of labelled cases.
        size: Volume size.
        channels: Image channels.
    """

    num_classes = 3
    class_names = ("background", "ball", "core")
    defaults = TrainingDefaults(patch_size=(16, 16, 16), max_iteration=4, labelnum=2)

    def __init__(
        self, cases: int = 8, labeled: int = 6, size: tuple[int, int, int] = (20, 18, 16), channels: int = 1
    ) -> None:
        self.in_channels = channels
        self._ids = [f"ball{index:02d}" for index in range(cases)]
        self._labeled, self._size = self._ids[:labeled], size
        self.label_reads: list[str] = []

    @classmethod
    def from_options(cls, options: SourceOptions) -> BallSource:
        return cls()

    def case_ids(self) -> list[str]:
        return list(self._ids)

    def labeled_ids(self) -> list[str]:
        return list(self._labeled)

    def load(self, case_id: str, *, with_label: bool) -> Volume:
        rng = np.random.default_rng(int(case_id[4:]))
        grid = np.stack(np.meshgrid(*[np.arange(n) for n in self._size], indexing="ij"))
        center = np.array(self._size).reshape(3, 1, 1, 1) / 2 + rng.uniform(-2, 2, (3, 1, 1, 1))
        distance = np.sqrt(((grid - center) ** 2).sum(0))
        label = (distance < 6).astype(np.uint8) + (distance < 3)
        image = np.stack([label + rng.normal(0, 0.3, self._size) for _ in range(self.in_channels)])
        if with_label:
            self.label_reads.append(case_id)
        shown = label.astype(np.uint8) if with_label else None
        return Volume(case_id, image.astype(np.float32), shown, np.diag([1.0, 2.0, 1.0, 1.0]), (1.0, 2.0, 1.0))


@pytest.fixture
def ball_source() -> BallSource:
    return BallSource()


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``--cache_dir``, one for all workers, for tests that train on the whole demo: it takes seconds to make."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "demo_cache"


@pytest.fixture
def shared_data() -> Path:
    """Folder of real data beside the checkout; the test is skipped where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA
