"""Flow attention as its definition says: the truth that other backends are compared with.

Every sum stands as the paper has it; in causal attention all of them are cumulative, of the products of keys and values
too.
"""
import torch
from torch import Tensor

from ..dispatch import numbers

__all__ = ["EPS", "run"]

EPS = 1e-6


def run(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, eps_of_sums: bool) -> Tensor:
    """The public function with every argument explicit."""
    dtype = q.dtype
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)).transpose(1, 2) for x in (q, k, v))
    q, k = q.sigmoid(), k.sigmoid()
    more = EPS if eps_of_sums else 0.
    queries, keys = numbers((q.shape[2], k.shape[2]))
    if is_causal:
        queries = keys = torch.arange(1, queries + 1, dtype=q.dtype, device=q.device)

    def total(x: Tensor) -> Tensor:
        return x.cumsum(dim=2) if is_causal else x.sum(dim=2, keepdim=True)

    def flow(x: Tensor, others: Tensor) -> Tensor:
        return ((x + EPS) * (total(others) + EPS)).sum(dim=-1) + more

    incoming, outgoing = 1 / flow(q, k), 1 / flow(k, q)
    if is_causal:
        received = flow(q, k * (outgoing * keys)[..., None]) / keys
        given = flow(k, q * (incoming * queries)[..., None]) / queries
    else:
        received = flow(q, k * outgoing[..., None])
        given = flow(k, q * incoming[..., None])
    allocation = (received * (queries / keys)).sigmoid()
    share = given.clamp(-1, 1).exp()
    competition = share / total(share[..., None])[..., 0] * keys
    if is_causal:
        products = (k[..., :, None] * (v * competition[..., None])[..., None, :]).cumsum(dim=2)
        out = ((q * incoming[..., None])[..., :, None] * products).sum(dim=-2)
    else:
        out = (q * incoming[..., None]) @ (k.transpose(-2, -1) @ (v * competition[..., None]))
    return (out * allocation[..., None]).transpose(1, 2).to(dtype)
