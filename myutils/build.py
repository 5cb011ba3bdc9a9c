"""From a configuration to objects: source, splits, preprocessing, network and method, the same way for every job."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dataloaders.base import SOURCES, CaseSource, Volume
from dataloaders.case_cache import CaseCache, CaseStore
from dataloaders.checked_cases import require_sound
from dataloaders.patients import name_patients
from dataloaders.preprocess import Preprocess
from dataloaders.transforms import AugmentOptions
from myutils.components import survey_components
from myutils.config import RunConfig, required
from myutils.inference import InferenceOptions
from myutils.methods.base import METHODS, Method
from myutils.muon import Muon, split_kernels
from networks.base import NETWORKS, SegmentationNetwork, make_network
from networks.checkpointing import checkpoint_blocks
from networks.layers import mend_layers

logger = logging.getLogger(__name__)

_RENAMED = {"single_parts": "single_components"}  # facts of older checkpoints


@dataclass(frozen=True)
class DataFacts:
    """What a checkpoint must know about its data to be used without them."""

    num_classes: int
    in_channels: int
    class_names: tuple[str, ...]
    modality: str
    flip_axes: tuple[int, ...]
    single_components: tuple[int, ...] = ()  # class ids, see ``Components``

    @classmethod
    def of(cls, source: CaseSource) -> DataFacts:
        """The facts of a source."""
        return cls(
            source.num_classes,
            source.in_channels,
            tuple(source.class_names),
            source.modality,
            tuple(source.flip_axes),
        )

    def with_labels(self, cases: Iterable[Volume], resampled: Iterable[Volume] | None = None) -> DataFacts:
        """The same with what the labels of the labelled cases say; a class that none shows is a warning.

        So is one that none shows any more where they are ``resampled`` to ``--spacing``.
        """
        found = survey_components((case.label for case in cases if case.label is not None), self.num_classes)
        missing = [self.class_names[k] for k in range(1, self.num_classes) if not found.shown[k]]
        if missing:
            logger.warning("no labelled case shows %s: the network cannot learn it", ", ".join(missing))
        if resampled is not None:
            left = {int(k) for case in resampled for k in np.unique(np.asarray(case.label))}
            lost = [self.class_names[k] for k in range(1, self.num_classes) if found.shown[k] and k not in left]
            if lost:
                text = "--spacing leaves no voxel of %s in any labelled case: it cannot be learned; make it finer"
                logger.warning(text, ", ".join(lost))
        return dataclasses.replace(self, single_components=found.single)

    @classmethod
    def from_dict(cls, stored: dict[str, object]) -> DataFacts:
        """Rebuild from ``dataclasses.asdict`` that went through a checkpoint."""
        named = {_RENAMED.get(key, key): value for key, value in stored.items()}
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in named.items()})  # type: ignore[arg-type]


def build_source(config: RunConfig) -> CaseSource:
    """The case source that ``--dataset_name`` and ``--dataset_path`` name; its patients are ``--patient_pattern``'s."""
    source = SOURCES.get(config.dataset_name).from_options(config.source_options())
    require_sound(source)
    if config.num_classes not in (None, source.num_classes):
        raise ValueError(
            f"--num_classes {config.num_classes}: {config.dataset_name} has {source.num_classes}; leave it out"
        )
    if config.patient_pattern:
        name_patients(source, config.patient_pattern)
    return source


def kept_components(config: RunConfig, facts: DataFacts) -> tuple[int, ...]:
    """Classes of which a prediction keeps the largest component: all, none, or those that are one in the labels."""
    if config.largest_component is None:
        return facts.single_components
    return tuple(range(1, facts.num_classes)) if config.largest_component else ()


def build_preprocess(config: RunConfig) -> Preprocess:
    """Axes, intensity normalisation and resampling of a resolved configuration; runs of before had axes as stored."""
    modality, orientation = required(config.modality, "modality"), config.orientation or "stored"
    return Preprocess(modality, config.spacing, config.interpolation, config.ct_range, orientation)


def build_cache(config: RunConfig, source: CaseSource) -> CaseCache:
    """Prepared cases of a resolved configuration, on the disk too where ``--cache_gb`` says so."""
    store = None
    if config.cache_gb > 0:
        store = CaseStore(config.cache_dir / "cases", round(config.cache_gb * 2**30))
        logger.info("prepared cases: up to %g GB in %s", config.cache_gb, store.folder)
    return CaseCache(source, build_preprocess(config), store=store)


def build_augmentation(config: RunConfig) -> AugmentOptions:
    """Random changes of a resolved configuration; a method that reads no strong views gets them unchanged."""
    size = 1.0 if config.strong_intensity is None else config.strong_intensity  # runs of before have None
    flat = config.flat_levels or (0, 0, 0)
    return AugmentOptions(
        patch_size=required(config.patch_size, "patch_size"),
        flip_axes=required(config.flip_axes, "flip_axes"),
        rotate90=config.rotate90 and flat[0] == flat[1],
        foreground_share=config.foreground_share,
        affine_share=config.affine_share if config.augment else 0.0,
        intensity=config.augment,
        max_angle=config.affine_angle,
        max_scale=config.affine_scale,
        strong_views=required(config.strong_views, "strong_views"),
        strong_intensity=size if METHODS.get(config.method).uses_strong_views else 0.0,
    )


def build_inference(config: RunConfig, amp: str) -> InferenceOptions:
    """Sliding-window settings of a resolved configuration; ``amp`` is resolved for the device."""
    views = config.tta_views
    return InferenceOptions(
        patch_size=required(config.patch_size, "patch_size"),
        overlap=config.overlap,
        flips=required(config.flip_axes, "flip_axes") if config.tta_flips or views > 1 else (),
        views=views if views > 1 else 0,
        amp=amp,
    )


def build_network(config: RunConfig, facts: DataFacts) -> SegmentationNetwork:
    """The network, freshly initialised from torch's global generator."""
    kind = NETWORKS.get(config.model)
    network = make_network(kind, facts.in_channels, facts.num_classes, config.flat_levels or (0, 0, 0))
    patch = required(config.patch_size, "patch_size")
    if any(size < step for size, step in zip(patch, network.stride, strict=True)):
        given, least = (" ".join(map(str, sizes)) for sizes in (patch, network.stride))
        raise ValueError(f"--patch_size {given}: {config.model} divides the axes by {least}; pass at least these")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        logger.warning(
            "%s has batch normalisation: labelled and unlabelled patches share its statistics, several processes do "
            "not, so that their number matters, and each further pass of a step moves its averages, that of ss_net's "
            "adversarial images too; instance normalisation has none of this",
            config.model,
        )
    mend_layers(network, channels_last=False if config.compile else None)  # its normalisation cannot be compiled
    if config.checkpoint_activations:
        checkpoint_blocks(network)
    return network


def build_optimizer(config: RunConfig, method: Method) -> torch.optim.Optimizer:
    """One optimizer for everything trainable; the selectors are a group of their own.

    Note: torch's fused SGD fails where some parameters have no gradient in the first steps, and starts from unwritten
    momentum where the first step overflows in fp16.
    """
    groups = method.parameter_groups(required(config.base_lr, "base_lr"))
    decay = required(config.weight_decay, "weight_decay")
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=decay)
    if config.optimizer == "muon":
        return Muon(split_kernels(groups, method.student.in_channels), decay, interval=config.muon_interval)
    return torch.optim.AdamW(groups, weight_decay=decay, fused=True)


def build_method(config: RunConfig, facts: DataFacts) -> Method:
    """The method with its student; call after seeding."""
    return METHODS.get(config.method)(build_network(config, facts), config)
