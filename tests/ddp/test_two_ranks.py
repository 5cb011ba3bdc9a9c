"""Two gloo processes: equal weights and memory after a step, and the same job through ``torchrun``."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BallSource
from helpers_runs import small_config
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import predict_3d
from dataloaders.splits import make_training_split
from myutils.build import DataFacts
from myutils.checkpoint import RunState
from myutils.distributed import RankInfo, join_group, stop_process_group
from myutils.label_files import save_volume
from myutils.methods.base import METHODS, Method
from myutils.prototype_sampling import sample_per_class, shared_keys
from myutils.rank_batch import all_rows, draw_rows, fetch_rows
from myutils.report import evaluate_run
from myutils.run_log import read_metrics
from myutils.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
TEST_IDS = ["ball05", "ball03", "ball04"]
WITH_WARM_UP = ("bcp", "mc_net")  # mc_net leaves a decoder idle in it
WITH_TERM = {
    "max_iteration": 4,
    "memory_interval": 2,
    "confidence_threshold": 0.34,
    "use_contrastive_prototype": True,
    "use_learned_selector": True,
    "prototype_samples": 64,  # far fewer than there are: which ones are drawn matters
}
BOXES_AND_DROPS = {"feature_perturbation": True, "paste_unlabeled": 0.5}
STAGES = {"dfp_start_iter": 0, "selector_train_iter": 1, "dfp_reconstruct_interval": 2}  # each second step has pools
STAGES |= {"num_eigenvectors": 1, "num_dfp": 2}  # the further patterns of so few features hang on rounding
EXTRAS = {"mean_teacher": BOXES_AND_DROPS, "best": BOXES_AND_DROPS, "cov_dfp": BOXES_AND_DROPS | STAGES}
# Runs with all that draws at random, and how far rounding may carry their losses apart in four steps: it parts the
# weights, until a voxel on the fence falls to the other side, 1 of the 64 that are drawn.
SHARED: dict[str, tuple[dict[str, object], float]] = {
    name: (
        WITH_TERM
        | EXTRAS.get(name, {})
        | {"method": name, "warmup_iteration": 2 * (name in ("bcp", "mc_net"))},  # idle decoder
        3e-2,
    )
    for name in METHODS.names()
}
SHARED["random ranking"] = (WITH_TERM | {"prototype_ranking": "random"}, 3e-2)
# Without the term no voxel is drawn, and less parts them; hard pseudo-labels still do.
PLAIN: dict[str, tuple[dict[str, object], float]] = {
    "supervised": ({}, 1e-4),
    "mean_teacher": ({"copy_paste": False, "deep_supervision": True}, 1e-3),
    "fixmatch": ({}, 1e-2),
    "cps": ({}, 1e-2),
    "mc_net": ({}, 1e-3),
    # Its steep sigmoid multiplies rounding, most where patches are turned: 2e-3 with these, without them 1e-4 at most.
    "dtc": ({"affine_share": 0.0}, 1e-3),
    # Orthogonal steps make directions with tiny gradients, and their rounding, as large as all others.
    "muon": ({"method": "supervised", "optimizer": "muon"}, 1e-3),
}
FAST = list(SHARED)
SHARED["dropout"] = (WITH_TERM | {"method": "ua_mt", "model": "vnet", "patch_size": (16, 16, 16)}, 3e-2)
SHARED |= {
    f"{name} alone": ({"method": name, "max_iteration": 4, "use_contrastive_prototype": False} | more, bound)
    for name, (more, bound) in PLAIN.items()
}
SLOW = [name for name in SHARED if name not in FAST]
ROWS = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def run_rank(rank: int, folder: str, names: list[str]) -> None:
    """One of two ranks, with a log: who fails first takes the other along, and the parent hears of one alone."""
    log = os.open(f"{folder}/rank{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, sys.stderr.fileno())
    faulthandler.enable()
    try:
        train_rank(rank, folder, names)
    except BaseException:
        traceback.print_exc()
        raise


def train_rank(rank: int, folder: str, names: list[str]) -> None:
    """Train rows for a few steps and write their whole state to the folder; of the fast ones evaluate and predict."""
    torch.set_num_threads(1)
    join_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in names:
        run = Path(folder) / name
        method = fit_in_float32(run, RankInfo(rank, 2, rank), name)
        torch.save(method.state_dict(), run / f"rank{rank}.pt")
    if names == FAST:
        share_cases(rank, BallSource(), Path(folder) / "mean_teacher")
        torch.save(work_on_rows(rank, 2), Path(folder) / f"rows{rank}.pt")
        predict_scans(Path(folder), Path(folder) / f"failed{rank}.json")
    del method
    stop_process_group()
    (Path(folder) / f"threads{rank}.json").write_text(json.dumps(gloo_threads()))


def gloo_threads() -> list[str]:
    """Names of this process's threads that are gloo's, once they had a while to end; none where there is no /proc."""
    found: list[str] = []
    for _ in range(50):
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        found = [name for name in names if "gloo" in name]
        if not found:
            break
        time.sleep(0.1)
    return found


def fit_in_float32(run: Path, ranks: RankInfo, name: str) -> Method:
    """Some steps with all that draws at random, on one thread; losses of every step are logged."""
    source = BallSource()
    config = small_config(source, **{"log_every": 1, "patch_size": (8, 8, 8), "optimizer": "adamw"} | SHARED[name][0])
    run.mkdir(parents=True, exist_ok=True)
    state = RunState(config, DataFacts.of(source), make_training_split(source, config.split_request()))
    trainer = Trainer(state, source, run, ranks, torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: another order of sums parts the runs
    try:
        trainer.fit()
    finally:
        torch.set_num_threads(threads)
    return trainer.method


def predict_scans(folder: Path, failed: Path) -> None:
    """Segment the folder's scans with the supervised run, and write down which failed."""
    predicted = folder / failed.stem.replace("failed", "predicted")
    flags = predict_3d.PredictFlags(
        checkpoint=(folder / "supervised" / "last.pt",), input=folder / "scans", output=predicted
    )
    failed.write_text(json.dumps(predict_3d.run(predict_3d.prepare(flags))))


