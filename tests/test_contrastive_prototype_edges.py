"""ContrastivePrototypeManager at its edges: absent classes, one voxel, no voxel, bad values, other types."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prototype_cases import E, K, fill, make_manager, sure_logits

from myutils.contrastive_prototype_manager import ContrastivePrototypeManager
from myutils.prototype_memory import non_finite_message


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_class_absent_from_batch_or_memory_is_left_out() -> None:
    manager = make_manager()
    manager.update_memory({0: torch.tensor([[1.0, 0, 0, 0]]), 1: torch.randn(2, E)})
    features = torch.tensor([[-1.0, 0, 0, 0], [1.0, 2, 3, 4]], requires_grad=True)
    loss = manager.contrastive_class_to_class_learned_memory(features, torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(2.0)  # class 0 alone; 1 has no features, 2 no memory


@pytest.mark.parametrize("learned", [False, True])
def test_one_voxel(learned: bool) -> None:
    manager = fill(make_manager(use_learned_selector=learned))
    features = torch.randn(1, E, 1, 1, 1, requires_grad=True)
    label = torch.ones(1, 1, 1, 1, dtype=torch.int64)
    loss, _ = manager.update_and_compute_loss(features, torch.tensor([0.0, 9.0, 0.0]).reshape(1, K, 1, 1, 1), label)
    loss.backward()
    assert torch.isfinite(loss) and features.grad is not None and features.grad.abs().sum() > 0
    assert manager.memory_count.tolist() == [5, 1, 5]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [(0, E), (2, E, 2, 2, 2)])
def test_nothing_to_compare_is_zero_on_the_graph(learned: bool, shape: tuple[int, ...]) -> None:
    manager = fill(make_manager(use_learned_selector=learned))
    features = torch.randn(shape, requires_grad=True)
    predictions = torch.zeros(shape[0], K, *shape[2:])
    labels = torch.full((shape[0], *shape[2:]), -1)
    loss, parts = manager.update_and_compute_loss(features, predictions, labels)
    assert loss.item() == 0.0 and all(part.requires_grad for part in parts.values())
    loss.backward()
    assert features.grad is not None and not features.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in manager.parameters())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_equal_or_zero_features_keep_gradients_finite(value: float) -> None:
    manager = make_manager(use_learned_selector=True)
    features = torch.full((6, E), value, requires_grad=True)
    labels = torch.arange(6) % K
    for _ in range(2):
        loss, _ = manager.update_and_compute_loss(features, sure_logits(labels), labels)
        loss.backward()
    assert torch.isfinite(loss) and features.grad is not None and torch.isfinite(features.grad).all()
    assert features.grad.abs().max() < 1e3
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in manager.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_features_name_the_class(bad: float) -> None:
    manager, labels = fill(make_manager()), torch.tensor([0, 2, 2])
    features = torch.randn(3, E)
    features[2, 1] = bad
    with pytest.raises(ValueError, match=r"class 2: 1 of 2"):
        manager.update_and_compute_loss(features, sure_logits(labels), labels)
    with pytest.raises(ValueError, match="class 2"):
        manager.contrastive_class_to_class_learned_memory(features, labels)
    with pytest.raises(ValueError, match="class 1: 1 of 3"):
        manager.update_memory({1: features})
    assert "class 2" in str(non_finite_message(features, labels))
    assert non_finite_message(features[:2], labels[:2]) is None


def test_non_finite_features_of_ignored_voxels_do_no_harm() -> None:
    manager, labels = fill(make_manager()), torch.tensor([0, -1])
    features = torch.randn(2, E)
    features[1] = float("nan")
    features.requires_grad_()
    loss, _ = manager.update_and_compute_loss(features, sure_logits(labels), labels)
    loss.backward()
    assert features.grad is not None and torch.isfinite(features.grad).all()


def test_wrong_widths_shapes_and_class_ids_are_refused() -> None:
    manager, labels = make_manager(), torch.tensor([0, 1])
    features, predictions = torch.randn(2, E), torch.randn(2, K)
    for wrong in (torch.randn(2, E + 1), torch.randn(2, E, 3)):
        with pytest.raises(ValueError, match=r"feature_dim being 4"):
            manager.update_and_compute_loss(wrong, predictions, labels)
    with pytest.raises(ValueError, match=r"expected logits \(2, 3\)"):
        manager.update_and_compute_loss(features, torch.randn(2, K + 1), labels)
    with pytest.raises(ValueError, match=r"labels have shape \(3,\)"):
        manager.update_and_compute_loss(features, predictions, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="memory_features"):
        manager.update_and_compute_loss(features, predictions, labels, memory_features=torch.randn(1, E))
    for ids in ([0, 3], [0, -2], [0, 255]):
        with pytest.raises(ValueError, match=rf"\[{ids[1]}\] are outside 0\.\.2"):
            manager.update_and_compute_loss(features, predictions, torch.tensor(ids))
        with pytest.raises(ValueError, match=r"outside 0\.\.2"):
            manager.contrastive_class_to_class_learned_memory(features, torch.tensor(ids))
        with pytest.raises(ValueError, match=r"outside 0\.\.2"):
            manager.sample_positions(torch.tensor(ids))
    with pytest.raises(ValueError, match=r"ignore_index 3 is one of the ids 0\.\.5; take another, such as -1"):
        ContrastivePrototypeManager(K, E, ignore_index=3).losses_by_part(features, labels, parts=2)
    with pytest.raises(ValueError, match="integer class ids"):
        manager.update_and_compute_loss(features, predictions, labels.float())
    with pytest.raises(ValueError, match="class id 3"):
        manager.update_memory({3: features})
    with pytest.raises(ValueError, match=r"expected \(n, 4\)"):
        manager.update_memory({0: torch.randn(2, E + 1)})
    with pytest.raises(ValueError, match=r"expected \(2,\)"):
        manager.update_memory({0: features}, {0: torch.ones(3)})
    with pytest.raises(ValueError, match="features do not"):
        manager.update_memory({0: features}, {1: torch.ones(2)})
    with pytest.raises(ValueError, match=r"expected \(N, 4\)"):
        manager.contrastive_class_to_class_learned_memory(features, labels[:1])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_classes": 1},
        {"feature_dim": 0},
        {"elements_per_class": 0},
        {"samples_per_class": 0},
        {"confidence_threshold": 1.0},
        {"ranking": "best"},
        {"ignore_index": 1},
        {"feature_dim": 1, "use_learned_selector": True},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ContrastivePrototypeManager(**{"num_classes": K, "feature_dim": E, **settings})


@pytest.mark.parametrize(
    "settings", [{"margin": 0.0}, {"margin": 2.5}, {"intra_weight": -0.1}, {"contrastive_weight": float("nan")}]
)
def test_impossible_loss_settings_are_refused(settings: dict[str, float]) -> None:
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="pass a"):
        make_manager().update_and_compute_loss(torch.randn(2, E), sure_logits(labels), labels, **settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_computes_in_float32(dtype: torch.dtype) -> None:
    manager, labels = fill(make_manager(use_learned_selector=True)), torch.tensor([0, 1, 2])
    features = torch.randn(3, E).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = manager.update_and_compute_loss(features, sure_logits(labels).to(dtype), labels, update=False)
    expected, _ = manager.update_and_compute_loss(features.detach().float(), sure_logits(labels), labels, update=False)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert features.grad is not None and features.grad.dtype == dtype and features.grad.abs().sum() > 0


def test_state_dict_round_trip_and_type_conversion(tmp_path: Path) -> None:
    manager = fill(make_manager(use_learned_selector=True), count=3)
    assert {"memory", "memory_count", "memory_from_labeled"} <= set(manager.state_dict())
    torch.save(manager.state_dict(), tmp_path / "manager.pt")
    restored = make_manager(use_learned_selector=True)
    restored.load_state_dict(torch.load(tmp_path / "manager.pt", weights_only=True))
    features, labels = torch.randn(6, E), torch.arange(6) % K
    values = [m.contrastive_class_to_class_learned_memory(features, labels) for m in (manager, restored)]
    assert torch.equal(values[0], values[1]) and torch.equal(manager.memory_count, restored.memory_count)
    assert restored.double().memory.dtype == torch.float64
    assert restored.memory_count.dtype == torch.int64 and restored.memory_from_labeled.dtype == torch.bool
    assert restored.contrastive_class_to_class_learned_memory(features, labels).dtype == torch.float64
    halved = restored.half().contrastive_class_to_class_learned_memory(features, labels)
    assert halved.dtype == torch.float32 and halved.item() == pytest.approx(values[0].item(), abs=1e-2)
    assert restored.to("meta").memory.device.type == "meta"


def test_hot_path_never_reads_a_tensor_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device every read of a value, and every shape that depends on one, is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # unknown to that device
    manager = fill(make_manager(use_learned_selector=True, samples_per_class=4)).to("meta")
    features, predictions = torch.randn(2, E, 3, 3, 3, device="meta"), torch.randn(2, K, 3, 3, 3, device="meta")
    labels = torch.zeros(2, 3, 3, 3, dtype=torch.int64, device="meta")
    loss, _ = manager.update_and_compute_loss(features, predictions, labels)
    assert loss.device.type == "meta"
    manager.update_and_compute_loss(features, predictions, is_labeled=False)
    manager.update_memory({0: torch.randn(3, E, device="meta")})
    with pytest.raises(RuntimeError):
        manager.get_memory_info()  # for the log, and allowed to wait


def test_dense_and_flat_input_agree() -> None:
    manager = fill(make_manager())
    features, predictions = torch.randn(2, E, 3, 2, 4), 5 * torch.randn(2, K, 3, 2, 4)
    labels = torch.randint(0, K, (2, 3, 2, 4))
    dense, _ = manager.update_and_compute_loss(features, predictions, labels, update=False)
    flat, _ = manager.update_and_compute_loss(
        features.movedim(1, -1).reshape(-1, E),
        predictions.movedim(1, -1).reshape(-1, K),
        labels.reshape(-1),
        update=False,
    )
    assert dense.item() == pytest.approx(flat.item(), rel=1e-5)


def test_backward_works_after_the_memory_was_replaced() -> None:
    manager, labels = fill(make_manager(use_learned_selector=True)), torch.arange(6) % K
    loss, _ = manager.update_and_compute_loss(torch.randn(6, E, requires_grad=True), sure_logits(labels), labels)
    manager.update_memory({0: torch.zeros(1, E)})
    loss.backward()


def test_float32_stays_near_the_float64_reference() -> None:
    manager = fill(make_manager(use_learned_selector=True))
    features, labels = torch.randn(300, E), torch.randint(0, K, (300,))
    loss = manager.contrastive_class_to_class_learned_memory(features, labels)
    exact = make_manager(use_learned_selector=True).double()
    exact.load_state_dict(manager.state_dict())
    expected = exact.contrastive_class_to_class_learned_memory(features.double(), labels)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_labels_and_is_labeled_must_agree() -> None:
    manager, labels = make_manager(), torch.tensor([0])
    with pytest.raises(ValueError, match="needs labels"):
        manager.update_and_compute_loss(torch.randn(1, E), sure_logits(labels))
    with pytest.raises(ValueError, match="never read"):
        manager.update_and_compute_loss(torch.randn(1, E), sure_logits(labels), labels, is_labeled=False)


def test_probabilities_are_refused_where_logits_belong() -> None:
    manager, labels = make_manager(), torch.tensor([0, 1, 2, 0])
    logits = torch.randn(4, K)
    manager.update_and_compute_loss(torch.randn(4, E), logits, labels)
    for probabilities in (logits.softmax(1), logits.softmax(1).half()):
        with pytest.raises(ValueError, match=r"predictions lie in 0..1 and add up to 1 .*; pass logits"):
            manager.update_and_compute_loss(torch.randn(4, E), probabilities, labels)


@pytest.mark.parametrize("name", ["features", "predictions", "labels", "memory_features"])
def test_what_lies_on_another_device_or_is_no_tensor_is_named(name: str) -> None:
    given: dict[str, Any] = {"features": torch.randn(4, E), "predictions": torch.randn(4, K)}
    given |= {"labels": torch.zeros(4, dtype=torch.int64), "memory_features": torch.randn(4, E)}
    with pytest.raises(ValueError, match=f"{name} on meta, the manager on cpu: move one of them with"):
        make_manager().update_and_compute_loss(**given | {name: given[name].to("meta")})
    with pytest.raises(ValueError, match=f"{name} is a ndarray; pass a tensor"):
        make_manager().update_and_compute_loss(**given | {name: given[name].numpy()})


def test_a_memory_of_other_sizes_is_not_loaded() -> None:
    state = fill(make_manager()).state_dict()
    other = ContrastivePrototypeManager(np.int64(K + 1), E)
    with pytest.raises(
        RuntimeError, match=f"the stored memory has num_classes {K}, .*: build it with the stored numbers"
    ):
        other.load_state_dict(state)


def test_labels_of_types_that_torch_does_not_compare_are_refused() -> None:
    labels = torch.zeros(4, dtype=torch.uint16)
    with pytest.raises(ValueError, match=r"class labels have dtype torch.uint16; pass integer class ids"):
        make_manager().update_and_compute_loss(torch.randn(4, E), torch.randn(4, K), labels)
