"""Score a checkpoint on labelled cases: Dice, Jaccard, HD95 and ASSD per case and class.

The test cases of the data set that it was trained on; the checkpoint knows where they are::

    python evaluate_3d.py --checkpoint runs/la8/best.pt

The same data set in another folder, its validation cases, or another data set with the same channels and classes::

    python evaluate_3d.py --checkpoint runs/la8/best.pt --dataset_path /data/LA
    python evaluate_3d.py --checkpoint runs/la8/best.pt --split val
    python evaluate_3d.py --checkpoint runs/la8/best.pt --dataset_name nifti --dataset_path /data/clinic --split all

Several checkpoints, with the settings of the first; their probabilities are averaged, a training case of any is no test
case::

    python evaluate_3d.py --checkpoint runs/LA_best_8labels_seed*/last.pt

Several processes share the cases out, on one machine or many::

    torchrun --nproc_per_node=2 evaluate_3d.py --checkpoint runs/la8/best.pt

It writes ``evaluation.json``, ``cases.csv``, ``summary.json`` and ``predictions/`` into ``--output_dir`` and prints the
table. Damaged cases are named at the end; ``cases.csv`` then holds the others, and there is no summary. Exit code 0
done, 1 failed on the way, 2 refused at the start, 130 stopped. ``--help`` lists all flags.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataloaders.base import CaseSource
from dataloaders.case_lists import some
from dataloaders.error_text import JOB_ERRORS, message_of
from dataloaders.patients import nameless_cases
from dataloaders.splits import ids_digest
from myutils.build import build_source, kept_components
from myutils.checkpoint import InferenceBundle
from myutils.components import name_kept_components
from myutils.config import RunConfig
from myutils.distributed import is_main_rank, start_process_group, stop_process_group
from myutils.ensemble import load_together
from myutils.evaluation import DamagedCasesError
from myutils.evaluation_cases import (
    SPLITS,
    choose_cases,
    is_training_data,
    require_match,
    warn_if_moved,
    warn_of_equal_ids,
    warn_of_stored_axes,
)
from myutils.evaluation_folder import (
    ABOUT,
    CASES,
    PREDICTIONS,
    SUMMARY,
    refuse_other_results,
    score_into,
    write_summary_json,
)
from myutils.flags import option
from myutils.inference import InferenceOptions
from myutils.inference_flags import InferenceFlags, inference_options, start
from myutils.progress import show
from myutils.run_folder import make_folder
from myutils.score_table import format_table
from myutils.stop_signals import sigterm_as_ctrl_c

logger = logging.getLogger("evaluate")

DATA = "data"
DATA_SETTINGS = ("dataset_name", "dataset_path", "num_classes", "patient_pattern", "voxel_size", "cache_dir")


@dataclass(frozen=True)
class EvaluateFlags(InferenceFlags):
    """All flags of this script."""

    output_dir: Path | None = option(
        None, help="folder for the results; else evaluation/SPLIT, or SPLIT_LIST, beside the checkpoint", group="files"
    )
    dataset_name: str | None = option(None, help="data format; else the checkpoint's", group=DATA)
    dataset_path: Path | None = option(None, help="folder of the data set; else the checkpoint's", group=DATA)
    split: str = option("test", help="cases to score; all: every labelled case", group=DATA, choices=SPLITS)
    test_list: Path | None = option(None, help="text file: test case ids; else the checkpoint's", group=DATA)
    val_list: Path | None = option(None, help="text file: case ids for --split val; else the checkpoint's", group=DATA)
    num_classes: int | None = option(
        None, help="classes with the background, where the data state none; else the checkpoint's", group=DATA
    )
    voxel_size: tuple[float, float, float] | None = option(
        None, help="voxel size in mm for formats that store none (LA); else the checkpoint's", group=DATA
    )
    patient_pattern: str | None = option(
        None, help="regular expression: the patient in a case id, '' for none; else the checkpoint's", group=DATA
    )
    cache_dir: Path | None = option(None, help="folder for data made once (demo); else the checkpoint's", group=DATA)

    @property
    def case_list(self) -> Path | None:
        """The list that names the cases to score; None where the checkpoint or the data do."""
        return self.test_list or self.val_list


@dataclass(frozen=True)
class Job:
    """Everything that is checked before the first case is opened."""

    flags: EvaluateFlags
    bundle: InferenceBundle
    config: RunConfig
    data: str
    source: CaseSource
    case_ids: tuple[str, ...]
    options: InferenceOptions
    device: torch.device
    folder: Path

    @property
    def checkpoints(self) -> str:
        """Their paths in one line, wherever they are named from, for the log and the summary."""
        return ", ".join(str(path.resolve()) for path in self.flags.checkpoint or ())


@sigterm_as_ctrl_c()
def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, score, write and print; see the module's docstring for the exit codes."""
    usage = "%(prog)s --checkpoint PATH [PATH ...] [flags]"
    job = start(EvaluateFlags, prepare, argv, prog="evaluate_3d.py", usage=usage, doc=__doc__)
    failed = True
    try:
        run(job)
        failed = False
    except JOB_ERRORS as error:
        logger.error("error: %s", message_of(error))
        return 1
    except KeyboardInterrupt:
        logger.info("stopped; nothing but finished predictions in %s was written", job.folder / "predictions")
        return 130
    finally:
        stop_process_group(failed=failed)
    return 0


