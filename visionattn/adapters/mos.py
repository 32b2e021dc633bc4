"""Adapters of a class-incremental training: one for each step of classes, beside one frozen backbone.

Paper: "MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning" (AAAI 2025). Official code:
sun-hailong/AAAI25-MOS, without a licence.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ._adapter import Adapter
from ._places import find_blocks

__all__ = ["StepAdapters", "pulled"]

DROPOUT = 0.1
LAYERS = ("down", "up")


class StepAdapters(Adapter):
    """In each block a bottleneck in parallel to the MLP, in training, and a stored copy of it for each step.

    A block adds ``up(Dropout(ReLU(down(x))))`` of the tokens that enter its MLP's branch, before the norm. At first
    nothing is added: ``up`` is zero.

    Args:
        steps: Number of steps; 0 for a plain adapter.
        dim: Width of the bottleneck.

    Attributes:
        layers: A bottleneck for each block.
        chosen: Whose weights work: None for those in training, a step, or the step of each image ``[B]``.

    Raises:
        ValueError: There are no such steps or width.
    """

    summary = "bottlenecks in parallel to the MLPs; in incremental training a stored set for each step"

    def __init__(self, steps: int = 0, dim: int = 16):
        super().__init__(steps=steps, dim=dim)
        if steps < 0 or dim < 1:
            raise ValueError(f"steps must not be negative and dim be at least 1, got {steps} and {dim}")
        self.layers = nn.ModuleList()
        self.chosen: Tensor | int | None = None

    def inject(self, backbone: Any) -> None:
        """A bottleneck for each block."""
        dd: Any = {"device": next(backbone.parameters()).device}
        for block in find_blocks(backbone):
            layer = StepBottleneck(block.width, self.options["dim"], self.options["steps"], **dd)
            self.on_branch(block, "mlp", partial(self._beside, layer))
            self.layers.append(layer)

    @contextmanager
    def using(self, step: Tensor | int | None) -> Iterator[None]:
        """Within the context a step's stored weights work, or those of each image's step ``[B]`` (:attr:`chosen`)."""
        before, self.chosen = self.chosen, step
        try:
            yield
        finally:
            self.chosen = before

    def store(self, step: int) -> None:
        """Keeps the weights in training as those of a step."""
        for layer in self._bottlenecks():
            layer.store(step)

    @torch.no_grad()
    def pull(self, step: int, momentum: float) -> None:
        """Moves the weights in training towards the mean of those of the steps before ``step``, by ``momentum``."""
        for layer in self._bottlenecks():
            for current, stored in layer.pairs():
                current.copy_(pulled(current, stored[:step], momentum))

    def _bottlenecks(self) -> list["StepBottleneck"]:
        return [layer for layer in self.layers if isinstance(layer, StepBottleneck)]

    def _beside(self, layer: "StepBottleneck", x: Tensor, branch: Tensor) -> Tensor:
        return branch + layer(x, self.chosen)


class StepBottleneck(nn.Module):
    """One block's part of :class:`StepAdapters`.

    Args:
        width: Channels of the tokens.
        dim: Width of the bottleneck.
        steps: Number of steps.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, width: int, dim: int, steps: int, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.down, self.up = nn.Linear(width, dim, **dd), nn.Linear(dim, width, **dd)
        for weights in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(weights)
        self.drop = nn.Dropout(DROPOUT)
        for layer in LAYERS:
            for name, weights in getattr(self, layer).named_parameters():
                self.register_buffer(f"{layer}_{name}", weights.detach().new_zeros(steps, *weights.shape))

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weight and bias of down, then of up: the tensor in training and the stored ones ``[steps, ...]``."""
        for layer in LAYERS:
            for name, weights in getattr(self, layer).named_parameters():
                yield weights, getattr(self, f"{layer}_{name}")

    @torch.no_grad()
    def store(self, step: int) -> None:
        """Keeps the weights in training as those of a step."""
        for current, stored in self.pairs():
            stored[step] = current

    def forward(self, x: Tensor, chosen: Tensor | int | None) -> Tensor:
        """What is added, of tokens ``[B, ..., width]``, in their shape.

        Raises:
            ValueError: Steps are given for each image, and the tokens are not in a batch of as many.
        """
        if chosen is None:
            return self.up(self.drop(self.down(x).relu()))
        stored = [stored[chosen] for _, stored in self.pairs()]
        if isinstance(chosen, int):
            return linear(linear(x, *stored[:2]).relu(), *stored[2:])
        if x.shape[0] != chosen.shape[0]:
            raise ValueError("the blocks of this model put the tokens of several images together or apart, so that no "
                             "adapter can be chosen for each image")
        down, down_bias, up, up_bias = (one.to(x.dtype) for one in stored)
        hidden = (x.flatten(1, -2) @ down.mT + down_bias[:, None]).relu()
        return (hidden @ up.mT + up_bias[:, None]).reshape(x.shape)


def pulled(current: Tensor, earlier: Tensor, momentum: float) -> Tensor:
    """``(1 - momentum) current + momentum mean(earlier)``: a moving average over the adapters ``[n, ...]`` of steps."""
    return torch.lerp(current, earlier.mean(dim=0), momentum)


adapter = StepAdapters
