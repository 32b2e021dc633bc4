"""Routed attention: every region of queries attends to the key regions that a routing table lists for it.

Definition: bi-level routing attention, "BiFormer: Vision Transformer with Bi-Level Routing Attention"
(arXiv 2303.08810), section 3.2; how the table is made is the layer's business.
"""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..checks import check_alike, check_sizes, checked_once, known_range, shapes
from ..dispatch import Backend, Op, any_problem, cast_for_autocast, empty_result, standard_only, wants_gradients
from . import gathered, naive, triton_backend
from .cases import CASES, RoutedProblem, pattern_case

__all__ = ["RoutedProblem", "routed_attention"]


_op = Op("routed_attention", [
    Backend("triton", triton_backend.supports, triton_backend.run, triton_support.automatic),
    Backend("gathered", gathered.supports, gathered.run),
    Backend("naive", any_problem, naive.run),
], CASES, pattern_case=pattern_case)


def routed_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        region_size: int | Sequence[int],
        scale: float | None = None,
        backend: str | None = None,
        *,
        route_weights: Tensor | None = None,
) -> Tensor:
    """Attention of every region of queries to all tokens of the key regions that ``routes`` lists for it.

    The map is cut into regions of ``region_size``, numbered row by row. There is one softmax over the tokens of all
    listed regions; the order of a region's routes does not matter.

    Args:
        q: Queries ``[batch, height, width, heads, head_dim]``; region_size divides height and width.
        k: Keys ``[batch, key_height, key_width, heads, head_dim]``, cut into the same grid of regions as q (so a
            pooled key map has smaller regions).
        v: Values ``[batch, key_height, key_width, heads, value_dim]``.
        routes: Integer table ``[batch, heads or 1, regions, topk]`` of key regions, without repeats in a row.
        region_size: Height and width of a query region in tokens.
        scale: Factor on ``q . k``; None means ``head_dim ** -0.5``.
        backend: ``"triton"``, ``"gathered"`` or ``"naive"``; None chooses (see :mod:`visionattn.ops.dispatch`).
        route_weights: ``[batch, heads or 1, regions, topk]``; the keys and the values of a route are multiplied by its
            weight ("soft routing"). Gradients flow into it.

    Returns:
        ``[batch, height, width, heads, value_dim]`` in the dtype of q, or autocast's where that is on (computed in
        float32 or better).

    Raises:
        ValueError: Arguments that do not fit each other; the message says which and what would fit. Route indices are
            checked on CPU tensors only, as elsewhere the check would wait for the device.
        BackendError: ``backend`` cannot do this problem (a ValueError too).
    """
    q, k, v = cast_for_autocast(q, k, v)
    problem = _problem(
        q, k, v, routes, route_weights, region_size, wants_gradients(q, k, v),
        standard_only(q, k, v, route_weights))
    _check_range(routes)
    if isinstance(batch := q.shape[0], int) and batch == 0:
        return empty_result((*q.shape[:-1], v.shape[-1]), (q, k, v, route_weights))
    return _op.run(
        problem, backend, q, k, v, routes, problem.region_size, problem.key_region_size,
        problem.head_dim ** -0.5 if scale is None else scale, route_weights)


@checked_once
def _problem(
        q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None, region_size: Any,
        requires_grad: bool, standard: bool,
) -> RoutedProblem:
    sizes: Any = tuple(region_size) if isinstance(region_size, Sequence) else (region_size, region_size)
    grid = _check_maps(q, k, v, sizes)
    _check_routes(routes, q, grid, route_weights)
    return RoutedProblem(
        grid=grid, region_size=sizes, key_region_size=(k.shape[1] // grid[0], k.shape[2] // grid[1]),
        heads=q.shape[-2], head_dim=q.shape[-1], value_dim=v.shape[-1], topk=routes.shape[-1],
        shared_routes=routes.shape[1] == 1, has_route_weights=route_weights is not None, dtype=q.dtype,
        device=q.device.type, requires_grad=requires_grad, standard_only=standard)


def _check_maps(q: Tensor, k: Tensor, v: Tensor, region_size: tuple) -> tuple[int, int]:
    if not q.ndim == k.ndim == v.ndim == 5:
        raise ValueError(f"q, k and v must be [batch, height, width, heads, head_dim]: got {shapes(q=q, k=k, v=v)}")
    if k.shape[0] != q.shape[0] or k.shape[-2:] != q.shape[-2:]:
        raise ValueError(f"k must have q's batch, heads and head_dim: got {shapes(q=q, k=k, v=v)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must have k's batch, spatial shape and heads: got {shapes(q=q, k=k, v=v)}")
    check_alike(q, k=k, v=v)
    check_sizes(q=q, k=k, v=v)
    if len(region_size) != 2 or not (_is_size(region_size[0]) and _is_size(region_size[1])):
        raise ValueError(f"region_size must be a positive int or two of them, got {region_size}")
    if q.shape[1] % region_size[0] or q.shape[2] % region_size[1]:
        raise ValueError(
            f"region_size {region_size} does not divide the map of {q.shape[1]} x {q.shape[2]}; pad the map first")
    grid = (q.shape[1] // region_size[0], q.shape[2] // region_size[1])
    if k.shape[1] % grid[0] or k.shape[2] % grid[1]:
        raise ValueError(f"the key map of {k.shape[1]} x {k.shape[2]} cannot be cut into q's grid of "
                         f"{grid[0]} x {grid[1]} regions")
    return grid


def _is_size(size: Any) -> bool:
    return isinstance(size, (int, torch.SymInt)) and bool(size >= 1)


def _check_routes(routes: Tensor, q: Tensor, grid: tuple[int, int], route_weights: Tensor | None) -> None:
    regions = grid[0] * grid[1]
    if routes.ndim != 4 or routes.shape[0] != q.shape[0] or routes.shape[1] not in (1, q.shape[-2]) \
            or routes.shape[2] != regions:
        raise ValueError(f"routes must be [batch, heads or 1, regions, topk] = [{q.shape[0]}, {q.shape[-2]} or 1, "
                         f"{regions}, topk], got {list(routes.shape)}")
    if routes.dtype not in (torch.int64, torch.int32) or routes.device != q.device:
        raise ValueError(f"routes must be int64 or int32 on {q.device}, got {routes.dtype} on {routes.device}")
    if routes.shape[3] < 1:
        raise ValueError("routes must list at least one key region for every query region")
    if route_weights is not None and route_weights.shape != routes.shape:
        raise ValueError(f"route_weights must have the shape of routes, {list(routes.shape)}, got "
                         f"{list(route_weights.shape)}")


def _check_range(routes: Tensor) -> None:
    found, regions = known_range(routes), routes.shape[2]
    if found is not None and (found[0] < 0 or found[1] >= regions):
        raise ValueError(f"routes must be region numbers 0 to {regions - 1}, got {found[0]} to {found[1]}")
