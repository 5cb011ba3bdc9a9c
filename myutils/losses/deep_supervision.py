"""Deep supervision: the decoder's coarser levels learn the labels too, through classifiers of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from myutils.losses.segmentation import soft_label_loss


class DeepSupervision(nn.Module):
    """A 1x1x1 classifier per coarse level; each learns the classes' shares of its voxels.

    The finest of them weighs 1/2, every coarser one half of the one before (Lee et al. 2015, arXiv:1409.5185; weights
    as in nnU-Net, not normalised). Its targets are averages of the labels, not every n-th label: at an eighth of the
    resolution thin structures would come and go.

    Args:
        widths: Feature channels of the levels, the coarsest first.
        num_classes: Classes K.

    Raises:
        ValueError: If the network has no coarse level.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        if not widths:
            raise ValueError(
                "--deep_supervision: this network's decoder has no coarser level; use --no-deep_supervision"
            )
        self.classifiers = nn.ModuleList(nn.Conv3d(width, num_classes, kernel_size=1) for width in widths)

    def forward(self, levels: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Weighted sum over the levels of soft cross-entropy and Dice, float32.

        Args:
            levels: Features (B, E_l, X_l, Y_l, Z_l) of each level, the coarsest first.
            targets: Class indicators (B, K, X, Y, Z) at full size, 0 for all classes where a voxel has no label.
        """
        losses = []
        for depth, (classify, features) in enumerate(zip(self.classifiers, levels, strict=True)):
            x, y, z = features.shape[2:]
            shares = functional.adaptive_avg_pool3d(targets, (x, y, z))
            loss = soft_label_loss(classify(features), shares, shares.sum(1), partial=True)
            losses.append(loss * 0.5 ** (len(levels) - depth))
        return torch.stack(losses).sum()
