"""The run's configuration: every flag of the trainer, checked before anything starts, saved with the run."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataloaders.base import SourceOptions, Triple
from dataloaders.geometry import Spacing
from dataloaders.orientation import ORIENTATIONS
from dataloaders.splits import SplitRequest
from myutils.config_checks import check_settings
from myutils.flags import option

DATA, METHOD, PROTOTYPES, DFP = "data", "method", "prototypes", "covariance feature pools (cov_dfp)"
OPTIMISATION, AUGMENTATION, RUN, EVALUATION = "optimisation", "augmentation", "run", "evaluation"


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run. A field that is None takes the data set's own default (``resolved``)."""

    dataset_name: str = option("demo", help="data format: demo, LA, ACDC, decathlon, nifti, dicom", group=DATA)
    dataset_path: Path | None = option(None, help="folder of the data set; else none, for demo", group=DATA)
    cache_dir: Path = option(Path.home() / ".cache" / "cov_dfp_3d", help="folder for data made once", group=DATA)
    cache_gb: float = option(
        0.0, help="GB in cache_dir for prepared images, shared by processes and runs; 0: memory only", group=DATA
    )
    labelnum: int | None = option(None, help="labelled training cases, >= 1, validation cases included", group=DATA)
    val_num: int = option(
        0, help="labelled cases held out to choose best.pt; 0: the last checkpoint counts", group=DATA
    )
    train_list: Path | None = option(
        None, help="text file: training case ids, the first labelnum labelled; else the data's own list", group=DATA
    )
    labeled_list: Path | None = option(None, help="text file: labelled case ids; else the first labelnum", group=DATA)
    val_list: Path | None = option(None, help="text file: validation case ids; else the last val_num", group=DATA)
    test_list: Path | None = option(
        None, help="text file: test case ids; else the data's own list, or a held-out fifth", group=DATA
    )
    num_classes: int | None = option(None, help="classes with the background, >= 2", group=DATA)
    modality: str | None = option(
        None, help="decides the intensities: z-score (mr), clip and scale (ct)", group=DATA, choices=("mr", "ct")
    )
    ct_range: tuple[float, float] | None = option(
        None, help="clip CT to these values, low and high (HU); else to those of the labelled structures", group=DATA
    )
    voxel_size: Spacing | None = option(None, help="voxel size in mm if files store none; else usual ones", group=DATA)
    spacing: Spacing | None = option(None, help="resample images to this voxel size in mm; else none", group=DATA)
    orientation: str | None = option(
        None,
        help="axes of the arrays: right, forward, up, or as in the files; else ras, unless labelled cases lie oblique",
        group=DATA,
        choices=ORIENTATIONS,
    )
    interpolation: str = option("linear", help="of images, for --spacing", group=DATA, choices=("linear", "cubic"))

    method: str = option(
        "mean_teacher",
        help="training method: supervised, mean_teacher, ua_mt, cps, fixmatch, mc_net, dtc, bcp, ss_net, cov_dfp, best",
        group=METHOD,
    )
    model: str = option("unet_3d", help="network: unet_3d, vnet, dynunet, segresnet", group=METHOD)
    flat_levels: Triple | None = option(
        None, help="first levels that neither convolve over nor downsample X, Y, Z; else by the voxels", group=METHOD
    )
    consistency: float | None = option(
        None, help="weight of the loss on unlabelled patches after its ramp-up, >= 0; else the method's", group=METHOD
    )
    consistency_rampup: int | None = option(
        None, help="steps of the sigmoid ramp-up of the unlabelled losses; else 30 % of the training", group=METHOD
    )
    ema_decay: float = option(0.99, help="decay of the teacher's moving average after warm-up, 0..1", group=METHOD)
    confidence_threshold: float = option(
        0.8, help="least probability of a pseudo-label that counts, 0..1", group=METHOD
    )
    uncertainty_passes: int = option(8, help="noisy teacher passes of ua_mt, >= 2", group=METHOD)
    feature_perturbation: bool | None = option(
        None,
        help="drop half of the encoder's channels: mean_teacher for the strong views, fixmatch in a stream of its own; "
        "else on for best",
        group=METHOD,
    )
    decoders: int = option(2, help="decoders of mc_net, >= 2", group=METHOD)
    warmup_iteration: int | None = option(
        None, help="first steps with labelled patches alone; else none, bcp: 20 % of the training", group=METHOD
    )
    teacher_flips: bool = option(
        False, help="the teacher averages each view with a mirrored one (flip_axes)", group=METHOD
    )
    strong_views: int | None = option(
        None,
        help="strong views of each unlabelled patch that learn its pseudo-label, 1..8 (mean_teacher, fixmatch, "
        "cov_dfp, best); else 1, best: 2",
        group=METHOD,
    )
    deep_supervision: bool | None = option(
        None, help="the decoder's coarser levels learn the labels too (not cps, mc_net); else on for best", group=METHOD
    )
    soft_labels: bool = option(
        True, help="mean_teacher: learn the teacher's probabilities, not only its confident classes", group=METHOD
    )
    copy_paste: bool = option(True, help="paste boxes of other patches into unlabelled ones", group=METHOD)
    paste_unlabeled: float | None = option(
        None, help="share of these boxes that come from other unlabelled patches, 0..1; else 0, best: 0.5", group=METHOD
    )
    perturbed_share: float | None = option(
        None, help="share of the steps, the first ones, with boxes and dropped channels, 0..1; else 1", group=METHOD
    )

    use_contrastive_prototype: bool | None = option(
        None, help="the prototype term; else on for mean_teacher and ss_net", group=PROTOTYPES
    )
    contrastive_weight: float = option(
        0.1, help="weight of the term's memory loss after ramp-up, >= 0", group=PROTOTYPES
    )
    intra_weight: float = option(0.01, help="weight of the term's within-class loss, >= 0", group=PROTOTYPES)
    inter_weight: float = option(0.01, help="weight of the term's between-class loss, >= 0", group=PROTOTYPES)
    prototype_loss: str | None = option(
        None,
        help="form of the memory loss: 1 - cosine (ssnet), or contrasts with other classes; else the method's own",
        group=PROTOTYPES,
        choices=("ssnet", "infonce", "multiproto"),
    )
    memory_from_unlabeled: bool = option(
        False, help="pseudo-labelled features may replace labelled ones in memory", group=PROTOTYPES
    )
    elements_per_class: int = option(32, help="vectors in memory per class, >= 1", group=PROTOTYPES)
    use_learned_selector: bool = option(True, help="learned selectors weight features and memory", group=PROTOTYPES)
    prototype_ranking: str = option(
        "highest",
        help="which vectors the memory keeps",
        group=PROTOTYPES,
        choices=("highest", "lowest", "random", "confidence"),
    )
    prototype_samples: int = option(
        512, help="voxels per class and batch in the term, half of them labelled; >= 1", group=PROTOTYPES
    )
    memory_interval: int = option(8, help="steps between refills of the memory by the teacher, >= 1", group=PROTOTYPES)
    embedding_dim: int = option(64, help="width of the projection and prediction heads, >= 1", group=PROTOTYPES)

    dfp_start_iter: int | None = option(None, help="step of the first pools; else 20 % of the training", group=DFP)
    dfp_reconstruct_interval: int = option(200, help="steps between rebuilds of the pools, >= 1", group=DFP)
    selector_train_iter: int = option(20, help="steps after a rebuild that train the pool selector, >= 0", group=DFP)
    max_global_features: int = option(50_000, help="features kept over all classes", group=DFP)
    max_store: int = option(256, help="features per class that a step may store and compare, >= 1", group=DFP)
    num_dfp: int = option(8, help="patterns of co-variation, one pool each", group=DFP)
    use_dfp: bool = option(True, help="pull features to the leading patterns of their class", group=DFP)
    num_eigenvectors: int = option(8, help="leading patterns (anchors) per class", group=DFP)
    ema_alpha: float = option(0.9, help="share of a class's old moments that a rebuild keeps, 0..1", group=DFP)
    anchor_weight: float = option(0.05, help="weight of the anchor loss after ramp-up, >= 0", group=DFP)
    compact_weight: float = option(0.01, help="weight of compactness within pools, >= 0", group=DFP)
    separation_weight: float = option(0.01, help="weight of separation between pools, >= 0", group=DFP)
    consistency_o: float = option(0.05, help="weight of the correlation consistency after ramp-up, >= 0", group=DFP)

    max_iteration: int | None = option(None, help="training steps, >= 1", group=OPTIMISATION)
    batch_size: int = option(4, help="patches per step, over all ranks", group=OPTIMISATION)
    labeled_bs: int | None = option(None, help="of these labelled, 1..batch_size - 1; else half", group=OPTIMISATION)
    optimizer: str = option(
        "muon",
        help="muon: AdamW, with orthogonal steps for kernels; sgd has Nesterov momentum 0.9",
        group=OPTIMISATION,
        choices=("adamw", "muon", "sgd"),
    )
    base_lr: float | None = option(
        None, help="first learning rate, > 0, decays as (1 - t/T)^0.9; else 0.003, 0.1 sgd", group=OPTIMISATION
    )
    weight_decay: float | None = option(None, help="decay of weights, >= 0; else 0.3, 1e-4 sgd", group=OPTIMISATION)
    grad_clip: float = option(5.0, help="largest gradient norm, > 0", group=OPTIMISATION)
    patch_size: Triple | None = option(
        None, help="voxels of a training patch and a window; else one that fits the cases", group=OPTIMISATION
    )

    augment: bool = option(True, help="random intensity and affine changes; without: no --affine_*", group=AUGMENTATION)
    affine_share: float = option(0.3, help="share of patches that are turned and scaled, 0..1", group=AUGMENTATION)
    affine_angle: float = option(12.0, help="largest turn about each axis in degrees, 0..180", group=AUGMENTATION)
    affine_scale: float = option(
        0.12, help="largest change of size, as a logarithm (0.12: by 11 to 13 %), 0..1", group=AUGMENTATION
    )
    flip_axes: tuple[int, ...] | None = option(
        None, help="axes (0 1 2) to mirror along; empty: never", group=AUGMENTATION
    )
    rotate90: bool = option(False, help="quarter turns in the X-Y plane", group=AUGMENTATION)
    foreground_share: float = option(0.5, help="share of crops centred on a structure", group=AUGMENTATION)
    place_prior: bool = option(
        True, help="centre unlabelled crops where labelled cases have structures", group=AUGMENTATION
    )

    exp: str | None = option(
        None, help="name of the run, its folder in output_dir; else data_method_labels_seed", group=RUN
    )
    output_dir: Path = option(Path("runs"), help="folder of all runs", group=RUN)
    seed: int = option(0, help="decides splits, weights and every random draw, >= 0", group=RUN)
    gpu: int | None = option(None, help="number of the CUDA device; else the first, or the CPU if none", group=RUN)
    amp: str = option(
        "auto",
        help="autocast precision; auto: bf16 where the device is fast at it",
        group=RUN,
        choices=("auto", "no", "bf16", "fp16"),
    )
    checkpoint_activations: bool = option(
        False, help="compute activations again in the backward pass: less memory, more time", group=RUN
    )
    compile: bool = option(
        False, help="torch.compile of the networks; needs a C++ compiler, and minutes at the start", group=RUN
    )
    deterministic: bool = option(True, help="only deterministic kernels, on CUDA too", group=RUN)
    num_workers: int = option(
        0, help="processes that prepare batches, each with its own case cache; 0: the trainer itself", group=RUN
    )
    resume: bool = option(False, help="go on from last.pt of --exp with its stored settings", group=RUN)
    profile: int = option(0, help="time the parts of N steps, print them and stop; nothing is kept", group=RUN)
    log_every: int = option(10, help="steps between log entries, >= 1", group=RUN)
    save_every: int = option(250, help="steps between checkpoints and validations, >= 1", group=RUN)
    image_every: int = option(250, help="steps between pictures in TensorBoard, >= 1; one is of the last", group=RUN)

    evaluate: bool = option(True, help="evaluate on the test cases after training", group=EVALUATION)
    baseline: bool | None = option(
        None, help="train the supervised-only baseline too; else on for demo", group=EVALUATION
    )
    overlap: float = option(0.5, help="overlap of neighbouring windows, 0..0.9", group=EVALUATION)
    tta_flips: bool | None = option(
        None, help="average over all mirrored inputs (flip_axes); else on for best", group=EVALUATION
    )
    tta_views: int = option(
        1, help="average over this many views of the input, all but one turned, scaled and mirrored", group=EVALUATION
    )
    largest_component: bool | None = option(
        None, help="keep the largest part of every class; else of those in one part in all labels", group=EVALUATION
    )

    def __post_init__(self) -> None:
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
            labelnum=required(self.labelnum, "labelnum"),
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
