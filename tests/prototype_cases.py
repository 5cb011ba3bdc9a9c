"""What the tests of the prototype manager share: small managers, sure predictions, plain gradient descent."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from myutils.contrastive_prototype_manager import ContrastivePrototypeManager

K, E = 3, 4


def make_manager(**settings: object) -> ContrastivePrototypeManager:
    return ContrastivePrototypeManager(K, E, **{"elements_per_class": 5, **settings})


def sure_logits(classes: Tensor, confidence_logit: float = 10.0) -> Tensor:
    """Logits (N, K) that are sure of ``classes`` (N,)."""
    return confidence_logit * nn.functional.one_hot(classes.clamp(min=0), K).float()


def fill(manager: ContrastivePrototypeManager, count: int = 5) -> ContrastivePrototypeManager:
    manager.update_memory({k: torch.randn(count, E) for k in range(K)})
    return manager


@torch.no_grad()
def descend(parameters: Iterable[Tensor], rate: float) -> None:
    """One step of plain gradient descent."""
    for parameter in parameters:
        assert parameter.grad is not None
        parameter -= rate * parameter.grad


def naive_loss(manager: ContrastivePrototypeManager, features: Tensor, labels: Tensor) -> Tensor:
    """The definition as three loops, in the type of ``features``."""
    feature_selectors, memory_selectors = manager.get_selectors()
    per_class = []
    for k in range(K):
        rows = features[labels == k]
        held = manager.memory[k, : manager.memory_count[k]]
        if not len(rows) or not len(held):
            continue
        w, v = torch.ones(len(rows)).to(rows), torch.ones(len(held)).to(rows)
        if feature_selectors is not None and memory_selectors is not None:
            w = torch.sigmoid(feature_selectors[k](rows.detach()))[:, 0]
            v = torch.sigmoid(memory_selectors[k](held))[:, 0]
            w, v = w * len(w) / w.sum(), v * len(v) / v.sum()
        total = rows.new_zeros(())
        for i in range(len(rows)):
            for j in range(len(held)):
                cosine = rows[i] @ held[j] / (rows[i].norm() * held[j].norm())
                total = total + w[i] * v[j] * (1 - cosine)
        per_class.append(total / (len(rows) * len(held)))
    return torch.stack(per_class).mean()


class FirstEntry(nn.Module):
    """A selector whose logit is the vector's first entry."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(sign))

    def forward(self, vectors: Tensor) -> Tensor:
        return self.sign * vectors[:, :1]
