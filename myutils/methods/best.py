"""The recipe that this project recommends so far: the mean teacher with mirrored views in training and at the end.

Against ``mean_teacher``: the teacher averages each view with a mirrored one, and mirrored inputs are averaged when
whole volumes are segmented; without axes to mirror along it is ``mean_teacher``. The search for a recipe is not
finished (docs/methods.md).
"""

from __future__ import annotations

from types import MappingProxyType

from myutils.methods.base import METHODS
from myutils.methods.mean_teacher import MeanTeacher


@METHODS.register("best")
class Best(MeanTeacher):
    """``mean_teacher`` with other defaults."""

    defaults = MappingProxyType({"use_contrastive_prototype": True, "teacher_flips": True, "tta_flips": True})
