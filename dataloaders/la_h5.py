"""Left Atrium 2018 challenge as released with UA-MT and SS-Net: one HDF5 file per case, id lists beside them.

Source: Xiong et al. 2021, Medical Image Analysis 67, 101832; crops by Yu et al. 2019 (UA-MT), arXiv:1907.07034.
"""

from __future__ import annotations

from pathlib import Path

from dataloaders.base import SOURCES, TrainingDefaults
from dataloaders.class_names import choose_modality, fit_class_names
from dataloaders.geometry import Spacing
from dataloaders.h5_source import H5Source, stated_voxel_size

CASE_FOLDER = "2018LA_Seg_Training Set"
CASE_FILE = "mri_norm2.h5"
DEFAULT_VOXEL_SIZE = (0.625, 0.625, 0.625)


@SOURCES.register("LA")
class LeftAtriumH5(H5Source):
    """Cases ``2018LA_Seg_Training Set/<id>/mri_norm2.h5`` with ``image`` and ``label`` (X, Y, Z).

    The ids of ``train.list`` whose files are there come first, then every other case folder by name. ``train.list`` and
    ``test.list`` may each be missing; each is read by the job that asks for it. The files store neither voxel size nor
    orientation: ``--voxel_size`` gives the one. (By the anatomy the axes of the release run left, backward and up: LPS,
    as in DICOM.)

    Args:
        root: Folder with the lists and the case folder.
        voxel_size: Voxel size in mm; None for the challenge's 0.625 mm, with a warning.
        num_classes: Classes with the background; None for 2.
        modality: "mr" or "ct"; None for "mr".
    """

    format_name = "LA"
    flip_axes = (0, 1)  # the field's augmentation on LA turns and flips in the axial plane
    defaults = TrainingDefaults(patch_size=(112, 112, 80), max_iteration=6000, labelnum=8)

    def __init__(
        self,
        root: Path,
        *,
        voxel_size: Spacing | None = None,
        num_classes: int | None = None,
        modality: str | None = None,
    ) -> None:
        self.root = root
        self.class_names = fit_class_names(("background", "left atrium"), num_classes, str(root))
        self.num_classes = len(self.class_names)
        self.modality = choose_modality(modality, "mr")
        self.spacing = stated_voxel_size(voxel_size, DEFAULT_VOXEL_SIZE, root)
        folder = root / CASE_FOLDER if (root / CASE_FOLDER).is_dir() else root
        found = {path.parent.name: path for path in sorted(folder.glob(f"*/{CASE_FILE}"))}
        if not found:
            raise FileNotFoundError(
                f"{root} holds no '{CASE_FOLDER}/<id>/{CASE_FILE}'; pass the folder of the UA-MT release"
            )
        first = [case_id for case_id in self.official_train() or () if case_id in found]
        self.files = {case_id: found[case_id] for case_id in dict.fromkeys([*first, *found])}

    def official_train(self) -> tuple[str, ...] | None:
        """The ids of ``train.list``; None without the file."""
        return self._list("train.list")

    def official_test(self) -> tuple[str, ...] | None:
        """The ids of ``test.list``; None without the file."""
        return self._list("test.list")
