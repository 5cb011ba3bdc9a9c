"""A reference from outside: nnU-Net (Isensee et al. 2021, arXiv:1904.08128) on the labelled cases of a finished run.

    pip install torch==2.13.0 nnunetv2==2.8.1
    python -m benchmarks.nnunet_reference --checkpoint runs/la/supervised_8labels_seed0/last.pt --seeds 0 1 2 \
        --output_dir runs/nnunet

nnU-Net learns the run's labelled cases with as many steps, patches of the same size and as many in a step; all else is
its own: fingerprint, normalisation, U-Net, augmentation, optimizer, schedule. The run's test cases are predicted
without mirroring and scored by the project's metrics, on their own grids. ``scores.csv`` can join those of
``benchmarks.kept_scores``.

With ``--own_patches`` their size and number are nnU-Net's own too: as large as the memory allows, and two or more in a
step. The rate falls every fifty steps, where its own epochs have 250. A seed that has its scores is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.comparison_tables import Row
from benchmarks.kept_scores import KeptRow, write_rows
from dataloaders.base import CaseSource, Triple, Volume
from dataloaders.orientation import Turn
from dataloaders.splits import ids_digest, make_test_ids
from myutils.build import build_source
from myutils.checkpoint import InferenceBundle, load_for_inference
from myutils.config import required
from myutils.evaluation import CaseResult, score_case
from myutils.evaluation_folder import CASES, write_scores
from myutils.label_files import save_label_map, save_volume
from myutils.seeding import seed_everything

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

DATASET_ID, DATASET, CONFIGURATION, PLANS = 900, "Dataset900_Reference", "3d_fullres", "nnUNetPlans"
STEPS_PER_EPOCH = 50
LEAST_EDGE, MOST_FEATURES = 4, 320  # of nnU-Net's smallest feature maps, as in its planner
ENDING = ".nii.gz"


def main() -> None:
    """Export, plan, train, predict, score."""
    settings = parse()
    if find_spec("nnunetv2") is None:
        raise SystemExit("nnU-Net is not installed: pip install torch==2.13.0 nnunetv2==2.8.1")
    torch.set_num_threads(settings.threads)
    bundle = load_for_inference(settings.checkpoint, torch.device("cpu"))
    source = build_source(bundle.config)
    set_up(settings.output_dir)
    steps = settings.max_iteration or required(bundle.config.max_iteration, "max_iteration")
    if steps > STEPS_PER_EPOCH and steps % STEPS_PER_EPOCH:
        raise SystemExit(f"--max_iteration {steps}: pass a multiple of {STEPS_PER_EPOCH}")
    request = {"steps": steps, **request_of(bundle, source, own_patches=settings.own_patches)}
    if not prepared_as(settings.output_dir, request):
        export(settings.output_dir, bundle, source)
        patch = None if settings.own_patches else (*stored_patch(bundle, source), bundle.config.batch_size)
        plan(settings.output_dir, patch)
    folders = [settings.output_dir / f"seed{seed}" for seed in settings.seeds]
    for seed, folder in zip(settings.seeds, folders, strict=True):
        if not (folder / "test" / CASES).exists():
            results = list(score_network(train(seed, steps), bundle, source))
            write_scores(folder / "test", results, bundle.class_names)
    row = Row("nnU-Net", tuple(folders))
    write_rows(settings.output_dir / "scores.csv", [KeptRow.of(row, settings.seeds)])
    dice = 100 * row.case_values("dice").mean(axis=1)
    sys.stdout.write(f"nnU-Net: Dice % {', '.join(f'{value:.2f}' for value in dice)} (seeds {settings.seeds})\n")


def parse() -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="run whose cases, patch and batch to take")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max_iteration", type=int, help="steps; default as many as the run has")
    parser.add_argument("--own_patches", action="store_true", help="leave their size and number to nnU-Net")
    parser.add_argument("--threads", type=int, default=1, help="of the network; patches are made in the same process")
    return parser.parse_args()


def set_up(folder: Path) -> None:
    """Tell nnU-Net where its folders are, before it is imported, and not to compile."""
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    os.environ.update({name: str((folder / name).resolve()) for name in names})
    os.environ.update({"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f"})


def request_of(bundle: InferenceBundle, source: CaseSource, *, own_patches: bool) -> dict[str, object]:
    """What the network will learn from and be scored on, to tell a folder's preparation from another."""
    patch = None if own_patches else [*required(bundle.config.patch_size, "patch_size"), bundle.config.batch_size]
    test = ids_digest(make_test_ids(source, bundle.config.split_request(), bundle.split))
    return {"cases": bundle.split.digest, "test": test, "patch_and_batch": patch}


def prepared_as(folder: Path, request: dict[str, object]) -> bool:
    """Whether the folder has been prepared, and note how: one that was prepared otherwise is refused."""
    note = folder / "request.json"
    if note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        if before != request:
            raise SystemExit(f"--output_dir {folder}: was made for {before}, not {request}; pass another folder")
        return (folder / "nnUNet_preprocessed" / DATASET / "gt_segmentations").exists()  # the last that nnU-Net makes
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(request), encoding="utf-8")
    return False


