"""Cascaded group attention: each head sees its own channels plus what the head before it found.

"EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention" (arXiv 2305.07027), section 3.2.
"""
from collections.abc import Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..ops.dispatch import numbers
from ..ops.kept import keep
from .conv_norm import ConvNorm
from .scripting import unscripted

__all__ = ["CascadedGroupAttention", "expand_bias_table", "resize_bias_table"]


@register_notrace_module
class CascadedGroupAttention(nn.Module):
    """Attention within square windows of a map ``[batch, dim, height, width]`` of any size, head after head.

    Head i takes the i-th of ``num_heads`` equal parts of the channels, to which the output of head i - 1 is added. Its
    queries pass through a depthwise convolution that sees nothing beyond the window. The heads' outputs side by side
    are rectified and projected.

    A map that windows do not divide is padded with zeros at the bottom and on the right. Padding is not masked: its
    tokens are keys and values like others. (The published weights were trained and measured so.)

    The bias is a table with an entry for every distance ``(|dy|, |dx|)`` within a window, ``rpb [num_heads,
    window_size ** 2]``, looked up for every pair of tokens: anew in training, once in inference
    (:func:`visionattn.ops.kept.keep`).

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        window_size: Tokens per side of a window.
        key_dim: Channels of the queries and keys of a head; its values have ``dim / num_heads``.
        kernels: Kernel sizes of the heads' depthwise convolutions, odd; at least ``num_heads``, more are not used.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or there are too few kernels.
    """

    inseparable = "each head works on the output of the one before"  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            window_size: int = 7,
            key_dim: int = 16,
            kernels: Sequence[int] = (5, 5, 5, 5),
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim})")
        if len(kernels) < num_heads:
            raise ValueError(f"kernels must have a size for each of {num_heads} heads, got {tuple(kernels)}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.widths = (key_dim, key_dim, dim // num_heads)  # of a head's queries, keys and values
        self.scale = key_dim ** -0.5
        self.rpb = nn.Parameter(torch.zeros(num_heads, window_size ** 2, **dd))
        self.qkvs = nn.ModuleList([ConvNorm(dim // num_heads, sum(self.widths), **dd) for _ in range(num_heads)])
        self.convs = nn.ModuleList([
            ConvNorm(key_dim, key_dim, kernel, groups=key_dim, **dd) for kernel in kernels[:num_heads]])
        self.proj = ConvNorm(dim, dim, gain=0., **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[batch, dim, height, width]``."""
        height, width, size = x.shape[2], x.shape[3], self.window_size
        x = _pad_to_multiples(x, size)
        rows, columns = x.shape[2] // size, x.shape[3] // size
        # To windows [windows, dim, size, size], channels-last in memory; a view where the map is one window.
        x = x.permute(0, 2, 3, 1).reshape(-1, rows, size, columns, size, x.shape[1])
        x = x.transpose(2, 3).reshape(-1, size, size, x.shape[-1]).permute(0, 3, 1, 2)
        x = self.proj(F.relu(self._attend(x), inplace=True)).permute(0, 2, 3, 1)
        x = x.reshape(-1, rows, columns, size, size, x.shape[-1]).transpose(2, 3)
        return x.reshape(-1, rows * size, columns * size, x.shape[-1])[:, :height, :width].permute(0, 3, 1, 2)

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Sets the bias table to zero."""
        nn.init.zeros_(self.rpb)

    @torch.no_grad()
    def resize_window(self, window_size: int) -> None:
        """Changes the size of the windows; the bias table is interpolated and becomes a new parameter."""
        if window_size != self.window_size:
            table = resize_bias_table(self.rpb, window_size)
            self.window_size = window_size
            self.rpb = nn.Parameter(table, requires_grad=self.rpb.requires_grad)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_heads={self.num_heads}, window_size={self.window_size}"

    def _attend(self, x: Tensor) -> Tensor:
        """The heads' outputs, side by side, of windows ``[windows, dim, size, size]``."""
        size = [self.window_size, self.window_size]
        parts, biases = x.chunk(self.num_heads, dim=1), self._bias()
        outputs: list[Tensor] = []
        out = parts[0]
        for i, (to_qkv, conv) in enumerate(zip(self.qkvs, self.convs)):  # noqa: B905 - TorchScript has no strict
            q, k, v = to_qkv(parts[i] + out if i else out).split(self.widths, dim=1)
            # The channels-last maps are read as [windows, tokens, channels] in place, by the products' strides.
            scores = torch.baddbmm(biases[i], conv(q).flatten(2).transpose(1, 2), k.flatten(2), alpha=self.scale)
            tokens = scores.softmax(-1) @ v.flatten(2).transpose(1, 2)
            out = tokens.transpose(1, 2).unflatten(2, size)
            outputs.append(tokens)
        return torch.cat(outputs, dim=2).transpose(1, 2).unflatten(2, size)

    @unscripted
    def _bias(self) -> Tensor:
        """The bias of every query and key of a window, ``[num_heads, size ** 2, size ** 2]``."""
        table, size = self.rpb, self.window_size
        return keep("window bias", size, lambda: expand_bias_table(table, size), sources=[table], owner=self)


def expand_bias_table(table: Tensor, window_size: int) -> Tensor:
    """Looks up the bias of every query and key of a window, ``[num_heads, s ** 2]`` to ``[num_heads, s ** 2, s ** 2]``.

    For tokens at (y, x) and (y', x') it is entry ``|y - y'| * s + |x - x'|``.
    """
    axis = torch.arange(window_size, device=table.device)
    distance = (axis[:, None] - axis).abs()
    bias = table.unflatten(1, (window_size, window_size))[:, distance][..., distance]
    return bias.transpose(2, 3).flatten(3).flatten(1, 2)  # from [head, query y, key y, query x, key x]


def resize_bias_table(table: Tensor, window_size: int) -> Tensor:
    """Interpolates a bias table ``[num_heads, s ** 2]`` to another size of the window, bicubically."""
    side = isqrt(table.shape[1])
    dtype = torch.promote_types(table.dtype, torch.float32)
    table = table.unflatten(1, (side, side))[None]
    return F.interpolate(table.to(dtype), size=(window_size, window_size), mode="bicubic")[0].flatten(1).to(table.dtype)


@unscripted
def _pad_to_multiples(x: Tensor, size: int) -> Tensor:
    """Adds zeros to ``[batch, dim, height, width]`` at the bottom and on the right up to multiples of ``size``."""
    height, width = numbers(x.shape[2:])
    bottom, right = -height % size, -width % size
    if statically_known_true(bottom == 0) and statically_known_true(right == 0):
        return x  # where F.pad would copy
    return F.pad(x, (0, right, 0, bottom))
