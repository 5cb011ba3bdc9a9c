"""The run's configuration: every flag of the trainer, checked before anything starts, saved with the run."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataloaders.base import SourceOptions, Triple, default_cache_dir
from dataloaders.geometry import Spacing
from dataloaders.orientation import ORIENTATIONS
from dataloaders.splits import SplitRequest
from myutils.config_checks import check_settings
from myutils.flags import check_limits, option

DATA, METHOD, PROTOTYPES, DFP = "data", "method", "prototypes", "covariance feature pools (cov_dfp)"
OPTIMISATION, AUGMENTATION, RUN, EVALUATION = "optimisation", "augmentation", "run", "evaluation"


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run; ``resolving.resolve_config`` fills those that are None from the data or the method."""

    dataset_name: str = option("demo", "data format: demo, LA, ACDC, decathlon, nifti, dicom", group=DATA)
    dataset_path: Path | None = option(None, "folder of the data set; else none, for demo", group=DATA)
    cache_dir: Path = option(default_cache_dir(), "folder for data made once", group=DATA)
    cache_gb: float = option(
        0.0, "GB in cache_dir for prepared images, shared by processes and runs; 0: memory only", low=0, group=DATA
    )
    labelnum: int | None = option(
        None,
        "labelled training cases, validation cases included; else LA 8, ACDC 14, demo 4, others all",
        low=1,
        group=DATA,
    )
    val_num: int = option(
        0, "labelled cases held out to choose best.pt; 0: the last checkpoint counts", low=0, group=DATA
    )
    train_list: Path | None = option(
        None, "text file: training case ids, the first labelnum labelled; else the data's own list", group=DATA
    )
    labeled_list: Path | None = option(None, "text file: labelled case ids; else the first labelnum", group=DATA)
    val_list: Path | None = option(None, "text file: validation case ids; else the last val_num", group=DATA)
    test_list: Path | None = option(
        None, "text file: test case ids; else the data's own list, or a held-out fifth", group=DATA
    )
    num_classes: int | None = option(None, "classes with the background", low=2, high=256, group=DATA)
    modality: str | None = option(
        None, "decides the intensities: z-score (mr), clip and scale (ct)", group=DATA, choices=("mr", "ct")
    )
    ct_range: tuple[float, float] | None = option(
        None, "clip CT to these values, low and high (HU); else to those of the labelled structures", group=DATA
    )
    patient_pattern: str | None = option(
        None, "regular expression that finds the patient in a case id; else what the data say", group=DATA
    )
    voxel_size: Spacing | None = option(None, "voxel size in mm if files store none; else usual ones", group=DATA)
    spacing: Spacing | None = option(None, "resample images to this voxel size in mm; else none", group=DATA)
    orientation: str | None = option(
        None,
        "axes of the arrays: right, forward, up, or as in the files; else ras, unless labelled cases lie oblique",
        group=DATA,
        choices=ORIENTATIONS,
    )
    interpolation: str = option("linear", "of images, for --spacing", group=DATA, choices=("linear", "cubic"))

    method: str = option(
        "mean_teacher",
        "training method: supervised, mean_teacher, ua_mt, cps, fixmatch, mc_net, dtc, bcp, ss_net, cov_dfp, best",
        group=METHOD,
    )
    model: str = option("unet_3d", "network: unet_3d, vnet, dynunet, segresnet", group=METHOD)
    flat_levels: Triple | None = option(
        None, "first levels that neither convolve over nor downsample X, Y, Z; else by the voxels", group=METHOD
    )
    consistency: float | None = option(
        None, "weight of the loss on unlabelled patches after its ramp-up; else the method's", low=0, group=METHOD
    )
    consistency_rampup: int | None = option(
        None, "steps of the ramp-up of the unlabelled losses; else 30 % of those after the warm-up", low=0, group=METHOD
    )
    ema_decay: float = option(0.99, "decay of the teacher's moving average after warm-up", low=0, high=1, group=METHOD)
    confidence_threshold: float = option(
        0.8, "least probability of a pseudo-label that counts", low=0, high=0.9999, group=METHOD
    )
    uncertainty_passes: int = option(8, "noisy teacher passes of ua_mt", low=2, group=METHOD)
    feature_perturbation: bool | None = option(
        None, "drop encoder channels by a coin, in strong views or fixmatch's stream; else on for best", group=METHOD
    )
    decoders: int = option(2, "decoders of mc_net", low=2, group=METHOD)
    warmup_iteration: int | None = option(
        None, "first steps with labelled patches alone; else none, bcp: 20 % of the training", low=0, group=METHOD
    )
    teacher_flips: bool = option(False, "the teacher averages each view with a mirrored one (flip_axes)", group=METHOD)
    strong_views: int | None = option(
        None,
        "strong views of a patch that learn its pseudo-label (mean_teacher, fixmatch, cov_dfp, best); else 1, best: 2",
        low=1,
        high=8,
        group=METHOD,
    )
    strong_intensity: float | None = option(
        None, "size of the intensity changes of strong views, 0: none; else 1, best: 0", low=0, high=1, group=METHOD
    )
    deep_supervision: bool | None = option(
        None, "the decoder's coarser levels learn the labels too (not cps, mc_net); else on for best", group=METHOD
    )
    soft_labels: bool = option(
        True, "mean_teacher, best, cov_dfp: learn the teacher's probabilities, not only its sure classes", group=METHOD
    )
    copy_paste: bool = option(True, "paste boxes of other patches into unlabelled ones", group=METHOD)
    paste_unlabeled: float | None = option(
        None,
        "share of these boxes that come from other unlabelled patches; else 0, best: 0.5",
        low=0,
        high=1,
        group=METHOD,
    )
    perturbed_share: float | None = option(
        None, "share of the steps, the first ones, with boxes and dropped channels; else 1", low=0, high=1, group=METHOD
    )

    use_contrastive_prototype: bool | None = option(
        None, "the prototype term; else on for mean_teacher and ss_net", group=PROTOTYPES
    )
    contrastive_weight: float = option(0.1, "weight of the term's memory loss after ramp-up", low=0, group=PROTOTYPES)
    intra_weight: float = option(0.01, "weight of the term's within-class loss", low=0, group=PROTOTYPES)
    inter_weight: float = option(0.01, "weight of the term's between-class loss", low=0, group=PROTOTYPES)
    prototype_loss: str | None = option(
        None,
        "form of the memory loss: 1 - cosine (ssnet), or contrasts with other classes; else ssnet",
        group=PROTOTYPES,
        choices=("ssnet", "infonce", "multiproto"),
    )
    memory_from_unlabeled: bool = option(
        False, "pseudo-labelled features may replace labelled ones in memory", group=PROTOTYPES
    )
    elements_per_class: int = option(32, "vectors in memory per class", low=1, group=PROTOTYPES)
    use_learned_selector: bool = option(True, "learned selectors weight features and memory", group=PROTOTYPES)
    prototype_ranking: str = option(
        "highest",
        "which vectors the memory keeps",
        group=PROTOTYPES,
        choices=("highest", "lowest", "random", "confidence"),
    )
    prototype_samples: int = option(
        512, "voxels per class and batch in the term, half of them labelled", low=1, group=PROTOTYPES
    )
    memory_interval: int = option(8, "steps between refills of the memory by the teacher", low=1, group=PROTOTYPES)
    embedding_dim: int = option(64, "width of the projection and prediction heads", low=4, group=PROTOTYPES)

    dfp_start_iter: int | None = option(None, "first pools; else a fifth of the steps after warm-up", low=0, group=DFP)
    dfp_reconstruct_interval: int = option(200, "steps between rebuilds of the pools", low=1, group=DFP)
    selector_train_iter: int = option(20, "steps after a rebuild that train the pool selector", low=1, group=DFP)
    max_global_features: int = option(50_000, "features kept over all classes", low=4, group=DFP)
    max_store: int = option(256, "features per class that a step may store and compare", low=1, group=DFP)
    num_dfp: int = option(8, "patterns of co-variation, one pool each", low=1, group=DFP)
    use_dfp: bool = option(True, "pull features to the leading patterns of their class", group=DFP)
    num_eigenvectors: int = option(8, "leading patterns (anchors) per class", low=1, group=DFP)
    ema_alpha: float = option(0.9, "share of a class's old moments that a rebuild keeps", low=0, high=1, group=DFP)
    anchor_weight: float = option(0.05, "weight of the anchor loss after ramp-up", low=0, group=DFP)
    compact_weight: float = option(0.01, "weight of compactness within pools", low=0, group=DFP)
    separation_weight: float = option(0.01, "weight of separation between pools", low=0, group=DFP)
    consistency_o: float = option(0.05, "weight of the correlation consistency after ramp-up", low=0, group=DFP)

    max_iteration: int | None = option(None, "training steps; else 6000, demo 480", low=1, group=OPTIMISATION)
    batch_size: int = option(4, "patches per step, over all ranks", low=1, group=OPTIMISATION)
    labeled_bs: int | None = option(None, "of these labelled, below batch_size; else half", low=1, group=OPTIMISATION)
    optimizer: str = option(
        "muon",
        "muon: AdamW, with orthogonal steps for kernels; sgd has Nesterov momentum 0.9",
        group=OPTIMISATION,
        choices=("adamw", "muon", "sgd"),
    )
    muon_interval: int = option(
        1, "muon: steps in which each kernel moves once, as many times as far", low=1, high=64, group=OPTIMISATION
    )
    base_lr: float | None = option(
        None, "first learning rate, decays as (1 - t/T)^0.9; else 0.003, 0.1 sgd", low=1e-12, group=OPTIMISATION
    )
    weight_decay: float | None = option(None, "decay of weights; else 0.3, 1e-4 sgd", low=0, group=OPTIMISATION)
    grad_clip: float = option(5.0, "largest gradient norm", low=1e-12, group=OPTIMISATION)
    patch_size: Triple | None = option(
        None, "voxels of a training patch and a window; else one that fits the cases", group=OPTIMISATION
    )

    augment: bool = option(True, "random intensity and affine changes; without: no --affine_*", group=AUGMENTATION)
    affine_share: float = option(0.3, "share of patches that are turned and scaled", low=0, high=1, group=AUGMENTATION)
    affine_angle: float = option(12.0, "largest turn about each axis in degrees", low=0, high=180, group=AUGMENTATION)
    affine_scale: float = option(
        0.12, "largest change of size, as a logarithm (0.12: by 11 to 13 %)", low=0, high=1, group=AUGMENTATION
    )
    flip_axes: tuple[int, ...] | None = option(None, "axes (0 1 2) to mirror along; empty: never", group=AUGMENTATION)
    rotate90: bool = option(False, "quarter turns in the X-Y plane", group=AUGMENTATION)
    foreground_share: float = option(0.5, "share of crops centred on a structure", low=0, high=1, group=AUGMENTATION)
    place_prior: bool = option(True, "centre unlabelled crops where labelled cases have structures", group=AUGMENTATION)

    exp: str | None = option(None, "name of the run, its folder in output_dir; else data_method_labels_seed", group=RUN)
    output_dir: Path = option(Path("runs"), "folder of all runs", group=RUN)
    seed: int = option(0, "decides splits, weights and every random draw", low=0, high=2**31 - 1, group=RUN)
    gpu: int | None = option(None, "number of the CUDA device; else the first, or the CPU if none", group=RUN)
    amp: str = option(
        "auto",
        "autocast precision; auto: bf16 where the device is fast at it; no: float32, on CUDA TF32 in convolutions",
        group=RUN,
        choices=("auto", "no", "bf16", "fp16"),
    )
    checkpoint_activations: bool = option(False, "compute activations twice: less memory, more time", group=RUN)
    compile: bool = option(False, "torch.compile the networks: a C++ compiler, minutes at the start", group=RUN)
    deterministic: bool = option(True, "deterministic kernels where torch has them, on CUDA too", group=RUN)
    num_workers: int = option(
        0, "processes that prepare batches, each with a case cache; 0: the trainer itself", low=0, high=256, group=RUN
    )
    resume: bool = option(False, "go on from last.pt of --exp with its stored settings", group=RUN)
    profile: int = option(0, "time the parts of N steps, print them and stop; nothing is kept", low=0, group=RUN)
    log_every: int = option(10, "steps between log entries", low=1, group=RUN)
    save_every: int = option(250, "steps between checkpoints and validations", low=1, group=RUN)
    image_every: int = option(250, "steps between pictures in TensorBoard; one is of the last", low=1, group=RUN)

    evaluate: bool = option(True, "evaluate on the test cases after training", group=EVALUATION)
    baseline: bool | None = option(None, "train the supervised-only baseline too; else on for demo", group=EVALUATION)
    overlap: float = option(0.5, "overlap of neighbouring windows", low=0, high=0.9, group=EVALUATION)
    tta_flips: bool | None = option(
        None, "average over all mirrored inputs (flip_axes); else on for best", group=EVALUATION
    )
    tta_views: int = option(
        1, "average over so many views, all but one turned, scaled and mirrored", low=1, high=64, group=EVALUATION
    )
    largest_component: bool | None = option(
        None, "keep the largest component of every class; else of those that are one in all labels", group=EVALUATION
    )

    def __post_init__(self) -> None:
        check_limits(self)
        check_settings(vars(self))

    def source_options(self) -> SourceOptions:
        """What the case source needs of this configuration."""
        return SourceOptions(
            root=self.dataset_path,
            num_classes=self.num_classes,
            voxel_size=self.voxel_size,
            modality=self.modality,
            cache_dir=self.cache_dir,
        )

    def split_request(self) -> SplitRequest:
        """What the splits need of this configuration."""
        return SplitRequest(
            labelnum=self.labelnum,
            val_num=self.val_num,
            seed=self.seed,
            train_list=self.train_list,
            labeled_list=self.labeled_list,
            val_list=self.val_list,
            test_list=self.test_list,
        )

    def with_absolute_paths(self) -> RunConfig:
        """The same files and folders, found from any working directory: what a run stores."""
        paths: dict[str, Any] = {
            name: value.absolute() for name, value in vars(self).items() if isinstance(value, Path)
        }
        return dataclasses.replace(self, **paths)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; paths as strings, tuples as lists."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> RunConfig:
        """Rebuild from ``to_dict``; unknown names are an error, missing ones take their default."""
        hints = typing.get_type_hints(cls)
        unknown = sorted(set(stored) - set(hints))
        if unknown:
            raise ValueError(f"config holds unknown settings {unknown}; it was written by another version")
        return cls(**{name: _typed(value, hints[name]) for name, value in stored.items()})


def required(value: Any, name: str) -> Any:
    """``value``, or a ValueError where ``resolve`` has not filled it in yet."""
    if value is None:
        raise ValueError(f"{name} is not set; call resolve_config(config, source) first")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _typed(value: Any, hint: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if hint is Path or Path in typing.get_args(hint) else value
