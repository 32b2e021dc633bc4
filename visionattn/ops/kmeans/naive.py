"""K-means routed attention as its definition says: a product for every cluster, added up at every token.

This form is the truth that every other backend is compared with.
"""
import torch
from torch import Tensor

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
        has_empty: bool,
) -> Tensor:
    """The public function with every argument explicit, and whether there may be empty places."""
    dtype, compute = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(compute).transpose(1, 2) for x in (q, k, v))  # [batch, heads, tokens, dim]
    batch, heads, tokens = q.shape[:3]
    images = torch.arange(batch, device=q.device)[:, None, None]
    numbers = torch.arange(heads, device=q.device)[None, :, None]
    total = v.new_zeros(batch, heads, tokens + 1, v.shape[-1])  # the last row collects what empty places get
    count = v.new_zeros(batch, heads, tokens + 1, 1)
    for cluster in range(query_index.shape[2]):
        query, key = query_index[:, :, cluster], key_index[:, :, cluster]  # [batch, heads, window]
        keys, values = k[images, numbers, key], v[images, numbers, key]
        queries = q[images, numbers, query]
        if has_empty:  # which stand for no token
            queries = queries.masked_fill(query[..., None] < 0, 0)
        logits = queries @ keys.transpose(-2, -1) * scale
        if mask is not None:
            seen = mask[images, query][..., :, None] & mask[images, key][..., None, :]
            logits = logits.masked_fill(~seen, torch.finfo(compute).min)
        if mask_self:
            logits = logits.masked_fill(query[..., :, None] == key[..., None, :], -5e4)
        if memory_key is not None and memory_value is not None:
            of_memory = queries @ memory_key[:, cluster].to(compute).transpose(-2, -1) * scale
            logits = torch.cat([of_memory, logits], dim=-1)
            values = torch.cat([memory_value[:, cluster].to(compute).expand(batch, -1, -1, -1), values], dim=2)
        place = (images, numbers, torch.where(query < 0, tokens, query))
        total = total.index_put(place, logits.softmax(dim=-1) @ values, accumulate=True)
        count = count.index_put(place, torch.ones_like(query, dtype=compute)[..., None], accumulate=True)
    return (total / (count + 1e-5))[:, :, :tokens].transpose(1, 2).to(dtype)
