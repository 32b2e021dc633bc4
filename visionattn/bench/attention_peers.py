"""What the ops are compared with in the patterns of attention: full attention in three forms, and linear attention."""
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.case import CROSS, PATTERN_WIDTH, Case
from ..ops.sdpa import probabilities

__all__ = ["PEERS", "Peer", "attention_peer"]

PEERS = ("full", "full_matrix", "flex", "linear")
_CHUNK = 64  # tokens that causal linear attention takes at once


class Peer(NamedTuple):
    """An attention of ``q``, ``k`` and ``v``, ``[batch, tokens, heads, dim]``; its simplest form; its call."""

    run: Callable[..., Tensor]
    naive: Callable[..., Tensor]
    case: Case


def attention_peer(name: str, pattern: str, tokens: int, device: str) -> Peer:
    """A peer in a pattern of attention.

    ``full`` is PyTorch's ``scaled_dot_product_attention``, which holds no matrix of scores where it has a fused kernel.
    ``full_matrix`` writes the softmax out and holds the matrix. ``flex`` is FlexAttention: eager on a CPU, where it
    has no backward pass and holds all scores, compiled on a GPU. ``linear`` is "Transformers are RNNs" (arXiv
    2006.16236): products of ``elu + 1``, whose sums are computed once for all queries, or, if causal, go along. In
    causal cross attention every query sees all keys and no other query, so that it is computed as the noncausal one.

    Args:
        name: One of :data:`PEERS`.
        pattern: One of :data:`visionattn.ops.case.PATTERNS`.
        tokens: Queries; keys are as many, in cross patterns half as many.
        device: ``"cpu"`` or ``"cuda"``.
    """
    heads, dim = PATTERN_WIDTH
    keys = tokens // 2 if pattern in CROSS else tokens
    causal = pattern == "causal_self"
    pairs = heads * (tokens * (tokens + 1) // 2 if causal else tokens * keys)
    naive: Callable[..., Tensor] = functools.partial(_full_matrix, causal=causal)
    if name == "linear":
        run: Callable[..., Tensor] = functools.partial(_linear, causal=causal)
        naive = functools.partial(_linear_matrix, causal=causal)
        pairs = heads * (tokens + keys) * (dim + 1) // 2  # that would cost as much as its products of dim x (dim + 1)
    else:
        run = {"full": _full, "full_matrix": _full_matrix, "flex": _flex(device)}[name]
        run = functools.partial(run, causal=causal)
    shape = (1, keys, heads, dim)
    inputs: dict[str, tuple[int, ...]] = {"q": (1, tokens, heads, dim), "k": shape, "v": shape}
    return Peer(run, naive, Case(None, inputs, pairs=pairs, summary="causal" if causal else ""))


def _full(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def _full_matrix(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    weights = probabilities(q.transpose(1, 2), k.transpose(1, 2), _earlier(q) if causal else None)
    return (weights @ v.transpose(1, 2).to(weights.dtype)).transpose(1, 2).to(q.dtype)


def _earlier(q: Tensor) -> Tensor:
    """Which key a query sees, ``[queries, keys]``: its own and those before it."""
    return torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()


def _flex(device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attention = flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=False)

    @functools.cache
    def mask(tokens: int):
        return create_block_mask(lambda b, h, query, key: query >= key, None, None, tokens, tokens, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        block_mask = mask(q.shape[1]) if causal else None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, block_mask=block_mask).transpose(1, 2)

    return run


def _features(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads first, in float32 or better; a column of ones beside the values sums the weights."""
    compute = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(compute).transpose(1, 2) for x in (q, k, v))
    return F.elu(q) + 1, F.elu(k) + 1, F.pad(v, (0, 1), value=1)


def _linear(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    dtype, tokens = q.dtype, q.shape[1]
    q, k, v = _features(q, k, v)
    if causal:
        missing = -tokens % _CHUNK
        q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, _CHUNK)) for x in (q, k, v))
        state = (k.transpose(-2, -1) @ v).cumsum(dim=2)
        earlier = F.pad(state[:, :, :-1], (0, 0, 0, 0, 1, 0))
        out = (q @ earlier + (q @ k.transpose(-2, -1)).tril() @ v).flatten(2, 3)[:, :, :tokens]
    else:
        out = q @ (k.transpose(-2, -1) @ v)
    return (out[..., :-1] / out[..., -1:]).transpose(1, 2).to(dtype)


def _linear_matrix(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    dtype = q.dtype
    q, k, v = _features(q, k, v)
    weights = q @ k.transpose(-2, -1)
    out = (weights.tril() if causal else weights) @ v
    return (out[..., :-1] / out[..., -1:]).transpose(1, 2).to(dtype)
