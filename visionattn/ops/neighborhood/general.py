"""Neighborhood attention in tiles of queries with the halo of their keys, made of standard operators only.

Index tables, one per axis, gather tiles and halos; one masked attention per tile; the inverse tables. It runs on any
device, on one to three axes, is differentiable in every mode and any number of times, and its tables are computed from
the axis lengths, so that these may be symbolic in an exported graph.
"""
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import numbers

__all__ = ["run"]

_TILE = {1: 32, 2: 8, 3: 4}  # queries of a tile along each axis, by the number of axes


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel_size: tuple[int, ...],
        dilation: tuple[int, ...],
        stride: tuple[int, ...],
        is_causal: tuple[bool, ...],
        bias: Tensor | None,
        scale: float,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The public function with every argument explicit; returns the output and, if asked for, the log-sum-exp."""
    compute = torch.promote_types(q.dtype, torch.float32)
    (heads, kv_heads), lengths = numbers((q.shape[-2], k.shape[-2])), numbers(q.shape[1:-2])
    group = heads // kv_heads
    cuts = [
        _cut_axis(*options, tile=_TILE[q.ndim - 3], device=q.device)
        for options in zip(lengths, kernel_size, dilation, stride, is_causal, strict=True)
    ]
    # The query heads of a key head are more rows: [batch, tiles, key heads, group * queries, head_dim].
    queries = _gather(q.to(compute).unflatten(-2, (-1, group)) * scale, [cut.query for cut in cuts])
    queries = queries.permute(0, 1, 3, 4, 2, 5).flatten(3, 4)
    keys, values = (_gather(x.to(compute), [cut.key for cut in cuts]).transpose(2, 3) for x in (k, v))

    scores = (queries @ keys.transpose(-2, -1)).unflatten(3, (group, -1))
    if bias is not None:
        sizes = [2 * size - 1 for size in kernel_size]
        entry = _outer(torch.add, [cut.offset * math.prod(sizes[i + 1:]) for i, cut in enumerate(cuts)])
        scores = scores + bias.to(compute).flatten(1)[:, entry].transpose(0, 1).unflatten(1, (-1, group))
    valid = _outer(torch.logical_and, [cut.valid for cut in cuts])
    scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
    if additional_keys is not None and additional_values is not None:
        extra_keys, extra_values = (
            x.to(compute).transpose(1, 2).unsqueeze(1) for x in (additional_keys, additional_values))
        scores = torch.cat([scores, (queries @ extra_keys.transpose(-2, -1)).unflatten(3, (group, -1))], dim=-1)
        halo = keys.shape[3]
        weights = scores.softmax(dim=-1).flatten(3, 4)
        out = weights[..., :halo] @ values + weights[..., halo:] @ extra_values
    else:
        out = scores.softmax(dim=-1).flatten(3, 4) @ values
    out = _scatter(out.unflatten(3, (group, -1)).flatten(2, 3), cuts).to(q.dtype)
    lse = _scatter(scores.logsumexp(dim=-1, keepdim=True).flatten(2, 3), cuts).squeeze(-1) if return_lse else None
    return out, lse


class _Cut(NamedTuple):
    """One axis cut into tiles, residue class after residue class.

    Attributes:
        query: Position of each query ``[tiles, queries]``; padding repeats the last query of the class.
        key: Position of each key ``[tiles, halo]``, kept inside of the axis.
        valid: Whether the query sees the key ``[tiles, queries, halo]``.
        offset: Offset of the key from the query in units of dilation, plus ``kernel_size - 1``, same shape.
        inverse: Where the query of each position is in ``query``, flattened ``[length]``.
    """

    query: Tensor
    key: Tensor
    valid: Tensor
    offset: Tensor
    inverse: Tensor


def _cut_axis(
        length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool, tile: int, device: torch.device,
) -> _Cut:
    longest = (length + dilation - 1) // dilation
    halo = tile + kernel_size - 1 + stride - 1
    if isinstance(length, int):
        tile, halo = min(tile, longest), min(halo, longest)
    tiles = (longest + tile - 1) // tile
    if not isinstance(tiles, int):
        tiles = torch.sym_max(tiles, 2)  # torch.export takes a size that may be 1 for one that is always 1

    # Tables of [classes, tiles, ...] first, the two made one at the end.
    residue = torch.arange(dilation, device=device)[:, None, None]
    members = (length - residue + dilation - 1) // dilation
    first = torch.arange(tiles, device=device)[:, None] * tile
    index = torch.minimum(first + torch.arange(tile, device=device), members - 1)
    if is_causal:
        leader = torch.minimum(index // stride * stride + stride - 1, members - 1)
        start = (leader - kernel_size + 1).clamp(min=0)
        end = index + 1
    else:
        leader = torch.minimum(index // stride * stride + stride // 2, members - 1)
        start = torch.minimum((leader - kernel_size // 2).clamp(min=0), members - kernel_size)
        end = start + kernel_size
    key = start[..., :1] + torch.arange(halo, device=device)
    wide = key[..., None, :]
    valid = (wide >= start[..., None]) & (wide < end[..., None])
    offset = (wide - index[..., None] + kernel_size - 1).clamp(0, 2 * kernel_size - 2)
    position = torch.arange(length, device=device)
    own = position // dilation
    return _Cut(
        query=(index * dilation + residue).flatten(0, 1),
        key=(torch.minimum(key, members - 1) * dilation + residue).flatten(0, 1),
        valid=valid.flatten(0, 1),
        offset=offset.flatten(0, 1),
        inverse=(position % dilation * tiles + own // tile) * tile + own % tile,
    )


def _gather(x: Tensor, tables: list[Tensor]) -> Tensor:
    """``[batch, *spatial, ...]`` to ``[batch, tiles, tokens of a tile, ...]``."""
    axes = len(tables)
    for axis, table in enumerate(tables):
        x = x.index_select(1 + axis, table.flatten())
    for axis in reversed(range(axes)):
        x = x.unflatten(1 + axis, (-1, tables[axis].shape[1]))
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), *range(2 * axes + 1, x.ndim)]
    return x.permute(order).flatten(axes + 1, 2 * axes).flatten(1, axes)


def _scatter(x: Tensor, cuts: list[_Cut]) -> Tensor:
    """``[batch, tiles, heads, queries of a tile, dim]`` to ``[batch, *spatial, heads, dim]``."""
    axes = len(cuts)
    x = x.transpose(2, 3)
    x = x.unflatten(2, [cut.query.shape[1] for cut in cuts]).unflatten(1, [cut.query.shape[0] for cut in cuts])
    pairs = [dim for axis in range(axes) for dim in (1 + axis, 1 + axes + axis)]
    x = x.permute(0, *pairs, 2 * axes + 1, 2 * axes + 2)
    for axis, cut in enumerate(cuts):
        x = x.flatten(1 + axis, 2 + axis).index_select(1 + axis, cut.inverse)
    return x


def _outer(combine: Callable[[Tensor, Tensor], Tensor], tables: list[Tensor]) -> Tensor:
    """Combines tables ``[tiles, queries, keys]`` of the axes into one of their products, the last axis fastest."""

    def pair(a: Tensor, b: Tensor) -> Tensor:
        both = combine(a[:, None, :, None, :, None], b[None, :, None, :, None, :])
        return both.flatten(4, 5).flatten(2, 3).flatten(0, 1)

    return functools.reduce(pair, tables)
