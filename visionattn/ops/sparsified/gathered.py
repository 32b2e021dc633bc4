"""Sparsified attention over gathered keys: each group's keys are copied once, then PyTorch's attention runs on them.

Some groups at a time, whose copies stay in a cache: to allocate those of all groups takes longer than the attention.
"""
import torch
from torch import Tensor

from ..dispatch import standard_only
from ..sdpa import sdpa

__all__ = ["run"]

_ENTRIES = 2**18  # of the keys that are copied at a time, of all heads and samples


def run(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> Tensor:
    """The public function with every argument explicit."""
    dtype = q.dtype
    if q.device.type == "cpu":  # half precision is rounded once, at the end
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    batch, tokens, heads = k.shape[:3]
    groups = index.shape[2]
    queries = q.transpose(1, 2).unflatten(2, (groups, q.shape[1] // groups)).flatten(0, 1)
    first = torch.arange(batch, device=q.device)[:, None] * tokens  # the number of a sample's first token
    rows = (index + first[..., None, None]) * heads + torch.arange(heads, device=q.device)[:, None, None]
    rows = rows.flatten(0, 1)
    width = k.shape[3]
    k, v = (x.flatten(0, 2) for x in (k, v))  # once, as it copies what is no block of memory
    if standard_only(q, k, v) or torch.compiler.is_compiling():
        out = _attend(queries, k, v, rows, scale)
    else:
        count = max(_ENTRIES // (batch * heads * index.shape[3] * width), 1)
        out = torch.cat([
            _attend(some, k, v, of_some, scale)
            for some, of_some in zip(queries.split(count, dim=1), rows.split(count, dim=1), strict=True)], dim=1)
    return out.flatten(1, 2).unflatten(0, (batch, heads)).transpose(1, 2).to(dtype)


def _attend(queries: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float) -> Tensor:
    """``[batch * heads, groups, queries of a group, dim]``, by the numbers of the keys among those of all heads."""
    keys, values = (x.index_select(0, rows.flatten()).unflatten(0, rows.shape) for x in (k, v))
    return sdpa(queries, keys, values, scale=scale)
