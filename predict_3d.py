"""Segment scans with a checkpoint; each label map has exactly the geometry of its input.

A NIfTI file, a folder of them, a DICOM series' folder, or a folder of such folders::

    python predict_3d.py --checkpoint runs/la8/best.pt --input scan.nii.gz --output predicted
    python predict_3d.py --checkpoint runs/la8/best.pt --input scans --output predicted --probabilities
    python predict_3d.py --checkpoint runs/LA_best_8labels_seed*/last.pt --input scans --output predicted

Several checkpoints, such as runs of several seeds, segment together: their probabilities are averaged, the settings are
those of the first.

Several processes share the scans out: ``torchrun --nproc_per_node=2 predict_3d.py ...``.

It writes ``<name>.nii.gz`` (class ids, uint8) and with ``--probabilities`` ``<name>_prob.nii.gz`` (float32, one volume
per class along the fourth axis), over files of before with ``--existing replace`` alone; ``--existing keep`` goes on
after an interruption. The field ``descrip`` of their headers tells of checkpoint and flags. A bad scan is reported and
skipped; a full disk and a GPU that fails end the run. Exit code 0 all done, 1 some failed, 2 refused at the start, 130
stopped. ``--help`` lists all flags.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from dataloaders.case_lists import some
from dataloaders.error_text import DeviceError, pass_on_device_error, reason_of
from dataloaders.geometry import states_orientation
from dataloaders.orientation import note_stored_axes, stated_axes
from myutils.build import kept_components
from myutils.checkpoint import InferenceBundle
from myutils.components import cut_to_largest, name_kept_components
from myutils.distributed import barrier, is_main_rank, join_shares, own_share, start_process_group, stop_process_group
from myutils.ensemble import load_together
from myutils.flags import option
from myutils.inference import SCAN_ERRORS, InferenceOptions, label_map_from, predict_label_map, predict_probabilities
from myutils.inference_flags import InferenceFlags, inference_options, other_settings, start
from myutils.label_files import (
    OutputFolderError,
    are_probabilities,
    is_of_others,
    is_whole,
    lies_elsewhere,
    origin_of,
    said_origin,
    save_in_geometry_of,
    save_volume,
)
from myutils.progress import ProgressBar
from myutils.run_folder import make_folder
from myutils.scan_inputs import Scan, find_scans, join_channels, require_free_outputs, warn_of_modality
from myutils.stop_signals import sigterm_as_ctrl_c

logger = logging.getLogger("predict")

FILES, EXISTING = "files", ("refuse", "replace", "keep")


@dataclass(frozen=True)
class PredictFlags(InferenceFlags):
    """All flags of this script."""

    input: Path | None = option(
        None,
        help="NIfTI file, folder of them, DICOM series' folder, or folder of these; else none, it is required",
        group=FILES,
    )
    output: Path | None = option(None, help="folder for the label maps; else none, it is required", group=FILES)
    probabilities: bool = option(False, help="write the probabilities of all classes too", group=FILES)
    existing: str = option(
        "refuse",
        "what to do about files of before in --output; keep: leave their scans out",
        group=FILES,
        choices=EXISTING,
    )


@dataclass(frozen=True)
class Job:
    """Everything that is checked before the first scan is opened."""

    bundle: InferenceBundle
    options: InferenceOptions
    keep_largest: tuple[int, ...]
    device: torch.device
    scans: list[Scan]
    folder: Path
    origin: str
    probabilities: bool
    existing: str = "refuse"
    cut_off: frozenset[Path] = frozenset()  # files of before that cannot be read

    @property
    def keeps_files(self) -> bool:
        """Whether files of before stay, and their scans are left out."""
        return self.existing == "keep"

    @property
    def how_to_go_on(self) -> str:
        """What to do about the scans that are left."""
        if self.existing == "replace":
            return "those not replaced yet are of before; --existing replace begins anew"
        return "--existing keep does the others"

    def outputs(self, scan: Scan) -> tuple[Path, ...]:
        """Files that a scan gives: the label map and, where asked for, the probabilities."""
        names = [f"{scan.name}.nii.gz"] + [f"{scan.name}_prob.nii.gz"] * self.probabilities
        return tuple(self.folder / name for name in names)


@sigterm_as_ctrl_c()
def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags and segment; see the module's docstring for the exit codes."""
    usage = "%(prog)s --checkpoint PATH [PATH ...] --input PATH --output DIR [flags]"
    job = start(PredictFlags, prepare, argv, prog="predict_3d.py", usage=usage, doc=__doc__)
    alone = True  # with what goes wrong: other ranks may wait for this one
    try:
        failed = run(job)
        alone = False
        logger.info("%d of %d scans segmented, in %s", len(job.scans) - len(failed), len(job.scans), job.folder)
        if failed and is_main_rank():
            logger.error("failed: %s", ", ".join(failed))
    except (OutputFolderError, DeviceError) as error:
        logger.error("error: %s; %s", error, job.how_to_go_on)
        return 1
    except KeyboardInterrupt:
        logger.info("stopped; the label maps in %s are whole, %s", job.folder, job.how_to_go_on)
        return 130
    finally:
        stop_process_group(failed=alone)
    return 1 if failed else 0


