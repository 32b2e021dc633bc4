"""Heads as experts: every token chooses some heads, and a head attends among the tokens that chose it.

Union of Experts (arXiv 2503.02495), its selective multi-head attention; written from the formulas. What is this
project's own, says :class:`UnionOfExpertsAttention`.
"""
import math

import torch
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.dispatch import concrete, no_autocast, numbers, smaller
from ..ops.recording import current_recorder
from ..ops.sdpa import probabilities
from .auxiliary import AuxiliaryLosses, in_backward
from .full import attend
from .mixture_of_heads import balance_loss
from .scripting import unscripted

__all__ = ["UnionOfExpertsAttention", "expert_attention", "rotate"]

_UNSEEN = -3e4  # what is added to the scores of keys that are none: exp of it is 0, and every dtype has it


@register_notrace_module
class UnionOfExpertsAttention(AuxiliaryLosses, nn.Module):
    """Attention of each head among the tokens that chose it, ``topk`` heads a token.

    Takes maps ``[batch, height, width, dim]`` and tokens ``[batch, tokens, dim]`` alike; tokens of maps are numbered
    row by row for the rotary positions. A head that no token chose does nothing.

    This project's own, where the authors' code does otherwise: the outputs of a head are multiplied by its gate, so
    that the router learns (theirs gets no gradient); a head takes the tokens that chose it and no others (theirs fills
    up to the largest number in the batch, on which results then depend); positions follow the number of tokens at
    hand; and the balance loss.

    On a CPU a head's tokens are gathered, for a part ``(topk / num_heads) ** 2`` of the products of scores and values.
    In graphs, transforms and on other devices all heads see all tokens, masked, which gives the same numbers, unless
    ``capacity`` fixes the number of tokens of a head.

    A training forward offers the auxiliary loss ``expert_balance``, see :func:`visionattn.layers.auxiliary_losses`.

    Args:
        dim: Width of the input and of the output.
        num_heads: Heads, the experts; a head's width ``dim / num_heads`` must be a multiple of 4.
        topk: Heads of a token; None for half of them.
        gate_output: Whether outputs are multiplied by the gates; False is the authors' rule.
        capacity: The most tokens of a head in units of ``topk * tokens / num_heads``, their mean number, rounded up;
            the surplus of least gate is dropped. None for all.
        loss_weight: Weight of the auxiliary loss.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Heads of such a width cannot be, or an option is out of range.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            topk: int | None = None,
            gate_output: bool = True,
            capacity: float | None = None,
            loss_weight: float = 0.01,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % (4 * num_heads):
            raise ValueError(f"the width of a head, dim / num_heads = {dim} / {num_heads}, must be a multiple of 4")
        topk = max(num_heads // 2, 1) if topk is None else topk
        if not 1 <= topk <= num_heads or (capacity is not None and capacity <= 0):
            raise ValueError(f"topk must be 1 to {num_heads} and capacity positive, got {topk} and {capacity}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.topk = topk
        self.gate_output = gate_output
        self.capacity = capacity
        self.loss_weight = loss_weight
        width = dim // num_heads
        self.router = nn.Parameter(torch.empty(num_heads, dim, **dd))
        self.router_bias = nn.Parameter(torch.empty(num_heads, **dd))
        self.qkv = nn.Parameter(torch.empty(num_heads, dim, 3 * width, **dd))
        self.qkv_bias = nn.Parameter(torch.empty(num_heads, 3 * width, **dd))
        self.proj = nn.Parameter(torch.empty(num_heads, width, dim, **dd))
        self.proj_bias = nn.Parameter(torch.empty(num_heads, dim, **dd))
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)
            else:
                trunc_normal_(parameter, std=.02)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of x's shape."""
        return self.proj_drop(self._mix(x.flatten(1, -2)).reshape(x.shape))

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_heads={self.num_heads}, topk={self.topk}"

    @unscripted
    def _mix(self, x: Tensor) -> Tensor:
        """What the heads make of tokens ``[batch, tokens, dim]``."""
        batch, tokens, _ = numbers(x.shape)
        x = rotate(x, self.num_heads)
        with no_autocast(x.device.type):
            compute = torch.promote_types(x.dtype, torch.float32)
            scores = F.linear(x.to(compute), self.router.to(compute), self.router_bias.to(compute))
            probability = scores.softmax(dim=-1)
            chosen = torch.zeros_like(probability).scatter(-1, probability.topk(self.topk, dim=-1).indices, 1)
            gates = probability * chosen
            gates = gates / (gates.sum(dim=-1, keepdim=True) + 1)
            if self.training and not in_backward() and not (isinstance(batch, int) and batch == 0):
                self.keep_auxiliary_loss("expert_balance", self.loss_weight * balance_loss(probability, chosen))
        factors = (gates if self.gate_output else chosen).transpose(1, 2)  # by head
        keys, index = chosen.transpose(1, 2) > 0, None
        if self.capacity is not None or concrete(x):
            if self.capacity is None:
                kept = int(keys.sum(dim=-1).max())
            else:
                kept = smaller(math.ceil(self.capacity * self.topk * tokens / self.num_heads), tokens)
            # Heads with fewer tokens fill up with tokens that are no keys, and whose outputs count for nothing.
            order = gates.detach().transpose(1, 2).masked_fill(~keys, -1).argsort(dim=-1, descending=True, stable=True)
            index = order[..., :kept].sort(dim=-1).values
            keys, factors = keys.gather(-1, index), factors.gather(-1, index)
        return expert_attention(x, index, keys, factors, self.qkv, self.qkv_bias, self.proj, self.proj_bias)


