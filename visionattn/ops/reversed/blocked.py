"""Reversed attention block by block of senders, whose part of the matrix stays in a cache.

It is the gradient of usual attention's values: what ``softmax(q k^T) x`` passes to ``x`` from its result. So the
gradients here are those of usual attention of the incoming gradient, by PyTorch's fused kernels.
"""
from typing import Any

import torch
from torch import Tensor

from ..dispatch import differentiated, standard_only
from ..sdpa import probabilities, sdpa

__all__ = ["run"]

_ENTRIES = 2**19  # of a block's scores, of all heads and samples


def run(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The public function with every argument explicit."""
    dtype, compute = q.dtype, torch.promote_types(q.dtype, torch.float32)
    sent = (v.to(compute) * weights.to(compute)[..., None]).transpose(1, 2)
    q, k = (x.transpose(1, 2).to(compute) for x in (q, k))
    if standard_only(q, k, sent) or torch.compiler.is_compiling():
        received = _plain(q, k, sent, scale)
    else:
        received = _Blocked.apply(q, k, sent, scale)
    return received.transpose(1, 2).to(dtype)


def _plain(q: Tensor, k: Tensor, sent: Tensor, scale: float) -> Tensor:
    """``[batch, heads, receivers, dim]`` of q, k and sent ``[batch, heads, tokens, dim]``."""
    return probabilities(q, k, scale=scale).transpose(-2, -1) @ sent


class _Blocked(torch.autograd.Function):
    """The same, with a matrix of one block of senders at a time; differentiated twice it is the plain form."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, sent: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, sent)
        ctx.scale = scale
        senders, receivers = q.shape[2], k.shape[2]
        rows = max(_ENTRIES // (q.shape[0] * q.shape[1] * receivers), 16)
        if senders <= rows:
            return _plain(q, k, sent, scale)
        received = sent.new_zeros(*k.shape[:3], sent.shape[3])
        for block, message in zip(q.split(rows, dim=2), sent.split(rows, dim=2), strict=True):
            received += _plain(block, k, message, scale)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, sent = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = differentiated(
                lambda q, k, sent: _plain(q, k, sent, ctx.scale), (q, k, sent), grad, ctx.needs_input_grad[:3])
            return *found, None
        with torch.enable_grad():
            q, k = (x.detach().requires_grad_() for x in (q, k))
            gathered = sdpa(q, k, grad.detach(), scale=ctx.scale)  # the gradient of what was sent
        return *torch.autograd.grad(gathered, (q, k), sent), gathered.detach(), None