def work_on_rows(rank: int, world: int) -> dict[str, torch.Tensor]:
    """What a rank with every ``world``-th row of a batch draws, fetches and gathers, and its gradient."""
    torch.manual_seed(3)
    whole = torch.arange(24.0).reshape(6, 4)
    own = whole[rank::world].clone().requires_grad_()
    weights = torch.linspace(-1.0, 2.0, 6 * 4).reshape(6, 4)
    order = torch.cat([weights[first::world] for first in range(world)])  # as ``all_rows`` has them
    (all_rows(own).square() * order).sum().backward()
    labels = (torch.arange(6 * 50) % 7 - 1).reshape(6, 50)  # -1 to 5
    labels[labels == 5] = 2
    positions, classes = sample_per_class(
        labels[rank::world], 5, 9, -1, keys=shared_keys(6 // world, 50, torch.device("cpu"))
    )
    positions = positions[classes >= 0]
    return {
        "drawn": draw_rows(lambda rows: torch.rand(rows, 3), 6 // world),
        "fetched": fetch_rows(own, torch.tensor([5, 0, 3, 3, 1, 4])),
        "gradient": own.grad / world,  # its part in the mean that DDP takes
        "voxels": (positions // 50 * world + rank) * 50 + positions % 50,  # in the whole batch
        "classes": classes[classes >= 0],
    }


def share_cases(rank: int, source: BallSource, run: Path) -> None:
    """Evaluate three cases on two ranks; each writes down what it got and what it worked on."""
    source.label_reads.clear()
    results, _ = evaluate_run(run, source, TEST_IDS, torch.device("cpu"))
    torch.distributed.barrier()
    with (run / f"scored{rank}.json").open("w") as file:
        json.dump([source.label_reads, [dataclasses.asdict(result) for result in results]], file)


def log_end(folder: Path, rank: int) -> str:
    """The last lines of a rank's log, without the list of every loaded module that a crash ends with."""
    lines = (folder / f"rank{rank}.log").read_text().splitlines()
    return "\n".join([f"rank {rank}:", *[line for line in lines if not line.startswith("Extension modules:")][-40:]])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the states of both ranks, one sub-folder per fast row, and what they did with cases and scans."""
    folder = tmp_path_factory.mktemp("two_ranks")
    for case_id in TEST_IDS:
        volume = BallSource().load(case_id, with_label=False)
        save_volume(folder / "scans" / f"{case_id}.nii.gz", volume.image[0], volume.affine)
    (folder / "scans" / "broken.nii.gz").write_bytes(b"no scan")
    return spawned(folder, FAST)


@pytest.fixture(scope="module")
def slow_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the slow rows, without cases and scans."""
    return spawned(tmp_path_factory.mktemp("slow_ranks"), SLOW)


@pytest.fixture
def run_of(request: pytest.FixtureRequest, name: str) -> Path:
    """The folder of a row, trained with all of its kind once one of them is asked for."""
    return Path(request.getfixturevalue("two_ranks" if name in FAST else "slow_ranks")) / name


def spawned(folder: Path, names: list[str]) -> Path:
    """The folder, once two ranks have trained these rows in it."""
    try:
        torch.multiprocessing.spawn(run_rank, args=(str(folder), names), nprocs=2)
    except (ProcessExitedException, ProcessRaisedException) as error:
        pytest.fail("\n".join([str(error), log_end(folder, 0), log_end(folder, 1)]), pytrace=False)
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_two_ranks_hold_equal_weights_and_memory(run_of: Path, name: str) -> None:
    first, second = (torch.load(run_of / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    if SHARED[name][0]["use_contrastive_prototype"]:
        assert first["prototypes.manager.memory_count"].sum() > 0
    assert (run_of / "last.pt").exists()


@pytest.mark.parametrize("name", ROWS)
def test_two_ranks_with_half_the_batch_each_have_the_losses_of_one(run_of: Path, tmp_path: Path, name: str) -> None:
    fit_in_float32(tmp_path, RankInfo(), name)
    losses, rounding = ["supervised", "total"], 1e-3 if name == "cov_dfp" else 1e-4  # eigenvectors multiply it
    if SHARED[name][0]["use_contrastive_prototype"]:
        losses += ["contrastive_loss", "intra_loss", "inter_loss"]
    parts = ("anchor", "compact", "separation", "correlation") if name == "cov_dfp" else ()
    for loss in (*losses, *(f"dfp_{part}" for part in parts)):
        (_, shared), (_, alone) = (read_metrics(folder, f"Loss/{loss}") for folder in (run_of, tmp_path))
        assert len(alone) == 4 and shared[:2] == pytest.approx(alone[:2], rel=rounding), loss
        assert shared == pytest.approx(alone, rel=SHARED[name][1]), loss
    (_, shared), (_, alone) = (read_metrics(folder, "Train/dice") for folder in (run_of, tmp_path))
    assert shared == pytest.approx(alone, abs=5e-3)  # a voxel on the fence


def test_rows_of_two_ranks_are_those_of_one(two_ranks: Path) -> None:
    ranks, alone = [torch.load(two_ranks / f"rows{rank}.pt", weights_only=True) for rank in (0, 1)], work_on_rows(0, 1)
    for name in ("drawn", "fetched", "gradient"):
        together = torch.stack([found[name] for found in ranks], dim=1).flatten(0, 1)
        torch.testing.assert_close(together, alone[name], rtol=0, atol=0, msg=name)
    assert alone["fetched"][:, 0].tolist() == [20.0, 0.0, 12.0, 12.0, 4.0, 16.0]
    drawn, expected = (
        sorted((int(v), int(c)) for found in group for v, c in zip(found["voxels"], found["classes"], strict=True))
        for group in (ranks, [alone])
    )
    assert drawn == expected and len(set(drawn)) == 5 * 9


def test_no_thread_of_a_process_group_outlives_it(two_ranks: Path) -> None:
    """One that does aborts the process as it ends, once in some hundred runs."""
    assert [json.loads((two_ranks / f"threads{rank}.json").read_text()) for rank in (0, 1)] == [[], []]


def test_two_ranks_share_the_cases_and_agree_with_one_process(two_ranks: Path) -> None:
    run = two_ranks / "mean_teacher"
    (read, first), (read_too, second) = (json.loads((run / f"scored{rank}.json").read_text()) for rank in (0, 1))
    assert (read, read_too) == (["ball05", "ball04"], ["ball03"])
    assert first == second and [result["case_id"] for result in first] == TEST_IDS
    assert sorted(path.name for path in (run / "test" / "predictions").iterdir()) == [
        f"{case_id}.nii.gz" for case_id in sorted(TEST_IDS)
    ]
    shared = (run / "test" / "cases.csv").read_text()
    evaluate_run(run, BallSource(), TEST_IDS, torch.device("cpu"))
    assert (run / "test" / "cases.csv").read_text() == shared


def test_two_ranks_share_the_scans_of_a_prediction(two_ranks: Path) -> None:
    assert [json.loads((two_ranks / f"failed{rank}.json").read_text()) for rank in (0, 1)] == [["broken"], ["broken"]]
    written = [{path.name for path in (two_ranks / f"predicted{rank}").iterdir()} for rank in (0, 1)]
    predict_scans(two_ranks, two_ranks / "failed_alone.json")
    alone = two_ranks / "predicted_alone"
    assert not written[0] & written[1]
    assert written[0] | written[1] == {path.name for path in alone.iterdir()} == {f"{name}.nii.gz" for name in TEST_IDS}
    for rank in (0, 1):
        for name in written[rank]:
            shared, own = (nib.load(folder / name) for folder in (two_ranks / f"predicted{rank}", alone))
            np.testing.assert_array_equal(np.asarray(shared.dataobj), np.asarray(own.dataobj))


@pytest.mark.slow
def test_torchrun_trains_the_demo(tmp_path: Path, demo_cache: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(ROOT / "train_cov_dfp_3d.py"), "--max_iteration", "2", "--log_every", "1", "--patch_size"]
    command += ["16", "16", "16", "--no-baseline", "--no-evaluate", "--output_dir", str(tmp_path), "--exp", "two"]
    command += ["--cache_dir", str(demo_cache)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=170)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
