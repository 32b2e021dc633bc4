"""Tables of biases and positions that are interpolated for maps of other sizes than they were made for.

timm's functions for it compute in float32 and by rules of their own; these follow the dtype and the authors' rules.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..layers.agent import resize
from ..layers.scripting import unscripted
from ..ops.kept import keep

__all__ = ["Grid", "PositionEmbedding", "resize_pairs", "resize_positions", "resize_rpb", "rpb_of_windows"]

Grid = tuple[int, int]  # rows and columns


@register_notrace_module
class PositionEmbedding(nn.Module):
    """A learnt vector for every position of a map, interpolated for maps of other sizes, and for every class token.

    Args:
        dim: Channels.
        size: Height and width of the map that the table ``[1, num_prefix_tokens + height * width, dim]`` is for.
        num_prefix_tokens: Number of class tokens before the map.
        mode: How to interpolate: ``"bilinear"`` or ``"bicubic"``.
        device: Device of the table.
        dtype: Dtype of the table.
    """

    def __init__(
            self,
            dim: int,
            size: Grid,
            num_prefix_tokens: int = 0,
            mode: str = "bilinear",
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.size = size
        self.num_prefix_tokens = num_prefix_tokens
        self.mode = mode
        self.table = nn.Parameter(torch.empty(
            1, num_prefix_tokens + size[0] * size[1], dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the table anew."""
        trunc_normal_(self.table, std=.02)

    @torch.jit.ignore
    def set_input_size(self, size: Grid) -> None:
        """Makes the table that of a map of another size."""
        with torch.no_grad():
            table = resize_positions(self.table, self.size, size, self.num_prefix_tokens, self.mode)
            self.table = nn.Parameter(table, requires_grad=self.table.requires_grad)
        self.size = size

    def forward(self, height: int, width: int) -> Tensor:
        """``[1, num_prefix_tokens + height * width, dim]``."""
        return self._at(height, width)

    @unscripted
    def _at(self, height: int, width: int) -> Tensor:
        size = (height, width)
        # A symbolic size (export) must not be compared: the answer would hold for the example's size only.
        if isinstance(height, int) and isinstance(width, int) and size == self.size:
            return self.table
        return keep(
            "positions", size, lambda: resize_positions(self.table, self.size, size, self.num_prefix_tokens, self.mode),
            sources=[self.table], owner=self)


def resize_positions(table: Tensor, old: Grid, new: Grid, num_prefix_tokens: int, mode: str) -> Tensor:
    """Interpolates position embeddings ``[1, num_prefix_tokens + height * width, dim]`` for a map of another size."""
    prefix, grid = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    grid = resize(grid.transpose(-2, -1).unflatten(2, old), new, mode).flatten(2).transpose(-2, -1)
    return torch.cat([prefix, grid], dim=1)


def resize_pairs(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Interpolates (bilinear) a table ``[heads, tokens, tokens]`` of pairs of places for maps of another size."""
    heads = table.shape[0]
    for _ in range(2):  # the keys, then the queries
        places = resize(table.reshape(1, -1, *old), new)
        table = places.reshape(heads, -1, new[0] * new[1]).transpose(1, 2)
    return table


def rpb_of_windows(table: Tensor) -> Tensor:
    """A bias table ``[heads, rows, columns]`` of a Swin transformer's ``[rows * columns, heads]``, for square windows."""
    side = round(len(table) ** 0.5)
    return table.transpose(-2, -1).reshape(-1, side, side)


def resize_rpb(table: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolates a bias table ``[heads, rows, columns]`` to another size, bicubically, each head for itself."""
    dtype = torch.promote_types(table.dtype, torch.float32)
    return F.interpolate(table[None].to(dtype), size=tuple(size), mode="bicubic")[0].to(table.dtype)
