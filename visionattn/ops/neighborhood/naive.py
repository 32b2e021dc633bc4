"""Neighborhood attention as its definition says: gather every query's window, then softmax over it.

This form is the truth that every other backend is compared with. It takes memory of ``tokens * window`` keys.
"""
import torch
from torch import Tensor

__all__ = ["axis_windows", "run"]


def axis_windows(
        length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool, device: torch.device | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of every query position on one axis.

    Dilation splits the axis in residue classes (position mod dilation); within its class, a query's window is that of
    the leader of its run of ``stride`` queries, shifted inward at the borders (causal: cut at the start instead).

    Returns:
        Position of each key ``[length, kernel_size]``; its offset from the query in units of dilation, same shape;
        whether the slot holds a key of this query, same shape (False only for causal windows).
    """
    position = torch.arange(length, device=device)
    residue, index = position % dilation, position // dilation
    members = (length - residue + dilation - 1) // dilation
    if is_causal:
        leader = torch.minimum(index // stride * stride + stride - 1, members - 1)
        start = (leader - kernel_size + 1).clamp(min=0)
    else:
        leader = torch.minimum(index // stride * stride + stride // 2, members - 1)
        start = torch.minimum((leader - kernel_size // 2).clamp(min=0), members - kernel_size)
    key = start[:, None] + torch.arange(kernel_size, device=device)
    offset = key - index[:, None]
    valid = offset <= 0 if is_causal else torch.ones_like(key, dtype=torch.bool)
    key = torch.where(valid, key, index[:, None])
    return key * dilation + residue[:, None], offset, valid


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel_size: tuple[int, ...],
        dilation: tuple[int, ...],
        stride: tuple[int, ...],
        is_causal: tuple[bool, ...],
        bias: Tensor | None,
        scale: float,
        additional_keys: Tensor | None,
        additional_values: Tensor | None,
        return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The public function with every argument explicit; returns the output and, if asked for, the log-sum-exp."""
    dtype, spatial, heads = q.dtype, q.shape[1:-2], q.shape[-2]
    compute = torch.promote_types(dtype, torch.float32)
    group = heads // k.shape[-2]

    # Flat key index, bias entry and validity of every (query, window slot), built up axis by axis.
    key = entry = torch.zeros(1, 1, dtype=torch.long, device=q.device)
    valid = torch.ones(1, 1, dtype=torch.bool, device=q.device)
    for axis, length in enumerate(spatial):
        window = axis_windows(
            length, kernel_size[axis], dilation[axis], stride[axis], is_causal[axis], device=q.device)
        position, offset, ok = (t[None, :, None, :] for t in window)
        key = (key[:, None, :, None] * length + position).flatten(0, 1).flatten(1, 2)
        entry = entry[:, None, :, None] * (2 * kernel_size[axis] - 1) + offset + kernel_size[axis] - 1
        entry = entry.flatten(0, 1).flatten(1, 2)
        valid = (valid[:, None, :, None] & ok).flatten(0, 1).flatten(1, 2)

    def heads_first(x: Tensor, repeat: int) -> Tensor:
        return x.to(compute).flatten(1, -3).transpose(1, 2).repeat_interleave(repeat, dim=1)

    q, k, v = heads_first(q, 1) * scale, heads_first(k, group), heads_first(v, group)
    scores = torch.einsum("bhqd,bhqwd->bhqw", q, k[:, :, key])
    if bias is not None:
        scores = scores + bias.to(compute).flatten(1)[:, entry]
    scores = scores.masked_fill(~valid, -torch.inf)
    if additional_keys is not None:
        scores = torch.cat([scores, q @ heads_first(additional_keys, group).transpose(-2, -1)], dim=-1)
    weights = scores.softmax(dim=-1)
    slots = key.shape[1]
    out = torch.einsum("bhqw,bhqwd->bhqd", weights[..., :slots], v[:, :, key])
    if additional_values is not None:
        out = out + weights[..., slots:] @ heads_first(additional_values, group)
    out = out.transpose(1, 2).unflatten(1, spatial).to(dtype)
    return out, scores.logsumexp(dim=-1).transpose(1, 2).unflatten(1, spatial) if return_lse else None
