"""ContrastivePrototypeManager in four groups; ``python tests/test_contrastive_prototype.py`` reports each of them.

Edge cases, memory and sampling have files of their own beside this one; the script counts them as basic function.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prototype_cases import E, FirstEntry, K, descend, fill, make_manager, naive_loss, sure_logits


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class TestBasicFunction:
    def test_update_memory_keeps_the_most_confident_and_detaches(self) -> None:
        manager = make_manager(elements_per_class=2)
        vectors = torch.arange(12.0).reshape(3, E).requires_grad_()
        manager.update_memory({1: vectors}, {1: torch.tensor([0.9, 0.1, 0.95])})
        assert torch.equal(manager.memory[1], vectors.detach()[[2, 0]])
        assert manager.memory_count.tolist() == [0, 2, 0]
        assert not manager.memory.requires_grad

    def test_loss_returns_the_four_parts_with_each_weight_applied_once(self) -> None:
        manager = fill(make_manager())
        labels = torch.tensor([0, 1, 2, 1])
        total, parts = manager.update_and_compute_loss(
            torch.randn(4, E), sure_logits(labels), labels, contrastive_weight=0.5, intra_weight=0.3, inter_weight=0.2
        )
        assert set(parts) == {"contrastive_loss", "intra_loss", "inter_loss", "total_prototype_loss"}
        expected = 0.5 * parts["contrastive_loss"] + 0.3 * parts["intra_loss"] + 0.2 * parts["inter_loss"]
        assert total.item() == pytest.approx(expected.item()) == pytest.approx(parts["total_prototype_loss"].item())

    @pytest.mark.parametrize("part", ["contrastive_loss", "intra_loss", "inter_loss"])
    def test_each_part_has_a_gradient_into_dense_features(self, part: str) -> None:
        manager = fill(make_manager())
        features = torch.randn(2, E, 3, 3, 2, requires_grad=True)
        labels = torch.randint(0, K, (2, 3, 3, 2))
        predictions = torch.randn(2, K, 3, 3, 2, requires_grad=True)
        _, parts = manager.update_and_compute_loss(features, predictions, labels, margin=2.0)
        parts[part].backward()
        assert features.grad is not None and features.grad.abs().sum() > 0 and torch.isfinite(features.grad).all()
        assert predictions.grad is None

    def test_only_labeled_voxels_predicted_right_and_surely_enter_the_memory(self) -> None:
        manager = make_manager()
        labels = torch.tensor([0, 0, 1, 1])
        predictions = sure_logits(torch.tensor([0, 0, 2, 1]))
        predictions[1] = 0.1 * predictions[1]  # right, but unsure
        features = torch.arange(1.0, 5.0)[:, None].expand(4, E)
        manager.update_and_compute_loss(features, predictions, labels)
        assert manager.memory_count.tolist() == [1, 1, 0]
        assert manager.memory[:2, 0, 0].tolist() == [1.0, 4.0]

    def test_loss_uses_the_memory_as_it_stood_before(self) -> None:
        manager = make_manager()
        manager.update_memory({0: torch.tensor([[1.0, 0, 0, 0]])})
        labels = torch.zeros(1, dtype=torch.int64)
        _, parts = manager.update_and_compute_loss(torch.tensor([[0.0, 1, 0, 0]]), sure_logits(labels), labels)
        assert parts["contrastive_loss"].item() == pytest.approx(1.0)  # orthogonal; 0 if it met itself
        assert manager.memory[0, 0].tolist() == [0.0, 1.0, 0.0, 0.0]

    def test_empty_memory_is_filled_before_the_loss_unless_update_is_off(self) -> None:
        labels = torch.zeros(2, dtype=torch.int64)
        features = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
        manager = make_manager()
        _, parts = manager.update_and_compute_loss(features, sure_logits(labels), labels)
        assert parts["contrastive_loss"].item() == pytest.approx(0.5)  # pairs at 0, 1, 1, 0
        manager = make_manager()
        _, parts = manager.update_and_compute_loss(features, sure_logits(labels), labels, update=False)
        assert parts["contrastive_loss"].item() == 0.0 and manager.memory_count.sum() == 0


class TestLearnedSelectors:
    def test_selectors_exist_from_the_start_one_per_class(self) -> None:
        feature_selectors, memory_selectors = make_manager(use_learned_selector=True).get_selectors()
        assert feature_selectors is not None and memory_selectors is not None
        assert len(feature_selectors) == len(memory_selectors) == K
        assert [type(layer) for layer in feature_selectors[0]][::2] == [nn.Linear, nn.LeakyReLU]
        assert feature_selectors[0](torch.randn(1, E)).shape == (1, 1)
        assert make_manager().get_selectors() == (None, None)
        assert not list(make_manager().parameters())

    def test_every_selector_gets_a_gradient_and_changes_over_steps(self) -> None:
        manager = fill(make_manager(use_learned_selector=True))
        before = {name: value.clone() for name, value in manager.named_parameters()}
        labels = torch.arange(12) % K
        for step in range(3):
            manager.zero_grad()
            loss, _ = manager.update_and_compute_loss(torch.randn(12, E), sure_logits(labels), labels)
            loss.backward()
            if step == 0:
                silent = [n for n, p in manager.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
                # The last bias moves all scores of a class together, yet not in proportion: it learns as well.
                assert not silent
            descend(manager.parameters(), rate=1.0)
        assert all(not torch.equal(value, before[name]) for name, value in manager.named_parameters())

    def test_scores_send_no_gradient_into_the_features(self) -> None:
        manager = fill(make_manager(use_learned_selector=True))
        features, labels = torch.randn(7, E, requires_grad=True), torch.arange(7) % K
        loss = manager.contrastive_class_to_class_learned_memory(features, labels)
        (gradient,) = torch.autograd.grad(loss, features)
        (expected,) = torch.autograd.grad(naive_loss(manager, features, labels), features)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)

    def test_training_lowers_the_score_of_features_far_from_the_memory(self) -> None:
        manager = make_manager(use_learned_selector=True)
        near, far = torch.tensor([[1.0, 0.1, 0, 0]]), torch.tensor([[-1.0, 0.2, 0.3, 0]])
        manager.update_memory({0: torch.tensor([[1.0, 0, 0, 0]])})
        selectors, _ = manager.get_selectors()
        assert selectors is not None
        for _ in range(30):
            loss = manager.contrastive_class_to_class_learned_memory(
                torch.cat([near, far]), torch.zeros(2, dtype=torch.int64)
            )
            manager.zero_grad()
            loss.backward()
            descend(manager.parameters(), rate=0.5)
        assert selectors[0](near) > selectors[0](far)

    @pytest.mark.parametrize(
        ("ranking", "kept"), [("highest", [4.0, 3.0]), ("lowest", [0.0, 1.0]), ("confidence", [1.0, 2.0])]
    )
    def test_ranking_follows_hand_made_scores(self, ranking: str, kept: list[float]) -> None:
        manager = make_manager(elements_per_class=2, use_learned_selector=True, ranking=ranking)
        assert manager.feature_selectors is not None
        manager.feature_selectors[0] = FirstEntry()
        confidences = torch.tensor([0.81, 0.99, 0.95, 0.82, 0.83])
        manager.update_memory({0: torch.arange(5.0)[:, None].expand(5, E)}, {0: confidences})
        assert manager.memory[0, :, 0].tolist() == kept

    def test_batches_are_ranked_by_the_selector_of_their_own_class(self) -> None:
        manager = make_manager(elements_per_class=1, use_learned_selector=True)
        assert manager.feature_selectors is not None
        manager.feature_selectors[0], manager.feature_selectors[1] = FirstEntry(), FirstEntry(sign=-1.0)
        labels = torch.tensor([0, 0, 1, 1])
        manager.update_and_compute_loss(torch.arange(4.0)[:, None].expand(4, E), sure_logits(labels), labels)
        assert manager.memory[:2, 0, 0].tolist() == [1.0, 2.0]


class TestUnlabeledData:
    def test_pseudo_labels_above_the_threshold_take_part_and_are_stored(self) -> None:
        manager = make_manager(confidence_threshold=0.8)
        predictions = torch.tensor([[0.95, 0.03, 0.02], [0.02, 0.9, 0.08], [0.3, 0.3, 0.4]]).log()
        features = torch.randn(3, E, requires_grad=True)
        loss, _ = manager.update_and_compute_loss(features, predictions, is_labeled=False, margin=2.0)
        loss.backward()
        assert manager.memory_count.tolist() == [1, 1, 0]
        assert not manager.memory_from_labeled.any()
        assert features.grad is not None
        assert features.grad[:2].abs().sum() > 0 and not features.grad[2].any()

    def test_pseudo_labels_do_not_overwrite_labeled_memory(self) -> None:
        manager = make_manager()
        manager.update_memory({0: torch.ones(2, E)})
        predictions = sure_logits(torch.tensor([0, 1, 1]))
        manager.update_and_compute_loss(torch.full((3, E), 5.0), predictions, is_labeled=False)
        assert manager.memory[0, :2].eq(1).all() and manager.memory_from_labeled.tolist() == [True, False, False]
        assert manager.memory[1, 0, 0] == 5.0
        manager.update_and_compute_loss(torch.full((3, E), 6.0), predictions, is_labeled=False)
        assert manager.memory[1, 0, 0] == 6.0  # pseudo-labelled memory may be renewed
        manager.update_and_compute_loss(torch.full((1, E), 7.0), sure_logits(torch.tensor([1])), torch.tensor([1]))
        assert manager.memory[1, 0, 0] == 7.0 and manager.memory_from_labeled[1]

    def test_the_flag_allows_overwriting(self) -> None:
        manager = make_manager(overwrite_with_unlabeled=True)
        manager.update_memory({0: torch.ones(2, E)})
        manager.update_and_compute_loss(torch.full((1, E), 5.0), sure_logits(torch.tensor([0])), is_labeled=False)
        assert manager.memory[0, 0, 0] == 5.0 and not manager.memory_from_labeled[0]

    def test_dense_pseudo_labels_equal_argmax_behind_the_gate(self) -> None:
        manager = fill(make_manager(confidence_threshold=0.6))
        features, predictions = torch.randn(2, E, 3, 4, 2), 2 * torch.randn(2, K, 3, 4, 2)
        confidence, pseudo = predictions.softmax(1).max(1)
        labels = pseudo.masked_fill(confidence <= 0.6, -1)
        assert 0 < (labels < 0).sum() < labels.numel()
        unlabeled, _ = manager.update_and_compute_loss(features, predictions, is_labeled=False, update=False)
        labeled, _ = manager.update_and_compute_loss(features, predictions, labels, update=False)
        assert unlabeled.item() == pytest.approx(labeled.item(), rel=1e-5)


class TestLossDetails:
    @pytest.mark.parametrize("learned", [False, True])
    def test_values_and_gradients_equal_the_naive_loop_in_float64(self, learned: bool) -> None:
        manager = make_manager(use_learned_selector=learned).double()
        manager.update_memory({0: torch.randn(5, E).double(), 1: torch.randn(3, E).double()})
        features = torch.randn(11, E, dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, -1, 1, 0, 0])
        inputs = [features, *manager.parameters()]
        loss = manager.contrastive_class_to_class_learned_memory(features, labels)
        naive = naive_loss(manager, features, labels)
        torch.testing.assert_close(loss, naive, atol=1e-12, rtol=1e-12)
        for gradient, expected in zip(
            torch.autograd.grad(loss, inputs),
            torch.autograd.grad(naive, inputs, allow_unused=True),
            strict=True,
        ):
            # Selectors of a class that sits out have no gradient in the loop and a zero one here.
            reference = torch.zeros_like(gradient) if expected is None else expected
            torch.testing.assert_close(gradient, reference, atol=1e-12, rtol=1e-10)

    def test_without_selectors_it_is_the_mean_of_the_similarity_matrix(self) -> None:
        manager = fill(make_manager())
        features, labels = torch.randn(40, E), torch.randint(0, K, (40,))
        means = []
        for k in range(K):
            rows = nn.functional.normalize(features[labels == k], dim=1)
            matrix = rows @ nn.functional.normalize(manager.memory[k], dim=1).T  # (n, M)
            assert matrix.abs().max() <= 1 + 1e-6
            means.append((1 - matrix).mean())
        loss = manager.contrastive_class_to_class_learned_memory(features, labels)
        assert loss.item() == pytest.approx(torch.stack(means).mean().item(), abs=1e-6)

    @pytest.mark.parametrize(("direction", "distance"), [(1.0, 0.0), (0.0, 1.0), (-1.0, 2.0)])
    def test_distance_is_0_along_1_across_and_2_against_the_memory(self, direction: float, distance: float) -> None:
        manager = make_manager()
        manager.update_memory({0: torch.tensor([[3.0, 0, 0, 0]])})
        feature = torch.tensor([[5 * direction, 1 - abs(direction), 0, 0]])
        loss = manager.contrastive_class_to_class_learned_memory(feature, torch.tensor([0]))
        assert loss.item() == pytest.approx(distance)

    def test_memory_weights_are_not_all_one(self) -> None:
        manager = make_manager(use_learned_selector=True)
        assert manager.memory_selectors is not None
        manager.memory_selectors[0] = FirstEntry()
        manager.update_memory({0: torch.tensor([[2.0, 0, 0, 0], [-2.0, 0, 0, 0]])})
        loss = manager.contrastive_class_to_class_learned_memory(torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([0]))
        high, low = torch.sigmoid(torch.tensor(2.0)), torch.sigmoid(torch.tensor(-2.0))
        assert loss.item() == pytest.approx((2 * low / (high + low)).item())  # distances 0 and 2; 1 if weights are dead

    def test_intra_is_the_squared_cosine_distance_to_the_prototype(self) -> None:
        manager = make_manager()
        manager.update_memory({0: torch.tensor([[2.0, 0, 0, 0], [0, 5.0, 0, 0]]), 1: torch.tensor([[0, 0, 1.0, 0]])})
        features = torch.tensor([[1.0, 1, 0, 0], [-1.0, -1, 0, 0], [0, 0, 0, 3.0]])
        labels = torch.tensor([0, 0, 1])
        _, parts = manager.update_and_compute_loss(features, sure_logits(labels), labels)
        assert parts["intra_loss"].item() == pytest.approx(((0 + 4) / 2 + 1) / 2)  # (1 - cos)^2: 0, 4 and 1

    def test_inter_is_the_squared_shortfall_of_the_distance_between_means(self) -> None:
        manager = make_manager()
        features = torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 1.0, 0]])
        labels = torch.tensor([0, 0, 1, 2])
        _, parts = manager.update_and_compute_loss(features, sure_logits(labels), labels, margin=1.0)
        distance = (0.2**2 + 0.6**2) ** 0.5  # class 2 is sqrt(2) away from both
        assert parts["inter_loss"].item() == pytest.approx((1 - distance) ** 2 / 3, rel=1e-5)
        _, parts = manager.update_and_compute_loss(features[:2], sure_logits(labels[:2]), labels[:2])
        assert parts["inter_loss"].item() == 0.0

    def test_descent_pulls_classes_together_and_apart(self) -> None:
        manager = make_manager()
        labels = torch.arange(30) % K
        features = (torch.randn(30, E) + 3).requires_grad_()
        history = []
        for _ in range(40):
            loss, _ = manager.update_and_compute_loss(
                features, sure_logits(labels), labels, intra_weight=1.0, inter_weight=1.0
            )
            (gradient,) = torch.autograd.grad(loss, features)
            with torch.no_grad():
                features -= gradient
            history.append(loss.item())
        assert history[-1] < 0.7 * history[0]


def _main() -> int:
    """Run the four groups, one after the other, and report each."""
    here = Path(__file__).resolve()
    groups = {
        "basic function": [f"{here}::TestBasicFunction", *map(str, sorted(here.parent.glob("test_*prototype_*.py")))],
        "learned selectors": [f"{here}::TestLearnedSelectors"],
        "unlabelled data": [f"{here}::TestUnlabeledData"],
        "loss details": [f"{here}::TestLossDetails"],
    }
    results = {title: pytest.main(["-q", *tests]) for title, tests in groups.items()}
    for title, code in results.items():
        sys.stdout.write(f"{title}: {'passed' if code == 0 else 'FAILED'}\n")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(_main())
