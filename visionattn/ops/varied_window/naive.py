"""Varied-size window attention as its definition says: the truth that other backends are compared with."""
import torch
from torch import Tensor

from ..dispatch import numbers
from .windows import cut, join, pair_bias, places

__all__ = ["interpolate", "run"]


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offset: Tensor,
        stretch: Tensor,
        window: tuple[int, int],
        bias: Tensor | None,
        scale: float,
) -> Tensor:
    """The public function with every argument explicit."""
    dtype, grid = q.dtype, numbers(offset.shape[1:3])
    compute = torch.promote_types(dtype, torch.float32)
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    x, y = places(offset, stretch, window, compute)
    k, v = interpolate(k, x, y), interpolate(v, x, y)
    scores = scale * cut(q, grid, window) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + pair_bias(bias.to(compute), window)[:, None]
    return join(scores.softmax(dim=-1) @ v, grid, window).to(dtype)


def interpolate(tokens: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Linear interpolation of a map ``[batch, height, width, heads, dim]``, zero outside, at ``[batch, heads, ...]``.

    Made of operators that can be differentiated any number of times, unlike ``grid_sample``.
    """
    height, width = numbers(tokens.shape[1:3])
    tokens = tokens.permute(0, 3, 1, 2, 4).flatten(2, 3)
    left, top = x.detach().floor(), y.detach().floor()
    right_share, low_share = x - left, y - top
    out = tokens.new_zeros(())
    for column, column_share in ((left, 1 - right_share), (left + 1, right_share)):
        for row, row_share in ((top, 1 - low_share), (top + 1, low_share)):
            inside = (column >= 0) & (column <= width - 1) & (row >= 0) & (row <= height - 1)
            # Of places that are outside no index is made: they may be too far for one, or not even numbers.
            index = torch.where(inside, row * width + column, 0).long().flatten(2)
            corner = tokens.gather(2, index[..., None].expand(-1, -1, -1, tokens.shape[-1])).unflatten(2, x.shape[2:])
            out = out + torch.where(inside[..., None], corner, 0) * (column_share * row_share)[..., None]
    return out
