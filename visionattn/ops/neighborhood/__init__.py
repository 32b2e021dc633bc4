"""Neighborhood attention: every query attends to a window of keys around it (NAT, DiNAT, causal and strided forms).

Definition: "Neighborhood Attention Transformer" (arXiv 2204.07143), "Dilated Neighborhood Attention Transformer"
(arXiv 2209.15001) and, for strides, "Generalized Neighborhood Attention" (arXiv 2504.16922).
"""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..checks import check_alike, check_sizes, checked_once
from ..dispatch import Backend, Op, any_problem, cast_for_autocast, empty_result, standard_only, wants_gradients
from ..recording import unit_values
from . import halo, naive, natten_backend, triton_backend
from .cases import CASES, NeighborhoodProblem, pattern_case

__all__ = ["NeighborhoodProblem", "neighborhood_attention"]


def _for_probabilities(
        problem: NeighborhoodProblem, q: Tensor, k: Tensor, v: Tensor, *others: Any,
) -> tuple[NeighborhoodProblem, tuple[Any, ...]]:
    """The call that gives the probabilities; additional keys come after those of the map."""
    *options, more_k, more_v, return_lse = others
    v, *more = unit_values(v) if more_v is None else unit_values(v, more_v)
    return problem, (q, k, v, *options, more_k, more[0] if more else None, return_lse)


_op = Op("neighborhood_attention", [
    Backend("triton", triton_backend.supports, triton_backend.run, triton_support.automatic),
    Backend("halo", any_problem, halo.run, aliases=("tiled",)),
    Backend("natten", natten_backend.supports, natten_backend.run),
    Backend("naive", any_problem, naive.run),
], CASES, _for_probabilities, pattern_case=pattern_case)


