"""Covariance dynamic feature pools on top of the mean teacher.

The teacher's reliable features of labelled patches (predicted correctly, above the confidence threshold) fill a ring
buffer. Its correlation matrix gives the leading patterns of co-variation, and each pattern a pool with a centre
(``myutils.dynamic_feature_pool``). Three stages:

1. before ``--dfp_start_iter``, by default a fifth of the steps after a warm-up: train as ``mean_teacher`` does, and
   collect;
2. for ``--selector_train_iter`` steps after each build: the selector learns to name the nearest pool of a region;
3. else: the terms below act on the student; pools are rebuilt every ``--dfp_reconstruct_interval`` steps.

Terms, all ramped up: ``anchor`` (1 - cosine to the nearest leading pattern of the own class), ``compact`` and
``separation`` (regions gather at the centre of the pool that the selector names, and pools part), ``correlation``
(unlabelled features vary together as labelled ones do, CORN, arXiv:2410.15916).

Note:
    The published trainer of this name stops training the network in stage 2 and takes anchor features without a
    gradient; here the network learns in every step and every term reaches it. Features are the last decoder features,
    regions are means over 4 x 4 x 4 voxels.
"""

from __future__ import annotations

import logging
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dataloaders.say_once import warn_once
from myutils.config import DFP, RunConfig, required
from myutils.dynamic_feature_pool import DynamicFeaturePool, correlation_consistency
from myutils.flags import flags_of
from myutils.methods.base import METHODS, LossTerm
from myutils.methods.mean_teacher import CONSISTENCY, MeanTeacher, StepParts
from myutils.prototype_sampling import pick_voxels, sample_per_class, shared_keys
from myutils.prototype_term import IGNORE
from myutils.pseudo_labels import pseudo_labels
from myutils.rank_batch import all_rows
from myutils.schedules import fraction_rampup
from networks.base import SegmentationNetwork, SegmentationOutput

logger = logging.getLogger(__name__)

_REGION = 4
_START_SHARE = 0.2


