"""TransNeXt as a plain composition of PyTorch's operations, what `benchmark_models.py --plain` times ours beside.

It is the paper's formulas (arXiv 2311.17132, sections 3.1 to 3.5) in the usual way: windows are unfolded to a copy for
every place, tokens are turned to maps for convolutions, and the network of the position biases runs in every pass, for
the different offsets of the map only.
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.layers import AggregatedAttention, CosineAttention
from visionattn.models.transnext import ConvGLU, TransNeXt

__all__ = ["make_plain"]


def make_plain(model: TransNeXt, size: int) -> TransNeXt:
    """Replaces the attentions and perceptrons of a TransNeXt, whose weights stay, for images of ``size`` pixels."""
    side = size // 4
    stages: Any = model.stages
    for stage in stages:
        for block in stage.blocks:
            kind = _Aggregated if isinstance(block.attn, AggregatedAttention) else _Cosine
            block.attn, block.mlp = kind(block.attn, side), _ConvGLU(block.mlp)
        side //= 2
    return model


class _Plain(nn.Module):
    """The tables of both kinds of attention: coordinates of the different offsets, and which pair has which."""

    def __init__(self, of: AggregatedAttention | CosineAttention, side: int, cells: int):
        super().__init__()
        self.of = of
        place = torch.arange(side, dtype=torch.float32)
        cell = F.adaptive_avg_pool1d(place[None], cells)[0]
        places, keys = torch.cartesian_prod(place, place), torch.cartesian_prod(cell, cell)
        offsets = (places[:, None] - keys) / (of.position_bias.trained_size[0] - 1) * 8
        offsets = offsets.sign() * torch.log2(offsets.abs() + 1) / 3
        unique, index = offsets.flatten(0, 1).unique(dim=0, return_inverse=True)
        self.register_buffer("coordinates", unique, persistent=False)
        self.register_buffer("index", index.view(side ** 2, cells ** 2), persistent=False)

    def bias(self) -> Tensor:
        """``[heads, queries, keys]``."""
        network = self.of.position_bias
        return network.out(network.hidden(self.coordinates).relu()).t()[:, self.index]

    def queries(self, units: Tensor, lengths: Tensor) -> Tensor:
        """For scores, from unit ones ``[batch, heads, tokens, dim]``."""
        return (units + self.of.query_embedding) * F.softplus(self.of.temperature) * lengths.log()


class _Aggregated(_Plain):
    def __init__(self, of: AggregatedAttention, side: int):
        super().__init__(of, side, side // of.pool_ratio)
        self.cells = side // of.pool_ratio
        ones = F.unfold(torch.ones(1, 1, side, side), of.kernel_size, padding=of.kernel_size // 2)[0].t()
        self.register_buffer("mask", ones == 0, persistent=False)
        self.register_buffer("lengths", ones.sum(dim=1, keepdim=True) + self.cells ** 2, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        of, (batch, height, width, dim) = self.of, x.shape
        heads, places = of.num_heads, of.kernel_size ** 2
        tokens = x.flatten(1, 2)
        units = F.normalize(of.q(tokens).view(batch, -1, heads, dim // heads).transpose(1, 2), dim=-1)
        queries = self.queries(units, self.lengths)

        k, v = of.kv(tokens).chunk(2, dim=-1)
        k = F.normalize(k.view(batch, -1, heads, dim // heads), dim=-1).flatten(2)
        local = torch.cat([k, v], dim=-1).transpose(1, 2).reshape(batch, -1, height, width)
        local = F.unfold(local, of.kernel_size, padding=of.kernel_size // 2)
        local = local.view(batch, 2 * heads, dim // heads, places, -1).permute(0, 1, 4, 2, 3)
        local_k, local_v = local.chunk(2, dim=1)
        local_scores = (queries.unsqueeze(-2) @ local_k).squeeze(-2) + of.local_bias.unsqueeze(1)
        local_scores = local_scores.masked_fill(self.mask, -torch.inf)

        maps = tokens.transpose(1, 2).reshape(batch, dim, height, width)
        pooled = F.adaptive_avg_pool2d(F.gelu(of.sr(maps)), self.cells).flatten(2).transpose(1, 2)
        pooled = of.kv(of.norm(pooled)).view(batch, -1, 2 * heads, dim // heads).transpose(1, 2)
        pooled_k, pooled_v = pooled.chunk(2, dim=1)
        pooled_scores = queries @ F.normalize(pooled_k, dim=-1).transpose(-2, -1) + self.bias()

        weights = torch.cat([local_scores, pooled_scores], dim=-1).softmax(dim=-1)
        local_weights, pooled_weights = weights.split([places, weights.shape[-1] - places], dim=-1)
        local_weights = local_weights + units @ of.learnable_tokens + of.learnable_bias
        out = (local_weights.unsqueeze(-2) @ local_v.transpose(-2, -1)).squeeze(-2) + pooled_weights @ pooled_v
        return of.proj(out.transpose(1, 2).reshape(batch, height, width, dim))


class _Cosine(_Plain):
    def __init__(self, of: CosineAttention, side: int):
        super().__init__(of, side, side)
        self.register_buffer("lengths", torch.tensor(float(side ** 2)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        of, (batch, height, width, dim) = self.of, x.shape
        qkv = of.qkv(x).view(batch, -1, 3 * of.num_heads, dim // of.num_heads).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)
        q = self.queries(F.normalize(q, dim=-1), self.lengths)
        weights = (q @ F.normalize(k, dim=-1).transpose(-2, -1) + self.bias()).softmax(dim=-1)
        return of.proj((weights @ v).transpose(1, 2).reshape(batch, height, width, dim))


class _ConvGLU(nn.Module):
    def __init__(self, of: ConvGLU):
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        gate, value = self.of.fc1(x.flatten(1, 2)).chunk(2, dim=-1)
        gate = self.of.dwconv(gate.transpose(1, 2).view(batch, -1, height, width)).flatten(2).transpose(1, 2)
        return self.of.fc2(F.gelu(gate) * value).view(batch, height, width, -1)
