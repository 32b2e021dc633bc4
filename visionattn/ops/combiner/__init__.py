"""Combiner attention: every query sees some keys directly and all others through summaries, under one softmax.

Definition: "Combiner: Full Attention Transformer with Sparse Computation Cost" (arXiv 2107.05768). Windows on maps of
two axes are this project's own form of its fixed pattern.
"""
from typing import Any, Literal

from torch import Tensor

from ..checks import check_alike, check_sizes, checked_once, shapes
from ..dispatch import Backend, Op, any_problem, cast_for_autocast, empty_result, standard_only, wants_gradients
from ..recording import unit_values
from . import blocked, naive
from .blocked import row_attention
from .cases import CASES, CombinerProblem, pattern_case

__all__ = ["CombinerProblem", "combiner_attention", "row_attention"]

_POOLS = {  # the defaults first
    "window": ("max", "mean", "sum"), "axial": ("max",), "mixture": ("sum", "max"), "logn": ("max",)}


def _for_probabilities(
        problem: CombinerProblem, q: Tensor, k: Tensor, v: Tensor, *others: Any,
) -> tuple[CombinerProblem, tuple[Any, ...]]:
    """The call with unit vectors as values, of which the values of the summaries are computed anew."""
    return problem._replace(has_summary_v=False), (q, k, *unit_values(v), *others[:-1], None)


_op = Op("combiner_attention", [
    Backend("blocked", any_problem, blocked.run), Backend("naive", any_problem, naive.run)], CASES, _for_probabilities,
    pattern_case=pattern_case)


def combiner_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Literal["window", "axial", "mixture", "logn"] = "window",
        window_size: tuple[int, int] | None = None,
        causal: bool = False,
        pool: str | None = None,
        count_bias: bool = False,
        scale: float | None = None,
        backend: str | None = None,
        *,
        summary_q: Tensor | None = None,
        summary_k: Tensor | None = None,
        summary_v: Tensor | None = None,
) -> Tensor:
    """One softmax over keys that a query sees directly and summaries of spans, whose values are attention in turn.

    A summary has a key and, as value, the attention of a query of its own to the tokens of its span, so that outputs
    are averages of all values. The patterns, of tokens in rows and columns:

    * ``"window"``: the map is cut into windows from the top left, the last ones partial. A query sees the tokens of its
      window and a summary of every window, its own included. A summary's query and key are pooled from its tokens'. A
      map of one row is the paper's *fixed* pattern; there, ``causal`` leaves own tokens up to the query and earlier
      windows.
    * ``"axial"``: a query sees the tokens of its row and, of every row, the summary that belongs to its column: the
      attention of the token in that row and column to its row. ``causal``: own row up to the query, earlier rows.
    * ``"mixture"``: a query sees its row, its column (itself twice) and summaries of what lies above, below, left and
      right of the tokens of its row (up and down) and of its column (left and right); their queries and keys are
      pooled. Beyond the border they have key 0 and the mean of the line as value. ``causal``: tokens above in its
      column, its row up to itself, and summaries of what is earlier.
    * ``"logn"``, of one row and always causal: a query sees itself and blocks of 1, 2, 4, ... tokens, one for every bit
      of its position, which cover all earlier tokens.

    Args:
        q: Queries ``[batch, rows, columns, heads, head_dim]``.
        k: Keys of the same shape.
        v: Values ``[batch, rows, columns, heads, value_dim]``.
        pattern: See above.
        window_size: Rows and columns of a window, of pattern ``"window"`` only.
        causal: Whether a query sees only itself and what comes before it, row by row.
        pool: ``"max"``, ``"mean"`` or ``"sum"`` of the queries and keys of a span; None for the pattern's first:
            ``"window"`` has max, mean and sum, ``"mixture"`` sum and max, the others max alone.
        count_bias: Adds the logarithm of a window's number of tokens to the score of its summary.
        scale: Factor on queries; None means ``head_dim ** -0.5``.
        backend: ``"blocked"`` (batched products) or ``"naive"``; None chooses (see :mod:`visionattn.ops.dispatch`).
        summary_q: What the queries of windows' summaries are pooled from, of q's shape; None for q.
        summary_k: What the keys of windows' summaries are pooled from, or the keys themselves of axial summaries, of
            k's shape; None for k.
        summary_v: The values of axial summaries, of v's shape, where the caller has them (:func:`row_attention`).

    Returns:
        ``[batch, rows, columns, heads, value_dim]`` in the dtype of q, or autocast's where that is on (computed in
        float32 or better).

    Raises:
        ValueError: Arguments that do not fit each other; the message says which and what would fit.
        BackendError: There is no such backend (a ValueError too).
    """
    q, k, v = cast_for_autocast(q, k, v)
    if summary_q is not None:
        summary_q, = cast_for_autocast(summary_q)
    if summary_k is not None:
        summary_k, = cast_for_autocast(summary_k)
    if summary_v is not None:
        summary_v, = cast_for_autocast(summary_v)
    tensors = (q, k, v, summary_q, summary_k, summary_v)
    problem = _problem(
        *tensors, pattern, window_size, causal, pool, count_bias, wants_gradients(*tensors), standard_only(*tensors))
    if isinstance(batch := q.shape[0], int) and batch == 0:
        return empty_result((*q.shape[:-1], v.shape[-1]), tensors)
    return _op.run(
        problem, backend, q, k, v, pattern, window_size, problem.causal, problem.pool, count_bias,
        problem.head_dim ** -0.5 if scale is None else scale, summary_q, summary_k, summary_v)


