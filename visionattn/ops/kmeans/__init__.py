"""K-means routed attention: every cluster's queries attend to the cluster's keys.

Definition: "Efficient Content-Based Sparse Attention with Routing Transformers" (arXiv 2003.05997), section 4. Which
tokens a cluster takes, and how clusters are found, is in :mod:`visionattn.ops.kmeans.clustering`.
"""
from typing import Any

import torch
from torch import Tensor

from ..checks import check_alike, check_sizes, checked_once, known_range, shapes
from ..dispatch import Backend, Op, any_problem, cast_for_autocast, empty_result, standard_only, wants_gradients
from ..recording import unit_values
from . import gathered, naive
from .cases import CASES, KMeansProblem, pattern_case

__all__ = ["KMeansProblem", "kmeans_attention"]


def _for_probabilities(
        problem: KMeansProblem, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[KMeansProblem, tuple[Any, ...]]:
    """The call that gives the probabilities of the tokens; memory keys, which are no tokens, take their share away."""
    v, = unit_values(v)
    *options, memory_key, memory_value, has_empty = others
    if memory_value is not None:
        memory_value = memory_value.new_zeros(*memory_value.shape[:-1], v.shape[-1])
    return problem, (q, k, v, *options, memory_key, memory_value, has_empty)


_op = Op("kmeans_attention", [
    Backend("gathered", any_problem, gathered.run),
    Backend("naive", any_problem, naive.run),
], CASES, _for_probabilities, pattern_case=pattern_case)


def kmeans_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_index: Tensor,
        key_index: Tensor,
        scale: float | None = None,
        backend: str | None = None,
        *,
        mask: Tensor | None = None,
        mask_self: bool = False,
        memory_key: Tensor | None = None,
        memory_value: Tensor | None = None,
) -> Tensor:
    """Attention of the queries that each cluster took to the keys that it took.

    A query that several clusters took gets the sum of what they give it, divided by their number plus 1e-5. A query
    that no cluster took gets zero.

    Args:
        q: Queries ``[batch, tokens, heads, head_dim]``.
        k: Keys of the same shape.
        v: Values ``[batch, tokens, heads, value_dim]``.
        query_index: int64 table ``[batch, heads, clusters, query_window]`` of the tokens that a cluster took, without
            repeats in a row; -1 is an empty place.
        key_index: int64 table ``[batch, heads, clusters, key_window]`` of the tokens whose keys a cluster took; no
            empty places.
        scale: Factor on ``q . k``; None means ``head_dim ** -0.5``.
        backend: ``"gathered"`` or ``"naive"``; None chooses (see :mod:`visionattn.ops.dispatch`).
        mask: Bool ``[batch, tokens]``, False for padding: a query and a key see each other only if both are True. A
            query that sees none of its keys gets their mean.
        mask_self: A token sees its own key (logit -5e4) only if it sees nothing else, as where keys are queries.
        memory_key: ``[heads, clusters, m, head_dim]``, m more keys of each cluster, that every query of it sees.
        memory_value: ``[heads, clusters, m, value_dim]``, their values.

    Returns:
        ``[batch, tokens, heads, value_dim]`` in the dtype of q, or autocast's where that is on (computed in float32 or
        better).

    Raises:
        ValueError: Arguments that do not fit each other; the message says which and what would fit. Indices are
            checked on CPU tensors only, as elsewhere the check would wait for the device.
        BackendError: ``backend`` cannot do this problem (a ValueError too).
    """
    q, k, v = cast_for_autocast(q, k, v)
    if memory_key is not None and memory_value is not None:
        memory_key, memory_value = cast_for_autocast(memory_key, memory_value)
    problem = _problem(
        q, k, v, query_index, key_index, mask, mask_self, memory_key, memory_value, wants_gradients(q, k, v),
        standard_only(q, k, v, memory_key, memory_value))
    lowest = _check_range("query_index", query_index, -1, problem.tokens)
    _check_range("key_index", key_index, 0, problem.tokens)
    has_empty = lowest is None or lowest < 0
    if isinstance(batch := q.shape[0], int) and batch == 0:
        return empty_result(v.shape, (q, k, v, memory_key, memory_value))
    return _op.run(
        problem, backend, q, k, v, query_index, key_index, problem.head_dim ** -0.5 if scale is None else scale, mask,
        mask_self, memory_key, memory_value, has_empty)


