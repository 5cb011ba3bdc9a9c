"""What DICOM files say of themselves, and which of them are scans."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import SimpleITK as sitk  # noqa: N813 - its usual name

from dataloaders.dicom_frames import header_texts

MODALITY_TAG = "0008|0060"
PATIENT_TAG = "0010|0020"
_NO_SCANS = frozenset({"SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG", "DOC"})  # modalities


class Tags(NamedTuple):
    """What a series says of itself, "" where it does not: modality in capitals, and PatientID."""

    modality: str
    patient: str

    @property
    def is_scan(self) -> bool:
        """Not so of segmentations, dose maps, reports and the like."""
        return self.modality not in _NO_SCANS


def kind_of(stated: str) -> str:
    """How a DICOM modality is normalised: "ct" or "mr", which stands for all others."""
    return "ct" if stated == "CT" else "mr"


def read_tags(folder: Path) -> Tags | None:
    """From the folder's first header of a DICOM image, else of what has no pixels; None without such a file."""
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
        except RuntimeError:  # no DICOM image, but a note beside the slices, or a report
            others.append(path)
            continue
        modality, patient = (
            reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else "" for tag in (MODALITY_TAG, PATIENT_TAG)
        )
        return Tags(modality.upper(), patient)
    return next((tags for path in others if path.is_file() and not (tags := tags_of(path)).is_scan), None)


def tags_of(path: Path) -> Tags:
    """From the header of one file, with pixels or without; "" throughout where it is no DICOM file."""
    modality, patient = header_texts(str(path), "Modality", "PatientID")
    return Tags(modality.upper(), patient)