@METHODS.register("cov_dfp")
class CovarianceFeaturePools(MeanTeacher):
    """Mean teacher with feature pools; the prototype term is off unless its flag says otherwise."""

    probes = ("dfp_selector",)
    reads = MeanTeacher.reads | flags_of(RunConfig, DFP) | {"memory_interval"}
    defaults = MappingProxyType({"consistency": CONSISTENCY})

    def __init__(self, network: SegmentationNetwork, config: RunConfig) -> None:
        super().__init__(network, config)
        width = network.feature_dim
        self.pool = DynamicFeaturePool(
            network.num_classes,
            width,
            capacity=config.max_global_features,
            num_pools=config.num_dfp,
            num_anchors=config.num_eigenvectors,
            anchor_decay=config.ema_alpha,
        )
        self.selector = nn.Sequential(
            nn.Linear(width, width), nn.LayerNorm(width), nn.LeakyReLU(0.2), nn.Linear(width, config.num_dfp)
        )
        steps = required(config.max_iteration, "max_iteration")
        usual = self.warmup + fraction_rampup(None, steps - self.warmup, _START_SHARE)
        self.start = usual if config.dfp_start_iter is None else max(self.warmup, config.dfp_start_iter)
        if config.dfp_start_iter is not None and config.dfp_start_iter < self.warmup:
            logger.warning("--dfp_start_iter: nothing is collected in the warm-up; pools start at %d", self.warmup)
        if config.selector_train_iter >= config.dfp_reconstruct_interval:
            raise ValueError(
                f"--selector_train_iter {config.selector_train_iter}: leaves none of the "
                f"{config.dfp_reconstruct_interval} steps between rebuilds (--dfp_reconstruct_interval) for the student"
            )
        if config.dfp_start_iter is not None and self.start >= steps:
            raise ValueError(
                f"--dfp_start_iter {self.start}: the training ends at --max_iteration {steps}; start earlier"
            )
        if self.start + config.selector_train_iter >= steps:
            logger.warning(
                "the pools teach the student nothing in %d steps (--max_iteration): they are built at %d, and their "
                "selector is trained for %d (--selector_train_iter) first",
                steps,
                self.start,
                config.selector_train_iter,
            )

    def further_groups(self, lr: float) -> list[dict[str, Any]]:
        """The pool selector has no weight decay; ``before_update`` has the rest of what leaves it as it is."""
        steady = {"params": list(self.selector.parameters()), "lr": lr, "lr_scale": 1.0, "weight_decay": 0.0}
        return [*super().further_groups(lr), steady]

    def before_update(self, step: int) -> None:
        """Outside stage 2 the pool selector rests: with gradients of zero its momentum would move it on."""
        if self.stage(step) != 2:
            for parameter in self.selector.parameters():
                parameter.grad = None

    def refills_at(self, step: int) -> bool:
        """The pool collects as often as the prototype memory refills, and in the step that builds it."""
        return step % self.config.memory_interval == 0 or self._rebuilds_at(step)

    def _rebuilds_at(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.config.dfp_reconstruct_interval == 0

    def stage(self, step: int) -> int:
        """1 collecting, 2 training the selector, 3 acting on the student."""
        if step < self.start:
            return 1
        since = (step - self.start) % self.config.dfp_reconstruct_interval
        return 2 if since < self.config.selector_train_iter else 3

    def further_terms(self, parts: StepParts, step: int) -> tuple[dict[str, LossTerm], dict[str, Tensor]]:
        """The pool's terms; all are computed in every stage, so that each parameter always takes part."""
        config, stage = self.config, self.stage(step)
        labels_u = self.confident_labels(parts.believed, self.views_at(step), parts.foreign)
        positions_l, classes_l = self._draw(parts.batch.label_l)
        positions_u, classes_u = self._draw(labels_u)
        with torch.autocast(labels_u.device.type, enabled=False):
            if parts.teacher_l is not None:
                self._collect(parts.teacher_l, positions_l, classes_l)
            if self._rebuilds_at(step) and not self.pool.rebuild():
                again = f"step {step + config.dfp_reconstruct_interval} at the earliest (--dfp_reconstruct_interval)"
                warn_once(logger, f"no voxel has been reliable (--confidence_threshold): pools are built at {again}")
            both = torch.cat([positions_l, positions_u + parts.batch.label_l.numel()])
            drawn = pick_voxels(parts.student.features, both).float()  # (S, E)
            features_l, features_u = (all_rows(half) for half in drawn.split([len(positions_l), len(positions_u)]))
            classes_l, classes_u = all_rows(classes_l), all_rows(classes_u)
            anchor = self.pool.anchor_loss(torch.cat([features_l, features_u]), torch.cat([classes_l, classes_u]))
            known_l, known_u = classes_l != IGNORE, classes_u != IGNORE
            correlation = correlation_consistency(features_l, features_u, known_l, known_u)
            features = parts.student.features.float()
            side = [min(_REGION, size) for size in features.shape[2:]]
            regions = functional.avg_pool3d(features, side, ceil_mode=True).movedim(1, -1).flatten(0, 3)
            target = self.pool.nearest_pools(regions)
            named = self.selector(self.pool.standardise(regions.detach()))  # (R, J)
            naming = functional.cross_entropy(named, target) * self.pool.sizes.any()  # without pools all are the first
            compact, separation = self.pool.pool_losses(all_rows(regions), all_rows(named.argmax(1)))
        weight = self.ramp(step) if stage == 3 else 0.0
        terms = {
            "dfp_selector": LossTerm(naming, 1.0 if stage == 2 else 0.0),
            "dfp_anchor": LossTerm(anchor, weight * config.anchor_weight * config.use_dfp),
            "dfp_compact": LossTerm(compact, weight * config.compact_weight),
            "dfp_separation": LossTerm(separation, weight * config.separation_weight),
            "dfp_correlation": LossTerm(correlation, weight * config.consistency_o),
        }
        scalars = {f"dfp_pool_{index}": size.float() for index, size in enumerate(self.pool.sizes)}
        scalars["dfp_stage"] = regions.new_full((), float(stage))
        if stage > 1:  # before, there are no pools to name
            scalars["dfp_selector_accuracy"] = (named.argmax(1) == target).float().mean()
        return terms, scalars

    def _draw(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (S,) and classes (S,) of up to ``--max_store`` voxels per class of all ranks; S is fixed."""
        keys = shared_keys(len(labels), labels[0].numel(), labels.device)
        return sample_per_class(labels, self.student.num_classes, self.config.max_store, IGNORE, True, keys)

    @torch.no_grad()
    def _collect(self, teacher: SegmentationOutput, positions: Tensor, classes: Tensor) -> None:
        """Store the drawn voxels that the teacher predicts correctly and with confidence."""
        found = pseudo_labels(pick_voxels(teacher.logits, positions))
        reliable = found.gated(self.config.confidence_threshold, IGNORE) == classes
        self.pool.push(pick_voxels(teacher.features, positions).float(), classes.where(reliable, IGNORE))
