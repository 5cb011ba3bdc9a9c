"""Flags: names, grouped help, hints for typos, and values refused before anything starts."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import BallSource
from helpers_runs import small_config

from dataloaders.base import SOURCES, default_cache_dir
from dataloaders.transforms import AugmentOptions
from myutils.build import DataFacts, build_augmentation, build_inference, build_network
from myutils.config import RunConfig
from myutils.fitting import fit_to_cases
from myutils.flags import SuggestingParser, add_flags, check_limits, given_flags, option
from myutils.inference_flags import InferenceFlags
from myutils.resolving import resolve_config

PROMISED = """dataset_name dataset_path exp model method max_iteration batch_size labeled_bs base_lr labelnum seed gpu
deterministic patch_size embedding_dim consistency consistency_rampup ema_decay confidence_threshold
use_contrastive_prototype contrastive_weight intra_weight inter_weight elements_per_class use_learned_selector amp
num_workers val_num resume output_dir evaluate train_list labeled_list val_list test_list modality spacing"""


def parser() -> SuggestingParser:
    made = SuggestingParser(prog="train")
    add_flags(made, RunConfig)
    return made


def test_every_promised_flag_exists_and_is_explained() -> None:
    text = parser().format_help()
    for name in PROMISED.split():
        assert f"--{name}" in text
    for field in dataclasses.fields(RunConfig):
        assert field.metadata["help"] and field.metadata["group"]
    assert "prototypes:" in text and "(in 0..1, default: 0.99)" in text


def test_only_given_flags_are_returned_with_their_types() -> None:
    given = given_flags(
        parser(), ["--patch_size", "8", "16", "32", "--labelnum", "4", "--no-evaluate", "--resume", "--dataset_path=x"]
    )
    assert given == {
        "patch_size": (8, 16, 32),
        "labelnum": 4,
        "evaluate": False,
        "resume": True,
        "dataset_path": Path("x"),
    }


def test_every_boolean_has_its_no_form() -> None:
    for field in dataclasses.fields(RunConfig):
        if "bool" in str(field.type):
            assert given_flags(parser(), [f"--no-{field.name}"]) == {field.name: False}
            assert given_flags(parser(), [f"--{field.name}"]) == {field.name: True}


def test_a_typo_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        given_flags(parser(), ["--labelnun", "4"])
    assert stop.value.code == 2
    assert "did you mean --labelnum?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labeled_bs": 4, "batch_size": 4}, "--labeled_bs 4: must be below --batch_size 4"),
        ({"labelnum": 0}, "--labelnum 0: must be at least 1"),
        ({"ema_decay": 1.5}, r"--ema_decay 1.5: must be in 0\.\.1"),
        ({"patch_size": (16, 0, 16)}, "--patch_size 16 0 16: every value must be finite and above 0"),
        ({"spacing": (1.0, -1.0, 1.0)}, "--spacing 1.0 -1.0 1.0"),
        ({"base_lr": 0.0}, "--base_lr 0.0"),
        ({"base_lr": float("nan")}, "--base_lr nan"),
        ({"flip_axes": (3,)}, "--flip_axes 3: axes are 0, 1 and 2"),
        ({"flip_axes": (0, 0)}, "--flip_axes 0 0: axes are 0, 1 and 2, each at most once"),
        ({"num_classes": 257}, r"--num_classes 257: must be in 2\.\.256"),
        ({"exp": "a/b"}, "a plain folder name"),
        ({"exp": ".."}, "a plain folder name"),
        ({"spacing": (float("nan"), 1.0, 1.0)}, "--spacing nan 1.0 1.0"),
        ({"base_lr": float("inf")}, "--base_lr inf"),
        ({"num_classes": 1}, "--num_classes 1"),
        ({"overlap": 1.0}, "--overlap 1.0"),
        ({"ct_range": (275.0, -125.0)}, "--ct_range 275 -125: the low value must be below the high one"),
        ({"ct_range": (float("-inf"), 0.0)}, "--ct_range -inf 0"),
    ],
)
def test_impossible_values_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**changes)


def test_a_flag_without_limits_takes_any_number_and_one_with_them_none_beyond() -> None:
    @dataclasses.dataclass
    class Flags:
        free: float = option(0.0, "any number")
        share: float | None = option(None, "a share", low=0, high=1)

    check_limits(Flags(free=-3.0))
    check_limits(Flags(share=1.0))
    with pytest.raises(ValueError, match=r"--share 1\.5: must be in 0\.\.1"):
        check_limits(Flags(share=1.5))


def test_config_survives_json() -> None:
    config = RunConfig(patch_size=(8, 8, 8), dataset_path=Path("/data"), spacing=(1.0, 1.0, 2.5), flip_axes=())
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown settings \\['colour'\\]"):
        RunConfig.from_dict({"colour": "red"})


def test_resolved_config_takes_the_data_sets_defaults() -> None:
    source = BallSource()
    config = fit_to_cases(resolve_config(RunConfig(dataset_name="decathlon"), source), source, ["ball00"])
    assert (config.patch_size, config.max_iteration, config.labelnum) == ((16, 16, 16), 4, 2)
    assert config.use_contrastive_prototype is True and config.baseline is False
    assert config.exp == "decathlon_mean_teacher_2labels_seed0"
    assert resolve_config(RunConfig(method="supervised"), BallSource()).use_contrastive_prototype is False


@pytest.mark.parametrize(
    ("flag", "meant"),
    [("--epochs", "max_iteration"), ("--learning-rate=1", "base_lr"), ("--dataset", "dataset_name"), ("--lrr", None)],
)
def test_what_other_programs_call_a_flag_is_known(
    flag: str, meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([flag])
    assert (f"did you mean --{meant}?" in capsys.readouterr().err) == (meant is not None)


def test_help_states_the_defaults_of_the_data_sets() -> None:
    stated = " ".join(parser().format_help().split())
    known = ("demo", "LA", "ACDC", "decathlon", "nifti", "dicom")
    found = {name: SOURCES.get(name).defaults for name in known}
    labels = [f"{name} {of.labelnum}" for name, of in found.items() if of.labelnum is not None]
    assert len(labels) == 3 and all(words in stated for words in labels)
    assert f"6000, demo {found['demo'].max_iteration}" in stated
    assert {of.max_iteration for name, of in found.items() if name != "demo"} == {6000}


def test_unknown_method_gets_a_hint() -> None:
    with pytest.raises(ValueError, match="did you mean 'mean_teacher'"):
        resolve_config(RunConfig(method="meen_teacher"), BallSource())


def test_patch_below_the_networks_stride_is_refused() -> None:
    source = BallSource()
    config = small_config(source, model="unet_3d", patch_size=(4, 16, 16))
    with pytest.raises(
        ValueError, match="--patch_size 4 16 16: unet_3d divides the axes by 8 8 8; pass at least these"
    ):
        build_network(config, DataFacts.of(source))


def test_labelled_share_of_a_batch_is_half_unless_given() -> None:
    assert resolve_config(RunConfig(batch_size=6), BallSource()).labeled_bs == 3
    assert resolve_config(RunConfig(batch_size=6, labeled_bs=1), BallSource()).labeled_bs == 1
    assert resolve_config(RunConfig(method="supervised", batch_size=1), BallSource()).batch_size == 1
    with pytest.raises(ValueError, match="--batch_size 1: mean_teacher needs at least 2"):
        resolve_config(RunConfig(batch_size=1), BallSource())


def test_affine_flags_reach_the_patches() -> None:
    source = BallSource()
    chosen = small_config(source, affine_share=0.7, affine_angle=25.0, affine_scale=0.2)
    options = build_augmentation(chosen)
    assert (options.affine_share, options.max_angle, options.max_scale) == (0.7, 25.0, 0.2)
    assert build_augmentation(dataclasses.replace(chosen, augment=False)).affine_share == 0


def test_default_affine_changes_are_those_of_the_options() -> None:
    """Published figures were trained with them."""
    built, plain = build_augmentation(small_config(BallSource())), AugmentOptions((16, 16, 16))
    assert (built.affine_share, built.max_angle, built.max_scale) == (0.3, 12.0, 0.12)
    assert (plain.affine_share, plain.max_angle, plain.max_scale) == (0.3, 12.0, 0.12)


def test_flags_that_the_method_does_not_read_are_named(caplog: pytest.LogCaptureFixture) -> None:
    resolve_config(RunConfig(method="fixmatch", decoders=3, strong_views=2, embedding_dim=32), BallSource())
    assert caplog.messages == ["without effect on --method fixmatch without prototypes: --decoders, --embedding_dim"]
    caplog.clear()
    resolve_config(RunConfig(method="mean_teacher", ema_decay=0.9, embedding_dim=32, num_dfp=4), BallSource())
    assert caplog.messages == ["without effect on --method mean_teacher: --num_dfp"]
    caplog.clear()
    resolve_config(RunConfig(method="supervised", use_contrastive_prototype=True, ema_decay=0.9), BallSource())
    assert caplog.messages == ["without effect on --method supervised: --ema_decay"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            {"augment": False, "affine_scale": 0.2, "strong_intensity": 0.5},
            "with --no-augment: --strong_intensity, --affine_scale",
        ),
        ({"affine_share": 0.0, "affine_angle": 20.0}, "with --affine_share 0: --affine_angle"),
        ({"copy_paste": False, "paste_unlabeled": 0.5}, "with --no-copy_paste: --paste_unlabeled"),
        ({"copy_paste": False, "perturbed_share": 0.5}, "with --no-copy_paste: --perturbed_share"),
        ({"batch_size": 2, "paste_unlabeled": 0.5}, "with one unlabelled patch a step: --paste_unlabeled"),
        ({"method": "cov_dfp", "use_dfp": False, "anchor_weight": 3.0}, "with --no-use_dfp: --anchor_weight"),
        (
            {"method": "supervised", "labeled_bs": 1, "place_prior": False},
            "without unlabelled patches: --labeled_bs, --place_prior",
        ),
        (
            {"method": "supervised", "use_contrastive_prototype": True, "memory_from_unlabeled": True},
            "without unlabelled patches: --memory_from_unlabeled",
        ),
        ({"voxel_size": (3.0, 3.0, 3.0)}, "on files that store their voxel size: --voxel_size"),
        ({"method": "bcp", "consistency_rampup": 7}, "on --method bcp without prototypes: --consistency_rampup"),
        ({"optimizer": "adamw", "muon_interval": 4}, "with --optimizer adamw: --muon_interval"),
        ({"interpolation": "cubic"}, "without --spacing: --interpolation"),
        ({"val_num": 1, "val_list": Path("some.txt")}, "with --val_list: --val_num"),
    ],
)
def test_flags_that_do_nothing_beside_others_are_named(
    given: dict[str, Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    resolve_config(RunConfig(**given), BallSource())
    assert caplog.messages == [f"without effect {named}"]


def test_a_list_of_labelled_cases_counts_and_not_labelnum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "labeled.txt").write_text("ball00\nball01\nball02\n")
    config = resolve_config(RunConfig(labelnum=1, labeled_list=tmp_path / "labeled.txt"), BallSource())
    assert caplog.messages == ["without effect with --labeled_list: --labelnum"] and "_3labels_" in str(config.exp)


def test_flags_that_do_something_beside_others_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    resolve_config(
        RunConfig(affine_scale=0.2, paste_unlabeled=0.5, muon_interval=4, interpolation="cubic", spacing=(1, 1, 1)),
        BallSource(),
    )
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("trained", "given", "used"),
    [("no", None, "no"), ("auto", None, "auto"), ("bf16", None, "auto"), ("fp16", None, "auto"), ("bf16", "no", "no")],
)
def test_a_run_trained_with_autocast_can_be_used_on_any_device(trained: str, given: str | None, used: str) -> None:
    assert InferenceFlags(amp=given).apply_to(RunConfig(amp=trained)).amp == used


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"warmup_iteration": 9}, "--warmup_iteration 9: leaves none of the 9 steps"),
        ({"muon_interval": 10}, "--muon_interval 10: no kernel would move in 9 steps"),
    ],
)
def test_settings_that_leave_nothing_to_train_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_config(RunConfig(max_iteration=9, **given), BallSource())
    resolve_config(RunConfig(max_iteration=10, **given), BallSource())
    resolve_config(RunConfig(max_iteration=9, method="supervised", optimizer="adamw", **given), BallSource())


@pytest.mark.parametrize("method", ["best", "supervised"])
def test_views_without_flips_are_not_mirrored(method: str) -> None:
    trained = small_config(BallSource(), method=method, flip_axes=(0,))
    for flips, axes in ((None, (0,)), (False, ())):
        options = build_inference(InferenceFlags(views=3, flips=flips).apply_to(trained), "no")
        assert (options.views, options.flips) == (3, axes)
    with pytest.raises(ValueError, match="mirrored already; choose one"):
        InferenceFlags(views=3, flips=True).apply_to(trained)


def test_a_user_without_a_home_gets_a_cache_among_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    assert default_cache_dir() == Path.home() / ".cache" / "cov_dfp_3d"
    monkeypatch.setattr(Path, "home", nowhere)
    assert default_cache_dir() == Path(tempfile.gettempdir()) / ".cache" / "cov_dfp_3d"