def prepare(flags: EvaluateFlags) -> Job:
    """Load the checkpoint, find the data and choose the cases.

    Raises:
        FileNotFoundError: If the checkpoint, the data or a list file is missing.
        ValueError: If data and checkpoint do not fit, or the split is empty.
    """
    if not flags.checkpoint:
        raise ValueError("--checkpoint is required: the last.pt or best.pt of a run")
    for split, listed in (("test", flags.test_list), ("val", flags.val_list)):
        if listed is not None and flags.split != split:
            raise ValueError(f"--{split}_list {listed}: is not read with --split {flags.split}; add --split {split}")
    _, device = start_process_group(flags.gpu)
    bundle = load_together(flags.checkpoint, device)
    config = flags.apply_to(bundle.config)
    options = inference_options(bundle, config, device)
    given = {name: getattr(flags, name) for name in DATA_SETTINGS if getattr(flags, name) is not None}
    if flags.dataset_name not in (None, config.dataset_name):
        given.setdefault("dataset_path", None)  # the folder of another format's data says nothing about these
    asked = dataclasses.replace(config, **given)
    data = str(asked.dataset_path.resolve()) if asked.dataset_path else ""  # of the package
    source = open_source(asked, bundle, flags)
    if flags.voxel_size and source.stores_voxel_size:
        logger.warning("without effect on files that store their voxel size: --voxel_size")
    require_match(source, bundle)
    if nameless := nameless_cases(source):
        logger.warning("each a patient of its own, for --patient_pattern finds none in them: %s", some(nameless))
    if flags.split == "test":
        warn_of_equal_ids(source, bundle, flags.dataset_path)
    case_ids = choose_cases(source, bundle, flags.split, test_list=flags.test_list, val_list=flags.val_list)
    drawn = flags.split == "test" and flags.test_list is None
    if drawn and len(flags.checkpoint) == 1 and is_training_data(source, bundle):
        warn_if_moved(case_ids, flags.checkpoint[0].parent)
    folder = flags.output_dir or default_folder(flags, bundle, source)
    job = Job(flags, bundle, config, data, source, case_ids, options, device, folder)
    refuse_other_results(folder, about_job(job))
    make_folder(folder, "--output_dir")
    return job


def open_source(config: RunConfig, bundle: InferenceBundle, flags: EvaluateFlags) -> CaseSource:
    """The data to score; where another data set states no number of classes, it is the checkpoint's."""
    if flags.num_classes is not None or (flags.dataset_name is None and flags.dataset_path is None):
        return build_source(config)
    try:
        return build_source(dataclasses.replace(config, num_classes=None))
    except ValueError:
        source = build_source(dataclasses.replace(config, num_classes=bundle.num_classes))
        logger.info("the data state no number of classes; taking the checkpoint's %d", bundle.num_classes)
        return source


def default_folder(flags: EvaluateFlags, bundle: InferenceBundle, source: CaseSource) -> Path:
    """``evaluation/<split>`` beside the first checkpoint; other data, lists and several checkpoints are in its name."""
    first, *others = flags.checkpoint or (Path(),)
    name = f"{flags.split}_mean_of_{len(others) + 1}" if others else flags.split
    if flags.case_list:
        name += f"_{flags.case_list.stem}"
    if not is_training_data(source, bundle):
        name = f"{flags.dataset_path.resolve().name if flags.dataset_path else flags.dataset_name or 'other'}_{name}"
    return first.parent / "evaluation" / name


def run(job: Job) -> None:
    """Score all cases, write the files, print the table and where the files are."""
    bundle, folder = job.bundle, job.folder
    kept = kept_components(job.config, bundle.facts)
    logger.info("checkpoint: %s, step %d, %s", job.checkpoints, bundle.step, bundle.config.model)
    logger.info("cases: %d (%s)", len(job.case_ids), job.flags.split)
    name_kept_components(kept, bundle.class_names)
    if is_main_rank():
        warn_of_stored_axes(job.source, job.case_ids, bundle)
    about, path = about_job(job), folder / ABOUT
    is_new = not path.exists()
    if is_main_rank():
        write_summary_json(path, about)
    try:
        results, summary = score_into(
            folder,
            bundle,
            job.source,
            job.case_ids,
            job.options,
            job.device,
            keep_largest=kept,
            about=about,
            advice="mend them, or leave them out with --test_list or --val_list",
        )
    except DamagedCasesError as error:
        if is_new and not error.results and is_main_rank():
            path.unlink(missing_ok=True)
        raise
    if is_main_rank():
        files = "".join(f"{folder / name}\n" for name in (CASES, SUMMARY, PREDICTIONS))
        show(f"\n{len(results)} cases, {job.flags.split}\n{format_table(summary)}\n\n{files}")


def about_job(job: Job) -> dict[str, Any]:
    """What is scored, and how."""
    listed = job.flags.case_list
    kept = kept_components(job.config, job.bundle.facts)
    return {
        "checkpoint": job.checkpoints,
        "step": job.bundle.step,
        "split": job.flags.split,
        "case_list": str(listed.resolve()) if listed else None,
        "cases_digest": ids_digest(job.case_ids),
        "split_digest": job.bundle.split.digest,
        "dataset_name": job.flags.dataset_name or job.config.dataset_name,
        "dataset_path": job.data,
        "inference": dataclasses.asdict(job.options) | {"largest_component": kept},
    }


if __name__ == "__main__":
    sys.exit(main())
