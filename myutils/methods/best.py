"""The recipe that this project recommends: ``mean_teacher`` with more perturbation of what the student sees.

Two strong views of each unlabelled patch learn its pseudo-label, for one pass of the teacher; half of the encoder's
channels are dropped for them (both as in UniMatch, Yang et al. 2023, arXiv:2208.09910), and half of the pasted boxes
come from the other unlabelled patch instead of a labelled one (CutMix, Yun et al. 2019, arXiv:1905.04899). Unlabelled
patches weigh half as much as labelled ones. Whole volumes are segmented as the mean over four views. What was chosen on
which cases: docs/results.md.
"""

from __future__ import annotations

from types import MappingProxyType

from myutils.methods.base import METHODS
from myutils.methods.mean_teacher import MeanTeacher


@METHODS.register("best")
class Best(MeanTeacher):
    """``mean_teacher`` with other defaults."""

    defaults = MappingProxyType(
        {
            "consistency": 0.5,
            "strong_views": 2,
            "feature_perturbation": True,
            "paste_unlabeled": 0.5,
            "tta_views": 4,
        }
    )
