"""Reversed attention: every sender spreads its value over the receivers, with weights that sum to one.

Definition: "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention" (arXiv 2304.03282),
section 3. The softmax is over those that receive, not over those that are read from as in usual attention. What scales
a sender's message (the paper's head selector and message controller) is the caller's business.
"""
from torch import Tensor

from ..checks import check_alike, check_sizes, checked_once, shapes
from ..dispatch import Backend, Op, any_problem, cast_for_autocast, empty_result, standard_only, wants_gradients
from . import blocked, naive
from .cases import CASES, ReversedProblem, pattern_case

__all__ = ["ReversedProblem", "reversed_attention"]


_op = Op(
    "reversed_attention", [Backend("blocked", any_problem, blocked.run), Backend("naive", any_problem, naive.run)],
    CASES, pattern_case=pattern_case)


def reversed_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
) -> Tensor:
    """``softmax(scale q k^T)^T (weights v)``, head by head: receivers sum what senders spread over them.

    Nothing is normalised over the senders: a receiver that many send to gets a large sum, one that nobody sends to gets
    next to nothing. What a sender gives to all receivers together is ``weights`` times its value.

    Args:
        q: Queries of the senders ``[batch, senders, heads, head_dim]``.
        k: Keys of the receivers ``[batch, receivers, heads, head_dim]``.
        v: Values of the senders ``[batch, senders, heads, value_dim]``.
        weights: What each sender's message counts in each head, ``[batch, senders, heads]``; None for 1.
        scale: Factor on ``q . k``; None means ``head_dim ** -0.5``.
        backend: ``"blocked"`` (senders in blocks, so that no matrix of all tokens is held) or ``"naive"``; None chooses
            (see :mod:`visionattn.ops.dispatch`).

    Returns:
        ``[batch, receivers, heads, value_dim]`` in the dtype of q, or autocast's where that is on (computed in float32
        or better).

    Raises:
        ValueError: Arguments that do not fit each other; the message says which and what would fit.
        BackendError: There is no such backend (a ValueError too).
    """
    weights = v.new_ones(v.shape[:-1]) if weights is None else weights
    q, k, v, weights = cast_for_autocast(q, k, v, weights)
    problem = _problem(q, k, v, weights, wants_gradients(q, k, v, weights), standard_only(q, k, v, weights))
    if isinstance(batch := q.shape[0], int) and batch == 0:
        return empty_result((*k.shape[:-1], v.shape[-1]), (q, k, v, weights))
    return _op.run(problem, backend, q, k, v, weights, problem.head_dim ** -0.5 if scale is None else scale)


@checked_once
def _problem(
        q: Tensor, k: Tensor, v: Tensor, weights: Tensor, requires_grad: bool, standard: bool,
) -> ReversedProblem:
    _check(q, k, v, weights)
    return ReversedProblem(
        senders=q.shape[1], receivers=k.shape[1], heads=q.shape[2], head_dim=q.shape[3], value_dim=v.shape[3],
        dtype=q.dtype, device=q.device.type, requires_grad=requires_grad, standard_only=standard)


def _check(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be [batch, tokens, heads, head_dim]: got {shapes(q=q, k=k, v=v)}")
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"k must have q's batch, heads and head_dim: got {shapes(q=q, k=k)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must have q's batch, tokens and heads: got {shapes(q=q, v=v)}")
    if weights.shape != q.shape[:3]:
        raise ValueError(f"weights must be [batch, senders, heads] = {list(q.shape[:3])}, got {list(weights.shape)}")
    check_sizes(q=q, k=k, v=v)
    check_alike(q, k=k, v=v, weights=weights)
