"""Reversed attention as its definition says: the truth that other backends are compared with."""
import torch
from torch import Tensor

__all__ = ["run"]


def run(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The public function with every argument explicit."""
    dtype, compute = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.transpose(1, 2).to(compute) for x in (q, k, v))
    forward = (scale * q @ k.transpose(-2, -1)).softmax(dim=-1)  # [batch, heads, senders, receivers]
    received = forward.transpose(-2, -1) * weights.to(compute).transpose(1, 2)[:, :, None]
    return (received @ v).transpose(1, 2).to(dtype)
