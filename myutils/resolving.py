"""From what the flags say to what a run does: what was left open is filled, and what does not fit is refused.

``fitting.fit_to_cases`` fills the settings that ask for a look at the cases.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Set

from dataloaders.base import CaseSource
from dataloaders.case_lists import read_case_list, some
from dataloaders.patients import nameless_cases
from dataloaders.splits import make_training_split
from myutils.config import RunConfig, required
from myutils.config_checks import idle_flags
from myutils.methods.base import COMMON_DEFAULTS, METHODS, Method, unread_flags
from networks.base import NETWORKS

logger = logging.getLogger(__name__)

# Learning rate and weight decay per optimizer; AdamW's and Muon's were searched (docs/search.md), SGD's are usual ones.
OPTIMIZER_DEFAULTS = {"adamw": (0.003, 0.3), "sgd": (0.1, 1e-4), "muon": (0.003, 0.3)}


def resolve_config(config: RunConfig, source: CaseSource) -> RunConfig:
    """Fill every setting that was left to the data set or the method, and name those without effect.

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
    chosen = [field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default]
    method, (base_lr, weight_decay) = METHODS.get(config.method), OPTIMIZER_DEFAULTS[config.optimizer]
    labelnum = config.labelnum if config.labelnum is not None else _default_labelnum(config, source)
    listed = labelnum if config.labeled_list is None else len(read_case_list(config.labeled_list))
    filled = dataclasses.replace(
        config,
        labelnum=labelnum,
        labeled_bs=config.labeled_bs or max(1, config.batch_size // 2),
        max_iteration=config.max_iteration or source.defaults.max_iteration,
        base_lr=config.base_lr if config.base_lr is not None else base_lr,
        weight_decay=config.weight_decay if config.weight_decay is not None else weight_decay,
        modality=config.modality or source.modality,
        flip_axes=config.flip_axes if config.flip_axes is not None else tuple(source.flip_axes),
        baseline=config.baseline if config.baseline is not None else config.dataset_name == "demo",
        exp=config.exp or f"{config.dataset_name}_{config.method}_{listed}labels_seed{config.seed}",
    )
    filled = _with_method_defaults(filled, method)
    _refuse_misfits(filled, method)
    for reason, flags in _without_effect(filled, method, source).items():
        if named := ", ".join(f"--{name}" for name in chosen if name in flags):
            logger.warning("without effect %s: %s", reason, named)
    return filled


def _default_labelnum(config: RunConfig, source: CaseSource) -> int:
    """The data set's own number of labelled cases, or all that have a label and are not for the test."""
    if source.defaults.labelnum is not None:
        return source.defaults.labelnum
    split = make_training_split(source, config.split_request())
    return len(split.labeled) + len(split.val) * (config.val_list is None)


def _with_method_defaults(config: RunConfig, method: type[Method]) -> RunConfig:
    """What the user left open and the method decides; mirroring only where the data have an axis for it."""
    if unknown := sorted(set(method.defaults) - set(COMMON_DEFAULTS)):
        raise ValueError(f"{method.__name__}.defaults has {some(unknown)}; known: {', '.join(COMMON_DEFAULTS)}")
    if unknown := sorted(method.reads - {field.name for field in dataclasses.fields(config)}):
        raise ValueError(f"{method.__name__}.reads has {some(unknown)}; name flags of the trainer")
    wanted = {**COMMON_DEFAULTS, **method.defaults}
    wanted["warmup_iteration"] = round(wanted.pop("warmup_share") * required(config.max_iteration, "max_iteration"))
    wanted["tta_flips"] = wanted["tta_flips"] and bool(config.flip_axes) and config.tta_views == 1
    for name in ("teacher_flips", "tta_flips"):
        if getattr(config, name) and not config.flip_axes:
            raise ValueError(f"--{name}: there is no axis to mirror along; name some with --flip_axes, or leave it out")
    return dataclasses.replace(config, **{name: v for name, v in wanted.items() if getattr(config, name) is None})


def _refuse_misfits(config: RunConfig, method: type[Method]) -> None:
    """Refuse what the method, the number of steps or the data cannot do."""
    max_iteration = required(config.max_iteration, "max_iteration")
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
    reads = method.reads
    needs = (
        ("strong_views", (config.strong_views or 1) > 1, method.uses_strong_views, "has no use for strong views"),
        ("feature_perturbation", config.feature_perturbation, "feature_perturbation" in reads, "drops no features"),
        ("deep_supervision", config.deep_supervision, method.deepens, "has several decoders"),
        ("paste_unlabeled", config.paste_unlabeled, "paste_unlabeled" in reads, "pastes no unlabelled boxes"),
        ("perturbed_share", config.perturbed_share != 1, "perturbed_share" in reads, "has no boxes to leave out"),
    )
    for flag, wanted, able, why in needs:
        if wanted and not able:
            value = getattr(config, flag)
            given = f"--{flag}" if value is True else f"--{flag} {value}"
            raise ValueError(f"{given}: {config.method} {why}; leave it out, or use --method best")
    if config.ct_range is not None and config.modality != "ct":
        raise ValueError(
            f"--ct_range: these data are {config.modality}; add --modality ct if they are CT, or leave it out"
        )
    if method.uses_unlabeled and required(config.labeled_bs, "labeled_bs") >= config.batch_size:
        raise ValueError(f"--batch_size {config.batch_size}: {config.method} needs at least 2, one patch unlabelled")


def _without_effect(config: RunConfig, method: type[Method], source: CaseSource) -> Mapping[str, Set[str]]:
    """Flags that change nothing in this run, by the reason."""
    prototypes = bool(config.use_contrastive_prototype)
    kind = f"on --method {config.method}{'' if prototypes else ' without prototypes'}"
    idle = {kind: unread_flags(method, prototypes=prototypes)} | idle_flags(vars(config))
    if not method.uses_unlabeled:
        idle["without unlabelled patches"] = {"labeled_bs", "place_prior", "memory_from_unlabeled"}
    if source.stores_voxel_size:
        idle["on files that store their voxel size"] = {"voxel_size"}
    return idle
