"""Neighborhood attention of one map size in an exported graph: few operators, that runtimes run fast.

What follows from the map's size is constants: which tokens are a tile of queries, which are its keys (the halo), and
what is added to their scores (mask and bias, which runtimes fold when they load a file). There remain a gather for keys
and values each, two batched matrix products and one softmax. A residue class, or a whole map, that is hardly larger
than a window is one tile: dense attention. Where tiles and classes divide the map evenly it is reshaped, not gathered.
Maps whose size a graph leaves free are in :mod:`.general`.
"""
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import numbers, untraced
from .general import axis_tables

__all__ = ["run"]

_LEAST, _MOST = 4, 64  # queries of a tile along an axis, but for the whole axis
_MASKED = -1e30  # finite, as a converted file may hold it in another type, where infinities are not safe


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
    with untraced():
        cut = _cut(lengths, kernel_size, dilation, stride, is_causal)
    group = heads // kv_heads
    queries = _split(_in(q, compute), cut.query, cut.grid, q.device)  # [batch, heads, (tiles,) queries, head_dim]
    even = cut.grid if cut.key is cut.query else None
    keys, values = (_split(_in(x, compute), cut.key, even, q.device) for x in (k, v))
    if group > 1:
        queries = queries.unflatten(1, (kv_heads, group))
        keys, values = keys.unsqueeze(2), values.unsqueeze(2)
    scores = (queries * scale) @ keys.transpose(-2, -1)
    added = _added(cut, None if bias is None else _in(bias, compute), compute, q.device)
    if added is not None:
        scores = scores + (added if group == 1 else added.unflatten(0, (-1, group if bias is not None else 1)))
    if additional_keys is not None and additional_values is not None:
        extra_keys, extra_values = (_in(x, compute).transpose(1, 2) for x in (additional_keys, additional_values))
        for place in range(2, scores.ndim - 2):
            extra_keys, extra_values = extra_keys.unsqueeze(place), extra_values.unsqueeze(place)
        scores = torch.cat([scores, (queries * scale) @ extra_keys.transpose(-2, -1)], dim=-1)
        halo = keys.shape[-2]
        weights = scores.softmax(dim=-1)
        out = weights[..., :halo] @ values + weights[..., halo:] @ extra_values
    else:
        out = scores.softmax(dim=-1) @ values
    lse = scores.logsumexp(dim=-1, keepdim=True) if return_lse else None
    if group > 1:
        out, lse = out.flatten(1, 2), None if lse is None else lse.flatten(1, 2)
    out = _in(_join(out, cut, lengths), q.dtype)
    return out, None if lse is None else _join(lse, cut, lengths).squeeze(-1)


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # which a graph would hold even where it does nothing


_Grid = tuple[tuple[int, int, int], ...]  # tiles, queries, residue classes of each axis


class _Cut(NamedTuple):
    """A map cut into tiles.

    Attributes:
        query: Token of each query ``[tiles, queries]``; padding repeats a query.
        key: Token of each key ``[tiles, keys]``; the array ``query`` itself if tiles are their own keys.
        grid: Given where tiles and classes are even, so that the map reshaped and permuted is its tiles.
        inverse: Where each token is among the queries.
        entry: Of each kind of tile, the entry of the flattened bias table for every pair ``[kinds, queries, keys]``;
            the number of entries for a masked pair.
        kind: The kind of each tile.
        entries: Number of entries of a bias table.
    """

    query: np.ndarray
    key: np.ndarray
    grid: _Grid | None
    inverse: np.ndarray
    entry: np.ndarray
    kind: np.ndarray
    entries: int


