"""Varied-size window attention: the keys of a window are sampled from a window of another size and place.

Definition: "VSA: Learning Varied-Size Window Attention in Vision Transformers" (ECCV 2022, arXiv 2204.08446), section
3.2. Which size and place is predicted by :class:`visionattn.layers.VariedSizeWindowAttention`.
"""
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..checks import check_alike, check_sizes, checked_once, shapes
from ..dispatch import Backend, Op, any_problem, cast_for_autocast, empty_result, standard_only, wants_gradients
from . import naive, sampled
from .cases import CASES, VariedWindowProblem, pattern_case

__all__ = ["VariedWindowProblem", "varied_window_attention"]


_op = Op("varied_window_attention", [
    Backend("sampled", any_problem, sampled.run),
    Backend("naive", any_problem, naive.run),
], CASES, pattern_case=pattern_case)


def varied_window_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offset: Tensor,
        stretch: Tensor,
        window_size: int | Sequence[int],
        bias: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
) -> Tensor:
    """Attention of the queries of each window of a map to keys of the same window, moved and stretched.

    The map is cut into windows. The keys and values of a window and head are a grid of as many points as the window has
    tokens: around its centre, moved by ``offset``, the window's own grid times ``1 + stretch``. They are interpolated
    linearly between the tokens of the whole map, outside of which all is zero. Offsets and stretches of zero give plain
    window attention.

    Args:
        q: Queries ``[batch, height, width, heads, head_dim]``; window_size divides height and width.
        k: Keys of the same shape.
        v: Values ``[batch, height, width, heads, value_dim]``.
        offset: ``[batch, rows, columns, heads, 2]``, for each window: tokens to the right and down. Like stretch, it
            may be of any floating-point dtype, and places are computed in float32 or better.
        stretch: ``[batch, rows, columns, heads, 2]``: by how much of its width and its height a window grows.
        window_size: Height and width of a window in tokens.
        bias: Table ``[heads, 2 * window height - 1, 2 * window width - 1]`` that is added to the scores, at query minus
            key plus window size - 1, where keys count by their places in the window's own grid.
        scale: Factor on ``q . k``; None means ``head_dim ** -0.5``.
        backend: ``"sampled"`` (with ``grid_sample``) or ``"naive"``; None chooses (see
            :mod:`visionattn.ops.dispatch`).

    Returns:
        ``[batch, height, width, heads, value_dim]`` in the dtype of q, or autocast's where that is on (computed in
        float32 or better).

    Raises:
        ValueError: Arguments that do not fit each other; the message says which and what would fit.
        BackendError: There is no such backend (a ValueError too).
    """
    q, k, v = cast_for_autocast(q, k, v)
    tensors = (q, k, v, offset, stretch, bias)
    problem = _problem(*tensors, window_size, wants_gradients(*tensors), standard_only(*tensors))
    if isinstance(batch := q.shape[0], int) and batch == 0:
        return empty_result((*q.shape[:-1], v.shape[-1]), tensors)
    return _op.run(
        problem, backend, q, k, v, offset, stretch, problem.window_size, bias,
        problem.head_dim ** -0.5 if scale is None else scale)


@checked_once
def _problem(
        q: Tensor, k: Tensor, v: Tensor, offset: Tensor, stretch: Tensor, bias: Tensor | None, window_size: Any,
        requires_grad: bool, standard: bool,
) -> VariedWindowProblem:
    window: Any = tuple(window_size) if isinstance(window_size, Sequence) else (window_size, window_size)
    _check_maps(q, k, v, window)
    rows, columns, heads = q.shape[1] // window[0], q.shape[2] // window[1], q.shape[3]
    for name, x in (("offset", offset), ("stretch", stretch)):
        _check(name, x, "[batch, rows, columns, heads, 2]", (q.shape[0], rows, columns, heads, 2), q)
    if bias is not None:
        _check("bias", bias, "[heads, 2 * window height - 1, 2 * window width - 1]",
               (heads, 2 * window[0] - 1, 2 * window[1] - 1), q)
    return VariedWindowProblem(
        size=(q.shape[1], q.shape[2]), window_size=window, heads=heads, head_dim=q.shape[4], value_dim=v.shape[4],
        has_bias=bias is not None, dtype=q.dtype, device=q.device.type, requires_grad=requires_grad,
        standard_only=standard)


def _check_maps(q: Tensor, k: Tensor, v: Tensor, window: tuple) -> None:
    if not q.ndim == k.ndim == v.ndim == 5:
        raise ValueError(f"q, k and v must be [batch, height, width, heads, head_dim]: got {shapes(q=q, k=k, v=v)}")
    if k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"k must have the shape of q, and v its batch, map and heads: got {shapes(q=q, k=k, v=v)}")
    check_sizes(q=q, v=v)
    check_alike(q, k=k, v=v)
    if len(window) != 2 or not all(isinstance(side, int) and side >= 1 for side in window):
        raise ValueError(f"window_size must be a positive int or two of them, got {window}")
    if q.shape[1] % window[0] or q.shape[2] % window[1]:
        raise ValueError(f"window_size {window} does not divide the map of {q.shape[1]} x {q.shape[2]}; pad it first")


def _check(name: str, x: Tensor, axes: str, shape: tuple, q: Tensor) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must be {axes} = {list(shape)}, got {list(x.shape)}")
    if not x.dtype.is_floating_point or x.device != q.device:
        raise ValueError(f"{name} must be floating point on {q.device}, got {x.dtype} on {x.device}")