def export(folder: Path, bundle: InferenceBundle, source: CaseSource) -> None:
    """Write the run's labelled cases in nnU-Net's format."""
    raw = folder / "nnUNet_raw" / DATASET
    for case_id in bundle.split.labeled:
        case = source.load(case_id, with_label=True)
        save_label_map(raw / "labelsTr" / f"{case_id}{ENDING}", required(case.label, "label"), case.affine)
        for channel, image in enumerate(case.image):
            save_volume(raw / "imagesTr" / f"{case_id}_{channel:04d}{ENDING}", image, case.affine)
    channel_name = "CT" if bundle.config.modality == "ct" else "MRI"
    description = {
        "channel_names": {str(channel): channel_name for channel in range(bundle.in_channels)},
        "labels": {name: class_id for class_id, name in enumerate(["background", *bundle.class_names[1:]])},
        "numTraining": len(bundle.split.labeled),
        "file_ending": ENDING,
    }
    (raw / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def stored_patch(bundle: InferenceBundle, source: CaseSource) -> Triple:
    """The run's patch along the axes of the files, which nnU-Net reads as they are stored."""
    if bundle.config.spacing is not None:
        raise SystemExit("--checkpoint: the run resamples, so that its patches have another size here; --own_patches")
    patch, orientation = required(bundle.config.patch_size, "patch_size"), bundle.config.orientation or "stored"
    affines = [source.grid(case_id).affine for case_id in bundle.split.labeled]
    found = {Turn.of(affine, orientation).values_back(patch) for affine in affines}
    if len(found) > 1:
        raise SystemExit("--checkpoint: labelled cases have their axes in different order; --own_patches")
    return found.pop()


def plan(folder: Path, patch_and_batch: tuple[int, int, int, int] | None) -> None:
    """Let nnU-Net plan, change its plans to this patch (X, Y, Z) and batch where given, and prepare the cases."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    api.extract_fingerprints([DATASET_ID], num_processes=1)
    api.plan_experiments([DATASET_ID])
    if patch_and_batch is not None:
        *size, batch_size = patch_and_batch
        path = folder / "nnUNet_preprocessed" / DATASET / f"{PLANS}.json"
        plans = json.loads(path.read_text(encoding="utf-8"))
        chosen = plans["configurations"][CONFIGURATION]
        patch = [size[::-1][axis] for axis in plans["transpose_forward"]]  # it reads arrays as (Z, Y, X)
        _, strides, kernels, patch, _ = get_pool_and_conv_props(chosen["spacing"], patch, LEAST_EDGE, 999)
        chosen["patch_size"], chosen["batch_size"] = [int(edge) for edge in patch], batch_size
        network, stages = chosen["architecture"]["arch_kwargs"], len(strides)
        for name, length in (("n_conv_per_stage", stages), ("n_conv_per_stage_decoder", stages - 1)):
            network[name] = (network[name] + network[name][-1:] * length)[:length]
        features = network["features_per_stage"]
        while len(features) < stages:  # as in its planner
            features.append(min(2 * features[-1], MOST_FEATURES))
        network |= {"features_per_stage": features[:stages], "n_stages": stages}
        network |= {"strides": strides, "kernel_sizes": kernels}
        path.write_text(json.dumps(plans), encoding="utf-8")
    api.preprocess([DATASET_ID], PLANS, (CONFIGURATION,), num_processes=[1])


def train(seed: int, steps: int) -> nnUNetTrainer:
    """A network after ``steps``, with its last weights."""
    from nnunetv2.run.run_training import get_trainer_from_args

    seed_everything(seed, deterministic=False)
    trainer = get_trainer_from_args(DATASET, CONFIGURATION, "all", device=torch.device("cpu"))
    trainer.num_iterations_per_epoch = min(steps, STEPS_PER_EPOCH)
    trainer.num_epochs = steps // trainer.num_iterations_per_epoch
    trainer.num_val_iterations_per_epoch = 1
    trainer.disable_checkpointing = True
    os.environ.update({"nnUNet_n_proc_DA": "0"})  # patches are made in this process; its planner needs at least 1
    begin = time.perf_counter()
    trainer.run_training()
    sys.stdout.write(f"seed {seed}: {(time.perf_counter() - begin) / steps:.3f} s per step\n")
    trainer.set_deep_supervision_enabled(False)
    return trainer


def score_network(trainer: nnUNetTrainer, bundle: InferenceBundle, source: CaseSource) -> Iterable[CaseResult]:
    """Scores of the run's test cases."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    trainer.network.eval()
    parts = (trainer.network, trainer.plans_manager, trainer.configuration_manager)
    predictor.manual_initialization(*parts, [trainer.network.state_dict()], trainer.dataset_json, "", None)
    for case_id in make_test_ids(source, bundle.config.split_request(), bundle.split):
        case = source.load(case_id, with_label=True)
        yield score_case(case, predict(predictor, case), bundle.num_classes, source.patient(case.case_id))


def predict(predictor: Any, case: Volume) -> np.ndarray:
    """Class ids (X, Y, Z) of a case; nnU-Net has arrays and spacings from Z to X."""
    image = np.ascontiguousarray(case.image.transpose(0, 3, 2, 1), dtype=np.float32)
    spacing = [float(size) for size in case.spacing[::-1]]
    found = predictor.predict_single_npy_array(image, {"spacing": spacing})
    return np.asarray(found).transpose(2, 1, 0).astype(np.uint8)


if __name__ == "__main__":
    main()
