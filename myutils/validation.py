"""The validation cases of a training: looked at before it, and scored whole at each save."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from dataloaders.base import CaseSource
from dataloaders.checked_cases import KeptCases, load_case
from dataloaders.preprocess import Preprocess
from myutils import build
from myutils.checkpoint import RunState
from myutils.distributed import own_share
from myutils.evaluation import evaluate_cases, summarise
from networks.base import Segmenter


class Validation:
    """Mean Dice of the split's validation cases, read once and segmented as an evaluation does.

    Args:
        state: Of the run; its facts may still change.
        source: Where the cases come from.
        amp: Precision, resolved for the device.
        device: Where the network computes.
    """

    def __init__(self, state: RunState, source: CaseSource, amp: str, device: torch.device) -> None:
        self._state, self._source, self._device = state, source, device
        self._kept = KeptCases(source)
        self._preprocess: Preprocess = build.build_preprocess(state.config)
        self._inference = build.build_inference(state.config, amp)

    def check(self) -> None:
        """Read and prepare every case, so that a wrong one is named before training; errors of both.

        What this rank scores later is kept.
        """
        mine = {*own_share(self._state.split.val)}
        for case_id in self._state.split.val:
            kept = case_id in mine
            volume = self._kept.load(case_id) if kept else load_case(self._source, case_id, with_label=True)
            self._preprocess(volume)

    def dice(self, network: Segmenter) -> float:
        """Mean Dice over cases and classes, 0..1; the ranks share the cases out. Errors of ``evaluate_cases``.

        A compiled network runs uncompiled: windows would be compiled for minutes, and the graphs made for them would
        take the place of those of the training, which a resumed run starts with.
        """
        config = self._state.config
        with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
            results = evaluate_cases(
                network,
                self._kept,
                self._state.split.val,
                self._preprocess,
                self._inference,
                self._device,
                keep_largest=build.kept_components(config, self._state.facts),
                progress=False,
            )
        return float(summarise(results, self._state.facts.class_names)["mean"]["dice"]["mean"])