@checked_once
def _problem(
        q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor | None, summary_k: Tensor | None, summary_v: Tensor | None,
        pattern: str, window_size: tuple[int, int] | None, causal: bool, pool: str | None, count_bias: bool,
        requires_grad: bool, standard: bool,
) -> CombinerProblem:
    given = {name: x for name, x in (
        ("summary_q", summary_q), ("summary_k", summary_k), ("summary_v", summary_v)) if x is not None}
    _check(q, k, v, given)
    _check_options(q, pattern, window_size, causal, pool, count_bias, given)
    return CombinerProblem(
        size=(q.shape[1], q.shape[2]), heads=q.shape[3], head_dim=q.shape[4], value_dim=v.shape[4], pattern=pattern,
        window_size=window_size, causal=causal or pattern == "logn", pool=pool or _POOLS[pattern][0],
        count_bias=count_bias, has_summary_q=summary_q is not None, has_summary_k=summary_k is not None,
        has_summary_v=summary_v is not None, dtype=q.dtype, device=q.device.type, requires_grad=requires_grad,
        standard_only=standard)


def _check(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Tensor]) -> None:
    if q.ndim != 5 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError("q, k and v must be [batch, rows, columns, heads, head_dim] of one size (value_dim may "
                         f"differ): got {shapes(q=q, k=k, v=v)}")
    check_sizes(q=q, k=k, v=v)
    check_alike(q, k=k, v=v, **given)
    for name, x in given.items():
        wanted = v.shape if name == "summary_v" else q.shape
        if x.shape != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, got {list(x.shape)}")


def _check_options(
        q: Tensor, pattern: str, window_size: tuple[int, int] | None, causal: bool, pool: str | None, count_bias: bool,
        given: dict[str, Tensor],
) -> None:
    if pattern not in _POOLS:
        raise ValueError(f"pattern must be one of {', '.join(_POOLS)}, got {pattern!r}")
    if (window_size is not None) != (pattern == "window"):
        raise ValueError(f"window_size belongs to pattern 'window' alone, got {window_size} for {pattern!r}")
    if window_size is not None and (len(window_size) != 2 or min(window_size) < 1):
        raise ValueError(f"window_size must be positive rows and columns, got {window_size}")
    if pool is not None and pool not in _POOLS[pattern]:
        raise ValueError(f"pool of pattern {pattern!r} must be {' or '.join(_POOLS[pattern])}, got {pool!r}")
    if (pattern == "logn" or (causal and pattern == "window")) and q.shape[1] != 1:
        raise ValueError(f"pattern {pattern!r} is causal on tokens in one row only, got {q.shape[1]} rows")
    allowed = {"window": ("summary_q", "summary_k"), "axial": ("summary_k", "summary_v")}.get(pattern, ())
    if extra := [name for name in given if name not in allowed]:
        raise ValueError(f"pattern {pattern!r} takes no {extra[0]}")
    if count_bias and pattern != "window":
        raise ValueError(f"count_bias belongs to pattern 'window' alone, not to {pattern!r}")
