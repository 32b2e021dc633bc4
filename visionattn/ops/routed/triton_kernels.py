"""Routed attention on a GPU in Triton: keys and values are read in place through the route table.

Forward and the gradient of the queries walk the tokens of a region's routes as one list, token ``t`` being token
``t % NK`` of route ``t // NK``, so short regions waste nothing. The gradient of keys and values walks the transposed
table: for every key region the query regions that listed it, in ascending order. Those lists are cut into chunks of
fixed length, so that a region that everybody listed is shared by many programs; chunks are summed in order by a second
kernel. There are no atomics: results are the same from run to run, and memory does not grow with the number of routes.
"""
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    LOG2E,
    constants,
    layout,
    load_rows,
    score_gradient,
    scores,
    softmax_finish,
    softmax_step,
    store_rows,
)

__all__ = ["backward", "forward"]

_CHUNK_QUERIES = 512  # query tokens in a chunk of a transposed list, unless its routes are more


def forward(
        q: Tensor, k: Tensor, v: Tensor, routes: Tensor, region_size: list[int], key_region_size: list[int],
        scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, height, width, heads, value_dim]`` and log-sum-exp ``[batch, height, width, heads]``."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    common, rows = _common(q, k, v, routes, region_size, key_region_size)
    blocks = triton.cdiv(math.prod(region_size), rows)
    _forward_kernel[(q.shape[0] * routes.shape[2] * blocks * q.shape[-2],)](
        q, k, v, routes, out, lse, scale, blocks, **common, BM=rows)
    return out, lse


