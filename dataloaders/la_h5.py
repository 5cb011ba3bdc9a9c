"""Left Atrium 2018 challenge as released with UA-MT and SS-Net: one HDF5 file per case, id lists beside them.

Source: Xiong et al. 2021, Medical Image Analysis 67, 101832; crops by Yu et al. 2019 (UA-MT), arXiv:1907.07034.
"""

from __future__ import annotations

from pathlib import Path

from dataloaders.base import SOURCES, TrainingDefaults
from dataloaders.case_lists import refuse_broken_links
from dataloaders.h5_source import H5Source

CASE_FOLDER = "2018LA_Seg_Training Set"
CASE_FILE = "mri_norm2.h5"


@SOURCES.register("LA")
class LeftAtriumH5(H5Source):
    """Cases ``2018LA_Seg_Training Set/<id>/mri_norm2.h5`` with ``image`` and ``label`` (X, Y, Z).

    The files store neither voxel size nor orientation: ``--voxel_size`` gives the one. (By the anatomy the axes of the
    release run left, backward and up: LPS, as in DICOM.)
    """

    format_name = "LA"
    known_classes = ("background", "left atrium")
    usual_voxel_size = (0.625, 0.625, 0.625)
    flip_axes = (0, 1)  # the field's augmentation on LA turns and flips in the axial plane
    defaults = TrainingDefaults(patch_size=(112, 112, 80), max_iteration=6000, labelnum=8)

    def list_folders(self) -> tuple[Path, ...]:
        """The root and the folder of cases; where that is the root, as for the release's loaders, the one around."""
        around = (self.root.resolve().parent,) if self.root.resolve().name == CASE_FOLDER else ()
        return (self.root, self.root / CASE_FOLDER, *around)

    @staticmethod
    def find_files(root: Path) -> dict[str, Path]:
        """The files of the case folders, which may lie in the root itself."""
        folder = root / CASE_FOLDER if (root / CASE_FOLDER).is_dir() else root
        refuse_broken_links([*folder.glob("*"), *folder.glob("*/*.h5")])
        found = {path.parent.name: path for path in sorted(folder.glob(f"*/{CASE_FILE}"))}
        if not found:
            raise FileNotFoundError(
                f"{root} holds no '{CASE_FOLDER}/<id>/{CASE_FILE}'; pass the folder of the UA-MT release"
            )
        return found
