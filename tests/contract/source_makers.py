"""A tiny data set of every registered source, with labelled and unlabelled cases, for the contract tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import data_makers as make
import h5py
import pytest

from dataloaders.base import SOURCES, CaseSource, SourceOptions
from dataloaders.demo import DemoCohort


@dataclass
class Instance:
    """A tiny source, and how to take the label of a case away behind its back."""

    source: CaseSource
    remove_label: Callable[[str], None]


MAKERS: dict[str, Callable[[Path], Instance]] = {}


def maker(name: str) -> Callable[[Callable[[Path], Instance]], Callable[[Path], Instance]]:
    """File a function that writes a tiny data set under its source's name; ", ..." may follow the name."""

    def add(function: Callable[[Path], Instance]) -> Callable[[Path], Instance]:
        MAKERS[name] = function
        return function

    return add


def remove_h5_label(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["label"]


@maker("LA")
def make_la(root: Path) -> Instance:
    files = {name: make.write_la_case(root, name, make.counting_image(), make.corner_label()) for name in ("b", "a")}
    make.write_la_case(root, "c", make.counting_image())
    (root / "train.list").write_text("b\nc\n")

    source = SOURCES.get("LA").from_options(SourceOptions(root=root, voxel_size=(1.0, 2.0, 3.0)))
    return Instance(source, lambda case_id: remove_h5_label(files[case_id]))


@maker("ACDC")
def make_acdc(root: Path) -> Instance:
    for name in ("training/patient002", "training/patient001", "testing/patient101"):
        make.write_acdc_patient(root, name, label=name != "testing/patient101")
    source = SOURCES.get("ACDC").from_options(SourceOptions(root=root))
    return Instance(source, lambda case_id: next(root.glob(f"*/*/{case_id}_gt.nii.gz")).unlink())


@maker("ACDC, the HDF5 copy")
def make_acdc_h5(root: Path) -> Instance:
    files = {}
    for name in ("patient001_frame01", "patient001_frame12", "patient002_frame01"):
        files[name] = make.write_h5(
            root / f"data/{name}.h5", make.counting_image().T, make.corner_label().T if "002" not in name else None
        )

    source = SOURCES.get("ACDC").from_options(SourceOptions(root=root))
    return Instance(source, lambda case_id: remove_h5_label(files[case_id]))


@maker("decathlon")
def make_decathlon(root: Path) -> Instance:
    training = []
    for name in ("case_b", "case_a", "case_c"):
        make.write_nifti(root / f"imagesTr/{name}.nii.gz", make.counting_image((*make.SHAPE, 2)))
        training.append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
    for name in ("case_b", "case_a"):
        make.write_nifti(root / f"labelsTr/{name}.nii.gz", make.corner_label())
    labels = {"0": "background", "1": "organ", "2": "tumour"}
    (root / "dataset.json").write_text(json.dumps({"training": training, "labels": labels}))
    source = SOURCES.get("decathlon").from_options(SourceOptions(root=root))
    return Instance(source, lambda case_id: (root / f"labelsTr/{case_id}.nii.gz").unlink())


@maker("nifti")
def make_nifti(root: Path) -> Instance:
    for name in ("a", "b", "c"):
        make.write_nifti(root / f"images/{name}.nii.gz", make.counting_image())
    for name in ("b", "c"):
        make.write_nifti(root / f"labels/{name}.nii.gz", make.corner_label())
    source = SOURCES.get("nifti").from_options(SourceOptions(root=root, num_classes=2))
    return Instance(source, lambda case_id: (root / f"labels/{case_id}.nii.gz").unlink())


@maker("dicom")
def make_dicom(root: Path) -> Instance:
    for name in ("a", "b"):
        make.write_dicom(root / name, make.counting_image())
    source = SOURCES.get("dicom").from_options(SourceOptions(root=root, num_classes=2))
    affine = source.load("a", with_label=False).affine
    make.write_nifti(root / "b.nii.gz", make.corner_label(), affine)
    source = SOURCES.get("dicom").from_options(SourceOptions(root=root, num_classes=2))
    return Instance(source, lambda case_id: (root / f"{case_id}.nii.gz").unlink())


@maker("demo")
def make_demo(root: Path) -> Instance:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dataloaders.demo.build_template", make.blob_template)
        source = DemoCohort(root, make.TINY_COHORT, training_cases=2, test_cases=1)
    return Instance(source, lambda case_id: next(root.glob(f"*/labels/{case_id}.nii.gz")).unlink())
