"""Projection and prediction heads of the prototype term, on sampled voxel features (N, E)."""

from __future__ import annotations

from torch import Tensor, nn


class FeatureHead(nn.Module):
    """Two-layer perceptron on single voxels: Linear, LayerNorm, LeakyReLU, Linear.

    Used twice, as in SS-Net (Wu et al. 2022, arXiv:2203.01324): a projection of decoder features, whose outputs
    fill the memory, and a prediction on top of it for the features that are compared with the memory.

    Args:
        in_dim: Width of the input features.
        out_dim: Width of the output, ``--embedding_dim``.

    Note:
        The published heads use batch normalisation. LayerNorm gives a voxel the same embedding whatever else is in
        the batch and on whichever rank, and works for a single voxel.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_dim, out_dim), nn.LayerNorm(out_dim), nn.LeakyReLU(0.2), nn.Linear(out_dim, out_dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map features (N, in_dim) to embeddings (N, out_dim)."""
        return self.layers(features)
