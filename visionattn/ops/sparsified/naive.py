"""Sparsified attention as its definition says, a product for every list: the truth that others are compared with."""
import torch
from torch import Tensor

__all__ = ["run"]


def run(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> Tensor:
    """The public function with every argument explicit."""
    dtype, compute = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(compute) for x in (q, k, v))
    images = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    heads = torch.arange(q.shape[2], device=q.device)[:, None, None]
    keys, values = k[images, index, heads], v[images, index, heads]  # [batch, heads, groups, chosen, dim]
    queries = q.transpose(1, 2).unflatten(2, (index.shape[2], -1))
    weights = (scale * queries @ keys.transpose(-2, -1)).softmax(dim=-1)
    return (weights @ values).flatten(2, 3).transpose(1, 2).to(dtype)
