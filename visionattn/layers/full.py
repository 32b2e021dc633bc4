"""Attention of all tokens to all, and in-place activations of tensors that nobody else sees: pieces of many layers."""
from typing import Any, Optional

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules import module as modules

from ..ops.sdpa import sdpa

__all__ = ["SelfAttention", "attend", "unseen"]


@register_notrace_function
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor] = None) -> Tensor:  # noqa: UP045 - TorchScript
    """Attention ``[batch, heads, queries, dim]`` of ``q, k, v [batch, heads, tokens, dim]``.

    ``mask`` is added to the scores. It is PyTorch's own, with second derivatives and forward-mode ones.
    """
    if torch.jit.is_scripting():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return sdpa(q, k, v, mask)


class SelfAttention(nn.Module):
    """Attention of all tokens of a map to all, without a word on where they are.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    by_head: tuple[str, ...] = ("qkv",)  # see visionattn.analysis.prune_heads

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide dim {dim}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, height, width, dim]`` to the same."""
        qkv = self.qkv(x)
        B, H, W, C = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
        q, k, v = qkv.reshape(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.mix(q, k, v, H, W).transpose(1, 2).reshape(B, H, W, C))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """The attention of ``q, k, v [batch, heads, height * width, head_dim]``, before the output projection."""
        return attend(q, k, v)


@register_notrace_function
def unseen(*producers: nn.Module) -> bool:
    """Whether what these modules just returned may be written over.

    No gradient needs it, no hook was given it, no module that somebody put in one's place may have kept it, and nothing
    is traced, as a graph may be used otherwise than it was made.
    """
    if torch.is_grad_enabled() or modules._global_forward_hooks or modules._global_forward_pre_hooks:
        return False
    if torch.jit.is_tracing() or is_fx_symbolic_tracing():
        return False
    parts: list[Any] = [part for producer in producers for part in (producer, *producer._modules.values())
                        if part is not None]
    return all(type(part).__module__.startswith(("torch.", "visionattn.")) for part in parts) and not any(
        part._forward_hooks or part._forward_pre_hooks for part in parts)
