"""A decoder of experts that every dense task assembles anew, with a memory beside the backbone, after TaskExpert.

It follows the idea of "TaskExpert: Dynamically Assembling Multi-Task Representations with Memorial Mixture-of-Experts"
(ICCV 2023) and is no reproduction: the authors' code was not to be had, and what the paper leaves open is ours.
"""
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from .blocks import classifier, conv_norm_relu, init_convolutions, resize

__all__ = ["Expertise", "TaskDecoder", "TaskExpertHead", "TaskExperts"]


class Expertise(NamedTuple):
    """What experts make of one map of the backbone's.

    Attributes:
        context: Mean of the map's tokens, ``[B, channels]``.
        features: Of each expert, ``[B, experts, width, h, w]``.
    """

    context: Tensor
    features: Tensor


class TaskExperts(nn.Module):
    """Experts on every map of a backbone: each takes a token to a feature that no task has of its own.

    Args:
        in_channels: Channels of the backbone's maps, finest first.
        channels: Width that the maps are brought to.
        experts: Experts of each map.
        width: Width of their features.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, experts: int, width: int):
        super().__init__()
        self.linear = nn.ModuleList(nn.Conv2d(dim, channels, 1) for dim in in_channels)
        self.experts = nn.ModuleList(nn.Conv2d(channels, experts * width, 1) for _ in in_channels)
        self.width = width

    def forward(self, features: Sequence[Tensor]) -> list[Expertise]:
        """Takes maps ``[B, in_channels[i], H_i, W_i]`` to what the experts make of each."""
        maps = [linear(x) for linear, x in zip(self.linear, features, strict=True)]
        return [Expertise(x.mean(dim=(2, 3)), gelu(experts(x)).unflatten(1, (-1, self.width)))
                for x, experts in zip(maps, self.experts, strict=True)]


class TaskDecoder(nn.Module):
    """What one task makes of the experts' features.

    At every map a gate, of the mean token and a learnt vector of the task, weighs the experts and the task's memory;
    what they sum up to is added to the memory, through a convolution of each channel, and taken along to the next map.
    The sums of all maps are brought to the size of the finest and added.

    Args:
        levels: Number of maps.
        channels: Width of their tokens.
        experts: Experts of each map.
        width: Width of their features.
        outputs: Channels of the result.
        dropout: Before the last layer.
    """

    def __init__(self, levels: int, channels: int, experts: int, width: int, outputs: int, dropout: float = 0.1):
        super().__init__()
        self.task = nn.Parameter(torch.zeros(channels))
        self.gates = nn.ModuleList(nn.Linear(channels, experts + 1) for _ in range(levels))
        self.updates = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(levels - 1))
        self.fusion = conv_norm_relu(width, channels, 3)
        self.classifier = classifier(channels, outputs, dropout)
        nn.init.trunc_normal_(self.task, std=0.02)
        init_convolutions(self.fusion)

    def forward(self, levels: Sequence[Expertise]) -> Tensor:
        """Takes what :class:`TaskExperts` gives to ``[B, outputs, H, W]`` at the size of the finest map."""
        size = levels[0].features.shape[-2:]
        memory, total = torch.zeros_like(levels[0].features[:, 0]), torch.zeros_like(levels[0].features[:, 0])
        for number, (level, gate) in enumerate(zip(levels, self.gates, strict=True)):
            memory = resize(memory, level.features.shape[-2:])
            weights = gate(level.context + self.task).float().softmax(dim=1).to(memory.dtype)
            found = torch.cat([level.features, memory[:, None]], dim=1)
            assembled = torch.einsum("bk,bkchw->bchw", weights, found)
            total = total + resize(assembled, size)
            if number < len(self.updates):
                memory = memory + self.updates[number](assembled)
        return self.classifier(self.fusion(total))


class TaskExpertHead(nn.Module):
    """The experts and the decoder of one task; others decode what :attr:`experts` gives by a :class:`TaskDecoder` each.

    Args:
        in_channels: Channels of the backbone's maps, finest first.
        outputs: Channels of the result.
        channels: Width of the tokens.
        experts: Experts of each map.
        reduction: How many times narrower their features are.
        dropout: Before the last layer.

    Raises:
        ValueError: ``reduction`` is larger than the width.
    """

    def __init__(
            self, in_channels: Sequence[int], outputs: int, channels: int = 256, experts: int = 4, reduction: int = 2,
            dropout: float = 0.1):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be 1 to {channels}, the width of the tokens, got {reduction}")
        self._sizes: dict[str, Any] = dict(
            levels=len(in_channels), channels=channels, experts=experts, width=channels // reduction, dropout=dropout)
        self.experts = TaskExperts(in_channels, channels, experts, channels // reduction)
        self.decoder = self.another(outputs)

    def another(self, outputs: int) -> TaskDecoder:
        """A decoder for one more task, with ``outputs`` channels, of the same experts."""
        return TaskDecoder(outputs=outputs, **self._sizes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Takes maps ``[B, in_channels[i], H_i, W_i]`` to ``[B, outputs, H, W]`` at the size of the first."""
        return self.decoder(self.experts(features))
