"""Aggregated attention: every query attends to the window around it and to a few pooled keys, in one softmax.

Definition: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers" (arXiv 2311.17132), section 3; how
queries and keys are normed, scaled and pooled is the layer's business.
"""
from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..checks import check_alike, check_sizes, checked_once, shapes
from ..dispatch import Backend, Op, any_problem, cast_for_autocast, empty_result, standard_only, wants_gradients
from ..recording import unit_values
from . import naive, shifted, triton_backend
from .cases import CASES, AggregatedProblem, pattern_case

__all__ = ["AggregatedProblem", "aggregated_attention"]


def _for_probabilities(
        problem: AggregatedProblem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pooled_k: Tensor,
        pooled_v: Tensor,
        kernel_size: int,
        local_bias: Tensor | None,
        pooled_bias: Tensor | None,
        *after: Any,
) -> tuple[AggregatedProblem, tuple[Any, ...]]:
    """The call that gives the softmax alone: without the weights that are added after it, for all queries."""
    v, pooled_v = unit_values(v, pooled_v)
    problem = problem._replace(has_local_weights=False, has_active=False)
    return problem, (q, k, v, pooled_k, pooled_v, kernel_size, local_bias, pooled_bias, None, None)


_op = Op("aggregated_attention", [
    Backend("triton", triton_backend.supports, triton_backend.run, triton_support.automatic),
    Backend("shifted", any_problem, shifted.run),
    Backend("naive", any_problem, naive.run),
], CASES, _for_probabilities, pattern_case=pattern_case)


def aggregated_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pooled_k: Tensor,
        pooled_v: Tensor,
        kernel_size: int = 3,
        backend: str | None = None,
        *,
        local_bias: Tensor | None = None,
        pooled_bias: Tensor | None = None,
        local_weights: Tensor | None = None,
        active: Tensor | None = None,
) -> Tensor:
    """Attention of every query to the keys of the window around it and to pooled keys, under one softmax.

    The window is centred on the query and cut at the borders of the map. Its places are numbered row by row, from the
    top left one. Scores are ``q . k``: a scale is a factor of q, which may depend on the position.

    Args:
        q: Queries ``[batch, height, width, heads, head_dim]``, scaled.
        k: Keys ``[batch, height, width, heads, head_dim]``.
        v: Values ``[batch, height, width, heads, value_dim]``.
        pooled_k: Keys ``[batch, tokens, heads, head_dim]`` that all queries see.
        pooled_v: Values ``[batch, tokens, heads, value_dim]`` that go with them.
        kernel_size: Height and width of the window, odd.
        backend: ``"triton"``, ``"shifted"`` or ``"naive"``; None chooses (see :mod:`visionattn.ops.dispatch`).
        local_bias: ``[heads, kernel_size ** 2]``, added to the scores of the window's places.
        pooled_bias: ``[heads, height * width, tokens]``, added to the scores of the pooled keys.
        local_weights: ``[batch, height, width, heads, kernel_size ** 2]``, added to the window's weights after the
            softmax, so that these need neither be positive nor sum to one. Those of places beyond the map count for
            nothing.
        active: Booleans ``[batch, height, width, heads]``: the output is 0 where they are false, and is not computed
            where that saves time.

    Returns:
        ``[batch, height, width, heads, value_dim]`` in the dtype of q, or autocast's where that is on (computed in
        float32 or better).

    Raises:
        ValueError: Arguments that do not fit each other; the message says which and what would fit.
        BackendError: ``backend`` cannot do this problem (a ValueError too).
    """
    q, k, v, pooled_k, pooled_v = cast_for_autocast(q, k, v, pooled_k, pooled_v)
    if local_weights is not None:
        local_weights, = cast_for_autocast(local_weights)
    tensors = (q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights)
    problem = _problem(*tensors, active, kernel_size, wants_gradients(*tensors), standard_only(*tensors))
    if isinstance(batch := q.shape[0], int) and batch == 0:
        return empty_result((*q.shape[:-1], v.shape[-1]), tensors)
    return _op.run(problem, backend, q, k, v, pooled_k, pooled_v, kernel_size, local_bias, pooled_bias, local_weights,
                   active)


@checked_once
def _problem(
        q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, local_bias: Tensor | None,
        pooled_bias: Tensor | None, local_weights: Tensor | None, active: Tensor | None, kernel_size: int,
        requires_grad: bool, standard: bool,
) -> AggregatedProblem:
    _check_maps(q, k, v, pooled_k, pooled_v)
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be a positive odd int, got {kernel_size!r}")
    places, heads, tokens = kernel_size ** 2, q.shape[-2], q.shape[1] * q.shape[2]
    _check_table("local_bias", local_bias, q, (heads, places))
    _check_table("pooled_bias", pooled_bias, q, (heads, tokens, pooled_k.shape[1]))
    _check_table("local_weights", local_weights, q, (*q.shape[:-1], places))
    if active is not None and (active.shape != q.shape[:-1] or active.dtype != torch.bool):
        raise ValueError(f"active must be booleans {list(q.shape[:-1])}, got {active.dtype} {list(active.shape)}")
    return AggregatedProblem(
        size=(q.shape[1], q.shape[2]), heads=heads, head_dim=q.shape[-1], value_dim=v.shape[-1],
        kernel_size=kernel_size, pooled=pooled_k.shape[1], has_local_bias=local_bias is not None,
        has_pooled_bias=pooled_bias is not None, has_local_weights=local_weights is not None,
        has_active=active is not None, dtype=q.dtype, device=q.device.type, requires_grad=requires_grad,
        standard_only=standard)


def _check_maps(q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor) -> None:
    maps, pooled = shapes(q=q, k=k, v=v), shapes(pooled_k=pooled_k, pooled_v=pooled_v)
    if q.ndim != 5 or k.shape != q.shape:
        raise ValueError(f"q and k must both be [batch, height, width, heads, head_dim]: got {maps}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must have k's batch, height, width and heads: got {maps}")
    check_alike(q, k=k, v=v, pooled_k=pooled_k, pooled_v=pooled_v)
    if pooled_k.ndim != 4 or pooled_k.shape[0] != q.shape[0] or pooled_k.shape[2:] != q.shape[3:] \
            or pooled_v.shape[:-1] != pooled_k.shape[:-1] or pooled_v.shape[-1] != v.shape[-1]:
        raise ValueError(f"pooled_k and pooled_v must be [batch, tokens, heads, head_dim or value_dim]: got {pooled} "
                         f"beside {maps}")
    check_sizes(q=q, k=k, v=v, pooled_k=pooled_k, pooled_v=pooled_v)


def _check_table(name: str, table: Tensor | None, q: Tensor, shape: tuple) -> None:
    if table is None:
        return
    if tuple(table.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(table.shape)}")
    if table.device != q.device or not table.dtype.is_floating_point:
        raise ValueError(f"{name} is {table.dtype} on {table.device}, but q is {q.dtype} on {q.device}")
