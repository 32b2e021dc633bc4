"""Neighborhood attention in tiles of queries with the halo of their keys, made of standard operators only.

Index tables, one per axis, gather tiles and halos; one masked attention per tile; the inverse tables. It runs on any
device, on one to three axes, is differentiable in every mode and any number of times, and its tables are computed from
the axis lengths, so that these may be symbolic in an exported graph.
"""
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..dispatch import numbers, untraced

__all__ = ["axis_tables", "run"]

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
        _cut_axis(*options, tile=_TILE[q.ndim - 3], offsets=bias is not None, device=q.device)
        for options in zip(lengths, kernel_size, dilation, stride, is_causal, strict=True)
    ]
    # The query heads of a key head are more rows: [batch, tiles, key heads, group * queries, head_dim].
    queries = _gather(_in(q, compute) * scale, [cut.query for cut in cuts])
    queries = queries.unflatten(3, (-1, group)).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)
    keys, values = (_gather(_in(x, compute), [cut.key for cut in cuts]).transpose(2, 3) for x in (k, v))

    scores = (queries @ keys.transpose(-2, -1)).unflatten(3, (group, -1))
    if bias is not None:
        sizes = [2 * size - 1 for size in kernel_size]
        entry = _outer(torch.add, [
            cut.offset * math.prod(sizes[i + 1:]) for i, cut in enumerate(cuts) if cut.offset is not None])
        scores = scores + _in(bias, compute).flatten(1)[:, entry].transpose(0, 1).unflatten(1, (-1, group))
    valid = _outer(torch.logical_and, [cut.valid for cut in cuts])
    scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
    if additional_keys is not None and additional_values is not None:
        extra_keys, extra_values = (
            _in(x, compute).transpose(1, 2).unsqueeze(1) for x in (additional_keys, additional_values))
        scores = torch.cat([scores, (queries @ extra_keys.transpose(-2, -1)).unflatten(3, (group, -1))], dim=-1)
        halo = keys.shape[3]
        weights = scores.softmax(dim=-1).flatten(3, 4)
        out = weights[..., :halo] @ values + weights[..., halo:] @ extra_values
    else:
        out = scores.softmax(dim=-1).flatten(3, 4) @ values
    out = _in(_scatter(out.unflatten(3, (group, -1)).flatten(2, 3), cuts), q.dtype)
    lse = _scatter(scores.logsumexp(dim=-1, keepdim=True).flatten(2, 3), cuts).squeeze(-1) if return_lse else None
    return out, lse


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # which a graph would hold even where it does nothing


class _Cut(NamedTuple):
    """One axis cut into tiles, residue class after residue class.

    Attributes:
        query: Position of each query ``[tiles, queries]``; padding repeats the last query of the class.
        key: Position of each key ``[tiles, halo]``, kept inside of the axis.
        valid: Whether the query sees the key ``[tiles, queries, halo]``.
        offset: Offset of the key from the query in units of dilation, plus ``kernel_size - 1``, same shape; None where
            it is not asked for, as a graph would hold it even where it is not used.
        inverse: Where the query of each position is in ``query``, flattened ``[length]``.
    """

    query: Tensor
    key: Tensor
    valid: Tensor
    offset: Tensor | None
    inverse: Tensor


