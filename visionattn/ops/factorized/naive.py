"""Factorized attention as its definition says: padding, tiles, their mean, a softmax.

This form is the truth that every other backend is compared with.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import numbers

__all__ = ["run"]


def run(q: Tensor, k: Tensor, v: Tensor, window: int, dilations: tuple[int, ...], scale: float) -> Tensor:
    """The public function with every argument explicit."""
    dtype = q.dtype
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    outputs = []
    for queries, keys, values, dilation in zip(*(x.chunk(len(dilations), dim=3) for x in (q, k, v)), dilations,
                                               strict=True):
        keys, values = _merge(keys, window, dilation), _merge(values, window, dilation)
        weights = (scale * torch.einsum("byxhd,bphd->byxhp", queries, keys)).softmax(dim=-1)
        outputs.append(torch.einsum("byxhp,bphd->byxhd", weights, values))
    return torch.cat(outputs, dim=3).to(dtype)


def _merge(x: Tensor, window: int, dilation: int) -> Tensor:
    """``[batch, height, width, heads, dim]`` to ``[batch, window ** 2, heads, dim]``."""
    side = (window - 1) * dilation + 1
    heads, dim = numbers(x.shape[3:])
    x = x.flatten(3).permute(0, 3, 1, 2)
    for axis in (2, 3):
        x = _reflect(x, axis, -numbers(x.shape)[axis] % side)
    tiles = F.unfold(x, window, dilation=dilation, stride=side)  # [batch, heads * dim * window ** 2, tiles]
    return tiles.unflatten(1, (heads, dim, window ** 2)).mean(dim=-1).permute(0, 3, 1, 2)


def _reflect(x: Tensor, axis: int, missing: int) -> Tensor:
    """Reflects a map ``[batch, channels, height, width]`` at its end, a whole length at most at a time."""
    while missing > 0:
        length, = numbers(x.shape[axis:axis + 1])
        if length == 1:
            return x.repeat_interleave(missing + 1, dim=axis)
        step = min(missing, length - 1)
        x = F.pad(x, (0, 0, 0, step) if axis == 2 else (0, step, 0, 0), mode="reflect")
        missing -= step
    return x
