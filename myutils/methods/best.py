"""The recipe that this project recommends: ``mean_teacher`` with other perturbations of what the student sees.

Two strong views of each unlabelled patch learn its pseudo-label, for one pass of the teacher (the dual streams of
UniMatch, Yang et al. 2023, arXiv:2208.09910, without a loss between them). They keep the patch's intensities, as in
BCP: what sets them apart are pasted boxes, half of which come from the other unlabelled patch, and dropped channels,
half of the encoder's. The decoder's coarser levels learn the labels too. Whole volumes are segmented as the mean over
all mirrored inputs, where there is an axis to mirror along. What was chosen on which cases: docs/search.md.
"""

from __future__ import annotations

from types import MappingProxyType

from myutils.methods.base import METHODS
from myutils.methods.mean_teacher import CONSISTENCY, MeanTeacher


@METHODS.register("best")
class Best(MeanTeacher):
    """``mean_teacher`` with other defaults."""

    defaults = MappingProxyType(
        {
            "consistency": CONSISTENCY,
            "strong_views": 2,
            "strong_intensity": 0.0,
            "feature_perturbation": True,
            "paste_unlabeled": 0.5,
            "deep_supervision": True,
            "tta_flips": True,
        }
    )
