"""Sparsified attention as PyTorch's attention to all keys under a mask of the lists: for lists that few queries share.

A copy of a list's keys is read by the queries of the list alone. On a CPU, where all queries read the same keys from
the cache, more products of more rows take less time than such copies. Some queries at a time, whose masks are small.
"""
import torch
from torch import Tensor

from ..dispatch import numbers, standard_only
from ..sdpa import sdpa
from .cases import SparsifiedProblem

__all__ = ["pays", "run"]

_ENTRIES = 2**20  # of the masks of all heads and samples at a time
_COPY = 12  # queries that take as long as to copy a key and a value for them


def pays(problem: SparsifiedProblem) -> bool:
    """Whether this form is faster than copies of the keys, as measured on CPUs."""
    sizes = (problem.queries, problem.keys, problem.groups, problem.chosen)
    if problem.device != "cpu" or not all(isinstance(n, int) for n in sizes):  # symbols must not be compared
        return False
    size = problem.queries // problem.groups
    return problem.keys * size < problem.chosen * (_COPY + size)


def run(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> Tensor:
    """The public function with every argument explicit."""
    dtype = q.dtype
    if q.device.type == "cpu":  # half precision is rounded once, at the end
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    queries, k, v = (x.transpose(1, 2) for x in (q, k, v))
    count, groups = numbers((q.shape[1], index.shape[2]))
    size = count // groups
    if standard_only(q, k, v) or torch.compiler.is_compiling():
        out = _attend(queries, k, v, index, size, scale)
    else:
        count = max(_ENTRIES // (k.shape[0] * k.shape[1] * k.shape[2] * size), 1)
        parts = zip(queries.split(count * size, dim=2), index.split(count, dim=2), strict=True)
        out = torch.cat([_attend(some, k, v, of_some, size, scale) for some, of_some in parts], dim=2)
    return out.transpose(1, 2).to(dtype)


def _attend(queries: Tensor, k: Tensor, v: Tensor, index: Tensor, size: int, scale: float) -> Tensor:
    """Of ``[batch, heads, tokens, dim]``, by the lists of the queries, ``size`` of which have one."""
    mask = queries.new_full((*index.shape[:3], k.shape[2]), -torch.inf).scatter(3, index, 0.)
    if size > 1:
        mask = mask.repeat_interleave(size, dim=2)
    return sdpa(queries, k, v, mask, scale)