def prepare(flags: PredictFlags) -> Job:
    """Find the scans, load the checkpoint, and make the output folder last.

    Raises:
        FileNotFoundError: If the checkpoint or the input is missing.
        ValueError: If a flag is missing, or an output would overwrite a file.
    """
    if not flags.checkpoint or flags.input is None or flags.output is None:
        missing = [name for name in ("checkpoint", "input", "output") if not getattr(flags, name)]
        raise ValueError(f"{', '.join('--' + name for name in missing)}: required")
    if flags.output.exists() and not flags.output.is_dir():
        raise ValueError(f"--output {flags.output} is a file; pass a folder")
    scans = find_scans(flags.input)
    _, device = start_process_group(flags.gpu)
    bundle = load_together(flags.checkpoint, device)
    config = flags.apply_to(bundle.config)
    options = inference_options(bundle, config, device)
    scans = join_channels(scans, bundle.in_channels)
    kept = kept_components(config, bundle.facts)
    origin = origin_of(flags.checkpoint, other_settings(bundle, options, kept))
    job = Job(bundle, options, kept, device, scans, flags.output, origin, flags.probabilities, flags.existing)
    require_free_outputs(scans, [path for scan in scans for path in job.outputs(scan)])
    make_folder(flags.output, "--output")
    if flags.existing != "replace":
        job = without_done(job)
        barrier()  # no rank writes before all have looked
    name_kept_components(kept, bundle.class_names)
    return job


def without_done(job: Job) -> Job:
    """The job without the scans whose files lie there already.

    Raises:
        ValueError: If there is any of these files and the job does not keep them, or another checkpoint or other flags
            made them.
    """
    outputs = {scan: job.outputs(scan) for scan in job.scans}
    there = [path for paths in outputs.values() for path in paths if path.exists()]
    cut_off = [path for path in there if job.keeps_files and not is_whole(path)]
    if cut_off:
        logger.warning("cannot be read and is written anew: %s", some([str(path) for path in cut_off]))
        there = [path for path in there if path not in cut_off]
    if there and not job.keeps_files:
        raise ValueError(
            f"{there[0]} exists already, and {len(there) - 1} more; pass another --output, --existing replace, or "
            "--existing keep to leave their scans out"
        )
    if others := [path for path in there if is_of_others(path, job.origin)]:
        raise ValueError(
            f"{others[0]}, and {len(others) - 1} more, come from another checkpoint or other flags: the header says "
            f"{said_origin(others[0])}, a new one would say {job.origin}; pass the same, another --output, or "
            "--existing replace"
        )
    done = set(there)
    for scan, paths in outputs.items():
        kept = [path for path in paths if path in done]
        place = _place_of(scan) if kept else None
        strangers = [] if place is None else [path for path in kept if lies_elsewhere(path, *place)]
        if strangers:
            raise ValueError(
                f"{strangers[0]} has another shape or place than {scan.path}: it is of another scan of this name; pass "
                "another --output, or --existing replace"
            )
    left = [scan for scan, paths in outputs.items() if not done.issuperset(paths)]
    if there:
        logger.info("%d of %d scans are done already", len(job.scans) - len(left), len(job.scans))
        if some_files := sum(path in done for scan in left for path in outputs[scan]):
            logger.info("%d files of the others stay as they are; only what is missing is written", some_files)
    return dataclasses.replace(job, scans=left, cut_off=frozenset(cut_off))


