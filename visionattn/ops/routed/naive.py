"""Routed attention as its definition says: copy the listed key regions for every query region, then softmax.

This form is the truth that every other backend is compared with. It copies keys and values ``topk`` times.
"""
import math

import torch
from torch import Tensor

__all__ = ["backward_flops", "flops", "merge_regions", "run", "split_regions"]


def split_regions(x: Tensor, region_size: tuple[int, int]) -> Tensor:
    """``[batch, height, width, heads, dim]`` to ``[batch, heads, regions, tokens, dim]``, rows first everywhere."""
    height, width = x.shape[1:3]
    rows, columns = region_size
    x = x.unflatten(2, (width // columns, columns)).unflatten(1, (height // rows, rows))
    return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)


def merge_regions(x: Tensor, region_size: tuple[int, int], height: int, width: int) -> Tensor:
    """The inverse of :func:`split_regions`."""
    rows, columns = region_size
    x = x.unflatten(3, (rows, columns)).unflatten(2, (height // rows, width // columns))
    return x.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        region_size: tuple[int, int],
        key_region_size: tuple[int, int],
        scale: float,
        route_weights: Tensor | None,
) -> Tensor:
    """The public function with every argument explicit."""
    dtype, height, width = q.dtype, q.shape[1], q.shape[2]
    compute = torch.promote_types(dtype, torch.float32)
    q = split_regions(q.to(compute), region_size) * scale
    k = split_regions(k.to(compute), key_region_size)
    v = split_regions(v.to(compute), key_region_size)
    batch, heads = q.shape[:2]
    pick = (torch.arange(batch, device=q.device)[:, None, None, None],
            torch.arange(heads, device=q.device)[:, None, None], routes.long())
    k, v = k[pick], v[pick]  # [batch, heads, regions, topk, tokens, dim]
    if route_weights is not None:
        weights = route_weights.to(compute)[..., None, None]
        k, v = k * weights, v * weights
    attention = (q @ k.flatten(3, 4).transpose(-2, -1)).softmax(dim=-1)
    return merge_regions(attention @ v.flatten(3, 4), region_size, height, width).to(dtype)


def flops(q_shape, v_shape, routes_shape, key_region_size) -> int:
    """Floating point operations of the products forward, by the shapes of q, v and routes."""
    return 2 * _pairs(q_shape, routes_shape, key_region_size) * (q_shape[-1] + v_shape[-1])


def backward_flops(q_shape, v_shape, routes_shape, key_region_size) -> int:
    """The same of a backward pass that computes the scores again: five products."""
    return 2 * _pairs(q_shape, routes_shape, key_region_size) * (3 * q_shape[-1] + 2 * v_shape[-1])


def _pairs(q_shape, routes_shape, key_region_size) -> int:
    """Number of query-key pairs."""
    return math.prod(q_shape[:-1]) * routes_shape[-1] * math.prod(key_region_size)
