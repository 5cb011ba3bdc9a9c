"""ContrastivePrototypeManager: a memory of prototype vectors per class and the losses that use it.

Contract: memory, counts and selectors move with ``.to()``, are part of ``state_dict()`` and agree across ranks.
Only ``get_memory_info`` makes the host wait for an accelerator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from myutils import prototype_checks as checks
from myutils import prototype_forms as forms
from myutils import prototype_losses as losses
from myutils.prototype_memory import RANKINGS, Candidates, PrototypeMemory, best_of_ranks, flatten_classes, unit_vectors
from myutils.prototype_sampling import pick_voxels, require_class_ids, sample_per_class
from myutils.pseudo_labels import pseudo_labels


class ContrastivePrototypeManager(PrototypeMemory):
    """Pulls voxel features to stored features of their class, and class means apart.

    The design follows the class-wise memory of Alonso et al. 2021 (arXiv:2104.13415) and SS-Net (Wu et al. 2022,
    arXiv:2203.01324): up to M vectors per class, replaced online by the best of each batch, and optional learned
    selectors that weigh features and memory.

    Args:
        num_classes: Number of classes K, the background included.
        feature_dim: Width E of the features.
        elements_per_class: Memory slots M of each class.
        use_learned_selector: Build a feature selector and a memory selector per class; off means equal weights.
        confidence_threshold: Probability in [0, 1) above which a voxel is trusted.
        ranking: Which vectors a full memory keeps. ``highest`` (default) and ``lowest`` go by the selector's score,
            or by confidence without selectors; ``confidence`` always by the highest confidence; ``random`` by chance.
        samples_per_class: Voxels drawn per class and batch, background included.
        overwrite_with_unlabeled: Let pseudo-labelled voxels replace a memory that came from labelled ones.
        prototype_loss: ``ssnet`` (1 - cosine), ``infonce`` or ``multiproto`` (see ``myutils.prototype_forms``).
        ignore_index: Label of voxels without a class, outside 0..K-1.
        check_finite: Refuse non-finite features, naming the class. ``None`` looks on the CPU only (elsewhere it waits).

    Note:
        - The published code sorts scores in ascending order and keeps the first: the *lowest*. The selector is trained
          by the loss itself, which rewards a low score for a voxel far from the memory; so the lowest are the
          outliers, and ``highest`` keeps the vectors that represent their class.
        - The memory is ranked by the feature selector; the memory selector only weighs entries already kept.
        - The published memory weights are divided by themselves, so that all are 1; here they are normalised over
          the memory axis, and the memory selector learns.
    """

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        elements_per_class: int = 32,
        use_learned_selector: bool = False,
        confidence_threshold: float = 0.8,
        *,
        ranking: str = "highest",
        samples_per_class: int = 2048,
        overwrite_with_unlabeled: bool = False,
        prototype_loss: str = "ssnet",
        ignore_index: int = -1,
        check_finite: bool | None = None,
    ) -> None:
        checks.require_at_least("num_classes", num_classes, 2)
        checks.require_at_least("feature_dim", feature_dim, 2 if use_learned_selector else 1)
        checks.require_at_least("elements_per_class", elements_per_class, 1)
        checks.require_at_least("samples_per_class", samples_per_class, 1)
        checks.require_choice("ranking", ranking, RANKINGS)
        checks.require_choice("prototype_loss", prototype_loss, forms.LOSS_FORMS)
        checks.require_gate(confidence_threshold, ignore_index, num_classes)
        super().__init__(num_classes, feature_dim, elements_per_class, overwrite_with_unlabeled, check_finite)
        self.use_learned_selector = use_learned_selector
        self.confidence_threshold = confidence_threshold
        self.ranking = ranking
        self.samples_per_class = samples_per_class
        self.prototype_loss = prototype_loss
        self.ignore_index = ignore_index
        self.feature_selectors: nn.ModuleList | None = None
        self.memory_selectors: nn.ModuleList | None = None
        if use_learned_selector:
            self.feature_selectors = nn.ModuleList(losses.build_selector(feature_dim) for _ in range(num_classes))
            self.memory_selectors = nn.ModuleList(losses.build_selector(feature_dim) for _ in range(num_classes))

    def get_selectors(self) -> tuple[nn.ModuleList, nn.ModuleList] | tuple[None, None]:
        """Feature selectors and memory selectors, K each, or ``(None, None)``; they exist from the start."""
        if self.feature_selectors is None or self.memory_selectors is None:
            return None, None
        return self.feature_selectors, self.memory_selectors

    def sample_positions(
        self, class_labels: Tensor, samples_per_class: int | None = None, parts: int = 1, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw voxels to compare, uniformly in each class, so that a caller can run its heads on these alone.

        Args:
            class_labels: Class ids (B, X, Y, Z) or (N,), integers; ``ignore_index`` marks voxels not to draw.
            samples_per_class: Largest number of voxels of one class; default as constructed.
            parts: With P parts the labels are groups, class id + K * part, and each group has its own quota.
            keys: ``shared_keys`` (N,), to draw from the voxels of all ranks together.

        Returns:
            Positions (S,) and labels (S,), as of ``sample_per_class``; ``ignore_index`` in unused slots.
        """
        quota = self.samples_per_class if samples_per_class is None else samples_per_class
        checks.require_at_least("samples_per_class", quota, 1)
        return sample_per_class(class_labels, parts * self.num_classes, quota, self.ignore_index, keys=keys)

    @torch.no_grad()
    def update_memory(
        self, features: Mapping[int, Tensor], confidences: Mapping[int, Tensor] | None = None, from_labeled: bool = True
    ) -> None:
        """Replace the memory of each class named by its best-ranked vectors; other classes are kept.

        With several ranks this is a collective call: every rank calls it equally often, with an empty mapping if it
        has nothing, and all end with the same memory, the best of all ranks' vectors.

        Args:
            features: Class id to vectors (n, E); n = 0 keeps what is there.
            confidences: Class id to confidences (n,). Classes without any are ranked in the given order.
            from_labeled: ``False`` marks pseudo-labelled vectors, which do not replace labelled ones unless the
                manager was built with ``overwrite_with_unlabeled``.

        Raises:
            ValueError: On class ids outside 0..K-1, wrong shapes, or non-finite vectors.
        """
        confidences = confidences or {}
        checks.require_mappings(features, confidences, self.num_classes, self.feature_dim)
        merged, labels, ranks = flatten_classes(features, confidences, self.ranking != "lowest", self.memory)
        self.store(self._rank(self.known_rows(merged, labels), labels, ranks, from_labeled))

    @torch.no_grad()
    def candidates(
        self, vectors: Tensor, logits: Tensor, class_labels: Tensor, from_labeled: bool, keys: Tensor | None = None
    ) -> Candidates:
        """The best trusted voxels of each class, for ``store``: predicted as their label, above the threshold.
        With several ranks this is a collective call; all get the best of all ranks.

        Args:
            vectors: What would be stored (S, E).
            logits: What the voxels were predicted as (S, K).
            class_labels: Class ids (S,), ``ignore_index`` for rows to leave out.
            from_labeled: Whether these are true labels; see ``update_memory``.
            keys: Random numbers (S,) for the ranking "random", such as ``shared_keys``; default drawn here.
        """
        found = pseudo_labels(logits)
        trusted = found.gated(self.confidence_threshold, self.ignore_index)
        labels = class_labels.where(trusted == class_labels, self.ignore_index)
        return self._rank(self.known_rows(vectors, class_labels), labels, found.confidence, from_labeled, keys)

    def contrastive_class_to_class_learned_memory(self, features: Tensor, class_labels: Tensor) -> Tensor:
        """Weighted mean of 1 - cosine between the features of a class and its memory, averaged over classes.

        Weights are sigmoid(selector(vector)) rescaled to mean 1 over the class's features and over its memory;
        without selectors all are 1. A class takes part if it has both features and memory.

        Args:
            features: (N, E); the gradient goes here and to the selectors, not through the scores to the features.
            class_labels: Class ids (N,), ``ignore_index`` for rows to leave out.

        Returns:
            Scalar, in [0, 2] for ``ssnet``; 0, still on the graph, if no class takes part.

        Raises:
            ValueError: On wrong shapes; on the CPU also on unknown class ids or non-finite features.
        """
        checks.require_rows(features, class_labels, self.feature_dim)
        require_class_ids(class_labels, self.num_classes, self.ignore_index)
        with torch.autocast(features.device.type, enabled=False):
            vectors = self.known_rows(features, class_labels)
            member = losses.class_membership(class_labels, self.num_classes)  # (K, N)
            return self._contrastive(vectors, unit_vectors(vectors), class_labels, member)

    def losses_by_part(
        self, features: Tensor, groups: Tensor, parts: int = 1, margin: float = 1.0
    ) -> dict[str, Tensor]:
        """Losses of several sets of voxels against the memory as it is: each as if alone, then summed.

        Args:
            features: (S, E).
            groups: Class id + K * part (S,), parts 0..P-1; ``ignore_index`` for rows to leave out.
            parts: Number of sets P, such as labelled and pseudo-labelled voxels.
            margin: As in ``update_and_compute_loss``, whose raw losses and errors these are.
        """
        checks.require_rows(features, groups, self.feature_dim)
        checks.require_loss_settings({}, margin)
        require_class_ids(groups, parts * self.num_classes, self.ignore_index)
        unknown = (groups < 0) | (groups >= parts * self.num_classes)
        class_labels = (groups % self.num_classes).masked_fill(unknown, self.ignore_index)
        with torch.autocast(features.device.type, enabled=False):
            vectors = self.known_rows(features, class_labels)
            member = losses.class_membership(groups, parts * self.num_classes).unflatten(0, (parts, self.num_classes))
            units = unit_vectors(vectors)  # (S, E)
            prototypes, filled = self.prototypes()
            return {
                "contrastive_loss": self._contrastive(vectors, units, class_labels, member),
                "intra_loss": losses.intra_class_loss(units, prototypes, member, filled),
                "inter_loss": losses.inter_class_loss(units, member, margin),
            }

    def compare_and_store(
        self, features: Tensor, groups: Tensor, found: Sequence[Candidates], parts: int = 1, margin: float = 1.0
    ) -> dict[str, Tensor]:
        """``losses_by_part`` against the memory as it stood (empty classes are filled first), then ``store``."""
        for candidates in found:
            self.store(candidates, only_empty=True)
        raw = self.losses_by_part(features, groups, parts, margin)
        for candidates in found:
            self.store(candidates)
        return raw

    def update_and_compute_loss(
        self,
        features: Tensor,
        predictions: Tensor,
        labels: Tensor | None = None,
        is_labeled: bool = True,
        contrastive_weight: float = 1.0,
        intra_weight: float = 0.1,
        inter_weight: float = 0.1,
        margin: float = 1.0,
        memory_features: Tensor | None = None,
        update: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare a batch with the memory as it stood before, then store the batch's best voxels.

        Labelled voxels enter the loss with their label; those predicted correctly and above the confidence
        threshold may be stored. Unlabelled voxels enter both with their predicted class, if above the threshold.
        A class whose memory is empty is filled from this batch first. About ``samples_per_class`` voxels per class
        are drawn, features of no other voxel are read; (N, E) input of up to K times that many rows is taken whole.
        With several ranks this is a collective call, unless ``update`` is off.

        Args:
            features: (B, E, X, Y, Z) or (N, E).
            predictions: Logits (B, K, X, Y, Z) or (N, K); no gradient flows into them.
            labels: Class ids (B, X, Y, Z) or (N,) if ``is_labeled``, else ``None``.
            is_labeled: Whether the batch comes with labels.
            contrastive_weight: Weight of the contrastive term in the returned loss.
            intra_weight: Weight of the pull to the class prototype.
            inter_weight: Weight of the push between class means.
            margin: Distance at which ``inter`` leaves two class means alone, in (0, 2].
            memory_features: What is stored, shaped like ``features``, such as the teacher's; default ``features``.
            update: ``False`` leaves the memory as it is, empty classes included.

        Returns:
            The weighted sum, and a dict of ``contrastive_loss``, ``intra_loss``, ``inter_loss`` (without weights)
            and ``total_prototype_loss`` (the weighted sum), all scalars on the graph.

        Raises:
            ValueError: On wrong shapes, weights or margin; on the CPU also on unknown class ids or non-finite features.
        """
        weights = {"contrastive_loss": contrastive_weight, "intra_loss": intra_weight, "inter_loss": inter_weight}
        checks.require_loss_settings(weights, margin)
        checks.require_label_source(labels, is_labeled)
        given = {"labels": labels, "memory_features": memory_features}
        checks.require_devices(self.memory, features=features, predictions=predictions, **given)
        checks.require_batch(features, predictions, labels, memory_features, (self.feature_dim, self.num_classes))
        checks.require_logits(predictions)
        with torch.autocast(features.device.type, enabled=False):
            if labels is None:
                labels = pseudo_labels(predictions).gated(self.confidence_threshold, self.ignore_index)
            stored = features if memory_features is None else memory_features
            if features.ndim > 2 or len(features) > self.num_classes * self.samples_per_class:
                positions, labels = self.sample_positions(labels)
                features, stored, predictions = (pick_voxels(x, positions) for x in (features, stored, predictions))
            require_class_ids(labels, self.num_classes, self.ignore_index)
            found = [self.candidates(stored, predictions, labels.long(), is_labeled)] if update else []
            parts = self.compare_and_store(features, labels.long(), found, margin=margin)
            total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return total, {**parts, "total_prototype_loss": total}

    def _rank(
        self, vectors: Tensor, labels: Tensor, confidences: Tensor, from_labeled: bool, drawn: Tensor | None = None
    ) -> Candidates:
        """Best M vectors per class over all ranks, from (N, E), (N,), (N,); ``drawn`` as keys of ``candidates``."""
        keys = confidences
        if self.ranking == "random":
            keys = torch.rand_like(confidences) if drawn is None else drawn
        elif self.feature_selectors is not None and self.ranking != "confidence":
            keys = losses.own_class_logits(self.feature_selectors, vectors, labels)
        keys = -keys if self.ranking == "lowest" else keys
        return Candidates(*best_of_ranks(vectors, labels, keys, self.memory.shape), from_labeled)

    def _contrastive(self, vectors: Tensor, units: Tensor, class_labels: Tensor, member: Tensor) -> Tensor:
        """The contrastive term of voxels (S, E), their directions, class ids (S,) and groups (P, K, S)."""
        memory, used = self.snapshot()
        feature_logits, memory_logits = vectors.new_zeros(vectors.shape[0]), memory.new_zeros(used.shape)
        if self.feature_selectors is not None and self.memory_selectors is not None:
            feature_logits = losses.own_class_logits(self.feature_selectors, vectors.detach(), class_labels)
            memory_logits = losses.memory_logits(self.memory_selectors, memory)
        feature_weights = losses.score_weights(feature_logits, member)  # (P, K, S)
        memory_weights = losses.score_weights(memory_logits, used)  # (K, M)
        taking_part = member.any(dim=-1) & (self.memory_count > 0)  # (P, K)
        if self.prototype_loss == "ssnet":
            return losses.class_to_class_loss(units, feature_weights, memory, memory_weights, taking_part)
        similarities = forms.class_similarities(self.prototype_loss, units, memory, memory_weights)
        return forms.class_contrast(similarities, class_labels, feature_weights, taking_part)
