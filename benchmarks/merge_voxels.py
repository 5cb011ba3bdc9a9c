"""A data set of large voxels from one of small ones: thick slices, or the left atrium at 1.25 and 2.5 mm.

Each voxel is the mean of a block of ``--factor`` voxels, each label the class that most of these have; where two have
as many, the lower one, or with ``--ties higher`` the higher one. Voxels at an axis's end that fill no block are left
out. The left atrium of docs/results.md, and its thick slices::

    python -m benchmarks.merge_voxels --dataset_name LA --dataset_path LA_release --voxel_size 0.625 0.625 0.625 \\
        --factor 4 4 4 --ties higher --output_dir LA_2.5mm
    python -m benchmarks.merge_voxels --dataset_path LA_1.25mm --num_classes 2 --factor 1 1 4 --output_dir runs/thick
    python -m benchmarks.compare --dataset_name nifti --dataset_path runs/thick --cases 64 --pool 40 --labelnum 8 \\
        --methods supervised,best --row "supervised, no flat levels=--method supervised --flat_levels 0 0 0" \\
        --row "best, no flat levels=--method best --flat_levels 0 0 0" --seeds 0,1,2 --max_iteration 1000 \\
        -- --patch_size 32 32 10
"""

from __future__ import annotations

import argparse
import re
from itertools import chain
from pathlib import Path

import nibabel as nib
import numpy as np

from dataloaders.base import SOURCES, CaseSource, SourceOptions, Triple, Volume


def main() -> None:
    """Write the folder, in the format ``nifti``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="nifti")
    parser.add_argument("--dataset_path", type=Path)
    parser.add_argument("--num_classes", type=int)
    parser.add_argument("--voxel_size", type=float, nargs=3)
    parser.add_argument("--factor", type=int, nargs=3, required=True, help="voxels along X, Y, Z that become one")
    parser.add_argument("--ties", choices=("lower", "higher"), default="lower", help="class where two are as frequent")
    parser.add_argument("--output_dir", type=Path, required=True)
    settings = parser.parse_args()
    if min(settings.factor) < 1:
        parser.error(f"--factor {' '.join(map(str, settings.factor))}: each at least 1")
    options = SourceOptions(settings.dataset_path, settings.num_classes, settings.voxel_size)
    try:
        source = SOURCES.get(settings.dataset_name).from_options(options)
        write_folder(source, tuple(settings.factor), settings.output_dir, ties=settings.ties)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def write_folder(source: CaseSource, factor: Triple, folder: Path, *, ties: str = "lower") -> None:
    """All labelled cases with blocks of voxels as one, in the order of ``file_names``."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(source.class_names) + "\n", encoding="utf-8")
    for case_id, name in file_names(source).items():
        merged = merge(source.load(case_id, with_label=True), factor, source.num_classes, ties=ties)
        channels = merged.image[0] if len(merged.image) == 1 else np.moveaxis(merged.image, 0, -1)
        for kind, array in (("images", channels), ("labels", merged.label)):
            image = nib.Nifti1Image(array, merged.affine)
            image.header.set_xyzt_units("mm")
            nib.save(image, folder / kind / f"{name}.nii.gz")


def file_names(source: CaseSource) -> dict[str, str]:
    """A name per labelled case, numbered in the source's order.

    Where the source knows a case's patient by more than its id, the name begins with a BIDS subject, by which the
    ``nifti`` format keeps the patient's cases together.
    """
    patients = {case_id: source.patient(case_id) for case_id in source.labeled_ids()}
    digits = max(3, len(str(len(patients))))
    numbers = {patient: f"{number:0{digits}d}" for number, patient in enumerate(dict.fromkeys(patients.values()))}
    names = {}
    for number, (case_id, patient) in enumerate(patients.items()):
        subject = f"sub-{numbers[patient]}{re.sub('[^A-Za-z0-9]', '', patient)}_" if patient != case_id else ""
        names[case_id] = f"{subject}{number:0{digits}d}_{case_id}"
    return names


def merge(volume: Volume, factor: Triple, num_classes: int, *, ties: str = "lower") -> Volume:
    """The case with blocks of ``factor`` voxels as one; the last voxels of an axis, if too few, are left out."""
    image = blocks_of(volume.image, factor).mean((-3, -2, -1))  # (C, X', Y', Z')
    labels = blocks_of(volume.label, factor)  # type: ignore[arg-type]
    order = range(num_classes) if ties == "lower" else range(num_classes)[::-1]
    votes = np.stack([(labels == class_id).sum((-3, -2, -1)) for class_id in order])  # (K, X', Y', Z')
    label = np.array(order, np.uint8)[votes.argmax(0)]
    move = np.diag([*map(float, factor), 1.0])
    move[:3, 3] = [(size - 1) / 2 for size in factor]
    x, y, z = (size * edge for size, edge in zip(factor, volume.spacing, strict=True))
    return Volume(volume.case_id, image, label, volume.affine @ move, (x, y, z))


def blocks_of(array: np.ndarray, factor: Triple) -> np.ndarray:
    """(..., X, Y, Z) as (..., X / x, Y / y, Z / z, x, y, z)."""
    counts = [size // step for size, step in zip(array.shape[-3:], factor, strict=True)]
    if not all(counts):
        raise ValueError(f"--factor {' '.join(map(str, factor))}: more than a case of {array.shape[-3:]} voxels has")
    ends = [count * step for count, step in zip(counts, factor, strict=True)]
    whole = array[..., : ends[0], : ends[1], : ends[2]]
    parts = whole.reshape(*array.shape[:-3], *chain(*zip(counts, factor, strict=True)))
    return np.moveaxis(parts, (-5, -3, -1), (-3, -2, -1))


if __name__ == "__main__":
    main()