def rotate(x: Tensor, num_heads: int) -> Tensor:
    """Tokens ``[batch, tokens, dim]`` with rotary positions, before any projection.

    Of each head's channels the second half is turned by angles of the position, in pairs of neighbours, and put first.
    """
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (num_heads, -1)).chunk(2, dim=-1)
    half = second.shape[-1]
    tokens, = numbers(x.shape[1:2])
    rate = 10000. ** (-torch.arange(0, half, 2, device=x.device, dtype=second.dtype) / half)
    angle = (torch.arange(tokens, device=x.device, dtype=second.dtype)[:, None] * rate)[:, None]
    a, b = second.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1).flatten(-2)
    return torch.cat([turned, first], dim=-1).flatten(-2).to(x.dtype)


def expert_attention(
        x: Tensor,
        index: Tensor | None,
        keys: Tensor,
        factors: Tensor,
        qkv: Tensor,
        qkv_bias: Tensor,
        proj: Tensor,
        proj_bias: Tensor,
        scale: float | None = None,
) -> Tensor:
    """The sum over heads of what each makes of its tokens.

    Args:
        x: Tokens ``[batch, tokens, dim]``.
        index: The tokens of each head ``[batch, heads, kept]``; None for all tokens of every head.
        keys: Which of them are keys, booleans of that shape; where none is, all are.
        factors: On their outputs, of that shape.
        qkv: ``[heads, dim, 3 * head_dim]``.
        qkv_bias: ``[heads, 3 * head_dim]``.
        proj: ``[heads, head_dim, dim]``.
        proj_bias: ``[heads, dim]``.
        scale: Factor on scores; None means ``head_dim ** -0.5``.

    Returns:
        ``[batch, tokens, dim]``; 0 for tokens of no head.
    """
    batch, tokens, dim = numbers(x.shape)
    heads = qkv.shape[0]
    own = x[:, None]
    if index is not None:
        own = own.expand(-1, heads, -1, -1).gather(2, index[..., None].expand(-1, -1, -1, dim))
    q, k, v = (own @ qkv + qkv_bias[:, None]).chunk(3, dim=-1)
    if scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)
    mask = torch.zeros_like(keys, dtype=q.dtype).masked_fill(~keys, _UNSEEN)[..., None, :]
    out = _attend(q, k, v, mask, index, keys, tokens)
    factors = factors.to(out.dtype)
    out = out * factors[..., None]
    if index is None:
        out = out.transpose(1, 2).flatten(2) @ proj.flatten(0, 1)
        return (out + factors.transpose(1, 2) @ proj_bias).contiguous()
    out = out @ proj + factors[..., None] * proj_bias[:, None]
    place = index.flatten(1)[..., None].expand(-1, -1, dim)
    return out.new_zeros(batch, tokens, dim).scatter_add(1, place, out.flatten(1, 2))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, index: Tensor | None, keys: Tensor, tokens: int) -> Tensor:
    """Attention of each head; offers maps of all tokens, 0 for what a head does not serve."""
    recorder = current_recorder()
    if recorder is None:
        return attend(q, k, v, mask)

    def maps() -> Tensor:
        weights = probabilities(q, k, mask) * keys[..., None]
        if index is None:
            return weights
        rows = weights.new_zeros(*weights.shape[:3], tokens).scatter_add(
            3, index[..., None, :].expand(-1, -1, weights.shape[2], -1), weights)
        return rows.new_zeros(*rows.shape[:2], tokens, tokens).scatter_add(
            2, index[..., None].expand(-1, -1, -1, tokens), rows)

    recorder.offer(maps)
    with recorder.paused():
        return attend(q, k, v, mask)
