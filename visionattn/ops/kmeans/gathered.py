"""K-means routed attention on any device: one gather, fused attention of all clusters at once, one sum per token."""
import torch
import torch.nn.functional as F
from torch import Tensor

from ..sdpa import sdpa

__all__ = ["run"]


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
) -> Tensor:
    """The public function with every argument explicit."""
    dtype, (batch, tokens, heads) = q.dtype, q.shape[:3]
    query_rows, key_rows = _rows(query_index, tokens), _rows(key_index, tokens)
    bias = None
    compute = torch.promote_types(dtype, torch.float32)
    if mask is not None or mask_self or q.device.type == "cpu":
        # Masked logits need float32's range; on a CPU, half precision is rounded once, at the end.
        q, k, v = q.to(compute), k.to(compute), v.to(compute)
    if mask is not None or mask_self:
        bias = _bias(query_index, key_index, mask, mask_self, memory_key is not None, compute)
    if mask is not None:
        # No gradient through a blocked pair, also where a query has no other.
        q, k = (x.masked_fill(~mask[:, :, None, None], 0) for x in (q, k))
    keys, values = _gather(k, key_rows), _gather(v, key_rows)
    if memory_key is not None and memory_value is not None:
        keys, values = _prepend(memory_key, keys), _prepend(memory_value, values)
        bias = None if bias is None else F.pad(bias, (memory_key.shape[2], 0))
    x = sdpa(_gather(q, query_rows), keys, values, bias, scale)

    # A row more than there are tokens, for the empty places. Half precision is summed in float32.
    places = torch.where(query_index < 0, batch * tokens * heads, query_rows).flatten()
    x = x.flatten(0, -2).to(compute)
    total = x.new_zeros(batch * tokens * heads + 1, x.shape[-1])
    total = total.scatter_add(0, places[:, None].expand_as(x), x)
    count = total.new_zeros(total.shape[0]).scatter_add(0, places, torch.ones_like(x[:, 0]))
    return (total / (count + 1e-5)[:, None])[:-1].view(batch, tokens, heads, -1).to(dtype)


def _rows(index: Tensor, tokens: int) -> Tensor:
    """Where the tokens of ``[batch, heads, clusters, window]`` lie in a flat ``[batch * tokens * heads, dim]``."""
    batch, heads = index.shape[:2]
    images = torch.arange(batch, device=index.device)[:, None, None, None]
    numbers = torch.arange(heads, device=index.device)[:, None, None]
    return (images * tokens + index.clamp(min=0)) * heads + numbers


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """``[batch, tokens, heads, dim]`` to ``[batch * heads, clusters, window, dim]``."""
    x = x.flatten(0, 2).index_select(0, rows.flatten())
    return x.view(-1, *rows.shape[2:], x.shape[-1])


def _prepend(memory: Tensor, x: Tensor) -> Tensor:
    """Adds ``[heads, clusters, m, dim]`` before the window of ``[batch * heads, clusters, window, dim]``."""
    batch = x.shape[0] // memory.shape[0]
    memory = memory.to(x.dtype).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    return torch.cat([memory, x], dim=2)


def _bias(
        query_index: Tensor, key_index: Tensor, mask: Tensor | None, mask_self: bool, has_memory: bool,
        dtype: torch.dtype,
) -> Tensor:
    """What is added to the logits, ``[batch * heads, clusters, query_window, key_window]``."""
    query, key = query_index[..., :, None], key_index[..., None, :]
    bias = torch.zeros(1, dtype=dtype, device=query.device)
    if mask is not None:
        images = torch.arange(mask.shape[0], device=mask.device)[:, None, None, None]
        seen = mask[images, query_index][..., :, None] & mask[images, key_index][..., None, :]
        bias = torch.where(seen, bias, torch.finfo(dtype).min)
    if mask_self:
        bias = torch.where(query == key, -5e4, bias)
    if mask is not None and not has_memory:
        # The mean of keys that are all blocked: their queries or they are zero. (Beside the least of numbers, the
        # logarithm of their count is lost, and with it the gradient's weights in PyTorch's kernel.)
        bias = bias.masked_fill((bias == torch.finfo(dtype).min).all(dim=-1, keepdim=True), 0)
    return bias.expand(*query_index.shape, key_index.shape[-1]).flatten(0, 1)
