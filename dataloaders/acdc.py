"""ACDC, the Automated Cardiac Diagnosis Challenge: short-axis cine MR of 150 patients, two labelled frames of each.

Read as released, and in the HDF5 copy that the field's semi-supervised repositories share (SSL4MIS, SS-Net, BCP).

Source: Bernard et al. 2018, IEEE Transactions on Medical Imaging 37(11), doi:10.1109/TMI.2018.2837502.
"""

from __future__ import annotations

import logging
import re
from itertools import zip_longest
from pathlib import Path

from dataloaders.base import SOURCES, CaseSource, SourceOptions, TrainingDefaults
from dataloaders.class_names import choose_modality, fit_class_names
from dataloaders.file_source import NiftiFiles
from dataloaders.h5_source import H5Source
from dataloaders.nifti_folder import list_nifti
from dataloaders.splits import HELD_OUT_SHARE

logger = logging.getLogger(__name__)

FORMAT = "ACDC"
CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")
LABEL = "_gt"
FRAME = re.compile(rf"patient\d+_frame\d+({LABEL})?")  # not patient001_4d
SLICE = re.compile(r"_slice_\d+$")


class _Frames(CaseSource):
    """What both layouts share: a case is a frame, and both frames show one patient."""

    format_name = FORMAT
    flip_axes = (0, 1)  # the field's augmentation on ACDC turns and flips in the short-axis plane
    defaults = TrainingDefaults(labelnum=14)  # 7 patients, a tenth of the field's training set

    def patient(self, case_id: str) -> str:
        """Both frames show the same patient."""
        return _patient(case_id)


@SOURCES.register(FORMAT)
class AcdcRelease(_Frames, NiftiFiles):
    """Cases ``training/patient001/patient001_frame01.nii.gz`` with ``..._gt.nii.gz``, then those of ``testing/``.

    A case is a frame, end diastole or end systole; both frames of a patient are in the same part of a split. The
    release lists its patients by diagnosis, so that the first ones all have the same: here the diagnoses of the
    ``Info.cfg`` files take turns, and any few labelled cases show different hearts. Labelled cases of ``testing/`` are
    the test list; where there is none, the last fifth of the patients of ``training/`` is, and ``testing/`` is
    unlabelled. The train list has all others.

    Args:
        root: Folder of ``training/`` and, perhaps, ``testing/``.
        num_classes: Classes with the background, at least the four of the challenge; None for these.
        modality: "mr" or "ct"; None for "mr".
    """

    in_channels = 1

    def __init__(self, root: Path, *, num_classes: int | None = None, modality: str | None = None) -> None:
        self.root = root
        self.images, self.labels = {}, {}
        training, testing = (_patients(root / part) for part in ("training", "testing"))
        for patient in (*training, *testing):
            self._add_frames(patient)
        if not any(self._frames(training)):
            raise FileNotFoundError(
                f"{root} holds neither training/patientNNN/patientNNN_frameMM.nii.gz, as released, nor "
                "data/patientNNN_frameMM.h5; pass the folder that holds training/ or data/"
            )
        self.warn_of_orphans()
        self.class_names = fit_class_names(CLASSES, num_classes, str(root))
        self.num_classes = len(self.class_names)
        self.modality = choose_modality(modality, "mr")
        labeled = tuple(case_id for case_id in self._frames(testing) if case_id in self.labels)
        held_out = training[len(training) - len(training) // HELD_OUT_SHARE :]
        self._test = labeled or tuple(case_id for case_id in self._frames(held_out) if case_id in self.labels)
        tested = {_patient(case_id) for case_id in self._test}
        self._train = tuple(case_id for case_id in self.images if _patient(case_id) not in tested)

    @classmethod
    def from_options(cls, options: SourceOptions) -> CaseSource:
        """Build from ``--dataset_path``, ``--num_classes`` and ``--modality``; the HDF5 copy where that is there."""
        is_h5 = options.root is not None and any(AcdcH5.find_files(options.root))
        return AcdcH5.from_options(options) if is_h5 else super().from_options(options)

    def official_train(self) -> tuple[str, ...]:
        """The cases of the patients that no test case is of."""
        return self._train

    def official_test(self) -> tuple[str, ...] | None:
        """The labelled cases of ``testing/``, else of the last fifth of ``training/``; None for fewer than five."""
        return self._test or None

    def _add_frames(self, patient: Path) -> None:
        """Take up the images and labels of a patient's folder."""
        for name, path in list_nifti(patient, FRAME).items():
            if _patient(name) == patient.name:
                (self.labels if name.endswith(LABEL) else self.images)[name.removesuffix(LABEL)] = path

    def _frames(self, patients: list[Path]) -> list[str]:
        """The cases of these patients."""
        names = {path.name for path in patients}
        return [case_id for case_id in self.images if _patient(case_id) in names]


class AcdcH5(_Frames, H5Source):
    """Cases ``data/patient001_frame01.h5`` with ``image`` and ``label`` stored as (Z, Y, X), and the field's lists.

    The copy has the 100 patients of ``training/``; its train list names slices. Beside its lists the cases of
    ``val.list`` are in no role; ``--val_list`` takes them with a ``--train_list``. The voxel sizes of the release,
    which differ between patients, are lost.
    """

    known_classes = CLASSES
    usual_voxel_size = (1.5, 1.5, 10.0)  # the release has 1.3 to 2 mm in the plane, slices of 5 to 10 mm
    stored_axes = (2, 1, 0)

    @staticmethod
    def find_files(root: Path) -> dict[str, Path]:
        """The volumes in ``data/``; its ``slices/`` repeat them."""
        return {path.stem: path for path in sorted((root / "data").glob("*.h5")) if FRAME.fullmatch(path.stem)}

    def official_train(self) -> tuple[str, ...] | None:
        """The cases whose slices ``train_slices.list`` names, in the order of their first; None without the file."""
        slices = self._list("train_slices.list")
        return slices and tuple(dict.fromkeys(SLICE.sub("", name) for name in slices))


def _patient(case_id: str) -> str:
    return case_id.split("_")[0]


def _patients(folder: Path) -> list[Path]:
    """The patients' folders by name, those of the diagnoses in turn."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("patient*")):
        if path.is_dir():
            groups.setdefault(_diagnosis(path / "Info.cfg"), []).append(path)
    if "" in groups:
        logger.warning("%s: %d patients have no Info.cfg with a 'Group:', their diagnosis", folder, len(groups[""]))
    return [path for turn in zip_longest(*groups.values()) for path in turn if path is not None]


def _diagnosis(path: Path) -> str:
    """The group in an ``Info.cfg`` (NOR, MINF, DCM, HCM or RV); "" where it states none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r"^Group:[ \t]*(\S+)", text, re.MULTILINE)
    return found[1] if found else ""
