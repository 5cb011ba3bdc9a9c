"""A data set of thick slices from one of thin ones: what networks do with them is asked of ``benchmarks.compare``.

Each slice is the mean of ``--factor`` slices along the third axis, each label the class of most of
their voxels, the lower one where two have as many::

    python -m benchmarks.thick_slices --dataset_path LA_1.25mm --num_classes 2 --factor 4 --output_dir runs/thick
    python -m benchmarks.compare --dataset_name nifti --dataset_path runs/thick --cases 64 --pool 40 --labelnum 8 \\
        --methods supervised,best --row "supervised, no flat levels=--method supervised --flat_levels 0 0 0" \\
        --row "best, no flat levels=--method best --flat_levels 0 0 0" --seeds 0,1,2 --max_iteration 1000 \\
        -- --patch_size 32 32 10
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np

from dataloaders.base import SOURCES, CaseSource, SourceOptions, Volume


def main() -> None:
    """Write the folder, in the format ``nifti``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="nifti")
    parser.add_argument("--dataset_path", type=Path)
    parser.add_argument("--num_classes", type=int)
    parser.add_argument("--voxel_size", type=float, nargs=3)
    parser.add_argument("--factor", type=int, default=4, help="slices that become one, >= 2")
    parser.add_argument("--output_dir", type=Path, required=True)
    settings = parser.parse_args()
    if settings.factor < 2:
        parser.error(f"--factor {settings.factor}: at least 2")
    options = SourceOptions(settings.dataset_path, settings.num_classes, settings.voxel_size)
    write_folder(SOURCES.get(settings.dataset_name).from_options(options), settings.factor, settings.output_dir)


def write_folder(source: CaseSource, factor: int, folder: Path) -> None:
    """All labelled cases, in the source's order (their names are numbered), with slices ``factor`` times as thick."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(source.class_names) + "\n", encoding="utf-8")
    for number, case_id in enumerate(source.labeled_ids()):
        thick = with_thick_slices(source.load(case_id, with_label=True), factor, source.num_classes)
        channels = thick.image[0] if len(thick.image) == 1 else np.moveaxis(thick.image, 0, -1)
        for kind, array in (("images", channels), ("labels", thick.label)):
            image = nib.Nifti1Image(array, thick.affine)
            image.header.set_xyzt_units("mm")
            nib.save(image, folder / kind / f"{number:03d}_{case_id}.nii.gz")


def with_thick_slices(volume: Volume, factor: int, num_classes: int) -> Volume:
    """The case with slices along Z put together; the last ones, if too few for one, are left out."""
    depth = volume.image.shape[-1] // factor * factor
    image = volume.image[..., :depth].reshape(*volume.image.shape[:-1], -1, factor).mean(-1)  # (C, X, Y, Z')
    slices = volume.label[..., :depth].reshape(*image.shape[1:], factor)  # type: ignore[index]
    votes = np.stack([(slices == class_id).sum(-1) for class_id in range(num_classes)])  # (K, X, Y, Z')
    merge = np.diag([1.0, 1.0, factor, 1.0])
    merge[2, 3] = (factor - 1) / 2
    x, y, z = volume.spacing
    return Volume(volume.case_id, image, votes.argmax(0).astype(np.uint8), volume.affine @ merge, (x, y, factor * z))


if __name__ == "__main__":
    main()
