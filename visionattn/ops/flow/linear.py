"""Flow attention on any device, by products whose cost is linear in the number of tokens."""
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import numbers
from .naive import EPS

__all__ = ["run"]

_CHUNK = 64  # tokens of a causal sequence that are multiplied with each other


def run(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, eps_of_sums: bool) -> Tensor:
    """The public function with every argument explicit."""
    dtype, more = q.dtype, EPS if eps_of_sums else 0.
    # Tokens of a head side by side: queries and keys are read several times.
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)).transpose(1, 2) for x in (q, k, v))
    q, k = (x.clone(memory_format=torch.contiguous_format).sigmoid_() for x in (q, k))
    return (_causal if is_causal else _whole)(q, k, v, more).transpose(1, 2).to(dtype)


def _whole(q: Tensor, k: Tensor, v: Tensor, more: float) -> Tensor:
    """Attention to all keys, ``[batch, heads, tokens, dim]``; ``more`` is added to every sum."""
    def flow(x: Tensor, total: Tensor) -> Tensor:  # [batch, heads, tokens, 1], of a sum over the others, of one token
        total = total + EPS
        return x @ total.transpose(-2, -1) + (EPS * total.sum(dim=-1, keepdim=True) + more)

    incoming, outgoing = 1 / flow(q, k.sum(dim=2, keepdim=True)), 1 / flow(k, q.sum(dim=2, keepdim=True))
    received, given = flow(q, outgoing.transpose(-2, -1) @ k), flow(k, incoming.transpose(-2, -1) @ q)
    queries, keys = numbers((q.shape[2], k.shape[2]))
    if queries != keys:
        received = received * (queries / keys)
    share = given.clamp(-1, 1).exp()
    products = k.transpose(-2, -1) @ (v * (share / share.mean(dim=2, keepdim=True)))
    return q @ products * (incoming * received.sigmoid())


def _causal(q: Tensor, k: Tensor, v: Tensor, more: float) -> Tensor:
    """Attention to the keys up to a query's own, by sums of chunks and products within a chunk."""
    def flow(x: Tensor, others: Tensor) -> Tensor:  # [batch, heads, tokens, 1]
        total = others.cumsum(dim=2) + EPS
        return (x * total).sum(dim=-1, keepdim=True) + (EPS * total.sum(dim=-1, keepdim=True) + more)

    tokens, = numbers(q.shape[2:3])
    number = torch.arange(1, tokens + 1, dtype=q.dtype, device=q.device)[:, None]
    incoming, outgoing = 1 / flow(q, k), 1 / flow(k, q)
    received, given = flow(q, k * (outgoing * number)) / number, flow(k, q * (incoming * number)) / number
    share = given.clamp(-1, 1).exp()
    v = v * (share / share.cumsum(dim=2) * number)

    missing = -tokens % _CHUNK
    a, b, c = (F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, _CHUNK)) for x in (q, k, v))
    products = (b.transpose(-2, -1) @ c).cumsum(dim=2)  # of the chunks up to each one
    before = F.pad(products[:, :, :-1], (0, 0, 0, 0, 1, 0))
    out = a @ before + (a @ b.transpose(-2, -1)).tril() @ c
    return out.flatten(2, 3)[:, :, :tokens] * (incoming * received.sigmoid())
