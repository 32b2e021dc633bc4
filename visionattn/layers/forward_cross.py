"""Forward cross attention: tokens of a map attend to each other and to tokens of earlier blocks of the stage.

"FcaFormer: Forward Cross Attention in Hybrid Vision Transformer" (arXiv 2211.07198), section 3.2.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.dispatch import numbers
from ..ops.kept import keep
from .agent import resize
from .full import attend
from .scripting import unscripted

__all__ = ["ForwardCrossAttention", "cross_size", "resize_offsets"]

Grid = tuple[int, int]  # rows and columns


class ForwardCrossAttention(nn.Module):
    """Attention of all tokens of a map to all and to the tokens that earlier blocks handed on (section 3.2).

    The latter are scaled and normed ("token-wise modulation"), keys and values of both are of one projection, and one
    softmax is over both. ``rpb [num_heads, height, width]`` has a bias for every distance of two tokens of the map,
    ``cross_bias [num_heads, sources, height / 4, width / 4]`` one for every token that was handed on, and
    ``cross_scale [sources, height / 4, width / 4]`` its factor. They are interpolated for maps of other sizes.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        size: Height and width of the map that the tables are for.
        sources: Number of earlier blocks in the stage.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``; in a call: ``crossed`` is missing or there are no sources.
    """

    by_head = ("qkv", "rpb", "cross_bias")  # see visionattn.analysis.prune_heads

    def __init__(self, dim: int, num_heads: int, size: Grid, sources: int, device=None, dtype=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide dim {dim}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.size = size
        self.sources = sources
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, *size, **dd))
        if sources:
            handed = cross_size(size)
            self.cross_norm: nn.Module = nn.LayerNorm(dim, **dd)
            self.cross_scale = nn.Parameter(torch.empty(sources, *handed, **dd))
            self.cross_bias = nn.Parameter(torch.empty(num_heads, sources, *handed, **dd))
        else:
            self.cross_norm = nn.Identity()
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Sets the biases to zero and the factors to one."""
        nn.init.zeros_(self.rpb)
        if self.sources:
            nn.init.ones_(self.cross_scale)
            nn.init.zeros_(self.cross_bias)

    @torch.jit.ignore
    @torch.no_grad()
    def set_input_size(self, size: Grid) -> None:
        """Makes the tables those of a map of another size; they become new parameters."""
        tables = {"rpb": resize_offsets(self.rpb, size)}
        if self.sources:
            tables |= {"cross_scale": resize(self.cross_scale[None], cross_size(size))[0],
                       "cross_bias": resize(self.cross_bias, cross_size(size))}
        for name, table in tables.items():
            setattr(self, name, nn.Parameter(table, requires_grad=getattr(self, name).requires_grad))
        self.size = size

    def forward(self, x: Tensor, crossed: Optional[Tensor] = None) -> Tensor:  # noqa: UP045 - TorchScript
        """Returns a map like ``x [batch, height, width, dim]``, which attends to ``crossed [batch, tokens, dim]`` too.

        ``crossed`` are the tokens of all sources, the oldest first, ``ceil(height / 4) * ceil(width / 4)`` of each.
        """
        batch, height, width = x.shape[0], x.shape[1], x.shape[2]
        tokens = x.flatten(1, 2)
        count = tokens.shape[1]
        if (crossed is None) != (self.sources == 0):
            raise ValueError("crossed must be given if there are sources, and only then")
        if crossed is not None:
            handed = self.cross_norm(crossed * self._scale(height, width).to(crossed.dtype))
            tokens = torch.cat([tokens, handed], dim=1)
        qkv = self.qkv(tokens)
        dim = qkv.shape[2] // 3
        qkv = qkv.unflatten(2, [3, self.num_heads, dim // self.num_heads]).permute(2, 0, 3, 1, 4)
        q = qkv[0][:, :, :count]
        out = attend(q, qkv[1], qkv[2], self._bias(height, width).to(q.dtype))
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, dim))

    @unscripted
    def _scale(self, height: int, width: int) -> Tensor:
        """The factor of every token that was handed on, ``[tokens, 1]``."""
        return resize(self.cross_scale[None], cross_size(numbers((height, width)))).reshape(-1, 1)

    @unscripted
    def _bias(self, height: int, width: int) -> Tensor:
        """The bias of every query for every key, ``[1, num_heads, height * width, height * width + tokens]``."""
        height, width = numbers((height, width))

        def make() -> Tensor:
            rows, columns = (torch.arange(n, device=self.rpb.device) for n in (height, width))
            rows, columns = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()
            bias = resize_offsets(self.rpb, (height, width))[:, rows][..., columns]
            bias = bias.transpose(2, 3).flatten(3).flatten(1, 2)  # from [head, query y, key y, query x, key x]
            if not self.sources:
                return bias[None]
            cross = resize(self.cross_bias, cross_size((height, width))).flatten(1)
            return torch.cat([bias, cross[:, None].expand(-1, bias.shape[1], -1)], dim=2)[None]

        sources = [self.rpb, self.cross_bias] if self.sources else [self.rpb]
        return keep("forward cross bias", (height, width), make, sources=sources, owner=self)


def cross_size(size: Grid) -> Grid:
    """Rows and columns of the tokens that a block hands on of a map."""
    return (size[0] + 3) // 4, (size[1] + 3) // 4


def resize_offsets(table: Tensor, size: Grid) -> Tensor:
    """Interpolates biases ``[num_heads, height, width]`` by distance to another size; distance 0 stays distance 0."""
    # A symbolic size (export) must not be compared: the answer would hold for the example's size only.
    if all(isinstance(n, int) for n in size) and numbers(table.shape[1:]) == size:
        return table
    dtype = torch.promote_types(table.dtype, torch.float32)
    return F.interpolate(table[None].to(dtype), size=size, mode="bilinear", align_corners=True)[0].to(table.dtype)
