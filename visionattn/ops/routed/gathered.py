"""Routed attention on any device with plain torch operations, never holding more than a slice of the gathered keys.

The work is a list of units, one query region of one head of one image each. A few units at a time gather their keys
into a small buffer that stays in the cache, so memory does not grow with topk. The backward pass gathers again instead
of keeping anything. On CPU, small maps with long lists run in PyTorch's dense attention under a mask. Half precision is
computed in float32.
"""
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import differentiated, no_autocast, standard_only
from ..kept import keep, workspace
from ..operator import operator
from . import naive

__all__ = ["run", "supports"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CHUNK_BYTES = 2 ** 20  # of keys, values or scores at a time, about a core's L2 cache
_DENSE_TOKENS = 18 * 18  # maps up to this size, with lists of at least one region in so many, are done densely
_DENSE_REGIONS = 4
_FEWEST_TOKENS = 16  # fewer keys than a vector holds lose NaN in PyTorch's CPU kernel

# The kernels of PyTorch's dense attention on CPU: its public function does not return what the backward needs.
_aten = torch.ops.aten


def supports(problem) -> tuple[bool, str]:
    """Every valid problem of the usual dtypes can be done."""
    if problem.dtype not in _DTYPES:
        return False, f"{problem.dtype} is not one of {', '.join(map(str, _DTYPES))}"
    return True, ""


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
    """The public function with every argument explicit. The naive form stands for it where standard operators are
    wanted: in exported graphs, under transforms of torch.func and in forward mode.
    """
    if standard_only(q, k, v, route_weights):
        return naive.run(q, k, v, routes, region_size, key_region_size, scale, route_weights)
    return _forward(q, k, v, routes, route_weights, list(region_size), list(key_region_size), scale)[0]


@operator("visionattn::routed_gathered")
def _forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        route_weights: Tensor | None,
        region_size: list[int],
        key_region_size: list[int],
        scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp ``[batch, height, width, heads]`` where the dense backward wants it, else 0."""
    if _is_dense(q, k, v, routes, route_weights):
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            *(_tokens(x) for x in (q, k, v)), attn_mask=_mask(routes, q, k, region_size, key_region_size), scale=scale)
        out = _to_map(out, q)
        if _is_finite(out):
            return out, lse.transpose(1, 2).contiguous().view(q.shape[:-1])
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_zeros(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    for images in _image_groups(q, k, v):
        queries = _to_units(q[images], region_size).mul_(scale)
        keys, values = _to_units(k[images], key_region_size), _to_units(v[images], key_region_size)
        rows, weights = _unit_routes(routes[images], route_weights, images, q.shape[-2])
        result = queries.new_empty(*queries.shape[:2], v.shape[-1])
        for units in _chunks(queries, keys, values, rows):
            scores = queries[units] @ _gather(keys, rows[units]).transpose(-2, -1)
            if weights is not None:
                _by_region(scores, weights[units])
            attention = torch.softmax(scores, dim=-1, out=scores)
            if weights is not None:
                _by_region(attention, weights[units])
            torch.bmm(attention, _gather(values, rows[units]), out=result[units])
        _from_units(result, region_size, out[images])
    return out, lse


@_forward.register_fake
def _(q, k, v, routes, route_weights, region_size, key_region_size, scale):
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:-1], v.shape[-1]), lse


@operator("visionattn::routed_gathered_backward")
def _backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        route_weights: Tensor | None,
        out: Tensor,
        lse: Tensor,
        region_size: list[int],
        key_region_size: list[int],
        scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and (empty without such) route_weights, all contiguous."""
    grad_weights = q.new_zeros(routes.shape if route_weights is not None else 0,
                               dtype=torch.promote_types(q.dtype, torch.float32))
    if _is_dense(q, k, v, routes, route_weights):
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_tokens(x) for x in (grad, q, k, v, out)), lse.flatten(1, 2).transpose(1, 2), 0.0, False,
            attn_mask=_mask(routes, q, k, region_size, key_region_size), scale=scale)
        grad_q, grad_k, grad_v = (_to_map(x, like) for x, like in zip(gradients, (q, k, v), strict=True))
        if _is_finite(grad_q, grad_k, grad_v):
            return grad_q, grad_k, grad_v, grad_weights
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for images in _image_groups(q, k, v):
        queries, grads = _to_units(q[images], region_size).mul_(scale), _to_units(grad[images], region_size)
        keys, values = _to_units(k[images], key_region_size), _to_units(v[images], key_region_size)
        rows, weights = _unit_routes(routes[images], route_weights, images, q.shape[-2])
        grad_queries = torch.empty_like(queries)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        unit_grad_weights = queries.new_empty(rows.shape)
        for units in _chunks(queries, keys, values, rows):
            gathered_keys, gathered_values = _gather(keys, rows[units]), _gather(values, rows[units])
            scores = queries[units] @ gathered_keys.transpose(-2, -1)
            grad_attention = grads[units] @ gathered_values.transpose(-2, -1)
            if weights is None:
                attention = torch.softmax(scores, dim=-1, out=scores)
                _scatter_add(grad_values, rows[units], attention.transpose(-2, -1) @ grads[units])
                grad_scores = torch._softmax_backward_data(grad_attention, attention, -1, attention.dtype)
            else:
                w = weights[units]
                attention = torch.softmax(_by_region(scores.clone(), w), dim=-1)
                unit_grad_weights[units] = _sum_by_region(grad_attention * attention, w)
                grad_scores = torch._softmax_backward_data(
                    _by_region(grad_attention, w), attention, -1, attention.dtype)
                unit_grad_weights[units] += _sum_by_region(grad_scores * scores, w)
                _scatter_add(grad_values, rows[units], _by_region(attention, w).transpose(-2, -1) @ grads[units])
                grad_scores = _by_region(grad_scores, w)
            torch.bmm(grad_scores, gathered_keys, out=grad_queries[units])
            _scatter_add(grad_keys, rows[units], grad_scores.transpose(-2, -1) @ queries[units])
        _from_units(grad_queries.mul_(scale), region_size, grad_q[images])
        _from_units(grad_keys, key_region_size, grad_k[images])
        _from_units(grad_values, key_region_size, grad_v[images])
        if weights is not None:
            heads = unit_grad_weights.view(-1, q.shape[-2], *routes.shape[2:])
            grad_weights[images] = heads.sum(dim=1, keepdim=True) if routes.shape[1] == 1 else heads
    return grad_q, grad_k, grad_v, grad_weights


