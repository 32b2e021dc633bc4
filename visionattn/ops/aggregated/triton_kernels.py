"""Triton kernels of aggregated attention.

Queries are consecutive tokens of the map. A place of the window is one key for each of them, so its scores are products
row by row, and the keys of the next place are for the most part in the cache already. Pooled keys are walked in blocks,
as in flash attention. No kernel uses atomics: gradients are the same from run to run.
"""
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
    softmax_step,
    store_rows,
)

__all__ = ["backward", "forward"]

_LN2 = tl.constexpr(0.6931471805599453)
_CHUNK_QUERIES = 1024  # whose parts of the pooled keys' gradients are summed in one program


def forward(
        q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, local_bias: Tensor | None,
        pooled_bias: Tensor | None, local_weights: Tensor | None, kernel_size: int,
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, height, width, heads, value_dim]`` and log-sum-exp ``[batch, height, width, heads]``."""
    out = q.new_empty(v.shape)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    common, blocks = _common(q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, kernel_size)
    _forward_kernel[(q.shape[0] * blocks * q.shape[-2],)](
        q, k, v, pooled_k, pooled_v, *_tables(q, local_bias, pooled_bias, local_weights), out, lse, **common)
    return out, lse


def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, local_bias: Tensor | None,
        pooled_bias: Tensor | None, local_weights: Tensor | None, lse: Tensor, kernel_size: int,
) -> list[Tensor]:
    """Gradients of all tensors, empty for those that are not there."""
    batch, heads, places = q.shape[0], q.shape[-2], kernel_size ** 2
    tensors = (q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights)
    grad_q, grad_k, grad_v, _, _, _, grad_pooled_bias, grad_local_weights = grads = [
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    common, blocks = _common(*tensors, kernel_size)
    tables = _tables(q, local_bias, pooled_bias, local_weights)
    delta = torch.empty_like(lse)
    sums = lse.new_empty(batch * blocks, heads, places)  # of the gradient of the local bias, one for each program
    _grad_query_kernel[(batch * blocks * heads,)](
        q, k, v, pooled_k, pooled_v, *tables, lse, grad, delta, grad_q, grad_local_weights, sums, **common)
    if local_bias is not None:
        grads[5] = sums.sum(dim=0).to(local_bias.dtype)
    _grad_key_kernel[(batch * blocks * heads,)](
        q, k, v, *tables, lse, grad, delta, grad_k, grad_v, **common)

    tokens, pooled = q.shape[1] * q.shape[2], pooled_k.shape[1]
    chunks = triton.cdiv(tokens, _CHUNK_QUERIES)
    key_blocks = triton.cdiv(pooled, common["BM"])
    partial_k, partial_v = (lse.new_empty(chunks, *x.shape) for x in (pooled_k, pooled_v))
    _grad_pooled_kernel[(batch * chunks * key_blocks * heads,)](
        q, pooled_k, pooled_v, tables[1], lse, grad, delta, partial_k, partial_v, chunks, key_blocks, _CHUNK_QUERIES,
        **common)
    grads[3], grads[4] = partial_k.sum(dim=0).to(q.dtype), partial_v.sum(dim=0).to(q.dtype)
    if pooled_bias is not None:
        key_blocks = triton.cdiv(pooled, common["BN"])
        _grad_bias_kernel[(blocks * key_blocks * heads,)](
            q, pooled_k, pooled_v, pooled_bias, lse, grad, delta, grad_pooled_bias, batch, key_blocks, **common)
    return grads


def _common(
        q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, local_bias: Tensor | None,
        pooled_bias: Tensor | None, local_weights: Tensor | None, kernel_size: int,
) -> tuple[dict[str, object], int]:
    """Arguments that all kernels take, and the blocks of tokens of a map."""
    tokens = q.shape[1] * q.shape[2]
    rows = min(64, max(16, triton.next_power_of_2(tokens)))
    blocks = triton.cdiv(tokens, rows)
    common = constants(q, v) | dict(
        BN=16 if q.dtype == torch.float32 else 32,  # beside the window's rows, registers hold no more
        q_layout=layout(q), k_layout=layout(k), v_layout=layout(v), pooled_k_layout=layout(pooled_k),
        pooled_v_layout=layout(pooled_v), heads=q.shape[-2], height=q.shape[1], width=q.shape[2],
        pooled=pooled_k.shape[1], blocks=blocks, K=kernel_size, HAS_LOCAL_BIAS=local_bias is not None,
        HAS_POOLED_BIAS=pooled_bias is not None, HAS_WEIGHTS=local_weights is not None, BM=rows)
    return common, blocks


def _tables(q: Tensor, *tables: Tensor | None) -> list[Tensor]:
    """The tables, with something to point to in place of those that are not there."""
    return [q if x is None else x for x in tables]


# --- Kernels ----------------------------------------------------------------------------------------------------------
#
# q_layout, ... are strides of batch, token and head; tensors without one are contiguous. A program has one head and one
# block of BM consecutive tokens of one image.


@triton.jit
def _unit(blocks, heads):
    """Head, block of tokens and image of this program; neighbours share all but the head."""
    unit = tl.program_id(0) // heads
    return tl.program_id(0) % heads, unit % blocks, (unit // blocks).to(tl.int64)


@triton.jit
def _tokens(block, height, width, BM: tl.constexpr):
    """Tokens of a block, their rows and columns, and whether they are on the map."""
    token = block * BM + tl.arange(0, BM)
    return token.to(tl.int64), token // width, token % width, token < height * width


@triton.jit
def _neighbour(row, column, ok, height, width):
    """Token numbers of places, and whether they are on the map."""
    on_map = ok & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return row.to(tl.int64) * width + column, on_map


@triton.jit
def _local_scores(q_rows, k_rows, local_bias, head, place, on_map, K: tl.constexpr, HAS_LOCAL_BIAS: tl.constexpr):
    """Scores in base 2 of each query and its own key."""
    s = tl.sum(q_rows.to(tl.float32) * k_rows.to(tl.float32), axis=1)
    if HAS_LOCAL_BIAS:
        s += tl.load(local_bias + head * (K * K) + place).to(tl.float32)
    return tl.where(on_map, s * LOG2E, float("-inf"))


@triton.jit
def _pooled_scores(
        q_rows, k_rows, pooled_bias, head, token, ok, key, key_ok, tokens, pooled, HAS_POOLED_BIAS: tl.constexpr,
        PRECISION: tl.constexpr,
):
    """Scores in base 2 ``[queries, keys]``."""
    s = scores(q_rows, k_rows, 1.0, PRECISION)
    if HAS_POOLED_BIAS:
        place = (head * tokens + token)[:, None].to(tl.int64) * pooled + key[None, :]
        s += tl.load(pooled_bias + place, mask=ok[:, None] & key_ok[None, :], other=0.0).to(tl.float32) * LOG2E
    return tl.where(key_ok[None, :], s, float("-inf"))


@triton.jit
def _forward_kernel(
        q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, out, lse, q_layout, k_layout, v_layout,
        pooled_k_layout, pooled_v_layout, heads, height, width, pooled, blocks, K: tl.constexpr,
        HAS_LOCAL_BIAS: tl.constexpr, HAS_POOLED_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, DQ: tl.constexpr,
        DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        PRECISION: tl.constexpr,
):
    head, block, image = _unit(blocks, heads)
    tokens = height * width
    token, row, column, ok = _tokens(block, height, width, BM)
    q_rows = load_rows(q + image * q_layout[0] + head * q_layout[2], token, ok, q_layout[1], DQ, BD)
    k += image * k_layout[0] + head * k_layout[2]
    v += image * v_layout[0] + head * v_layout[2]
    pooled_k += image * pooled_k_layout[0] + head * pooled_k_layout[2]
    pooled_v += image * pooled_v_layout[0] + head * pooled_v_layout[2]
    statistic = (image * tokens + token) * heads + head
    largest = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    more = tl.zeros([BM, BV], tl.float32)  # what comes after the softmax
    for start in range(0, pooled, BN):
        key = (start + tl.arange(0, BN)).to(tl.int64)
        key_ok = key < pooled
        k_rows = load_rows(pooled_k, key, key_ok, pooled_k_layout[1], DQ, BD)
        v_rows = load_rows(pooled_v, key, key_ok, pooled_v_layout[1], DV, BV)
        s = _pooled_scores(
            q_rows, k_rows, pooled_bias, head, token, ok, key, key_ok, tokens, pooled, HAS_POOLED_BIAS, PRECISION)
        largest, total, acc = softmax_step(s, v_rows, largest, total, acc, PRECISION)
    for place in range(K * K):
        key, on_map = _neighbour(row + place // K - K // 2, column + place % K - K // 2, ok, height, width)
        k_rows = load_rows(k, key, on_map, k_layout[1], DQ, BD)
        v_rows = load_rows(v, key, on_map, v_layout[1], DV, BV).to(tl.float32)
        s = _local_scores(q_rows, k_rows, local_bias, head, place, on_map, K, HAS_LOCAL_BIAS)
        new_largest = tl.maximum(largest, s)
        shrink = tl.exp2(largest - new_largest)
        p = tl.exp2(s - new_largest)
        total = total * shrink + p
        acc = acc * shrink[:, None] + p[:, None] * v_rows
        largest = new_largest
        if HAS_WEIGHTS:
            w = tl.load(local_weights + statistic * (K * K) + place, mask=on_map, other=0.0).to(tl.float32)
            more += w[:, None] * v_rows
    rows = acc / total[:, None] + more
    store_rows(out + (image * tokens * heads + head) * DV, token, ok, heads * DV, rows, DV, BV)
    tl.store(lse + statistic, (largest + tl.log2(total)) * _LN2, mask=ok)


@triton.jit
def _grad_query_kernel(
        q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, lse, grad, delta, grad_q,
        grad_local_weights, sums, q_layout, k_layout, v_layout, pooled_k_layout, pooled_v_layout, heads, height, width,
        pooled, blocks, K: tl.constexpr, HAS_LOCAL_BIAS: tl.constexpr, HAS_POOLED_BIAS: tl.constexpr,
        HAS_WEIGHTS: tl.constexpr, DQ: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients of queries, local weights and (a part of) the local bias, and delta (the part of the scores' gradient
    that a query's keys share: the mean of the gradients of its probabilities)."""
    head, block, image = _unit(blocks, heads)
    tokens = height * width
    token, row, column, ok = _tokens(block, height, width, BM)
    contiguous = image * tokens * heads + head
    statistic = (image * tokens + token) * heads + head
    q_rows = load_rows(q + image * q_layout[0] + head * q_layout[2], token, ok, q_layout[1], DQ, BD)
    grad_rows = load_rows(grad + contiguous * DV, token, ok, heads * DV, DV, BV)
    k += image * k_layout[0] + head * k_layout[2]
    v += image * v_layout[0] + head * v_layout[2]
    pooled_k += image * pooled_k_layout[0] + head * pooled_k_layout[2]
    pooled_v += image * pooled_v_layout[0] + head * pooled_v_layout[2]
    query_lse = tl.load(lse + statistic, mask=ok, other=0.0) * LOG2E
    query_delta = tl.zeros([BM], tl.float32)
    for place in range(K * K):
        key, on_map = _neighbour(row + place // K - K // 2, column + place % K - K // 2, ok, height, width)
        k_rows = load_rows(k, key, on_map, k_layout[1], DQ, BD)
        v_rows = load_rows(v, key, on_map, v_layout[1], DV, BV)
        s = _local_scores(q_rows, k_rows, local_bias, head, place, on_map, K, HAS_LOCAL_BIAS)
        weight_grad = tl.sum(grad_rows.to(tl.float32) * v_rows.to(tl.float32), axis=1)
        query_delta += tl.exp2(s - query_lse) * weight_grad
        if HAS_WEIGHTS:
            tl.store(grad_local_weights + statistic * (K * K) + place,
                     weight_grad.to(grad_local_weights.dtype.element_ty), mask=ok)
    for start in range(0, pooled, BN):
        key = (start + tl.arange(0, BN)).to(tl.int64)
        key_ok = key < pooled
        k_rows = load_rows(pooled_k, key, key_ok, pooled_k_layout[1], DQ, BD)
        v_rows = load_rows(pooled_v, key, key_ok, pooled_v_layout[1], DV, BV)
        s = _pooled_scores(
            q_rows, k_rows, pooled_bias, head, token, ok, key, key_ok, tokens, pooled, HAS_POOLED_BIAS, PRECISION)
        p = tl.exp2(s - query_lse[:, None])
        query_delta += tl.sum(p * tl.dot(grad_rows, tl.trans(v_rows), input_precision=PRECISION), axis=1)
    tl.store(delta + statistic, query_delta, mask=ok)
    acc = tl.zeros([BM, BD], tl.float32)
    for place in range(K * K):
        key, on_map = _neighbour(row + place // K - K // 2, column + place % K - K // 2, ok, height, width)
        k_rows = load_rows(k, key, on_map, k_layout[1], DQ, BD)
        v_rows = load_rows(v, key, on_map, v_layout[1], DV, BV)
        s = _local_scores(q_rows, k_rows, local_bias, head, place, on_map, K, HAS_LOCAL_BIAS)
        weight_grad = tl.sum(grad_rows.to(tl.float32) * v_rows.to(tl.float32), axis=1)
        ds = tl.exp2(s - query_lse) * (weight_grad - query_delta)
        acc += ds[:, None] * k_rows.to(tl.float32)
        if HAS_LOCAL_BIAS:
            tl.store(sums + ((image * blocks + block) * heads + head) * (K * K) + place, tl.sum(ds, axis=0))
    for start in range(0, pooled, BN):
        key = (start + tl.arange(0, BN)).to(tl.int64)
        key_ok = key < pooled
        k_rows = load_rows(pooled_k, key, key_ok, pooled_k_layout[1], DQ, BD)
        v_rows = load_rows(pooled_v, key, key_ok, pooled_v_layout[1], DV, BV)
        s = _pooled_scores(
            q_rows, k_rows, pooled_bias, head, token, ok, key, key_ok, tokens, pooled, HAS_POOLED_BIAS, PRECISION)
        ds = score_gradient(tl.exp2(s - query_lse[:, None]), grad_rows, v_rows, query_delta, PRECISION)
        acc = tl.dot(ds.to(k_rows.dtype), k_rows, acc, input_precision=PRECISION)
    store_rows(grad_q + contiguous * DQ, token, ok, heads * DQ, acc, DQ, BD)


@triton.jit
def _grad_key_kernel(
        q, k, v, local_bias, pooled_bias, local_weights, lse, grad, delta, grad_k, grad_v, q_layout, k_layout,
        v_layout, pooled_k_layout, pooled_v_layout, heads, height, width, pooled, blocks, K: tl.constexpr,
        HAS_LOCAL_BIAS: tl.constexpr, HAS_POOLED_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, DQ: tl.constexpr,
        DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        PRECISION: tl.constexpr,
):
    """Gradients of the map's keys and values, from the queries that have them at a place of their window."""
    head, block, image = _unit(blocks, heads)
    tokens = height * width
    token, row, column, ok = _tokens(block, height, width, BM)
    contiguous = image * tokens * heads + head
    q += image * q_layout[0] + head * q_layout[2]
    k_rows = load_rows(k + image * k_layout[0] + head * k_layout[2], token, ok, k_layout[1], DQ, BD)
    v_rows = load_rows(v + image * v_layout[0] + head * v_layout[2], token, ok, v_layout[1], DV, BV)
    acc_k = tl.zeros([BM, BD], tl.float32)
    acc_v = tl.zeros([BM, BV], tl.float32)
    for place in range(K * K):
        query, on_map = _neighbour(row + K // 2 - place // K, column + K // 2 - place % K, ok, height, width)
        q_rows = load_rows(q, query, on_map, q_layout[1], DQ, BD)
        grad_rows = load_rows(grad + contiguous * DV, query, on_map, heads * DV, DV, BV).to(tl.float32)
        statistic = (image * tokens + query) * heads + head
        query_lse = tl.load(lse + statistic, mask=on_map, other=0.0) * LOG2E
        query_delta = tl.load(delta + statistic, mask=on_map, other=0.0)
        s = _local_scores(q_rows, k_rows, local_bias, head, place, on_map, K, HAS_LOCAL_BIAS)
        p = tl.exp2(s - query_lse)
        ds = p * (tl.sum(grad_rows * v_rows.to(tl.float32), axis=1) - query_delta)
        acc_k += ds[:, None] * q_rows.to(tl.float32)
        if HAS_WEIGHTS:
            p += tl.load(local_weights + statistic * (K * K) + place, mask=on_map, other=0.0).to(tl.float32)
        acc_v += p[:, None] * grad_rows
    store_rows(grad_k + contiguous * DQ, token, ok, heads * DQ, acc_k, DQ, BD)
    store_rows(grad_v + contiguous * DV, token, ok, heads * DV, acc_v, DV, BV)


@triton.jit
def _grad_pooled_kernel(
        q, pooled_k, pooled_v, pooled_bias, lse, grad, delta, partial_k, partial_v, chunks, key_blocks, chunk_queries,
        q_layout, k_layout, v_layout, pooled_k_layout, pooled_v_layout, heads, height, width, pooled, blocks,
        K: tl.constexpr, HAS_LOCAL_BIAS: tl.constexpr, HAS_POOLED_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
        DQ: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        PRECISION: tl.constexpr,
):
    """Gradients of a block of pooled keys and values from one chunk of the queries."""
    head, block, rest = _unit(key_blocks, heads)
    chunk, image = rest % chunks, rest // chunks
    batch = tl.num_programs(0) // (heads * key_blocks * chunks)
    tokens = height * width
    key = (block * BM + tl.arange(0, BM)).to(tl.int64)
    key_ok = key < pooled
    contiguous = image * tokens * heads + head
    q += image * q_layout[0] + head * q_layout[2]
    k_rows = load_rows(pooled_k + image * pooled_k_layout[0] + head * pooled_k_layout[2], key, key_ok,
                       pooled_k_layout[1], DQ, BD)
    v_rows = load_rows(pooled_v + image * pooled_v_layout[0] + head * pooled_v_layout[2], key, key_ok,
                       pooled_v_layout[1], DV, BV)
    acc_k = tl.zeros([BM, BD], tl.float32)
    acc_v = tl.zeros([BM, BV], tl.float32)
    for start in range(0, chunk_queries, BN):
        token = chunk * chunk_queries + start + tl.arange(0, BN)
        ok = token < tokens
        q_rows = load_rows(q, token, ok, q_layout[1], DQ, BD)
        grad_rows = load_rows(grad + contiguous * DV, token, ok, heads * DV, DV, BV)
        statistic = (image * tokens + token) * heads + head
        query_lse = tl.load(lse + statistic, mask=ok, other=0.0) * LOG2E
        query_delta = tl.load(delta + statistic, mask=ok, other=0.0)
        s = scores(k_rows, q_rows, 1.0, PRECISION)
        if HAS_POOLED_BIAS:
            place = (head * tokens + token)[None, :].to(tl.int64) * pooled + key[:, None]
            s += tl.load(pooled_bias + place, mask=key_ok[:, None] & ok[None, :], other=0.0).to(tl.float32) * LOG2E
        p = tl.exp2(tl.where(ok[None, :], s, float("-inf")) - query_lse[None, :])
        acc_v = tl.dot(p.to(grad_rows.dtype), grad_rows, acc_v, input_precision=PRECISION)
        ds = p * (tl.dot(v_rows, tl.trans(grad_rows), input_precision=PRECISION) - query_delta[None, :])
        acc_k = tl.dot(ds.to(q_rows.dtype), q_rows, acc_k, input_precision=PRECISION)
    first = (chunk * batch + image) * pooled * heads + head
    store_rows(partial_k + first * DQ, key, key_ok, heads * DQ, acc_k, DQ, BD)
    store_rows(partial_v + first * DV, key, key_ok, heads * DV, acc_v, DV, BV)


@triton.jit
def _grad_bias_kernel(
        q, pooled_k, pooled_v, pooled_bias, lse, grad, delta, grad_bias, batch, key_blocks, q_layout, k_layout,
        v_layout, pooled_k_layout, pooled_v_layout, heads, height, width, pooled, blocks, K: tl.constexpr,
        HAS_LOCAL_BIAS: tl.constexpr, HAS_POOLED_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, DQ: tl.constexpr,
        DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        PRECISION: tl.constexpr,
):
    """Gradient of a block of the pooled keys' bias, summed over the images."""
    head, key_block, block = _unit(key_blocks, heads)
    tokens = height * width
    token = block * BM + tl.arange(0, BM)
    ok = token < tokens
    key = (key_block * BN + tl.arange(0, BN)).to(tl.int64)
    key_ok = key < pooled
    acc = tl.zeros([BM, BN], tl.float32)
    for number in range(batch):
        image = number + tl.full([], 0, tl.int64)
        contiguous = image * tokens * heads + head
        q_rows = load_rows(q + image * q_layout[0] + head * q_layout[2], token, ok, q_layout[1], DQ, BD)
        grad_rows = load_rows(grad + contiguous * DV, token, ok, heads * DV, DV, BV)
        k_rows = load_rows(pooled_k + image * pooled_k_layout[0] + head * pooled_k_layout[2], key, key_ok,
                           pooled_k_layout[1], DQ, BD)
        v_rows = load_rows(pooled_v + image * pooled_v_layout[0] + head * pooled_v_layout[2], key, key_ok,
                           pooled_v_layout[1], DV, BV)
        statistic = (image * tokens + token) * heads + head
        query_lse = tl.load(lse + statistic, mask=ok, other=0.0) * LOG2E
        query_delta = tl.load(delta + statistic, mask=ok, other=0.0)
        s = _pooled_scores(
            q_rows, k_rows, pooled_bias, head, token, ok, key, key_ok, tokens, pooled, HAS_POOLED_BIAS, PRECISION)
        acc += score_gradient(tl.exp2(s - query_lse[:, None]), grad_rows, v_rows, query_delta, PRECISION)
    place = (head * tokens + token)[:, None].to(tl.int64) * pooled + key[None, :]
    tl.store(grad_bias + place, acc.to(grad_bias.dtype.element_ty), mask=ok[:, None] & key_ok[None, :])
