"""Gates of attention heads: every token weights the heads and chooses some of them.

"MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842), section 3.
"""
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from .auxiliary import AuxiliaryLosses, in_backward
from .scripting import unscripted

__all__ = ["HeadGates", "balance_loss"]


@register_notrace_module
class HeadGates(AuxiliaryLosses, nn.Module):
    """Factors of the heads' outputs of every token, from the input of the attention.

    The first heads are shared: all tokens have them. Of the others, the routed ones, every token has those ``topk``
    that a router finds most probable; their factors sum to ``topk``, those of the shared ones to their number, and a
    third router balances the two kinds. Factors are no convex weights: they are 1 if all routers are indifferent.

    A training forward of gates with a router offers the auxiliary loss ``head_balance``, see
    :func:`visionattn.layers.auxiliary_losses`: it is least, ``topk`` before its weight, where tokens spread evenly over
    the routed heads.

    Args:
        dim: Channels of the input.
        num_heads: Heads of the attention.
        shared: Number of shared heads, the first ones.
        topk: Number of the other heads that a token has; 0 if all heads are shared.
        loss_weight: Weight of the auxiliary loss.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: There are no such heads.
    """

    def __init__(
            self, dim: int, num_heads: int, shared: int, topk: int, loss_weight: float = 0.01, device=None, dtype=None,
    ):
        super().__init__()
        routed = num_heads - shared
        if not 0 <= shared <= num_heads or not 0 <= topk <= routed or (topk == 0) != (routed == 0):
            raise ValueError(
                f"of {num_heads} heads, shared ({shared}) must be at most all and topk ({topk}) at least 1 and at most "
                f"the {routed} others, or 0 where all are shared")
        if topk == 0 and shared < 2:
            raise ValueError("a single shared head needs no gates; there must be two or some to choose from")
        dd = {"device": device, "dtype": dtype}
        self.shared_heads = shared
        self.topk = topk
        self.loss_weight = loss_weight
        self.routed = nn.Parameter(torch.empty(routed, dim, **dd)) if topk else None
        self.balance = nn.Parameter(torch.empty(2, dim, **dd)) if topk and shared else None
        self.shared = nn.Parameter(torch.empty(shared, dim, **dd)) if shared > 1 else None
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the routers anew."""
        for parameter in self.parameters():
            trunc_normal_(parameter, std=.02)

    def forward(self, x: Tensor) -> Tensor:
        """Factors ``[..., num_heads]`` of tokens ``[..., dim]``; 0 for heads that a token did not choose."""
        return self._gates(x)

    @unscripted
    def _gates(self, x: Tensor) -> Tensor:
        shared = routed = x.new_ones(*x.shape[:-1], self.shared_heads)
        if self.shared is not None:
            shared = self.shared_heads * F.linear(x, self.shared).softmax(dim=-1)
        if self.routed is None:
            return shared
        probability = F.linear(x, self.routed).softmax(dim=-1)
        chosen = torch.zeros_like(probability).scatter(-1, probability.topk(self.topk, dim=-1).indices, 1)
        if self.training:
            loss = self.loss_weight * balance_loss(probability, chosen)
            if not in_backward():  # gradient checkpointing comes a second time
                self.keep_auxiliary_loss("head_balance", loss)
        routed = probability * chosen
        least = torch.finfo(routed.dtype).eps
        routed = self.topk * routed / routed.sum(dim=-1, keepdim=True).clamp(min=least)
        if self.balance is not None:
            share = 2 * F.linear(x, self.balance).softmax(dim=-1)
            shared, routed = share[..., :1] * shared, share[..., 1:] * routed
        return torch.cat([shared, routed], dim=-1)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"shared={self.shared_heads}, topk={self.topk}"


def balance_loss(probability: Tensor, chosen: Tensor) -> Tensor:
    """``heads`` times the sum over heads of their mean probability times the share of tokens that chose them."""
    heads = probability.shape[-1]
    share = chosen.detach().flatten(0, -2).float().mean(dim=0).to(probability.dtype)
    return heads * (probability.flatten(0, -2).mean(dim=0) * share).sum()
