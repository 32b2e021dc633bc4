"""Heads over the last tokens of any timm model in place of its own pooling: efficient probing and what it is beside.

Paper: "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency" (ICLR 2026, arXiv 2506.10178).
"""
import math
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

__all__ = ["EfficientProbing", "MultiHeadPooling", "PooledHead", "Pooling", "map_tokens", "pool_tokens"]

Pooling = Literal["mean", "token", "attention", "ep", "ep_all"]
QUERIES = 32  # the paper's best


class EfficientProbing(nn.Module):
    """Learned queries that each gather a chunk of the values of all tokens (EP, section 3).

    Keys are the tokens as they are, so that ``[B, N, dim]`` become ``[B, dim / reduction]`` by ``num_queries x dim +
    dim^2 / reduction`` parameters. Values are computed of what each query has gathered, which is the same and N times
    less work.

    Args:
        dim: Channels of the tokens, a multiple of ``num_queries`` times ``reduction``.
        num_queries: Queries; None for the largest divisor of ``dim`` among 32, 16, 8, ...
        reduction: Factor by which the values are narrower than the tokens.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: The channels cannot be divided so.
    """

    def __init__(self, dim: int, num_queries: int | None = None, reduction: int = 1, device=None, dtype=None):
        super().__init__()
        queries = math.gcd(QUERIES, dim // max(1, reduction)) if num_queries is None else num_queries
        if queries < 1 or reduction < 1 or dim % (queries * reduction):
            raise ValueError(f"{dim} channels cannot be divided among {queries} queries with a reduction of "
                             f"{reduction}: their product must divide the channels")
        self.queries = nn.Parameter(0.02 * torch.randn(1, queries, dim, device=device, dtype=dtype))
        self.v = nn.Linear(dim, dim // reduction, bias=False, device=device, dtype=dtype)

    def attention(self, tokens: Tensor, queries: Tensor | None = None) -> Tensor:
        """Shares of the tokens ``[B, N, dim]`` in what each query gathers, ``[B, Q, N]``; in float32 of half precision.

        Args:
            tokens: The tokens.
            queries: Others than the learned ones, ``[B or 1, Q, dim]``.
        """
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        queries = self.queries if queries is None else queries
        return (queries.to(dtype) @ tokens.to(dtype).mT * tokens.shape[-1] ** -0.5).softmax(dim=-1)

    def forward(self, tokens: Tensor, queries: Tensor | None = None) -> Tensor:
        """Takes tokens ``[B, N, dim]`` to ``[B, dim / reduction]``."""
        gathered = self.attention(tokens, queries).to(tokens.dtype) @ tokens
        weights = self.v.weight.unflatten(0, (gathered.shape[1], -1))
        return torch.einsum("bqd,qcd->bqc", gathered, weights).flatten(1)


class MultiHeadPooling(nn.Module):
    """One learned query that attends to all tokens by several heads, with projections of all four kinds.

    Args:
        dim: Channels of the tokens; a head has 64, or the next divisor.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        heads = next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, dim, device=device, dtype=dtype))
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Takes tokens ``[B, N, dim]`` to ``[B, dim]``."""
        query = self.query.expand(len(tokens), -1, -1)
        return self.attn(query, tokens, tokens, need_weights=False)[0][:, 0]


class PooledHead(nn.Module):
    """Pools what ``forward_features`` of a timm model gives, brings it to unit variance and classifies it.

    The norm is a batch norm without parameters of its own, as linear probes of MAE (arXiv 2111.06377) have it: features
    of any scale are learned from alike.

    Args:
        kind: ``mean`` of the tokens of the image; ``token``: the class token; ``attention``:
            :class:`MultiHeadPooling`; ``ep``: :class:`EfficientProbing` of the image's tokens, ``ep_all`` also of the
            class token and registers.
        dim: Channels of the features.
        num_classes: Classes; 0 for none.
        num_prefix_tokens: Tokens before those of the image, of ``[B, N, dim]``.
        output_fmt: Order of the axes of features that are maps, ``NCHW`` or ``NHWC``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: There is no such kind, or no class token.
    """

    def __init__(
            self, kind: Pooling, dim: int, num_classes: int, num_prefix_tokens: int = 0, output_fmt: str = "NCHW",
            device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if kind not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {kind!r}")
        if kind == "token" and not num_prefix_tokens:
            raise ValueError("pooling token takes the class token, and the model has none: take mean or ep")
        self.kind, self.num_prefix_tokens, self.output_fmt = kind, num_prefix_tokens, output_fmt
        self.pool: nn.Module = nn.Identity()
        if kind == "attention":
            self.pool = MultiHeadPooling(dim, **dd)
        elif kind.startswith("ep"):
            self.pool = EfficientProbing(dim, **dd)
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False, **dd)
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            self.fc = classifier = nn.Linear(dim, num_classes, **dd)
            nn.init.trunc_normal_(classifier.weight, std=0.01)
            nn.init.zeros_(classifier.bias)

    def tokens(self, features: Tensor) -> Tensor:
        """The tokens ``[B, N, dim]`` that are pooled, of features ``[B, N, dim]`` or maps."""
        if features.ndim == 4:
            return map_tokens(features, self.output_fmt)
        if self.kind == "token":
            return features[:, :1]
        return features if self.kind == "ep_all" else features[:, self.num_prefix_tokens:]

    def gather(self, features: Tensor) -> Tensor:
        """Pooled features ``[B, dim]``; of ``mean`` and ``token`` nothing in it is learned."""
        tokens = self.tokens(features)
        return tokens.mean(dim=1) if isinstance(self.pool, nn.Identity) else self.pool(tokens)

    def classify(self, pooled: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of pooled features."""
        return self.fc(self.norm(pooled))

    def forward(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits ``[B, classes]``, or with ``pre_logits`` what the classifier is given, ``[B, dim]``."""
        pooled = self.gather(features)
        return self.norm(pooled) if pre_logits else self.classify(pooled)


def map_tokens(x: Tensor, output_fmt: str) -> Tensor:
    """The tokens ``[B, H * W, dim]`` of maps, row by row; ``output_fmt`` is ``NCHW`` or ``NHWC``."""
    return x.flatten(1, 2) if output_fmt == "NHWC" else x.flatten(2).mT


def pool_tokens(model: Any, kind: Pooling, num_classes: int) -> Any:
    """Gives a timm model a :class:`PooledHead`, ``model.pooled_head``, in place of its own head.

    Args:
        model: A model that was made without classes; its forward is ``forward_head`` of ``forward_features``.
        kind: Of the head.
        num_classes: Classes of the head.

    Returns:
        The model.

    Raises:
        ValueError: The model has no such parts, or the kind does not fit it.
    """
    name = type(model).__name__
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise ValueError(f"{name} has no forward_features and forward_head, between which pooling {kind} would stand")
    first = next(model.parameters())
    head = PooledHead(
        kind, model.num_features, num_classes, getattr(model, "num_prefix_tokens", 0),
        getattr(model, "output_fmt", "NCHW"), device=first.device, dtype=first.dtype)
    model.pooled_head = head
    # No bound methods: copies and pickles would call the wrong head.
    model.forward_head, model.get_classifier = partial(_forward_head, head), partial(_itself, head)
    model.num_classes, model.head_hidden_size = num_classes, model.num_features
    return model


def _forward_head(head: PooledHead, features: Tensor, pre_logits: bool = False) -> Tensor:
    return head(features, pre_logits)


def _itself(head: PooledHead) -> PooledHead:
    return head
