"""Flow attention: keys compete for the queries' flow and queries for the keys', in place of a softmax over pairs.

Definition: "Flowformer: Linearizing Transformers with Conservation Flows" (arXiv 2202.06258), section 3.2. Time and
memory are linear in the number of queries and keys.
"""
from torch import Tensor

from ..checks import check_alike, check_sizes, checked_once, shapes
from ..dispatch import Backend, Op, any_problem, cast_for_autocast, empty_result, standard_only, wants_gradients
from . import linear, naive
from .cases import CASES, FlowProblem, pattern_case

__all__ = ["FlowProblem", "flow_attention"]

_op = Op("flow_attention", [
    Backend("linear", any_problem, linear.run),
    Backend("naive", any_problem, naive.run),
], CASES, pattern_case=pattern_case)


def flow_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        eps_of_sums: bool = False,
        backend: str | None = None,
) -> Tensor:
    """Flow attention, head by head.

    With sigmoids of q and k as capacities, the flow between query i and key j is ``q_i . k_j``, and ``in_i`` is its sum
    over the keys. What leaves a key is normed to one and tells how much a query receives (``cs``); what a query
    receives is normed to one and tells how much a key gives away (``cr``, cut at 1)::

        out_i = sigmoid(cs_i * queries / keys) * sum_j (q_i . k_j / in_i) * (keys * softmax_j(cr_j)) * v_j

    No scale, no position, no mask of pairs: to leave a key out, leave it out of k and v. The weights of a query do not
    sum to one.

    Args:
        q: Queries ``[batch, queries, heads, head_dim]``.
        k: Keys ``[batch, keys, heads, head_dim]``.
        v: Values ``[batch, keys, heads, value_dim]``.
        is_causal: A query sees the keys up to its own, of which there are as many as queries. Sums over all tokens
            become sums over those up to a token, their numbers the token's own. (A value that is no number may be felt
            by up to 63 queries before it.)
        eps_of_sums: Adds 1e-6 to the sums that norm and are normed, too, as the authors' model of images does. Each
            of their factors has it either way.
        backend: ``"linear"`` or ``"naive"``; None chooses (see :mod:`visionattn.ops.dispatch`).

    Returns:
        ``[batch, queries, heads, value_dim]`` in the dtype of q, or autocast's where that is on (computed in float32 or
        better, as sums over many tokens leave the range of float16).

    Raises:
        ValueError: Arguments that do not fit each other; the message says which and what would fit.
        BackendError: There is no such backend (a ValueError too).
    """
    q, k, v = cast_for_autocast(q, k, v)
    problem = _problem(q, k, v, is_causal, eps_of_sums, wants_gradients(q, k, v), standard_only(q, k, v))
    if isinstance(batch := q.shape[0], int) and batch == 0:
        return empty_result((*q.shape[:-1], v.shape[-1]), (q, k, v))
    return _op.run(problem, backend, q, k, v, is_causal, eps_of_sums)


@checked_once
def _problem(
        q: Tensor, k: Tensor, v: Tensor, is_causal: bool, eps_of_sums: bool, requires_grad: bool, standard: bool,
) -> FlowProblem:
    _check(q, k, v, is_causal)
    return FlowProblem(
        queries=q.shape[1], keys=k.shape[1], heads=q.shape[2], head_dim=q.shape[3], value_dim=v.shape[3],
        is_causal=is_causal, eps_of_sums=eps_of_sums, dtype=q.dtype, device=q.device.type, requires_grad=requires_grad,
        standard_only=standard)


def _check(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be [batch, tokens, heads, head_dim]: got {shapes(q=q, k=k, v=v)}")
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"k must have q's batch, heads and head_dim: got {shapes(q=q, k=k, v=v)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's batch, tokens and heads: got {shapes(q=q, k=k, v=v)}")
    if is_causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal attention needs as many keys as queries: got {shapes(q=q, k=k)}")
    check_sizes(q=q, k=k, v=v)
    check_alike(q, k=k, v=v)
