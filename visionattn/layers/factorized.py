"""Factorization self-attention: a part of the channels attends far, the others to few keys merged from all tiles.

"FaViT: Factorization Vision Transformers" (arXiv 2312.08614), section 3.
"""
from typing import Literal, Tuple  # noqa: UP035 - TorchScript reads Tuple

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops import factorized_attention, merge_tiles
from .full import attend
from .scripting import unscripted

__all__ = ["FactorizedAttention"]


class TileKeys(nn.Module):
    """Keys and values of a group of channels: merged from the tiles of the map, projected, the values convolved.

    Args:
        dim: Channels of the group.
        num_heads: Divides ``dim``; heads share the projections.
        dilation: Tokens from one place of the window to the next in a tile.
        window: Rows and columns of keys.
        merging: How tiles are merged, see :func:`visionattn.ops.merge_tiles`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            dilation: int,
            window: int,
            merging: Literal["runs", "tiles"],
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.dilation = dilation
        self.window = window
        self.merging: Literal["runs", "tiles"] = merging
        self.fc = nn.Linear(self.head_dim, self.head_dim, **dd)
        self.kv = nn.Linear(self.head_dim, 2 * self.head_dim, **dd)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        """Map ``[B, H, W, dim]`` to keys and values ``[B, window, window, num_heads, dim / num_heads]``."""
        kv = self.kv(self.fc(self._merge(x)))
        k, v = kv.reshape(x.shape[0], self.window, self.window, self.num_heads, 2 * self.head_dim).chunk(2, dim=-1)
        local = self.conv(v.flatten(3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return k, v + local.reshape(v.shape)

    @unscripted
    def _merge(self, x: Tensor) -> Tensor:
        """``[B, window ** 2, num_heads, dim / num_heads]``."""
        return merge_tiles(x.unflatten(-1, (self.num_heads, -1)), self.window, self.dilation, self.merging)


@register_notrace_module
class FactorizedAttention(nn.Module):
    """Factorization self-attention on maps ``[B, H, W, dim]``.

    Channels are cut into groups. The first (an eighth) attends, as one head, to patches of ``sr_ratio x sr_ratio``
    tokens. The others attend to ``window x window`` keys, each merged from one place of all tiles of the map: half of
    them with tiles of neighbouring tokens, half with tiles of every ``sr_ratio``-th one; with a ratio of 1 all are of
    the first kind. Maps that are not of whole tiles are reflected, small ones repeatedly (see
    :func:`visionattn.ops.merge_tiles`): where the authors' padding works it gives the same, and it refuses no map.

    Args:
        dim: Channels, a multiple of 16 (of 8 with a ratio of 1).
        num_heads: Heads of each group but the first; divides their channels.
        sr_ratio: Side of the patches, and dilation of the second kind of tiles. A side of the map must hold a patch.
        window: Rows and columns of keys.
        merging: How tiles are merged: ``"runs"`` as the authors do, which mixes channels, or ``"tiles"``, their mean.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: The groups or their heads do not divide ``dim``.
    """

    inseparable = "its heads share the projections of their keys and values"  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            sr_ratio: int,
            window: int = 7,
            merging: Literal["runs", "tiles"] = "runs",
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dilations = (1,) if sr_ratio == 1 else (1, sr_ratio)
        parts = 8 * len(dilations)
        if dim % parts or 7 * dim // parts % num_heads:
            raise ValueError(f"dim ({dim}) must be a multiple of {parts}, and num_heads ({num_heads}) must divide 7 of "
                             f"{parts} parts of it")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window = window
        self.first = dim // 8
        # Channels of each head in the input of the projection.
        self.head_widths = [self.first] + [7 * dim // parts // num_heads] * (len(dilations) * num_heads)
        self.q = nn.Linear(dim, dim, **dd)
        self.sr = nn.Conv2d(self.first, self.first, sr_ratio, stride=sr_ratio, **dd)
        self.norm = nn.LayerNorm(self.first, **dd)
        self.kv_g = nn.Linear(self.first, 2 * self.first, **dd)
        self.local_conv_g = nn.Conv2d(self.first, self.first, 3, padding=1, groups=self.first, **dd)
        local = dim - self.first
        self.depth_conv = nn.Conv2d(local, local, 3, padding=1, groups=local, **dd)
        self.point_conv = nn.Conv2d(local, local, 1, **dd)
        self.groups = nn.ModuleList([
            TileKeys(7 * dim // parts, num_heads, dilation, window, merging, **dd) for dilation in dilations])
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        q, x = self.q(x), x.permute(0, 3, 1, 2)
        far = self._attend_far(q[..., :self.first], x[:, :self.first])
        x = self.point_conv(self.depth_conv(x[:, self.first:])).permute(0, 2, 3, 1)
        parts = x.chunk(len(self.groups), dim=-1)
        keys, values = [], []
        for i, group in enumerate(self.groups):
            k, v = group(parts[i])
            keys.append(k)
            values.append(v)
        near = self._attend_to_tiles(q[..., self.first:], torch.cat(keys, dim=3), torch.cat(values, dim=3))
        return self.proj_drop(self.proj(torch.cat([far, near], dim=-1)))

    def _attend_far(self, q: Tensor, x: Tensor) -> Tensor:
        """Attention of queries ``[B, H, W, first]`` to patches of the map ``[B, first, H, W]``."""
        patches = self.norm(self.sr(x).permute(0, 2, 3, 1))
        k, v = self.kv_g(patches).chunk(2, dim=-1)
        v = v + self.local_conv_g(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = attend(q.flatten(1, 2).unsqueeze(1), k.flatten(1, 2).unsqueeze(1), v.flatten(1, 2).unsqueeze(1))
        return out.reshape(q.shape)

    @unscripted
    def _attend_to_tiles(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of queries ``[B, H, W, dim - first]`` to keys that are merged already, one tile for all groups."""
        # A head's channels hold its queries of all groups, one after the other.
        q = q.unflatten(-1, (self.num_heads, len(self.groups), -1)).transpose(-3, -2).flatten(-3, -2)
        return factorized_attention(q, k, v, self.window).flatten(-2)
