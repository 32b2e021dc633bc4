"""Neighborhood attention in tiles of queries with the halo of their keys: the portable fast path.

Four forms. A window as large as the map is dense attention. On CPU the two-dimensional problem without causal axes
(and the one-dimensional, as a map of width 1) runs in :mod:`.slab`. Exported and traced graphs of one map size hold
:mod:`.exported`. Everything else, other devices, exported graphs of free sizes, transforms of torch.func and forward
mode run in :mod:`.general`, which consists of standard operators.
"""
import math

import torch
from torch import Tensor

from ..dispatch import concrete, exporting, numbers, standard_only
from ..kept import keep
from ..sdpa import sdpa
from . import exported, general, naive
from .slab import slab_attention

__all__ = ["run"]


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
    plain = not any(is_causal) and additional_keys is None and not return_lse
    if plain and not exporting() and tuple(q.shape[1:-2]) == kernel_size and (bias is None or q.dtype == bias.dtype):
        return _run_dense(q, k, v, kernel_size, bias, scale), None
    if plain and q.ndim <= 5 and q.device.type in ("cpu", "meta") and not standard_only(q, k, v, bias):
        return _run_slab(q, k, v, kernel_size, dilation, stride, bias, scale), None
    arguments = (
        q, k, v, kernel_size, dilation, stride, is_causal, bias, scale, additional_keys, additional_values, return_lse)
    # A strict export reads Python's code itself, NumPy's and caches included: the general form's is written for it.
    if exporting() and not torch.compiler.is_dynamo_compiling() and all(
            isinstance(length, int) for length in numbers(q.shape[1:-2])):
        return exported.run(*arguments)
    out, lse = general.run(*arguments)
    if concrete(q, k, v) and not math.isfinite(out.detach().sum(dtype=torch.promote_types(q.dtype, torch.float32))):
        return naive.run(*arguments)  # an infinity reaches all queries of its tiles in the general form
    return out, lse


def _run_dense(q: Tensor, k: Tensor, v: Tensor, kernel_size, bias: Tensor | None, scale: float) -> Tensor:
    """Windows as large as the map are PyTorch's own attention; the bias table is composed to a mask."""
    group = q.shape[-2] // k.shape[-2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=-2), v.repeat_interleave(group, dim=-2)
    mask = None
    if bias is not None:
        index = keep("window entries", kernel_size, lambda: _dense_entries(kernel_size, q.device), device=q.device)
        mask = bias.flatten(1).index_select(1, index.flatten()).view(1, -1, *index.shape)
    queries, keys, values = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    out = sdpa(queries, keys, values, mask, scale)
    return out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


def _dense_entries(kernel_size: tuple[int, ...], device: torch.device) -> Tensor:
    """Entry of the flattened bias table of every query and key of a map of the window's size, ``[tokens, tokens]``."""
    place = torch.cartesian_prod(*(torch.arange(size, device=device) for size in kernel_size))
    place = place.view(-1, len(kernel_size))
    entry = torch.zeros(len(place), len(place), dtype=torch.long, device=device)
    for axis, size in enumerate(kernel_size):
        entry = entry * (2 * size - 1) + place[:, axis] - place[:, None, axis] + size - 1
    return entry


def _run_slab(
        q: Tensor, k: Tensor, v: Tensor, kernel_size, dilation, stride, bias: Tensor | None, scale: float,
) -> Tensor:
    group = q.shape[-2] // k.shape[-2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=-2), v.repeat_interleave(group, dim=-2)
    if q.ndim == 5:
        return slab_attention(q, k, v, bias, kernel_size, dilation, stride, scale)
    bias = None if bias is None else bias.unsqueeze(2)
    q, k, v = q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2)
    return slab_attention(q, k, v, bias, (*kernel_size, 1), (*dilation, 1), (*stride, 1), scale).squeeze(2)
