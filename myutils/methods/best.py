"""The recipe that this project recommends: ``mean_teacher`` with more perturbation of what the student sees.

Two strong views of each unlabelled patch learn its pseudo-label, for one pass of the teacher; half of the encoder's
channels are dropped for them (after UniMatch, Yang et al. 2023, arXiv:2208.09910), and half of the pasted boxes come
from the other unlabelled patch instead of a labelled one (CutMix, Yun et al. 2019, arXiv:1905.04899). Unlabelled
patches weigh half as much as labelled ones. Whole volumes are segmented as the mean over all mirrored inputs, where
there is an axis to mirror along. What was chosen on which cases: docs/results.md.

Note: UniMatch drops the features of weak views, in a stream of its own; here the strong views lose theirs, so that no
further pass is needed.
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
            "tta_flips": True,
        }
    )