def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor,
        region_size: list[int], key_region_size: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    batch, heads = q.shape[0], q.shape[-2]
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    common, rows = _common(q, k, v, routes, region_size, key_region_size)
    blocks = triton.cdiv(math.prod(region_size), rows)
    _grad_query_kernel[(batch * routes.shape[2] * blocks * heads,)](
        q, k, v, routes, out, lse, grad, delta, grad_q, scale, blocks, **common, BM=rows)

    lists = _transpose(routes, max(routes.shape[-1], _CHUNK_QUERIES // math.prod(region_size)))
    key_tokens = math.prod(key_region_size)
    rows = min(64, max(16, triton.next_power_of_2(key_tokens)))
    blocks = triton.cdiv(key_tokens, rows)
    partial_k, partial_v = (q.new_empty(batch, lists.first.shape[-1], heads, key_tokens, dim, dtype=torch.float32)
                            for dim in (q.shape[-1], v.shape[-1]))
    _grad_key_kernel[(batch * lists.first.shape[-1] * blocks * heads,)](
        q, k, v, lists.queries, lists.region, lists.first, lists.last, lse, grad, delta, partial_k, partial_v,
        scale, lists.first.shape[-1], blocks, **common, BM=rows)
    for partial, total in ((partial_k, grad_k), (partial_v, grad_v)):
        dim = total.shape[-1]
        _sum_chunks_kernel[(batch * routes.shape[2] * blocks * heads,)](
            partial, lists.ends, total, lists.first.shape[-1], blocks, heads, routes.shape[1], routes.shape[2],
            common["grid_width"], common["key_width"], common["key_map"], DIM=dim,
            BLOCK=max(16, triton.next_power_of_2(dim)), KEY_REGION=tuple(key_region_size), BM=rows)
    return grad_q, grad_k, grad_v


# --- Launch parameters ------------------------------------------------------------------------------------------------


class _Lists(NamedTuple):
    """The transposed route table, cut into chunks; one row per image and table."""

    queries: Tensor  # [rows, regions * topk]: query regions, grouped by the key region that they listed
    region: Tensor  # [rows, chunks]: key region of the chunk; the number of regions in surplus chunks
    first: Tensor  # [rows, chunks]: the chunk's part of ``queries``
    last: Tensor  # [rows, chunks]: (exclusive)
    ends: Tensor  # [rows, regions]: end (exclusive) of the region's chunks; every region has at least one


def _transpose(routes: Tensor, chunk: int) -> _Lists:
    """Builds the lists on the device, without waiting for it; the number of chunks is a bound, not a count."""
    regions, topk = routes.shape[2:]
    table = routes.reshape(-1, regions * topk)
    keys, order = table.sort(dim=1, stable=True)
    numbers = torch.arange(regions + 1, dtype=keys.dtype, device=keys.device).expand(len(keys), -1).contiguous()
    starts = torch.searchsorted(keys, numbers)  # where each key region's list starts
    chunks = ((starts[:, 1:] - starts[:, :-1] + chunk - 1) // chunk).clamp(min=1)
    ends = chunks.cumsum(dim=1)
    number = torch.arange(regions + regions * topk // chunk, device=keys.device).expand(len(keys), -1).contiguous()
    region = torch.searchsorted(ends, number, right=True)
    inside = region.clamp(max=regions - 1)
    part = number - (ends - chunks).gather(1, inside)
    first = starts.gather(1, inside) + part * chunk
    last = torch.minimum(first + chunk, starts.gather(1, inside + 1))
    return _Lists(*(x.int().contiguous() for x in (order // topk, region, first, last, ends)))


def _common(
        q: Tensor, k: Tensor, v: Tensor, routes: Tensor, region_size: list[int], key_region_size: list[int],
) -> tuple[dict[str, object], int]:
    """Arguments that all kernels take, and the query rows of a program."""
    common = constants(q, v) | dict(
        q_layout=layout(q), k_layout=layout(k), v_layout=layout(v), heads=q.shape[-2], tables=routes.shape[1],
        regions=routes.shape[2], topk=routes.shape[3], grid_width=q.shape[2] // region_size[1], width=q.shape[2],
        key_width=k.shape[2], tokens=q.shape[1] * q.shape[2], key_map=k.shape[1] * k.shape[2],
        REGION=tuple(region_size), KEY_REGION=tuple(key_region_size))
    return common, min(64, max(16, triton.next_power_of_2(math.prod(region_size))))


# --- Kernels ----------------------------------------------------------------------------------------------------------
#
# q_layout, ... are strides of batch, token and head; tensors without one are contiguous. ``width`` and ``key_width``
# are those of the maps in tokens, ``tokens`` and ``key_map`` their sizes, ``grid_width`` the regions of a row.


@triton.jit
def _token(region, offset, grid_width, width, REGION: tl.constexpr):
    """Flat token number of the token ``offset`` of a region."""
    row = region // grid_width * REGION[0] + offset // REGION[1]
    return (row * width + region % grid_width * REGION[1] + offset % REGION[1]).to(tl.int64)


@triton.jit
def _unit(blocks, regions, heads):
    """Head, block of rows, region (or chunk) and image of this program; neighbours share all but the head."""
    unit = tl.program_id(0) // heads
    rest = unit // blocks
    return tl.program_id(0) % heads, unit % blocks, rest % regions, (rest // regions).to(tl.int64)


@triton.jit
def _routed_keys(routes, flat, topk, grid_width, key_width, KEY_REGION: tl.constexpr):
    """Token numbers of the positions ``flat`` of the list of a region's keys, and whether there are such keys."""
    ok = flat < topk * (KEY_REGION[0] * KEY_REGION[1])
    region = tl.load(routes + flat // (KEY_REGION[0] * KEY_REGION[1]), mask=ok, other=0)
    return _token(region, flat % (KEY_REGION[0] * KEY_REGION[1]), grid_width, key_width, KEY_REGION), ok


@triton.jit
def _forward_kernel(
        q, k, v, routes, out, lse, scale, blocks, q_layout, k_layout, v_layout, heads, tables, regions, topk,
        grid_width, width, key_width, tokens, key_map, REGION: tl.constexpr, KEY_REGION: tl.constexpr,
        DQ: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        PRECISION: tl.constexpr,
):
    head, block, region, image = _unit(blocks, regions, heads)
    offset = block * BM + tl.arange(0, BM)
    query_ok = offset < REGION[0] * REGION[1]
    query = _token(region, offset, grid_width, width, REGION)
    routes += ((image * tables + head % tables) * regions + region) * topk
    k += image * k_layout[0] + head * k_layout[2]
    v += image * v_layout[0] + head * v_layout[2]
    q_rows = load_rows(q + image * q_layout[0] + head * q_layout[2], query, query_ok, q_layout[1], DQ, BD)
    largest = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    for flat in range(0, topk * (KEY_REGION[0] * KEY_REGION[1]), BN):
        key, key_ok = _routed_keys(routes, flat + tl.arange(0, BN), topk, grid_width, key_width, KEY_REGION)
        k_rows = load_rows(k, key, key_ok, k_layout[1], DQ, BD)
        v_rows = load_rows(v, key, key_ok, v_layout[1], DV, BV)
        s = tl.where(key_ok[None, :], scores(q_rows, k_rows, scale, PRECISION), float("-inf"))
        largest, total, acc = softmax_step(s, v_rows, largest, total, acc, PRECISION)
    rows, log_sum = softmax_finish(largest, total, acc)
    store_rows(out + (image * tokens * heads + head) * DV, query, query_ok, heads * DV, rows, DV, BV)
    tl.store(lse + (image * tokens + query) * heads + head, log_sum, mask=query_ok)


@triton.jit
def _grad_query_kernel(
        q, k, v, routes, out, lse, grad, delta, grad_q, scale, blocks, q_layout, k_layout, v_layout, heads, tables,
        regions, topk, grid_width, width, key_width, tokens, key_map, REGION: tl.constexpr, KEY_REGION: tl.constexpr,
        DQ: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        PRECISION: tl.constexpr,
):
    """Gradient of the queries, and delta (the part of the scores' gradient that a query's keys share)."""
    head, block, region, image = _unit(blocks, regions, heads)
    offset = block * BM + tl.arange(0, BM)
    query_ok = offset < REGION[0] * REGION[1]
    query = _token(region, offset, grid_width, width, REGION)
    routes += ((image * tables + head % tables) * regions + region) * topk
    k += image * k_layout[0] + head * k_layout[2]
    v += image * v_layout[0] + head * v_layout[2]
    contiguous = image * tokens * heads + head
    q_rows = load_rows(q + image * q_layout[0] + head * q_layout[2], query, query_ok, q_layout[1], DQ, BD)
    grad_rows = load_rows(grad + contiguous * DV, query, query_ok, heads * DV, DV, BV)
    out_rows = load_rows(out + contiguous * DV, query, query_ok, heads * DV, DV, BV)
    statistic = (image * tokens + query) * heads + head
    query_delta = tl.sum(grad_rows.to(tl.float32) * out_rows.to(tl.float32), axis=1)
    tl.store(delta + statistic, query_delta, mask=query_ok)
    query_lse = tl.load(lse + statistic, mask=query_ok, other=0.0) * LOG2E
    acc = tl.zeros([BM, BD], tl.float32)
    for flat in range(0, topk * (KEY_REGION[0] * KEY_REGION[1]), BN):
        key, key_ok = _routed_keys(routes, flat + tl.arange(0, BN), topk, grid_width, key_width, KEY_REGION)
        k_rows = load_rows(k, key, key_ok, k_layout[1], DQ, BD)
        v_rows = load_rows(v, key, key_ok, v_layout[1], DV, BV)
        s = tl.where(key_ok[None, :], scores(q_rows, k_rows, scale, PRECISION), float("-inf"))
        ds = score_gradient(tl.exp2(s - query_lse[:, None]), grad_rows, v_rows, query_delta, PRECISION)
        acc = tl.dot(ds.to(k_rows.dtype), k_rows, acc, input_precision=PRECISION)
    store_rows(grad_q + contiguous * DQ, query, query_ok, heads * DQ, acc * scale, DQ, BD)


@triton.jit
def _grad_key_kernel(
        q, k, v, queries, chunk_region, chunk_first, chunk_last, lse, grad, delta, partial_k, partial_v, scale,
        chunks, blocks, q_layout, k_layout, v_layout, heads, tables, regions, topk, grid_width, width, key_width,
        tokens, key_map, REGION: tl.constexpr, KEY_REGION: tl.constexpr, DQ: tl.constexpr, DV: tl.constexpr,
        BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients of a block of a key region from one chunk of the query regions that listed it."""
    NQ: tl.constexpr = REGION[0] * REGION[1]
    NK: tl.constexpr = KEY_REGION[0] * KEY_REGION[1]
    head, block, chunk, image = _unit(blocks, chunks, heads)
    table = image * tables + head % tables
    region = tl.load(chunk_region + table * chunks + chunk)
    if region < regions:
        first = tl.load(chunk_first + table * chunks + chunk)
        last = tl.load(chunk_last + table * chunks + chunk)
        queries += table * (regions * topk) + first
        offset = block * BM + tl.arange(0, BM)
        key_ok = offset < NK
        key = _token(region, offset, grid_width, key_width, KEY_REGION)
        contiguous = image * tokens * heads + head
        q += image * q_layout[0] + head * q_layout[2]
        k_rows = load_rows(k + image * k_layout[0] + head * k_layout[2], key, key_ok, k_layout[1], DQ, BD)
        v_rows = load_rows(v + image * v_layout[0] + head * v_layout[2], key, key_ok, v_layout[1], DV, BV)
        acc_k = tl.zeros([BM, BD], tl.float32)
        acc_v = tl.zeros([BM, BV], tl.float32)
        for flat in range(0, (last - first) * NQ, BN):
            t = flat + tl.arange(0, BN)
            query_ok = t < (last - first) * NQ
            query_region = tl.load(queries + t // NQ, mask=query_ok, other=0)
            query = _token(query_region, t % NQ, grid_width, width, REGION)
            q_rows = load_rows(q, query, query_ok, q_layout[1], DQ, BD)
            grad_rows = load_rows(grad + contiguous * DV, query, query_ok, heads * DV, DV, BV)
            statistic = (image * tokens + query) * heads + head
            query_lse = tl.load(lse + statistic, mask=query_ok, other=0.0) * LOG2E
            query_delta = tl.load(delta + statistic, mask=query_ok, other=0.0)
            s = tl.where(query_ok[None, :], scores(k_rows, q_rows, scale, PRECISION), float("-inf"))
            p = tl.exp2(s - query_lse[None, :])
            acc_v = tl.dot(p.to(grad_rows.dtype), grad_rows, acc_v, input_precision=PRECISION)
            ds = p * (tl.dot(v_rows, tl.trans(grad_rows), input_precision=PRECISION) - query_delta[None, :])
            acc_k = tl.dot(ds.to(q_rows.dtype), q_rows, acc_k, input_precision=PRECISION)
        place = ((image * chunks + chunk) * heads + head) * NK
        store_rows(partial_k + place * DQ, offset, key_ok, DQ, acc_k * scale, DQ, BD)
        store_rows(partial_v + place * DV, offset, key_ok, DV, acc_v, DV, BV)


@triton.jit
def _sum_chunks_kernel(
        partial, ends, total, chunks, blocks, heads, tables, regions, grid_width, key_width, key_map,
        DIM: tl.constexpr, BLOCK: tl.constexpr, KEY_REGION: tl.constexpr, BM: tl.constexpr,
):
    """Sums the chunks of every key region, in their order, into the map."""
    NK: tl.constexpr = KEY_REGION[0] * KEY_REGION[1]
    head, block, region, image = _unit(blocks, regions, heads)
    ends += (image * tables + head % tables) * regions
    offset = block * BM + tl.arange(0, BM)
    ok = offset < NK
    acc = tl.zeros([BM, BLOCK], tl.float32)
    first = tl.load(ends + region - 1, mask=region > 0, other=0)
    for chunk in range(first, tl.load(ends + region)):
        acc += load_rows(partial + ((image * chunks + chunk) * heads + head) * (NK * DIM), offset, ok, DIM, DIM, BLOCK)
    token = _token(region, offset, grid_width, key_width, KEY_REGION)
    store_rows(total + (image * key_map * heads + head) * DIM, token, ok, heads * DIM, acc, DIM, BLOCK)
