"""K-means routed attention on any device: one gather, fused attention of all clusters at once, one sum per token."""
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import standard_only
from ..sdpa import sdpa

__all__ = ["run"]

# With fewer keys, a vector's width, PyTorch's CPU kernel (2.15) takes twice as long, and loses NaN.
_CPU_KEYS = 16


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_index: Tensor,
        key_index: Tensor,
        scale: float,
        mask: Tensor | None,
        mask_self: bool,
        memory_key: Tensor | None,
        memory_value: Tensor | None,
        has_empty: bool,
) -> Tensor:
    """The public function with every argument explicit, and whether there may be empty places."""
    dtype, (batch, tokens, heads) = q.dtype, q.shape[:3]
    compute = torch.promote_types(dtype, torch.float32)
    if q.device.type == "cpu":  # half precision is rounded once, at the end; an accelerator's kernels take it as it is
        q, k, v = q.to(compute), k.to(compute), v.to(compute)
    memory = 0 if memory_key is None else memory_key.shape[2]
    bias = None
    if mask is not None or mask_self:
        bias = _bias(query_index, key_index, mask, mask_self, memory > 0, q.dtype)
    if mask is not None:
        # No gradient through a blocked pair, also where a query has no other.
        q, k = (x.masked_fill(~mask[:, :, None, None], 0) for x in (q, k))
    missing = _CPU_KEYS - memory - key_index.shape[3]
    if q.device.type == "cpu" and not standard_only(q, k, v) and missing > 0 and key_index.shape[3] > 0:
        key_index = torch.cat([key_index, key_index[..., :1].expand(-1, -1, -1, missing)], dim=-1)
        bias = q.new_zeros(_CPU_KEYS - memory - missing) if bias is None else bias
        bias = F.pad(bias, (0, missing), value=-torch.inf)
    query_rows, key_rows = _rows(query_index, tokens), _rows(key_index, tokens)
    keys, values = _gather(k, key_rows), _gather(v, key_rows)
    if memory_key is not None and memory_value is not None:
        keys, values = _prepend(memory_key, keys), _prepend(memory_value, values)
        bias = None if bias is None else F.pad(bias, (memory, 0))
    queries, places = _gather(q, query_rows), query_rows
    if has_empty:
        empty = query_index < 0
        # What stands in for it must not be felt by the gradients of the cluster, not even as NaN.
        queries = queries.masked_fill(empty.flatten(0, 1)[..., None], 0)
        places = torch.where(empty, batch * tokens * heads, query_rows)
    if bias is not None:
        bias = bias.expand(*queries.shape[:-1], -1)
    x = sdpa(queries, keys, values, bias, scale)

    # A row more than there are tokens, for the empty places. Half precision is summed in float32.
    places = places.flatten()
    x = x.flatten(0, -2).to(compute)
    total = x.new_zeros(batch * tokens * heads + 1, x.shape[-1])
    total = total.scatter_add(0, places[:, None].expand_as(x), x)
    count = total.new_zeros(total.shape[0]).scatter_add(0, places, torch.ones_like(x[:, 0]))
    return (total / (count + 1e-5)[:, None])[:-1].unflatten(0, (batch, tokens, heads)).to(dtype)


def _rows(index: Tensor, tokens: int) -> Tensor:
    """Where the tokens of ``[batch, heads, clusters, window]`` lie in a flat ``[batch * tokens * heads, dim]``."""
    batch, heads = index.shape[:2]
    images = torch.arange(batch, device=index.device)[:, None, None, None]
    numbers = torch.arange(heads, device=index.device)[:, None, None]
    return (images * tokens + index.clamp(min=0)) * heads + numbers


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """``[batch, tokens, heads, dim]`` to ``[batch * heads, clusters, window, dim]``."""
    shape = rows.shape
    return x.flatten(0, 2).index_select(0, rows.flatten()).unflatten(0, (shape[0] * shape[1], shape[2], shape[3]))


def _prepend(memory: Tensor, x: Tensor) -> Tensor:
    """Adds ``[heads, clusters, m, dim]`` before the window of ``[batch * heads, clusters, window, dim]``."""
    batch = x.shape[0] // memory.shape[0]
    memory = memory.to(x.dtype).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    return torch.cat([memory, x], dim=2)


def _bias(
        query_index: Tensor,
        key_index: Tensor,
        mask: Tensor | None,
        mask_self: bool,
        memory: bool,
        dtype: torch.dtype,
) -> Tensor:
    """What is added to the logits, ``[batch * heads, clusters, query_window, key_window]``: 0 or minus infinity.

    A query that sees no key has 0 for all of them, or for itself alone; as the logits of blocked pairs are 0 too, that
    is what very large negative ones mean, but with gradients that are exact and in every dtype.
    """
    if mask is not None:
        images = torch.arange(mask.shape[0], device=mask.device)[:, None, None, None]
        queries, keys = mask[images, query_index], mask[images, key_index]
    if mask_self:
        own = query_index[..., :, None] == key_index[..., None, :]
        seen = ~own if mask is None else queries[..., :, None] & keys[..., None, :] & ~own
        if not memory:  # which every query sees
            seen = seen | (own & ~seen.any(dim=-1, keepdim=True))
            seen = seen | ~seen.any(dim=-1, keepdim=True)
    elif memory:
        seen = queries[..., :, None] & keys[..., None, :]
    else:
        seen = keys[..., None, :] | ~(queries & keys.any(dim=-1, keepdim=True))[..., :, None]
    return torch.where(seen, torch.zeros((), dtype=dtype, device=seen.device), -torch.inf).flatten(0, 1)
