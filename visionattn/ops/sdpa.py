"""PyTorch's ``scaled_dot_product_attention`` with the derivatives that its fused kernels lack: second, forward."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import differentiated, exporting, in_forward_mode, no_autocast, standard_only, transforming
from .recording import current_recorder

__all__ = ["probabilities", "sdpa", "sdpa_of_few_keys"]

# With fewer keys, a vector's width, PyTorch's CPU kernel (2.15) takes three times as long, and loses NaN.
_CPU_KEYS = 16

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention ``[batch, heads, queries, value_dim]`` of ``q``, ``k`` and ``v`` ``[batch, heads, tokens, dim]``.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: What is added to the scores, in the dtype of q, of a shape that broadcasts to theirs.
        scale: Factor on ``q . k``; None means ``head_dim ** -0.5``.

    Returns:
        The attention in the dtype of q, computed in float32 or better on a CPU. It can be differentiated any number of
        times, in forward mode too.
    """
    recorder = current_recorder()
    if recorder is not None:
        recorder.offer(lambda: probabilities(q, k, mask, scale), lambda: q.shape[:-1].numel() * k.shape[-2])
        with recorder.paused():
            return sdpa(q, k, v, mask, scale)
    if transforming() or in_forward_mode(q, k, v, mask):
        return _plain(q, k, v, mask, scale)
    if q.device.type == "cpu":
        if q.dtype in (torch.bfloat16, torch.float16):
            # There the kernels round between their products; those of accelerators sum in float32.
            wide = None if mask is None else mask.float()
            return sdpa(q.float(), k.float(), v.float(), wide, scale).to(q.dtype)
        if torch.is_grad_enabled() and _is_fused(q, k, v, mask):
            return _Fused.apply(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if exporting() and not torch.jit.is_tracing():
        # The strides of the kernels that the exporter takes the operator apart into, one after the other, differ: what
        # follows must not depend on them.
        return out.clone(memory_format=torch.contiguous_format)
    return out


def sdpa_of_few_keys(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """:func:`sdpa` where keys may be very few, which on a CPU are padded with keys that nobody sees.

    Args:
        q: Queries ``[batch, heads, queries, dim]``.
        k: Keys ``[batch, heads, keys, dim]``.
        v: Values ``[batch, heads, keys, value_dim]``.
        bias: Added to the scores of all samples, ``[heads, queries, keys]``, seen through a stride of 0.
        scale: Factor on ``q . k``; None means ``head_dim ** -0.5``.
    """
    if q.device.type == "cpu" and not standard_only(q, k, v) and (missing := _CPU_KEYS - k.shape[2]) > 0:
        k, v = (F.pad(x, (0, 0, 0, missing)) for x in (k, v))
        bias = q.new_zeros(1, 1, _CPU_KEYS - missing) if bias is None else bias
        bias = F.pad(bias, (0, missing), value=-torch.inf)
    if bias is not None:
        bias = (bias if bias.dtype == q.dtype else bias.to(q.dtype)).expand(q.shape[0], -1, -1, -1)
    return sdpa(q, k, v, bias, scale)


def _is_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether PyTorch would run its fused kernel for CPUs, with gradients."""
    if torch.compiler.is_compiling() or exporting() or not (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    if (mask is not None and mask.requires_grad) or not torch.backends.cuda.flash_sdp_enabled():
        return False
    return (q.ndim == 4 and q.shape[-1] == v.shape[-1] and q.numel() > 0 and k.numel() > 0
            and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """The definition, in float32 or better."""
    weights = probabilities(q, k, mask, scale)
    return (weights @ v.to(weights.dtype)).to(q.dtype)


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """What the values are weighed by, ``[batch, heads, queries, keys]``, in float32 or better.

    Args:
        q: Queries ``[batch, heads, queries, dim]``.
        k: Keys ``[batch, heads, keys, dim]``.
        mask: What is added to the scores, or booleans, False for the keys that a query does not see.
        scale: Factor on ``q . k``; None means ``dim ** -0.5``.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    with no_autocast(q.device.type):
        scores = (q.to(compute) * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.to(compute).transpose(-2, -1)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.to(compute)
    return scores.softmax(dim=-1)


class _Fused(torch.autograd.Function):
    """PyTorch's fused kernels; a gradient that is to be differentiated again is that of the definition."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        wide = mask if mask is None or mask.ndim in (2, 4) else mask.expand(*q.shape[:-1], k.shape[-2])
        out, lse = _forward(q, k, v, attn_mask=wide, scale=scale)
        ctx.save_for_backward(q, k, v, wide, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = differentiated(
                lambda q, k, v: _plain(q, k, v, mask, ctx.scale), (q, k, v), grad, ctx.needs_input_grad[:3])
            return *found, None, None
        return *_backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=ctx.scale), None, None