def neighborhood_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        bias: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
        *,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to the window of keys around it, on 1, 2 or 3 spatial axes.

    Axes are independent and there is one softmax over the product of their windows. On an axis of length L, dilation D
    splits the positions in residue classes (position mod D). Inside its class a query sees ``kernel_size`` consecutive
    keys, centred on it and shifted inward at the borders, never cut. With a stride S, runs of S consecutive queries
    share the window of their middle one. A causal axis ends the window at the query and cuts it at the start.

    Args:
        q: Queries ``[batch, *spatial, heads, head_dim]``.
        k: Keys ``[batch, *spatial, kv_heads, head_dim]``; kv_heads divides heads, and key head j serves the j-th
            block of ``heads / kv_heads`` query heads.
        v: Values ``[batch, *spatial, kv_heads, value_dim]``.
        kernel_size: Window size, at least 2, on every axis or one per axis.
        dilation: Distance between neighbours; ``kernel_size * dilation`` must not exceed the axis.
        stride: Queries that share a window, 1 to kernel_size.
        is_causal: Whether queries see no key after them.
        bias: Relative position bias table ``[heads, 2 * kernel_size - 1 (per axis)]``: to the score of query p and key
            s, ``bias[head, (s - p) / dilation + kernel_size - 1]`` is added after scaling. Odd kernel sizes, no
            causal axis; dtype of q or float32.
        scale: Factor on ``q . k``; None means ``head_dim ** -0.5``.
        backend: ``"triton"``, ``"halo"``, ``"natten"`` or ``"naive"``; None chooses (see
            :mod:`visionattn.ops.dispatch`).
        additional_keys: ``[batch, tokens, kv_heads, head_dim]``, keys that every query sees beside its window, in the
            same softmax.
        additional_values: ``[batch, tokens, kv_heads, value_dim]``.
        return_lse: Also return the log-sum-exp of the scores.

    Returns:
        ``[batch, *spatial, heads, value_dim]`` in the dtype of q, or autocast's where that is on (computed in float32
        or better); with ``return_lse``
        also ``[batch, *spatial, heads]`` in the compute dtype, natural logarithm, of the scaled and biased scores.

    Raises:
        ValueError: Arguments that do not fit each other; the message says which and what would fit.
        BackendError: ``backend`` cannot do this problem (a ValueError too).
    """
    q, k, v = cast_for_autocast(q, k, v)
    if additional_keys is not None and additional_values is not None:
        additional_keys, additional_values = cast_for_autocast(additional_keys, additional_values)
    problem = _problem(
        q, k, v, kernel_size, dilation, stride, is_causal, bias, additional_keys, additional_values, return_lse,
        wants_gradients(q, k, v), standard_only(q, k, v, bias))
    if isinstance(batch := q.shape[0], int) and batch == 0:
        out = empty_result((*q.shape[:-1], v.shape[-1]), (q, k, v, bias, additional_keys, additional_values))
        return (out, out.new_zeros(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))) \
            if return_lse else out
    out, lse = _op.run(
        problem, backend, q, k, v, problem.kernel_size, problem.dilation, problem.stride, problem.is_causal, bias,
        problem.head_dim ** -0.5 if scale is None else scale, additional_keys, additional_values, return_lse)
    return (out, lse) if return_lse else out


@checked_once
def _problem(
        q: Tensor, k: Tensor, v: Tensor, kernel_size: Any, dilation: Any, stride: Any, is_causal: Any,
        bias: Tensor | None, additional_keys: Tensor | None, additional_values: Tensor | None, return_lse: bool,
        requires_grad: bool, standard: bool,
) -> NeighborhoodProblem:
    axes = q.ndim - 3
    if axes not in (1, 2, 3):
        raise ValueError(
            f"q must be [batch, *spatial, heads, head_dim] with 1 to 3 spatial axes, got shape {_shape(q)}")
    kernel_size = _per_axis("kernel_size", kernel_size, axes, int)
    dilation = _per_axis("dilation", dilation, axes, int)
    stride = _per_axis("stride", stride, axes, int)
    is_causal = _per_axis("is_causal", is_causal, axes, bool)
    _check_tensors(q, k, v, additional_keys, additional_values)
    _check_windows(q.shape[1:-2], kernel_size, dilation, stride)
    if bias is not None:
        _check_bias(bias, q, kernel_size, is_causal)
    return NeighborhoodProblem(
        spatial=tuple(q.shape[1:-2]), heads=q.shape[-2], kv_heads=k.shape[-2], head_dim=q.shape[-1],
        value_dim=v.shape[-1], kernel_size=kernel_size, dilation=dilation, stride=stride, is_causal=is_causal,
        has_bias=bias is not None, additional=0 if additional_keys is None else additional_keys.shape[1],
        return_lse=return_lse, dtype=q.dtype, device=q.device.type, requires_grad=requires_grad,
        standard_only=standard)


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _per_axis(name: str, value, axes: int, kind: type) -> tuple:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{name} has {len(values)} values for {axes} spatial axes: {values}")
    for item in values:
        if not isinstance(item, kind) or (kind is int and isinstance(item, bool)):
            raise ValueError(f"{name} must be {kind.__name__}, or one per axis, got {value!r}")
    return values


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
    if k.ndim != q.ndim or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's batch, spatial shape and head_dim: q {_shape(q)}, k {_shape(k)}")
    if v.ndim != k.ndim or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must have k's batch, spatial shape and heads: k {_shape(k)}, v {_shape(v)}")
    check_sizes(q=q, k=k, v=v)
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"the {k.shape[-2]} heads of k must divide the {q.shape[-2]} heads of q")
    if (keys is None) != (values is None):
        raise ValueError("additional_keys and additional_values go together; only one was given")
    others = {"k": k, "v": v}
    if keys is not None and values is not None:
        others |= {"additional_keys": keys, "additional_values": values}
        expected = (q.shape[0], keys.shape[1], k.shape[-2], q.shape[-1])
        if tuple(keys.shape) != expected or values.shape[:-1] != keys.shape[:-1] or values.shape[-1] != v.shape[-1]:
            raise ValueError(
                "additional_keys and additional_values must be [batch, tokens, kv_heads, head_dim or value_dim]: "
                f"got {_shape(keys)} and {_shape(values)} beside k {_shape(k)}")
    check_alike(q, **others)


def _check_windows(spatial: Sequence[int], kernel_size: tuple, dilation: tuple, stride: tuple) -> None:
    for axis, (length, kernel, dil, step) in enumerate(zip(spatial, kernel_size, dilation, stride, strict=True)):
        if kernel < 2:
            raise ValueError(f"kernel_size must be at least 2, got {kernel} on axis {axis}")
        if dil < 1:
            raise ValueError(f"dilation must be at least 1, got {dil} on axis {axis}")
        if not 1 <= step <= kernel:
            raise ValueError(f"stride must be 1 to kernel_size ({kernel}), got {step} on axis {axis}")
        if kernel * dil > length:
            raise ValueError(
                f"kernel_size * dilation = {kernel} * {dil} = {kernel * dil} exceeds the {length} tokens of spatial "
                f"axis {axis}; pad the map to {kernel * dil} first")


def _check_bias(bias: Tensor, q: Tensor, kernel_size: tuple, is_causal: tuple) -> None:
    expected = (q.shape[-2], *(2 * kernel - 1 for kernel in kernel_size))
    if any(kernel % 2 == 0 for kernel in kernel_size):
        raise ValueError(f"relative position bias needs odd kernel sizes, got {kernel_size}")
    if any(is_causal):
        raise ValueError("relative position bias is not defined for causal axes")
    if tuple(bias.shape) != expected:
        raise ValueError(f"bias must be [heads, 2 * kernel_size - 1 per axis] = {list(expected)}, got {_shape(bias)}")
    if bias.device != q.device or bias.dtype not in (q.dtype, torch.float32):
        raise ValueError(f"bias is {bias.dtype} on {bias.device}, but q is {q.dtype} on {q.device}")