def _place_of(scan: Scan) -> tuple[tuple[int, ...], np.ndarray] | None:
    """A scan's shape and affine; None of a file that cannot be read, which is named in its turn."""
    try:
        return scan.place()
    except SCAN_ERRORS:
        return None


def run(job: Job) -> list[str]:
    """Segment all scans, shared out over the ranks; returns the names of those that failed, on every rank.

    Raises:
        OutputFolderError: If no output can be written, be it this scan's or another's.
        DeviceError: If the GPU failed.
    """
    failed: list[str | None] = []  # None for a scan that did not fail
    with logging_redirect_tqdm():
        for scan in ProgressBar(own_share(job.scans), desc="predict", unit="scan", disable=not is_main_rank()):
            try:
                segment(scan, job)
                failed.append(None)
            except OutputFolderError:
                raise
            except SCAN_ERRORS as error:
                pass_on_device_error(error)
                logger.error("%s: skipped: %s", scan.path, reason_of(error))
                failed.append(scan.name)
    return [name for name in join_shares(failed) if name is not None]


def segment(scan: Scan, job: Job) -> None:
    """Read, segment and write one scan.

    Raises:
        ValueError: If the scan is damaged, has another number of channels, or voxels that are not finite.
    """
    volume = scan.read()
    warn_of_modality(scan, job.bundle.preprocess.modality)
    channels, expected = volume.image.shape[0], job.bundle.in_channels
    if channels != expected:
        several = "store them in one 4D file, or in NAME_0000.nii.gz, NAME_0001.nii.gz ... and pass their folder"
        how = several if expected > 1 else "store the one that the network was trained on in a 3D file"
        raise ValueError(f"the scan has {channels} channels, the network takes {expected}; {how}")
    arguments = (job.bundle.network, volume, job.bundle.preprocess, job.options, job.device)
    if job.probabilities:
        probabilities = predict_probabilities(*arguments)
        arrays = [label_map_from(probabilities), np.moveaxis(probabilities, 0, -1)]  # (X, Y, Z) and (X, Y, Z, K)
    else:
        arrays = [predict_label_map(*arguments)]
    arrays[0] = cut_to_largest(arrays[0], job.keep_largest, job.bundle.class_names, scan.path)
    header = scan.header()
    oriented = header is None or states_orientation(header)
    if job.bundle.preprocess.orientation == "stored":
        note_stored_axes(stated_axes(volume.affine, oriented))
    elif not oriented:
        logger.warning("%s does not say how it lies in the body, and may be mirrored to the network", scan.path)
    for path, array in zip(job.outputs(scan), arrays, strict=True):
        if job.keeps_files and path.exists() and path not in job.cut_off:
            continue
        if header is None:
            save_volume(path, array, volume.affine, job.origin)
        else:
            save_in_geometry_of(path, array, header, job.origin)
    left = job.folder / f"{scan.name}_prob.nii.gz"
    if job.existing == "replace" and not job.probabilities and are_probabilities(left):
        left.unlink()
        logger.info("%s: removed, the probabilities of the prediction that this one replaces", left)


if __name__ == "__main__":
    sys.exit(main())
