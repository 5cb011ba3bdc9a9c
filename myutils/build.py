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
from dataloaders.case_lists import read_case_list, some
from dataloaders.checked_cases import require_sound
from dataloaders.patients import name_patients, nameless_cases
from dataloaders.preprocess import Preprocess
from dataloaders.splits import make_training_split
from dataloaders.transforms import AugmentOptions
from myutils.components import survey_parts
from myutils.config import RunConfig, required
from myutils.config_checks import idle_flags
from myutils.inference import InferenceOptions
from myutils.methods.base import COMMON_DEFAULTS, METHODS, Method, unread_flags
from myutils.muon import Muon, split_kernels
from networks.base import NETWORKS, SegmentationNetwork, make_network
from networks.checkpointing import checkpoint_blocks
from networks.layers import mend_layers

logger = logging.getLogger(__name__)

# Learning rate and weight decay per optimizer; AdamW's and Muon's were searched (docs/search.md), SGD's are usual ones.
OPTIMIZER_DEFAULTS = {"adamw": (0.003, 0.3), "sgd": (0.1, 1e-4), "muon": (0.003, 0.3)}


@dataclass(frozen=True)
class DataFacts:
    """What a checkpoint must know about its data to be used without them."""

    num_classes: int
    in_channels: int
    class_names: tuple[str, ...]
    modality: str
    flip_axes: tuple[int, ...]
    single_parts: tuple[int, ...] = ()  # class ids, see ``components.Parts``

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
        parts = survey_parts((case.label for case in cases if case.label is not None), self.num_classes)
        missing = [self.class_names[k] for k in range(1, self.num_classes) if not parts.shown[k]]
        if missing:
            logger.warning("no labelled case shows %s: the network cannot learn it", ", ".join(missing))
        if resampled is not None:
            left = {int(k) for case in resampled for k in np.unique(np.asarray(case.label))}
            lost = [self.class_names[k] for k in range(1, self.num_classes) if parts.shown[k] and k not in left]
            if lost:
                text = "--spacing leaves no voxel of %s in any labelled case: it cannot be learned; make it finer"
                logger.warning(text, ", ".join(lost))
        return dataclasses.replace(self, single_parts=parts.single)

    @classmethod
    def from_dict(cls, stored: dict[str, object]) -> DataFacts:
        """Rebuild from ``dataclasses.asdict`` that went through a checkpoint."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()})  # type: ignore[arg-type]


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


def resolve_config(config: RunConfig, source: CaseSource) -> RunConfig:
    """Fill every setting that was left to the data set, and check what depends on it.

    ``fit_to_cases`` fills those that ask for a look at the cases.

    Raises:
        ValueError: If the model, the method or a size does not fit.
    """
    for registry, name in ((NETWORKS, config.model), (METHODS, config.method)):
        registry.get(name)
    if config.patient_pattern and (nameless := nameless_cases(source)):
        raise ValueError(
            f"--patient_pattern {config.patient_pattern!r}: finds no patient in {some(nameless)}; pass one that "
            "matches every case id, or leave it out to go by what the data say"
        )
    defaults = source.defaults
    base_lr, weight_decay = OPTIMIZER_DEFAULTS[config.optimizer]
    labelnum = config.labelnum if config.labelnum is not None else defaults.labelnum
    if labelnum is None:
        split = make_training_split(source, config.split_request())
        labelnum = len(split.labeled) + len(split.val) * (config.val_list is None)
    listed = labelnum if config.labeled_list is None else len(read_case_list(config.labeled_list))
    method = METHODS.get(config.method)
    labeled_bs = config.labeled_bs or max(1, config.batch_size // 2)
    flip_axes = config.flip_axes if config.flip_axes is not None else tuple(source.flip_axes)
    max_iteration = config.max_iteration or defaults.max_iteration
    chosen = [field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default]
    config = _with_method_defaults(config, method, flip_axes, max_iteration)
    prototypes = bool(config.use_contrastive_prototype)
    kind = f"on --method {config.method}{'' if prototypes else ' without prototypes'}"
    idle = {kind: unread_flags(method, prototypes=prototypes)} | idle_flags(vars(config) | {"labeled_bs": labeled_bs})
    if not method.uses_unlabeled:
        idle["without unlabelled patches"] = {"labeled_bs", "place_prior", "memory_from_unlabeled"}
    if source.stores_voxel_size:
        idle["on files that store their voxel size"] = {"voxel_size"}
    for reason, flags in idle.items():
        if named := ", ".join(f"--{name}" for name in chosen if name in flags):
            logger.warning("without effect %s: %s", reason, named)
    if method.uses_unlabeled and required(config.warmup_iteration, "warmup_iteration") >= max_iteration:
        raise ValueError(
            f"--warmup_iteration {config.warmup_iteration}: leaves none of the {max_iteration} steps (--max_iteration) "
            "for unlabelled patches; pass fewer, or --method supervised"
        )
    if config.optimizer == "muon" and config.muon_interval > max_iteration:
        raise ValueError(
            f"--muon_interval {config.muon_interval}: no kernel would move in {max_iteration} steps (--max_iteration); "
            "pass a smaller one, such as 4"
        )
    if (config.strong_views or 1) > 1 and not method.uses_strong_views:
        raise ValueError(f"--strong_views {config.strong_views}: {config.method} has no use for strong views")
    if config.feature_perturbation and "feature_perturbation" not in method.reads:
        raise ValueError(f"--feature_perturbation: {config.method} has no stream whose features it drops")
    if config.deep_supervision and not method.deepens:
        raise ValueError(f"--deep_supervision: {config.method} has several decoders; use another --method")
    if config.paste_unlabeled and "paste_unlabeled" not in method.reads:
        raise ValueError(f"--paste_unlabeled {config.paste_unlabeled}: {config.method} pastes no unlabelled boxes")
    if config.perturbed_share != 1 and "perturbed_share" not in method.reads:
        raise ValueError(f"--perturbed_share {config.perturbed_share}: {config.method} has no boxes to leave out")
    modality = config.modality or source.modality
    if config.ct_range is not None and modality != "ct":
        raise ValueError(f"--ct_range: these data are {modality}; add --modality ct if they are CT, or leave it out")
    if method.uses_unlabeled and labeled_bs >= config.batch_size:
        raise ValueError(f"--batch_size {config.batch_size}: {config.method} needs at least 2, one patch unlabelled")
    return dataclasses.replace(
        config,
        labelnum=labelnum,
        labeled_bs=labeled_bs,
        max_iteration=max_iteration,
        base_lr=config.base_lr if config.base_lr is not None else base_lr,
        weight_decay=config.weight_decay if config.weight_decay is not None else weight_decay,
        modality=modality,
        flip_axes=flip_axes,
        baseline=config.baseline if config.baseline is not None else config.dataset_name == "demo",
        exp=config.exp or f"{config.dataset_name}_{config.method}_{listed}labels_seed{config.seed}",
    )


def _with_method_defaults(
    config: RunConfig, method: type[Method], flip_axes: tuple[int, ...], max_iteration: int
) -> RunConfig:
    """What the user left open and the method decides; mirroring only where the data have an axis for it."""
    if unknown := sorted(set(method.defaults) - set(COMMON_DEFAULTS)):
        raise ValueError(f"{method.__name__}.defaults has {some(unknown)}; known: {', '.join(COMMON_DEFAULTS)}")
    if unknown := sorted(method.reads - {field.name for field in dataclasses.fields(config)}):
        raise ValueError(f"{method.__name__}.reads has {some(unknown)}; name flags of the trainer")
    wanted = {**COMMON_DEFAULTS, **method.defaults}
    wanted["warmup_iteration"] = round(wanted.pop("warmup_share") * max_iteration)
    wanted["tta_flips"] = wanted["tta_flips"] and bool(flip_axes) and config.tta_views == 1
    for name in ("teacher_flips", "tta_flips"):
        if getattr(config, name) and not flip_axes:
            raise ValueError(f"--{name}: there is no axis to mirror along; name some with --flip_axes, or leave it out")
    return dataclasses.replace(config, **{name: v for name, v in wanted.items() if getattr(config, name) is None})


def kept_parts(config: RunConfig, facts: DataFacts) -> tuple[int, ...]:
    """Classes of which a prediction keeps the largest component: all, none, or those in one part in the labels."""
    if config.largest_component is None:
        return facts.single_parts
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