def _cut_axis(
        length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool, tile: int, offsets: bool,
        device: torch.device,
) -> _Cut:
    longest = (length + dilation - 1) // dilation
    halo = tile + kernel_size - 1 + stride - 1
    if isinstance(length, int):
        # The tables are numbers, which a graph holds as they are.
        tile, halo = min(tile, longest), min(halo, longest)
        with untraced():
            tables = axis_tables(
                np, length, kernel_size, dilation, stride, is_causal, tile, halo, -(-longest // tile), offsets)
            tensors: Any = (None if table is None else _on(device, torch.from_numpy(table)) for table in tables)
            return _Cut(*tensors)
    # torch.export takes a size that may be 1 for one that is always 1.
    tiles = torch.sym_max((longest + tile - 1) // tile, 2)
    with device:
        return _Cut(*axis_tables(torch, length, kernel_size, dilation, stride, is_causal, tile, halo, tiles, offsets))


def _on(device: torch.device, table: Tensor) -> Tensor:
    return table if device.type == "cpu" else table.to(device)  # which a graph would hold even where it does nothing


def axis_tables(
        lib: Any, length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool, tile: int, halo: int,
        tiles: int, offsets: bool,
) -> tuple[Any, ...]:
    """The fields of a :class:`_Cut`, as arrays of ``lib``: NumPy, or PyTorch where the length is a symbol."""
    # Tables of [classes, tiles, ...] first, the two made one at the end.
    residue = lib.arange(dilation)[:, None, None]
    members = (length - residue + dilation - 1) // dilation
    first = lib.arange(tiles)[:, None] * tile
    index = lib.minimum(first + lib.arange(tile), members - 1)
    if is_causal:
        leader = lib.minimum(index // stride * stride + stride - 1, members - 1)
        start = (leader - kernel_size + 1).clip(min=0)
        end = index + 1
    else:
        leader = lib.minimum(index // stride * stride + stride // 2, members - 1)
        start = lib.minimum((leader - kernel_size // 2).clip(min=0), members - kernel_size)
        end = start + kernel_size
    key = start[..., :1] + lib.arange(halo)
    wide = key[..., None, :]
    valid = (wide >= start[..., None]) & (wide < end[..., None])
    offset = None
    if offsets:
        offset = (wide - index[..., None] + kernel_size - 1).clip(0, 2 * kernel_size - 2).reshape(-1, tile, halo)
    position = lib.arange(length)
    own = position // dilation
    return (
        (index * dilation + residue).reshape(-1, tile),
        (lib.minimum(key, members - 1) * dilation + residue).reshape(-1, halo),
        valid.reshape(-1, tile, halo),
        offset,
        (position % dilation * tiles + own // tile) * tile + own % tile,
    )


def _gather(x: Tensor, tables: list[Tensor]) -> Tensor:
    """``[batch, *spatial, ...]`` to ``[batch, tiles, tokens of a tile, ...]``."""
    axes, rest = len(tables), x.shape[1 + len(tables):]
    for axis, table in enumerate(tables):
        x = x.index_select(1 + axis, table.flatten())
    x = x.reshape(x.shape[0], *(size for table in tables for size in table.shape), *rest)
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), *range(2 * axes + 1, x.ndim)]
    # The number of tiles is said: of free lengths, PyTorch would find it by long divisions of formulas.
    tiles, tokens = (math.prod([table.shape[axis] for table in tables]) for axis in range(2))
    return x.permute(order).reshape(x.shape[0], tiles, tokens, *rest)


def _scatter(x: Tensor, cuts: list[_Cut]) -> Tensor:
    """``[batch, tiles, heads, queries of a tile, dim]`` to ``[batch, *spatial, heads, dim]``."""
    axes = len(cuts)
    tiles, queries = zip(*(cut.query.shape for cut in cuts), strict=True)
    x = x.transpose(2, 3)
    x = x.reshape(x.shape[0], *tiles, *queries, *x.shape[3:])
    pairs = [dim for axis in range(axes) for dim in (1 + axis, 1 + axes + axis)]
    x = x.permute(0, *pairs, 2 * axes + 1, 2 * axes + 2)
    for axis, cut in enumerate(cuts):
        x = x.flatten(1 + axis, 2 + axis).index_select(1 + axis, cut.inverse)
    return x


def _outer(combine: Callable[[Tensor, Tensor], Tensor], tables: list[Tensor]) -> Tensor:
    """Combines tables ``[tiles, queries, keys]`` of the axes into one of their products, the last axis fastest."""

    def pair(a: Tensor, b: Tensor) -> Tensor:
        both = combine(_spread(a, 0), _spread(b, 1))
        return both.reshape(-1, *(m * n for m, n in zip(a.shape[1:], b.shape[1:], strict=True)))

    return functools.reduce(pair, tables)


def _spread(table: Tensor, place: int) -> Tensor:
    """``[a, b, c]`` with an axis of length 1 after each axis (``place`` 0) or before it (1)."""
    _, queries, keys = table.shape
    return table.reshape([(-1, 1, queries, 1, keys, 1), (1, -1, 1, queries, 1, keys)][place])
