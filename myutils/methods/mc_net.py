"""Mutual consistency: several decoders on one encoder, each learning the sharpened predictions of the others.

Source: Wu et al. 2021, arXiv:2103.02911, and MC-Net+, arXiv:2109.09960. With p_i the probabilities of decoder i and
``sharp(p)_k = p_k^(1/T) / sum_j p_j^(1/T)``, T = 0.1::

    L_c = mean over i != j of |p_i - sharp(p_j)|^2      on labelled and unlabelled patches

Deviations: losses are means over decoders and pairs of them (published: half the sum over two decoders, and the sum
over pairs), so that their ratio does not depend on how many there are: with two, half the published one at equal
weights. The decoders (``--decoders``, 2 as in MC-Net) are of one kind and differ in their initial weights, not in
how they upsample, so that every network of this project can have them; the sharpened target carries no gradient. The
first decoder segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from dataloaders.patches import Batch
from myutils.config import RunConfig
from myutils.losses.segmentation import dice_ce_loss
from myutils.methods.base import METHODS, LossTerm, Method, StepOutput
from myutils.pseudo_labels import most_probable
from networks.base import Branch, SegmentationNetwork, SegmentationOutput

_TEMPERATURE = 0.1


def sharpen(probs: Tensor, temperature: float = _TEMPERATURE) -> Tensor:
    """Probabilities (B, K, X, Y, Z) raised to 1 / temperature and renormalised, without gradient."""
    # Through logarithms: 0.5 ** 10 is far from underflow, but a mean of many classes need not be.
    return (probs.detach().clamp(min=1e-8).log() / temperature).softmax(1)


@METHODS.register("mc_net")
class MutualConsistency(Method):
    """One encoder with several branches; the prototype term looks at the first."""

    deepens = False
    reads = frozenset({"decoders"})
    defaults = MappingProxyType({"consistency": 0.1})

    def __init__(self, network: SegmentationNetwork, config: RunConfig) -> None:
        super().__init__(network, config)
        self.others = nn.ModuleList(network.fresh_copy().branch for _ in range(config.decoders - 1))

    def losses(self, batch: Batch, step: int) -> StepOutput:
        """See the base class."""
        labeled = len(batch.image_l)
        outputs = self.student.run_branches(torch.cat([batch.image_l, batch.image_u]), self._branches())
        probs = [output.logits.float().softmax(1) for output in outputs]
        sharp = [sharpen(each) for each in probs]
        pairs = [(probs[i] - sharp[j]).square().mean() for i in range(len(probs)) for j in range(len(probs)) if i != j]
        terms = {
            "supervised": LossTerm(self._supervised(outputs, batch), 1.0),
            "consistency": LossTerm(torch.stack(pairs).mean(), self.unlabeled_weight(step)),
        }
        first = outputs[0]
        own = first.patches(slice(labeled, None))
        terms |= self.prototype_terms(first, batch.label_l, step, teacher_u=own)
        scalars = {"disagreement": (most_probable(probs[0]) != most_probable(probs[1])).float().mean()}
        return StepOutput(terms, scalars, most_probable(own.logits), first.logits[:labeled].detach())

    def supervised_losses(self, batch: Batch, step: int) -> StepOutput:
        """All decoders learn the labels."""
        outputs = self.student.run_branches(batch.image_l, self._branches())
        terms = {"supervised": LossTerm(self._supervised(outputs, batch), 1.0)}
        terms |= self.prototype_terms(outputs[0], batch.label_l, step)
        return StepOutput(terms, logits_l=outputs[0].logits.detach())

    def _supervised(self, outputs: Sequence[SegmentationOutput], batch: Batch) -> Tensor:
        """Mean over the decoders of the loss on the labelled patches, which come first."""
        labeled = len(batch.image_l)
        return torch.stack([dice_ce_loss(output.logits[:labeled], batch.label_l) for output in outputs]).mean()

    def _branches(self) -> list[Branch]:
        return [self.student.branch, *(branch for branch in self.others if isinstance(branch, Branch))]
