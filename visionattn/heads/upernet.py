"""UPerNet (Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018) and its auxiliary FCN head.

Heads take a backbone's maps, finest first, and give logits at the resolution of the finest.
"""
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from .blocks import classifier, conv_norm_relu, init_convolutions, resize

__all__ = ["FCNHead", "PyramidPooling", "UPerNetHead"]


class UPerNetHead(nn.Module):
    """Pyramid pooling on the coarsest map, a top-down path through the others, and all levels fused at the finest.

    Works for any number of maps and any ratio between their sizes.

    Args:
        in_channels: Channels of the backbone's maps, finest first.
        num_classes: Channels of the logits.
        channels: Width of every convolution.
        pool_scales: Sides of the grids that the coarsest map is averaged to.
        dropout: Before the classifier.
    """

    def __init__(
            self,
            in_channels: Sequence[int],
            num_classes: int,
            channels: int = 512,
            pool_scales: Sequence[int] = (1, 2, 3, 6),
            dropout: float = 0.1,
    ):
        super().__init__()
        *finer, coarsest = in_channels
        self.pooling = PyramidPooling(coarsest, channels, pool_scales)
        self.lateral = nn.ModuleList(conv_norm_relu(width, channels, 1) for width in finer)
        self.smooth = nn.ModuleList(conv_norm_relu(channels, channels, 3) for _ in finer)
        self.fusion = conv_norm_relu(len(in_channels) * channels, channels, 3)
        self.classifier = classifier(channels, num_classes, dropout)
        init_convolutions(self)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits ``[B, num_classes, H, W]`` of maps ``[B, in_channels[i], H_i, W_i]``, at the size of the first."""
        *finer, coarsest = features
        levels = [self.pooling(coarsest)]
        for lateral, x in zip(reversed(self.lateral), reversed(finer), strict=True):
            levels.insert(0, lateral(x) + resize(levels[0], x.shape[-2:]))
        for i, smooth in enumerate(self.smooth):
            levels[i] = smooth(levels[i])
        x = torch.cat([resize(level, levels[0].shape[-2:]) for level in levels], dim=1)
        return self.classifier(self.fusion(x))


class PyramidPooling(nn.Module):
    """PSPNet's pyramid pooling: averages over grids, each through a convolution, beside the map itself.

    Args:
        in_channels: Channels of the map.
        channels: Channels of each grid's branch and of the output.
        scales: Sides of the grids.
    """

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int]):
        super().__init__()
        self.scales = tuple(scales)
        self.branches = nn.ModuleList(conv_norm_relu(in_channels, channels, 1) for _ in scales)
        self.fusion = conv_norm_relu(in_channels + len(self.scales) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, channels, H, W]`` of ``x [B, in_channels, H, W]``."""
        if self.training and len(x) == 1 and 1 in self.scales and isinstance(self.branches[0].norm, nn.BatchNorm2d):
            raise ValueError("UPerNet cannot train on a batch of one image: batch norm sees a single pixel where the "
                             "map is averaged to 1 x 1; use two images or more, or trainer.sync_batchnorm on several "
                             "devices")
        pool = _grid_means if torch.compiler.is_exporting() else adaptive_avg_pool2d
        pooled = [branch(pool(x, scale)) for scale, branch in zip(self.scales, self.branches, strict=True)]
        return self.fusion(torch.cat([x, *(resize(y, x.shape[-2:]) for y in pooled)], dim=1))


class FCNHead(nn.Module):
    """One 3 x 3 convolution and the classifier: the auxiliary head on the backbone's last but one map.

    Args:
        in_channels: Channels of the map.
        num_classes: Channels of the logits.
        channels: Width of the convolution.
        dropout: Before the classifier.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, dropout: float = 0.1):
        super().__init__()
        self.conv = conv_norm_relu(in_channels, channels, 3)
        self.classifier = classifier(channels, num_classes, dropout)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes, H, W]`` of ``x [B, in_channels, H, W]``."""
        return self.classifier(self.conv(x))


def _grid_means(x: Tensor, side: int) -> Tensor:
    """``adaptive_avg_pool2d(x, side)`` as products with matrices, which torch.export lets have any size."""
    rows, columns = (_shares(length, side).to(x) for length in x.shape[-2:])
    return rows @ x @ columns.mT


def _shares(length: int, side: int) -> Tensor:
    """What part each of ``length`` positions has in the means of ``side`` cells ``[side, length]``."""
    cell, place = torch.arange(side)[:, None], torch.arange(length)
    inside = (place >= cell * length // side) & (place < ((cell + 1) * length + side - 1) // side)
    return inside / inside.sum(dim=1, keepdim=True)
