"""Neighborhood attention on a GPU in Triton: flash attention over the tile's halo of keys, forward and backward.

Every problem is run as one of three spatial axes; the axes it lacks have length and kernel size 1. Tokens stay where
they are: a program takes one residue class of the dilation and one tile of queries in it, and walks the keys of the box
that contains all their windows, row by row, in blocks of ``BN``. Nothing of the size of the scores is stored and no key
is copied, so memory is linear in the tokens. The gradient of keys and values walks the inverse box (the queries that
may see a key tile), each output has one writer, and there are no atomics: results are the same from run to run.

Class coordinates: ``r`` the residue, ``n`` the members of the class, ``i`` a query's and ``j`` a key's index inside it;
the token at index ``i`` sits at position ``i * D + r``. All of them stay non-negative before ``//`` and ``%``, which
round towards zero in Triton.
"""
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    LOG2E,
    block_size,
    constants,
    layout,
    load_rows,
    score_gradient,
    scores,
    softmax_finish,
    softmax_step,
    store_rows,
)

__all__ = ["backward", "forward", "pairs"]


def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: list[int], dilation: list[int],
        stride: list[int], is_causal: list[bool], scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *spatial, heads, value_dim]`` and log-sum-exp ``[batch, *spatial, heads]`` (float32)."""
    plan = _plan_of(q, v, kernel_size, dilation, stride, is_causal)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    _forward_kernel[(q.shape[0] * plan.cells * q.shape[-2],)](
        q, k, v, bias, out, lse, scale, *_layout(q, k, v), W=plan.halo, **plan.arguments(), **_constants(q, v, bias))
    return out, lse


def backward(
        grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
        kernel_size: list[int], dilation: list[int], stride: list[int], is_causal: list[bool], scale: float,
        needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and (empty unless ``needs_bias``) bias."""
    plan = _plan_of(q, v, kernel_size, dilation, stride, is_causal)
    batch, heads = q.shape[0], q.shape[-2]
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    layout = _layout(q, k, v)
    common = plan.arguments() | _constants(q, v, bias)
    grid = (batch * plan.cells * heads,)
    _grad_query_kernel[grid](
        q, k, v, bias, out, lse, grad, grad_lse, delta, grad_q, scale, *layout,
        W=plan.halo, **common)
    _grad_key_kernel[grid](
        q, k, v, bias, lse, grad, delta, grad_k, grad_v, scale, *layout,
        W=plan.inverse_halo, **common)
    if bias is None or not needs_bias:
        return grad_q, grad_k, grad_v, q.new_empty(0)
    # Offsets of keys from the tile's corner, minus the largest kernel reach: the same box for every tile.
    box = [tile + 2 * (kernel - 1) for tile, kernel in zip(plan.tile, plan.kernel_size, strict=True)]
    block = min(block_size(q, v), 64 if max(q.shape[-1], v.shape[-1]) <= 32 else 32)
    blocks = triton.cdiv(math.prod(box), block)
    units = batch * plan.cells
    splits = min(units, max(1, _BIAS_PROGRAMS // (heads * blocks)))
    partial = q.new_empty(heads, splits, math.prod(plan.tile), blocks * block, dtype=torch.float32)
    _grad_bias_kernel[(heads * blocks * splits,)](
        q, k, v, bias, lse, grad, delta, partial, units, splits, blocks, scale, *layout,
        W=tuple(box), **common | dict(BN=block))
    grad_bias = _fold_bias(partial.sum(dim=1), plan.tile, plan.kernel_size, box)
    return grad_q, grad_k, grad_v, grad_bias.reshape(bias.shape).to(bias.dtype)


def pairs(q_shape: Sequence[int], *options: Sequence) -> int:
    """Number of query-key pairs; the options are kernel size, dilation, stride and causality, one per axis each."""
    count = q_shape[0] * q_shape[-2]
    for length, kernel, dilation, stride, causal in zip(q_shape[1:-2], *options, strict=True):
        members = [(length - residue + dilation - 1) // dilation for residue in range(dilation)]
        count *= sum(end - start for n in members for start, end in _windows(n, kernel, stride, causal))
    return count


# --- Launch parameters ------------------------------------------------------------------------------------------------

_BIAS_PROGRAMS = 1024  # programs that share the gradient of the bias, a few waves of a large GPU


class _Plan(NamedTuple):
    """How a problem of three axes is cut: see the module docstring."""

    length: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    is_causal: tuple[bool, ...]
    tile: tuple[int, ...]
    tiles: tuple[int, ...]
    halo: tuple[int, ...]
    inverse_halo: tuple[int, ...]

    @property
    def cells(self) -> int:
        """Tiles times residue classes."""
        return math.prod(self.tiles) * math.prod(self.dilation)

    def arguments(self) -> dict[str, tuple]:
        """The kernels' arguments that describe the axes."""
        return dict(L=self.length, D=self.dilation, N=self.tiles, K=self.kernel_size, S=self.stride, C=self.is_causal,
                    T=self.tile)


def _plan_of(
        q: Tensor, v: Tensor, kernel_size: list[int], dilation: list[int], stride: list[int], is_causal: list[bool],
) -> _Plan:
    """The plan of these tensors: a tile has as many queries (or keys) as registers hold."""
    queries = 32 if q.dtype == torch.float32 and max(q.shape[-1], v.shape[-1]) > 32 else 64
    options = tuple(kernel_size), tuple(dilation), tuple(stride), tuple(is_causal)
    return _plan(tuple(q.shape[1:-2]), *options, queries)


@functools.lru_cache(maxsize=1024)
def _plan(
        spatial: tuple[int, ...], kernel_size: tuple[int, ...], dilation: tuple[int, ...], stride: tuple[int, ...],
        is_causal: tuple[bool, ...], queries: int,
) -> _Plan:
    missing = 3 - len(spatial)
    length, kernel_size, dilation, stride = (
        (1,) * missing + values for values in (spatial, kernel_size, dilation, stride))
    is_causal = (False,) * missing + is_causal
    tile = {1: (1, 1, queries), 2: (1, queries // 8, 8), 3: (queries // 16, 4, 4)}[len(spatial)]
    members = [-(-axis // dil) for axis, dil in zip(length, dilation, strict=True)]
    halos = [_halos(*axis) for axis in zip(length, kernel_size, dilation, stride, is_causal, tile, strict=True)]
    return _Plan(
        length, kernel_size, dilation, stride, is_causal, tile,
        tiles=tuple(-(-n // t) for n, t in zip(members, tile, strict=True)),
        halo=tuple(forward for forward, _ in halos), inverse_halo=tuple(inverse for _, inverse in halos))


def _halos(length: int, kernel: int, dilation: int, stride: int, causal: bool, tile: int) -> tuple[int, int]:
    """Widest box of keys of a query tile, and widest box of queries of a key tile, over the tiles of one axis."""
    forward = inverse = 1
    for n in {length // dilation, -(-length // dilation)} - {0}:
        windows = _windows(n, kernel, stride, causal)
        for first in range(0, n, tile):
            last = min(first + tile, n) - 1
            forward = max(forward, windows[last][1] - windows[first][0])
            seen_by = [i for i, (start, end) in enumerate(windows) if start <= last and end > first]
            inverse = max(inverse, seen_by[-1] - seen_by[0] + 1)
    return forward, inverse


def _windows(n: int, kernel: int, stride: int, causal: bool) -> list[tuple[int, int]]:
    """First key and end (exclusive) of the window of every member of a class of ``n``."""
    if causal:
        return [(max(min(i // stride * stride + stride - 1, n - 1) - kernel + 1, 0), i + 1) for i in range(n)]
    leaders = (min(i // stride * stride + stride // 2, n - 1) for i in range(n))
    starts = (min(max(leader - kernel // 2, 0), n - kernel) for leader in leaders)
    return [(start, start + kernel) for start in starts]


def _fold_bias(scores: Tensor, tile: tuple[int, ...], kernel_size: tuple[int, ...], box: list[int]) -> Tensor:
    """Sums score gradients ``[heads, tile, box]`` over the queries of the tile, for each offset of key from query."""
    device = scores.device
    query = torch.zeros(1, 1, dtype=torch.long, device=device)  # [entries, 1]: flat position in the box, per query
    for axis in range(3):
        entry = torch.arange(2 * kernel_size[axis] - 1, device=device)
        corner = entry[:, None] + torch.arange(tile[axis], device=device)
        query = (query[:, None, :, None] * box[axis] + corner[None, :, None, :]).flatten(0, 1).flatten(1, 2)
    row = torch.arange(query.shape[1], device=device)
    return scores[:, row, query].sum(dim=-1)


def _layout(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    return layout(q), layout(k), layout(v), q.shape[-2]


def _constants(q: Tensor, v: Tensor, bias: Tensor | None) -> dict[str, object]:
    return constants(q, v) | dict(HAS_BIAS=bias is not None)


# --- Kernels ----------------------------------------------------------------------------------------------------------
#
# Names of one axis each, in tuples: L length, D dilation, N tiles, K kernel size, S stride, C causal, T tile, W width
# of the box that is walked. q_layout, ... are strides of batch, token and head. Tensors without one are contiguous.


@triton.jit
def _cell(index, L, D, N):
    """Residues, tile numbers, class sizes and image of a flat cell index (axis 2 fastest)."""
    c2 = index % (D[2] * N[2])
    index = index // (D[2] * N[2])
    c1 = index % (D[1] * N[1])
    index = index // (D[1] * N[1])
    c0 = index % (D[0] * N[0])
    r = (c0 % D[0], c1 % D[1], c2 % D[2])
    n = ((L[0] - r[0] + D[0] - 1) // D[0], (L[1] - r[1] + D[1] - 1) // D[1], (L[2] - r[2] + D[2] - 1) // D[2])
    return r, (c0 // D[0], c1 // D[1], c2 // D[2]), n, (index // (D[0] * N[0])).to(tl.int64)


@triton.jit
def _walk(flat, start, W: tl.constexpr):
    """Class coordinates of the members ``flat`` of a box of width ``W`` that starts at ``start``."""
    return (start[0] + flat // (W[1] * W[2]), start[1] + flat // W[2] % W[1], start[2] + flat % W[2])


@triton.jit
def _exists(i, n):
    return (i[0] >= 0) & (i[0] < n[0]) & (i[1] >= 0) & (i[1] < n[1]) & (i[2] >= 0) & (i[2] < n[2])


@triton.jit
def _clamp(i, n):
    return (tl.minimum(i[0], n[0] - 1), tl.minimum(i[1], n[1] - 1), tl.minimum(i[2], n[2] - 1))


@triton.jit
def _token(i, r, L, D):
    """Flat token number of class coordinates."""
    return (((i[0] * D[0] + r[0]) * L[1] + i[1] * D[1] + r[1]) * L[2] + i[2] * D[2] + r[2]).to(tl.int64)


@triton.jit
def _axis_window(i, n, K: tl.constexpr, S: tl.constexpr, C: tl.constexpr):
    if C:
        leader = tl.minimum(i // S * S + S - 1, n - 1)
        start = tl.maximum(leader - K + 1, 0)
        end = i + 1
    else:
        leader = tl.minimum(i // S * S + S // 2, n - 1)
        start = tl.minimum(tl.maximum(leader - K // 2, 0), n - K)
        end = start + K
    return start, end


@triton.jit
def _window(i, n, K: tl.constexpr, S: tl.constexpr, C: tl.constexpr):
    """First key and end (exclusive) of the windows of queries ``i``."""
    a0, e0 = _axis_window(i[0], n[0], K[0], S[0], C[0])
    a1, e1 = _axis_window(i[1], n[1], K[1], S[1], C[1])
    a2, e2 = _axis_window(i[2], n[2], K[2], S[2], C[2])
    return (a0, a1, a2), (e0, e1, e2)


@triton.jit
def _axis_queries(j, n, K: tl.constexpr, S: tl.constexpr, C: tl.constexpr):
    last_run = (n + S - 1) // S - 1
    if C:
        first = j
        run = tl.where(j + K - 1 >= n - 1, last_run, (j + K - S) // S)
    else:
        leader_low = tl.where(j < K, 0, j - K + 1 + K // 2)
        leader_high = tl.where(j >= n - K, n - 1, j + K // 2)
        low = tl.minimum((tl.maximum(leader_low - S // 2, 0) + S - 1) // S, last_run)
        first = tl.where(leader_low == 0, 0, low) * S
        run = tl.where(leader_high >= n - 1, last_run, tl.maximum(leader_high - S // 2, 0) // S)
    return first, tl.minimum(S * (run + 1), n)


@triton.jit
def _queries(j, n, K: tl.constexpr, S: tl.constexpr, C: tl.constexpr):
    """First and end (exclusive) of the queries whose windows may hold key ``j``: an interval on every axis."""
    a0, e0 = _axis_queries(j[0], n[0], K[0], S[0], C[0])
    a1, e1 = _axis_queries(j[1], n[1], K[1], S[1], C[1])
    a2, e2 = _axis_queries(j[2], n[2], K[2], S[2], C[2])
    return (a0, a1, a2), (e0, e1, e2)


@triton.jit
def _corners(t, n, T: tl.constexpr):
    """First and last member of a tile."""
    first = _clamp((t[0] * T[0], t[1] * T[1], t[2] * T[2]), n)
    return first, _clamp((t[0] * T[0] + T[0] - 1, t[1] * T[1] + T[1] - 1, t[2] * T[2] + T[2] - 1), n)


@triton.jit
def _columns(x):
    return (x[0][None, :], x[1][None, :], x[2][None, :])


@triton.jit
def _rows(x):
    return (x[0][:, None], x[1][:, None], x[2][:, None])


@triton.jit
def _inside(j, start, end):
    """``start <= j < end`` on every axis, one unsigned comparison each."""
    return ((j[0] - start[0]).to(tl.uint32, bitcast=True) < (end[0] - start[0]).to(tl.uint32, bitcast=True)) \
        & ((j[1] - start[1]).to(tl.uint32, bitcast=True) < (end[1] - start[1]).to(tl.uint32, bitcast=True)) \
        & ((j[2] - start[2]).to(tl.uint32, bitcast=True) < (end[2] - start[2]).to(tl.uint32, bitcast=True))


@triton.jit
def _linear(i, K: tl.constexpr):
    """Flat index in the bias table; a pair's entry is that of the key minus that of the query plus the centre's."""
    return (i[0] * (2 * K[1] - 1) + i[1]) * (2 * K[2] - 1) + i[2]


@triton.jit
def _table(bias, head, K: tl.constexpr):
    """Pointer to the centre (offset zero) of a head's bias table."""
    return bias + head * ((2 * K[0] - 1) * (2 * K[1] - 1) * (2 * K[2] - 1)) \
        + ((K[0] - 1) * (2 * K[1] - 1) + K[1] - 1) * (2 * K[2] - 1) + K[2] - 1


@triton.jit
def _pair_scores(x, y, visible, table, entry, scale, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr):
    """Scores in base 2 with bias, minus infinity where the key is not visible."""
    s = scores(x, y, scale, PRECISION)
    if HAS_BIAS:
        s += tl.load(table + entry, mask=visible, other=0.0).to(tl.float32) * LOG2E
    return tl.where(visible, s, float("-inf"))


@triton.jit
def _forward_kernel(
        q, k, v, bias, out, lse, scale, q_layout, k_layout, v_layout, heads, L, D, N,
        K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, T: tl.constexpr, W: tl.constexpr, DQ: tl.constexpr,
        DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr,
        PRECISION: tl.constexpr,
):
    BM: tl.constexpr = T[0] * T[1] * T[2]
    head = tl.program_id(0) % heads
    r, t, n, image = _cell(tl.program_id(0) // heads, L, D, N)
    first, last = _corners(t, n, T)
    i = _walk(tl.arange(0, BM), (t[0] * T[0], t[1] * T[1], t[2] * T[2]), T)
    query_ok = _exists(i, n)
    i = _clamp(i, n)
    query = _token(i, r, L, D)
    start, end = _window(i, n, K, S, C)
    box_start, _ = _window(first, n, K, S, C)
    _, box_end = _window(last, n, K, S, C)

    k += image * k_layout[0] + head * k_layout[2]
    v += image * v_layout[0] + head * v_layout[2]
    q_rows = load_rows(q + image * q_layout[0] + head * q_layout[2], query, query_ok, q_layout[1], DQ, BD)
    table = _table(bias, head, K) if HAS_BIAS else bias
    largest = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    for flat in range(0, (box_end[0] - box_start[0]) * (W[1] * W[2]), BN):
        j = _walk(flat + tl.arange(0, BN), box_start, W)
        key_ok = _exists(j, n)
        key = _token(j, r, L, D)
        k_rows = load_rows(k, key, key_ok, k_layout[1], DQ, BD)
        v_rows = load_rows(v, key, key_ok, v_layout[1], DV, BV)
        visible = _inside(_columns(j), _rows(start), _rows(end))
        entry = _linear(j, K)[None, :] - _linear(i, K)[:, None]
        s = _pair_scores(q_rows, k_rows, visible, table, entry, scale, HAS_BIAS, PRECISION)
        largest, total, acc = softmax_step(s, v_rows, largest, total, acc, PRECISION)
    rows, log_sum = softmax_finish(largest, total, acc)
    tokens = L[0] * L[1] * L[2]
    store_rows(out + (image * tokens * heads + head) * DV, query, query_ok, heads * DV, rows, DV, BV)
    tl.store(lse + (image * tokens + query) * heads + head, log_sum, mask=query_ok)


@triton.jit
def _grad_query_kernel(
        q, k, v, bias, out, lse, grad, grad_lse, delta, grad_q, scale, q_layout, k_layout, v_layout, heads, L, D, N,
        K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, T: tl.constexpr, W: tl.constexpr, DQ: tl.constexpr,
        DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr,
        PRECISION: tl.constexpr,
):
    """Gradient of the queries, and delta (the part of the scores' gradient that a query's keys share)."""
    BM: tl.constexpr = T[0] * T[1] * T[2]
    head = tl.program_id(0) % heads
    r, t, n, image = _cell(tl.program_id(0) // heads, L, D, N)
    first, last = _corners(t, n, T)
    i = _walk(tl.arange(0, BM), (t[0] * T[0], t[1] * T[1], t[2] * T[2]), T)
    query_ok = _exists(i, n)
    i = _clamp(i, n)
    query = _token(i, r, L, D)
    start, end = _window(i, n, K, S, C)
    box_start, _ = _window(first, n, K, S, C)
    _, box_end = _window(last, n, K, S, C)

    tokens = L[0] * L[1] * L[2]
    contiguous = image * tokens * heads + head
    k += image * k_layout[0] + head * k_layout[2]
    v += image * v_layout[0] + head * v_layout[2]
    q_rows = load_rows(q + image * q_layout[0] + head * q_layout[2], query, query_ok, q_layout[1], DQ, BD)
    grad_rows = load_rows(grad + contiguous * DV, query, query_ok, heads * DV, DV, BV)
    out_rows = load_rows(out + contiguous * DV, query, query_ok, heads * DV, DV, BV)
    statistic = (image * tokens + query) * heads + head
    query_delta = tl.sum(grad_rows.to(tl.float32) * out_rows.to(tl.float32), axis=1) \
        - tl.load(grad_lse + statistic, mask=query_ok, other=0.0)
    tl.store(delta + statistic, query_delta, mask=query_ok)
    query_lse = tl.load(lse + statistic, mask=query_ok, other=0.0) * LOG2E
    table = _table(bias, head, K) if HAS_BIAS else bias
    acc = tl.zeros([BM, BD], tl.float32)
    for flat in range(0, (box_end[0] - box_start[0]) * (W[1] * W[2]), BN):
        j = _walk(flat + tl.arange(0, BN), box_start, W)
        key_ok = _exists(j, n)
        key = _token(j, r, L, D)
        k_rows = load_rows(k, key, key_ok, k_layout[1], DQ, BD)
        v_rows = load_rows(v, key, key_ok, v_layout[1], DV, BV)
        visible = _inside(_columns(j), _rows(start), _rows(end))
        entry = _linear(j, K)[None, :] - _linear(i, K)[:, None]
        s = _pair_scores(q_rows, k_rows, visible, table, entry, scale, HAS_BIAS, PRECISION)
        p = tl.exp2(s - query_lse[:, None])
        ds = score_gradient(p, grad_rows, v_rows, query_delta, PRECISION)
        acc = tl.dot(ds.to(k_rows.dtype), k_rows, acc, input_precision=PRECISION)
    store_rows(grad_q + contiguous * DQ, query, query_ok, heads * DQ, acc * scale, DQ, BD)


@triton.jit
def _grad_key_kernel(
        q, k, v, bias, lse, grad, delta, grad_k, grad_v, scale, q_layout, k_layout, v_layout, heads, L, D, N,
        K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, T: tl.constexpr, W: tl.constexpr, DQ: tl.constexpr,
        DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr,
        PRECISION: tl.constexpr,
):
    """Gradients of the keys and values of a tile, from the box of queries that may see it."""
    BM: tl.constexpr = T[0] * T[1] * T[2]
    head = tl.program_id(0) % heads
    r, t, n, image = _cell(tl.program_id(0) // heads, L, D, N)
    first, last = _corners(t, n, T)
    j = _walk(tl.arange(0, BM), (t[0] * T[0], t[1] * T[1], t[2] * T[2]), T)
    key_ok = _exists(j, n)
    key = _token(j, r, L, D)
    box_start, _ = _queries(first, n, K, S, C)
    _, box_end = _queries(last, n, K, S, C)

    tokens = L[0] * L[1] * L[2]
    contiguous = image * tokens * heads + head
    q += image * q_layout[0] + head * q_layout[2]
    k_rows = load_rows(k + image * k_layout[0] + head * k_layout[2], key, key_ok, k_layout[1], DQ, BD)
    v_rows = load_rows(v + image * v_layout[0] + head * v_layout[2], key, key_ok, v_layout[1], DV, BV)
    table = _table(bias, head, K) if HAS_BIAS else bias
    acc_k = tl.zeros([BM, BD], tl.float32)
    acc_v = tl.zeros([BM, BV], tl.float32)
    for flat in range(0, (box_end[0] - box_start[0]) * (W[1] * W[2]), BN):
        i = _walk(flat + tl.arange(0, BN), box_start, W)
        query_ok = _exists(i, n)
        i = _clamp(i, n)
        query = _token(i, r, L, D)
        start, end = _window(i, n, K, S, C)
        q_rows = load_rows(q, query, query_ok, q_layout[1], DQ, BD)
        grad_rows = load_rows(grad + contiguous * DV, query, query_ok, heads * DV, DV, BV)
        statistic = (image * tokens + query) * heads + head
        query_lse = tl.load(lse + statistic, mask=query_ok, other=0.0) * LOG2E
        query_delta = tl.load(delta + statistic, mask=query_ok, other=0.0)
        visible = _inside(_rows(j), _columns(start), _columns(end)) & query_ok[None, :]
        entry = _linear(j, K)[:, None] - _linear(i, K)[None, :]
        s = _pair_scores(k_rows, q_rows, visible, table, entry, scale, HAS_BIAS, PRECISION)
        p = tl.exp2(s - query_lse[None, :])
        acc_v = tl.dot(p.to(grad_rows.dtype), grad_rows, acc_v, input_precision=PRECISION)
        ds = p * (tl.dot(v_rows, tl.trans(grad_rows), input_precision=PRECISION) - query_delta[None, :])
        acc_k = tl.dot(ds.to(q_rows.dtype), q_rows, acc_k, input_precision=PRECISION)
    store_rows(grad_k + contiguous * DQ, key, key_ok, heads * DQ, acc_k * scale, DQ, BD)
    store_rows(grad_v + contiguous * DV, key, key_ok, heads * DV, acc_v, DV, BV)


@triton.jit
def _grad_bias_kernel(
        q, k, v, bias, lse, grad, delta, partial, units, splits, blocks, scale, q_layout, k_layout, v_layout, heads,
        L, D, N,
        K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, T: tl.constexpr, W: tl.constexpr, DQ: tl.constexpr,
        DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr,
        PRECISION: tl.constexpr,
):
    """Gradients of the scores in one block of the box around a tile, summed over a share of all tiles and images."""
    BM: tl.constexpr = T[0] * T[1] * T[2]
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % blocks
    split = tl.program_id(0) // heads // blocks
    tokens = L[0] * L[1] * L[2]
    table = _table(bias, head, K)
    flat = block * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for unit in range(split, units, splits):
        r, t, n, image = _cell(unit, L, D, N)
        i = _walk(tl.arange(0, BM), (t[0] * T[0], t[1] * T[1], t[2] * T[2]), T)
        query_ok = _exists(i, n)
        query = _token(i, r, L, D)
        start, end = _window(_clamp(i, n), n, K, S, C)
        j = _walk(flat, (t[0] * T[0] - K[0] + 1, t[1] * T[1] - K[1] + 1, t[2] * T[2] - K[2] + 1), W)
        key_ok = _exists(j, n)
        key = _token(j, r, L, D)
        contiguous = image * tokens * heads + head
        q_rows = load_rows(q + image * q_layout[0] + head * q_layout[2], query, query_ok, q_layout[1], DQ, BD)
        k_rows = load_rows(k + image * k_layout[0] + head * k_layout[2], key, key_ok, k_layout[1], DQ, BD)
        v_rows = load_rows(v + image * v_layout[0] + head * v_layout[2], key, key_ok, v_layout[1], DV, BV)
        grad_rows = load_rows(grad + contiguous * DV, query, query_ok, heads * DV, DV, BV)
        statistic = (image * tokens + query) * heads + head
        query_lse = tl.load(lse + statistic, mask=query_ok, other=0.0) * LOG2E
        query_delta = tl.load(delta + statistic, mask=query_ok, other=0.0)
        visible = _inside(_columns(j), _rows(start), _rows(end)) & query_ok[:, None]
        entry = _linear(j, K)[None, :] - _linear(i, K)[:, None]
        s = _pair_scores(q_rows, k_rows, visible, table, entry, scale, HAS_BIAS, PRECISION)
        p = tl.exp2(s - query_lse[:, None])
        acc += score_gradient(p, grad_rows, v_rows, query_delta, PRECISION)
    place = ((head * splits + split) * BM + tl.arange(0, BM)).to(tl.int64)[:, None] * (blocks * BN) + flat[None, :]
    tl.store(partial + place, acc)