@functools.lru_cache(maxsize=64)
def _cut(
        lengths: tuple[int, ...], kernel_size: tuple[int, ...], dilation: tuple[int, ...], stride: tuple[int, ...],
        is_causal: tuple[bool, ...],
) -> _Cut:
    axes = list(zip(lengths, kernel_size, dilation, stride, is_causal, strict=True))
    best = min(itertools.product(*(_candidates(*axis) for axis in axes)), key=_cost)
    query = key = inverse = np.zeros((1, 1), int)
    kind, entry, entries = np.zeros(1, int), np.zeros((1, 1, 1), int), 1
    masked = np.zeros((1, 1, 1), bool)
    for axis, length, kernel in zip(best, lengths, kernel_size, strict=True):
        query = _outer(query * length, axis.query)
        key = _outer(key * length, axis.key)
        # Of a flat place (tile, query) of all axes.
        tile, place = np.divmod(inverse, query.shape[1] // axis.query.shape[1])
        own_tile, own_place = np.divmod(axis.inverse, axis.query.shape[1])
        inverse = ((tile[..., None] * len(axis.query) + own_tile) * query.shape[1]
                   + place[..., None] * axis.query.shape[1] + own_place).reshape(1, -1)
        width = 2 * kernel - 1
        kind = (kind[:, None] * len(axis.offset) + axis.kind).reshape(-1)
        entry = _outer(entry * width, np.maximum(axis.offset, 0))
        masked = ~_outer(~masked, axis.offset >= 0, np.logical_and)
        entries *= width
    entry = np.where(masked, entries, entry)
    grid = None
    if all(axis.even for axis in best):
        grid = tuple(
            (len(axis.query) // dil, axis.query.shape[1], dil) for axis, dil in zip(best, dilation, strict=True))
    if np.array_equal(query, key):
        key = query
    return _Cut(query, key, grid, inverse.reshape(-1), entry, kind, entries)


class _Axis(NamedTuple):
    """One axis cut into tiles, residue class after residue class; ``offset`` is that of the kinds, -1 if masked."""

    query: np.ndarray
    key: np.ndarray
    offset: np.ndarray
    kind: np.ndarray
    inverse: np.ndarray
    even: bool


@functools.lru_cache(maxsize=256)
def _candidates(length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool) -> list[_Axis]:
    """The axis in tiles of every size worth considering."""
    longest = -(-length // dilation)
    parts = (-(-longest // parts) for parts in range(2, longest // _LEAST + 1))
    sizes = {longest, *(size for size in parts if _LEAST <= size <= _MOST)}
    return [_cut_axis(length, kernel_size, dilation, stride, is_causal, size) for size in sorted(sizes)]


def _cut_axis(length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool, tile: int) -> _Axis:
    longest = -(-length // dilation)
    halo = min(tile + kernel_size - 1 + stride - 1, longest)
    query, key, valid, offset, inverse = axis_tables(
        np, length, kernel_size, dilation, stride, is_causal, tile, halo, -(-longest // tile), True)
    needed = int(valid.any((0, 1)).nonzero()[0].max()) + 1
    offset = np.where(valid, offset, -1)[..., :needed]
    kinds, kind = np.unique(offset, axis=0, return_inverse=True)
    return _Axis(query, key[:, :needed], kinds, kind.reshape(-1), inverse, length % (dilation * tile) == 0)


def _cost(axes: Sequence[_Axis]) -> float:
    """Estimated work: scores, of which small products have fewer a second, and copied keys and values (measured)."""
    tiles, queries, keys = (
        math.prod(sizes) for sizes in zip(*((*axis.query.shape, axis.key.shape[1]) for axis in axes), strict=True))
    return tiles * keys * (queries + 8 + 24 * queries / keys + 20)


def _outer(a: np.ndarray, b: np.ndarray, combine: Any = np.add) -> np.ndarray:
    """Combines tables of two axes into one of their products, the last axis fastest."""
    left = a.reshape([size for length in a.shape for size in (length, 1)])
    right = b.reshape([size for length in b.shape for size in (1, length)])
    return combine(left, right).reshape([m * n for m, n in zip(a.shape, b.shape, strict=True)])


def _constant(table: np.ndarray, device: torch.device) -> Tensor:
    with untraced():
        tensor = torch.from_numpy(np.ascontiguousarray(table))
        return tensor if device.type == "cpu" else tensor.to(device)


def _split(x: Tensor, table: np.ndarray, grid: _Grid | None, device: torch.device) -> Tensor:
    """``[batch, *spatial, heads, dim]`` to ``[batch, heads, (tiles,) tokens of a tile, dim]``."""
    shape = table.shape if len(table) > 1 else table.shape[1:]
    if grid is None:
        x = x.flatten(1, -3).transpose(1, 2).index_select(2, _constant(table.reshape(-1), device))
    else:
        sizes, order = _order(grid)
        x = x.reshape(x.shape[0], *sizes, *x.shape[-2:])
        x = x.permute(0, x.ndim - 2, *(1 + place for place in order), x.ndim - 1)
    return x.reshape(x.shape[0], x.shape[1], *shape, x.shape[-1])


def _join(x: Tensor, cut: _Cut, lengths: Sequence[int]) -> Tensor:
    """``[batch, heads, (tiles,) queries, dim]`` to ``[batch, *spatial, heads, dim]``."""
    if cut.grid is None:
        x = x.reshape(x.shape[0], x.shape[1], -1, x.shape[-1]).index_select(2, _constant(cut.inverse, x.device))
        x = x.transpose(1, 2)
    else:
        sizes, order = _order(cut.grid)
        x = x.reshape(x.shape[0], x.shape[1], *(sizes[place] for place in order), x.shape[-1])
        x = x.permute(0, *(2 + order.index(place) for place in range(len(order))), 1, x.ndim - 1)
    return x.reshape(x.shape[0], *lengths, *x.shape[-2:])


def _order(grid: _Grid) -> tuple[list[int], list[int]]:
    """Lengths of a map reshaped by its grid, and their order in ``[tiles, queries]``; without those that are 1."""
    flat = [size for axis in grid for size in axis]
    wanted = [place for axis in range(len(grid)) for place in (3 * axis + 2, 3 * axis)]
    wanted += [3 * axis + 1 for axis in range(len(grid))]
    kept = [place for place, size in enumerate(flat) if size > 1]
    if all(place % 3 == 1 for place in kept):
        return [math.prod(flat)], [0]
    return [flat[place] for place in kept], [kept.index(place) for place in wanted if place in kept]


def _added(cut: _Cut, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """What is added to the scores, ``[heads or 1, (tiles,) queries, keys]``; None for nothing."""
    masked = cut.entry == cut.entries
    if bias is not None:
        table = F.pad(bias.flatten(1), (0, 1), value=_MASKED) if masked.any() else bias.flatten(1)
        added = table.index_select(1, _constant(cut.entry.reshape(-1), device)).unflatten(1, cut.entry.shape)
    elif masked.any():
        added = _constant(np.where(masked, _MASKED, 0.)[None], device).to(dtype)
    else:
        return None
    if len(cut.kind) == 1:
        return added.squeeze(1)
    return added if len(cut.entry) == 1 else added.index_select(1, _constant(cut.kind, device))