@checked_once
def _problem(
        q: Tensor, k: Tensor, v: Tensor, query_index: Tensor, key_index: Tensor, mask: Tensor | None, mask_self: bool,
        memory_key: Tensor | None, memory_value: Tensor | None, requires_grad: bool, standard: bool,
) -> KMeansProblem:
    _check_tokens(q, k, v)
    _check_indices(query_index, key_index, q)
    _check_extras(mask, memory_key, memory_value, q, v, query_index.shape[2])
    return KMeansProblem(
        tokens=q.shape[1], num_clusters=query_index.shape[2], query_window=query_index.shape[3],
        key_window=key_index.shape[3], heads=q.shape[2], head_dim=q.shape[3], value_dim=v.shape[3],
        has_mask=mask is not None, mask_self=mask_self, num_memory=0 if memory_key is None else memory_key.shape[2],
        dtype=q.dtype, device=q.device.type, requires_grad=requires_grad, standard_only=standard)


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be [batch, tokens, heads, head_dim]: got {shapes(q=q, k=k, v=v)}")
    if k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"k must have the shape of q, and v its batch, tokens and heads: got {shapes(q=q, k=k, v=v)}")
    check_sizes(q=q, v=v)
    check_alike(q, k=k, v=v)


def _check_indices(query_index: Tensor, key_index: Tensor, q: Tensor) -> None:
    batch, _, heads = q.shape[:3]
    for name, index in (("query_index", query_index), ("key_index", key_index)):
        if index.ndim != 4 or index.shape[:2] != (batch, heads) or index.shape[2] != query_index.shape[2]:
            raise ValueError(f"{name} must be [batch, heads, clusters, window] = [{batch}, {heads}, "
                             f"{query_index.shape[2] if query_index.ndim == 4 else 'clusters'}, window], "
                             f"got {list(index.shape)}")
        if index.dtype != torch.int64 or index.device != q.device:
            raise ValueError(f"{name} must be int64 on {q.device}, got {index.dtype} on {index.device}")
    check_sizes(query_index=query_index, key_index=key_index)


def _check_range(name: str, index: Tensor, lowest: int, tokens: int) -> int | None:
    """Returns the least entry, where it is known."""
    found = known_range(index)
    if found is None:
        return None
    if found[0] < lowest or found[1] >= tokens:
        raise ValueError(f"{name} must hold {lowest} to {tokens - 1}, got {found[0]} to {found[1]}")
    return found[0]


def _check_extras(
        mask: Tensor | None,
        memory_key: Tensor | None,
        memory_value: Tensor | None,
        q: Tensor,
        v: Tensor,
        num_clusters: int,
) -> None:
    batch, tokens, heads, head_dim = q.shape
    if mask is not None and (mask.shape != (batch, tokens) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool [batch, tokens] = [{batch}, {tokens}], got {mask.dtype} "
                         f"{list(mask.shape)}")
    if (memory_key is None) != (memory_value is None):
        raise ValueError("memory_key and memory_value must be given together")
    if memory_key is not None and memory_value is not None:
        size = memory_key.shape[2] if memory_key.ndim == 4 else "m"
        for name, x, dim in (("memory_key", memory_key, head_dim), ("memory_value", memory_value, v.shape[-1])):
            if list(x.shape) != [heads, num_clusters, size, dim] or x.dtype != q.dtype:
                raise ValueError(f"{name} must be {q.dtype} [heads, clusters, m, dim] = [{heads}, {num_clusters}, "
                                 f"{size}, {dim}], got {x.dtype} {list(x.shape)}")