@_backward.register_fake
def _(grad, q, k, v, routes, route_weights, out, lse, region_size, key_region_size, scale):
    weights = q.new_empty(routes.shape if route_weights is not None else 0,
                          dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), weights


def _setup_context(ctx, inputs, output):
    q, k, v, routes, route_weights, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, routes, route_weights, *output)


def _autograd(ctx, grad, _):
    q, k, v, routes, route_weights, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
        def standard(q, k, v, route_weights):
            region_size, key_region_size, scale = ctx.options
            return naive.run(q, k, v, routes, tuple(region_size), tuple(key_region_size), scale, route_weights)

        needed = [*ctx.needs_input_grad[:3], ctx.needs_input_grad[4]]
        *found, grad_weights = differentiated(standard, (q, k, v, route_weights), grad, needed)
        return *found, None, grad_weights, None, None, None
    with no_autocast(q.device.type):
        grad_q, grad_k, grad_v, grad_weights = _backward(
            grad.contiguous(), q, k, v, routes, route_weights, out, lse, *ctx.options)
    grad_weights = None if route_weights is None else grad_weights.to(route_weights.dtype)
    return grad_q, grad_k, grad_v, None, grad_weights, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.visionattn.routed_gathered)
def _forward_flops(q, k, v, routes, route_weights, region_size, key_region_size, *_, **__) -> int:
    return naive.flops(q, v, routes, key_region_size)


@register_flop_formula(torch.ops.visionattn.routed_gathered_backward)
def _backward_flops(
        grad, q, k, v, routes, route_weights, output, lse, region_size, key_region_size, *_, **__,
) -> int:
    # (No argument may be called out_shape or out: PyTorch passes one of that name.)
    return naive.backward_flops(q, v, routes, key_region_size)


def _is_dense(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None) -> bool:
    """Whether dense attention under a mask costs less than gathering (measured)."""
    tokens, regions, topk = k.shape[1] * k.shape[2], routes.shape[2], routes.shape[3]
    return (q.device.type == "cpu" and route_weights is None and q.shape[-1] == v.shape[-1]
            and _FEWEST_TOKENS <= tokens <= _DENSE_TOKENS and regions <= _DENSE_REGIONS * topk)


def _is_finite(*results: Tensor) -> bool:
    """Whether the dense form gave numbers only: an infinity reaches regions that are not listed there."""
    return all(math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32))) for x in results)


