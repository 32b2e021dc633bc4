"""Sparsified attention: queries, or groups of them, attend to the keys of a list.

Definition: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers" (arXiv
2303.13755), section 3, where every query has a list of its own. Groups of consecutive queries that share a list are
this project's: their keys are gathered once. Which keys a list holds is the caller's business.
"""
import torch
from torch import Tensor

from ..checks import check_alike, check_sizes, checked_once, known_range, shapes
from ..dispatch import Backend, Op, any_problem, cast_for_autocast, empty_result, standard_only, wants_gradients
from . import gathered, masked, naive
from .cases import CASES, SparsifiedProblem, pattern_case

__all__ = ["SparsifiedProblem", "sparsified_attention"]


_op = Op("sparsified_attention", [
    Backend("masked", any_problem, masked.run, automatic=masked.pays),
    Backend("gathered", any_problem, gathered.run),
    Backend("naive", any_problem, naive.run),
], CASES, pattern_case=pattern_case)


def sparsified_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        scale: float | None = None,
        backend: str | None = None,
) -> Tensor:
    """Softmax attention ``softmax(scale q k^T) v`` of every query over the keys of its list alone.

    Args:
        q: Queries ``[batch, queries, heads, head_dim]``.
        k: Keys ``[batch, keys, heads, head_dim]``.
        v: Values ``[batch, keys, heads, value_dim]``.
        index: int64 numbers of keys ``[batch, heads, groups, chosen]``, without repeats in a list. The queries are cut
            into groups of equal size, in their order, that share a list; as many groups as queries give each its own.
        scale: Factor on ``q . k``; None means ``head_dim ** -0.5``.
        backend: ``"gathered"`` (copies of some lists' keys at a time), ``"masked"`` (all keys, under a mask) or
            ``"naive"`` (all copies at once); None chooses (see :mod:`visionattn.ops.dispatch`).

    Returns:
        ``[batch, queries, heads, value_dim]`` in the dtype of q, or autocast's where that is on (computed in float32 or
        better).

    Raises:
        ValueError: Arguments that do not fit each other; the message says which and what would fit.
        BackendError: There is no such backend (a ValueError too).
    """
    q, k, v = cast_for_autocast(q, k, v)
    problem = _problem(q, k, v, index, wants_gradients(q, k, v), standard_only(q, k, v))
    known = known_range(index)
    if known is not None and (known[0] < 0 or known[1] >= problem.keys):
        raise ValueError(f"index must hold 0 to {problem.keys - 1}, got {known[0]} to {known[1]}")
    if isinstance(batch := q.shape[0], int) and batch == 0:
        return empty_result((*q.shape[:-1], v.shape[-1]), (q, k, v))
    return _op.run(problem, backend, q, k, v, index, problem.head_dim ** -0.5 if scale is None else scale)


@checked_once
def _problem(
        q: Tensor, k: Tensor, v: Tensor, index: Tensor, requires_grad: bool, standard: bool,
) -> SparsifiedProblem:
    _check(q, k, v, index)
    return SparsifiedProblem(
        queries=q.shape[1], keys=k.shape[1], groups=index.shape[2], chosen=index.shape[3], heads=q.shape[2],
        head_dim=q.shape[3], value_dim=v.shape[3], dtype=q.dtype, device=q.device.type, requires_grad=requires_grad,
        standard_only=standard)


def _check(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be [batch, tokens, heads, head_dim]: got {shapes(q=q, k=k, v=v)}")
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"k must have q's batch, heads and head_dim: got {shapes(q=q, k=k)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's batch, tokens and heads: got {shapes(k=k, v=v)}")
    check_sizes(q=q, k=k, v=v)
    check_alike(q, k=k, v=v)
    if index.ndim != 4 or index.shape[0] != q.shape[0] or index.shape[1] != q.shape[2]:
        raise ValueError(f"index must be [batch, heads, groups, chosen] with q's batch and heads: got "
                         f"{shapes(index=index, q=q)}")
    check_sizes(index=index)
    if index.dtype != torch.int64 or index.device != q.device:
        raise ValueError(f"index must be int64 on {q.device}, got {index.dtype} on {index.device}")
    if isinstance(q.shape[1], int) and q.shape[1] % index.shape[2]:
        raise ValueError(f"the groups of index ({index.shape[2]}) must divide the queries ({q.shape[1]})")
