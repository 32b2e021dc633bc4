"""Reversed attention with a head selector, and the message controller that gates what tokens send.

"Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention" (arXiv 2304.03282), section 3. The
authors published no code: what their text leaves open is settled here, see docs/models/dependency_vit.md.
"""
from typing import Optional, Tuple  # noqa: UP035 - TorchScript reads Optional and Tuple

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops import reversed_attention
from ..ops.sdpa import probabilities
from .scripting import unscripted

__all__ = ["MessageController", "ReversedAttention"]

_OPEN = 4.  # logit that is added to those of the gates


class MessageController(nn.Module):
    """How much each token sends, between 0 and 1: the sigmoid of a perceptron.

    Gates are multiplied over the layers of a network, so they start nearly open: 0.98 where the perceptron gives 0.

    Args:
        dim: Channels of the tokens.
        hidden_dim: Width of the perceptron's hidden layer; None for ``dim``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, hidden_dim: int | None = None, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.hidden = nn.Linear(dim, hidden_dim or dim, bias=False, **dd)
        self.act = nn.GELU()
        self.out = nn.Linear(hidden_dim or dim, 1, bias=False, **dd)
        self.open = _OPEN

    def forward(self, x: Tensor) -> Tensor:
        """Gates ``[...]`` of tokens ``[..., dim]``, in float32 or better: near 1 others tell few apart."""
        logits = self.out(self.act(self.hidden(x))).squeeze(-1)
        if logits.dtype != torch.float64:
            logits = logits.to(torch.float32)
        return torch.sigmoid(logits + self.open)


@register_notrace_module
class ReversedAttention(nn.Module):
    """Attention in which every token, a child, spreads its message over all tokens, its parents.

    A token's message has the mass of its gate: it is split over the heads by a selector (a softmax over the heads) and
    in each head over the tokens (a softmax over those that receive). What a token receives is normalised by nothing.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        temperature: The selector's logits are divided by it: the lower, the more a token favours one head.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or ``temperature`` is not positive.
    """

    inseparable = "its selector splits a message among all heads"  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            temperature: float = 0.1,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim})")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.temperature = temperature
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.selector = nn.Linear(dim, num_heads, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, gate: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        """Tokens ``[batch, tokens, dim]``, or a map of them, to the same; ``gate [batch, tokens]``, None for 1."""
        qkv, shares = self.qkv(x.flatten(1, -2)), self._shares(x.flatten(1, -2))
        return self.proj_drop(self.proj(self._attend(qkv, shares, gate))).reshape(x.shape)

    @torch.jit.export
    def with_parents(
            self, x: Tensor, gate: Tensor, senders: Tensor, receivers: Tensor,
    ) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        """:meth:`forward`, and who of some tokens gets most of what each of some others sends, over all heads.

        Args:
            x: Tokens ``[batch, tokens, dim]``.
            gate: ``[batch, tokens]``.
            senders: Numbers of tokens ``[batch, children]``.
            receivers: Numbers of other tokens ``[batch, parents]``.

        Returns:
            The tokens, and for each of ``senders`` a place in ``receivers``, ``[batch, children]``.
        """
        qkv, shares = self.qkv(x), self._shares(x)
        parents = self._parents(qkv, shares, senders, receivers)
        return self.proj_drop(self.proj(self._attend(qkv, shares, gate))), parents

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_heads={self.num_heads}, temperature={self.temperature}"

    def _shares(self, x: Tensor) -> Tensor:
        """The head selector's choice, ``[batch, tokens, num_heads]``."""
        return (self.selector(x) / self.temperature).softmax(dim=-1)

    @unscripted
    def _attend(self, qkv: Tensor, shares: Tensor, gate: Tensor | None) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        weights = shares if gate is None else shares * gate[..., None]
        return reversed_attention(q, k, v, weights.to(v.dtype)).flatten(2)

    @unscripted
    def _parents(self, qkv: Tensor, shares: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        q, k, _ = qkv.detach().unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = take_tokens(q.flatten(2), senders).unflatten(-1, q.shape[2:]), k
        sent = probabilities(q.transpose(1, 2), k.transpose(1, 2))  # [batch, heads, children, tokens]
        mass = (sent * take_tokens(shares.detach(), senders).transpose(1, 2)[..., None]).sum(dim=1)
        return mass.gather(2, receivers[:, None].expand(-1, mass.shape[1], -1)).argmax(dim=-1)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The tokens ``index [batch, count]`` of ``x [batch, tokens, dim]``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