def _mask(routes: Tensor, q: Tensor, k: Tensor, region_size: list[int], key_region_size: list[int]) -> Tensor:
    """What is added to the scores of all tokens, until the next call: minus infinity for regions not listed."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    times = routes.new_zeros(*routes.shape[:3], routes.shape[2])
    times.scatter_add_(3, routes.long(), torch.ones_like(routes))
    # A region that is listed twice counts twice in the softmax. (Logarithms of many zeros are slow.)
    weights = torch.arange(routes.shape[3] + 1, dtype=dtype, device="cpu").log_()
    mask = weights.index_select(0, times.flatten()).view_as(times)
    # Whole rows last, they are copied faster.
    mask = mask.gather(3, _regions(k, key_region_size).expand(*mask.shape[:3], -1))
    rows = _regions(q, region_size)
    shape = (*mask.shape[:2], len(rows), mask.shape[3])
    return torch.index_select(mask, 2, rows, out=workspace(math.prod(shape), dtype).view(shape))


def _regions(x: Tensor, region_size: list[int]) -> Tensor:
    """The region of every token of a map."""
    def make() -> Tensor:
        rows, columns = (torch.arange(size, device="cpu") // side for size, side in zip(*key, strict=True))
        return (rows[:, None] * (key[0][1] // key[1][1]) + columns).flatten()

    key = tuple(x.shape[1:3]), tuple(region_size)
    return keep("routed regions", key, make)


def _tokens(x: Tensor) -> Tensor:
    """``[images, heads, tokens, dim]`` in the dtype of computation, dim dense as PyTorch's kernel takes it."""
    x = x.flatten(1, 2).transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))
    return x if x.stride(-1) == 1 else x.contiguous()


def _to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_tokens`, in shape and dtype of ``like``, contiguous."""
    return tokens.transpose(1, 2).reshape(like.shape).to(like.dtype).contiguous()


def _image_groups(q: Tensor, k: Tensor, v: Tensor) -> Iterator[slice]:
    """As many images at a time as keep the copies in unit order small."""
    image_bytes = 4 * max(q[0].numel(), k[0].numel(), v[0].numel())
    step = max(1, _CHUNK_BYTES // image_bytes)
    return (slice(i, i + step) for i in range(0, len(q), step))


def _chunks(queries: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> Iterator[slice]:
    """As many units at a time as keep gathered keys and scores small."""
    gathered = rows.shape[1] * keys.shape[1]
    unit_bytes = queries.element_size() * gathered * max(queries.shape[1], keys.shape[2], values.shape[2])
    step = max(1, _CHUNK_BYTES // unit_bytes)
    return (slice(i, i + step) for i in range(0, len(rows), step))


def _by_unit(x: Tensor, region_size: list[int]) -> Tensor:
    """A view ``[images, heads, grid rows, grid columns, rows, columns, dim]`` of a map."""
    return x.unflatten(2, (-1, region_size[1])).unflatten(1, (-1, region_size[0])).permute(0, 5, 1, 3, 2, 4, 6)


def _to_units(x: Tensor, region_size: list[int]) -> Tensor:
    """``[images, height, width, heads, dim]`` to a copy ``[units, tokens, dim]`` in the dtype of computation."""
    x = _by_unit(x, region_size)
    copy = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device).copy_(x)
    return copy.view(-1, math.prod(region_size), x.shape[-1])


def _from_units(units: Tensor, region_size: list[int], target: Tensor) -> None:
    """The inverse of :func:`_to_units`, into ``target``."""
    target = _by_unit(target, region_size)
    target.copy_(units.view(target.shape))


def _unit_routes(
        routes: Tensor,
        route_weights: Tensor | None,
        images: slice,
        heads: int,
) -> tuple[Tensor, Tensor | None]:
    """The units whose keys a unit attends to, ``[units, topk]``, and their weights."""
    count, _, regions, topk = routes.shape
    first = torch.arange(count * heads, device=routes.device).view(count, heads, 1, 1) * regions
    rows = (routes + first).reshape(-1, topk)
    if route_weights is None:
        return rows, None
    weights = route_weights[images].expand(-1, heads, -1, -1).reshape(-1, topk)
    return rows, weights.to(torch.promote_types(weights.dtype, torch.float32))


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens of the listed units: ``[units, topk * tokens, dim]``."""
    return x.index_select(0, rows.flatten()).view(len(rows), -1, x.shape[-1])


def _scatter_add(target: Tensor, rows: Tensor, x: Tensor) -> None:
    """The adjoint of :func:`_gather`; in a fixed order, so that results repeat bit by bit."""
    x = x.reshape(-1, *target.shape[1:])
    if target.device.type == "cpu":
        target.index_add_(0, rows.flatten(), x)
    else:  # index_add_ has no fixed order there, this has
        target.index_put_((rows.flatten(),), x, accumulate=True)


def _by_region(x: Tensor, weights: Tensor) -> Tensor:
    """Multiplies ``[units, queries, topk * tokens]`` in place by a factor for each listed region."""
    x.unflatten(-1, (weights.shape[-1], -1)).mul_(weights[:, None, :, None])
    return x


def _sum_by_region(x: Tensor, weights: Tensor) -> Tensor:
    """Sums ``[units, queries, topk * tokens]`` for each listed region."""
    return x.unflatten(-1, (weights.shape[-1], -1)).sum(dim=(1, 3))
