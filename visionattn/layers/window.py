"""Attention within windows of a map, as the Swin transformer has it."""
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from ..ops.dispatch import numbers
from ..ops.kept import keep
from .full import attend
from .scripting import unscripted

__all__ = ["WindowAttention"]

Grid = tuple[int, int]  # rows and columns


@register_notrace_module
class WindowAttention(nn.Module):
    """Attention within the windows of a map ``[B, H, W, dim]`` of any size, with a bias for every offset.

    Zeros are added to the map at the bottom and on the right until windows fill it; they are not masked. Shifted
    windows wrap around; tokens that were no neighbours before do not see each other.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        window_size: Height and width of a window.
        shift: How far windows are shifted, in tokens.
        always_shift: Shift also along an axis that one window spans.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    by_head = ("qkv", "rpb")  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            window_size: int,
            shift: int = 0,
            always_shift: bool = False,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = shift
        self.always_shift = always_shift
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * window_size - 1, 2 * window_size - 1, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the bias table anew."""
        trunc_normal_(self.rpb, std=.02)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        windows = self._partition(x)
        x = self._attend(self.qkv(windows), x.shape[1], x.shape[2])
        return self.proj_drop(self.proj(x))

    @unscripted
    def _partition(self, x: Tensor) -> Tensor:
        """``[B * windows, window_size, window_size, dim]``, each image's windows row by row."""
        height, width = numbers(x.shape[1:3])
        padded, shift = _layout((height, width), self.window_size, self.shift, self.always_shift)
        if _symbolic(padded):
            x = F.pad(x, (0, 0, *(0, self.window_size - 1) * 2))  # as much as may be needed
            for axis in range(2):
                place = torch.arange(padded[axis], device=x.device) + shift[axis]
                x = x.index_select(1 + axis, place.where(place < padded[axis], place - padded[axis]))
            return window_partition(x, (self.window_size, self.window_size))
        if padded != (height, width):
            x = F.pad(x, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
        return window_partition(x, (self.window_size, self.window_size))

    @unscripted
    def _attend(self, qkv: Tensor, height: int, width: int) -> Tensor:
        """Attention within windows of queries, keys and values, and these windows as a map again."""
        height, width = numbers((height, width))
        padded, shift = _layout((height, width), self.window_size, self.shift, self.always_shift)
        symbolic = _symbolic(padded)
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = keep("shifted windows", (padded, shift, qkv.dtype), lambda: _bias(self.rpb, padded, shift).to(qkv.dtype),
                    sources=[self.rpb], owner=self)
        if symbolic or any(shift):  # a mask of its own for every window
            bias = bias.expand(qkv.shape[0] // bias.shape[0], -1, -1, -1, -1).flatten(0, 1)
        x = attend(q, k, v, bias).transpose(1, 2).reshape(*qkv.shape[:3], qkv.shape[3] // 3)
        x = window_reverse(x, (self.window_size, self.window_size), *padded)
        if symbolic:
            for axis, length in enumerate((height, width)):
                place = torch.arange(length, device=x.device) - shift[axis]
                x = x.index_select(1 + axis, place.where(place >= 0, place + padded[axis]))
            return x
        if any(shift):
            x = x.roll(shift, dims=(1, 2))
        return x[:, :height, :width]


def _layout(size: Grid, window: int, shift: int, always_shift: bool) -> tuple[Grid, Grid]:
    """Height and width of a map once windows fill it, and how far these are shifted: not along one that spans it."""
    # ONNX's division of integers rounds towards zero: none of negative ones.
    padded = (size[0] + window - 1) // window * window, (size[1] + window - 1) // window * window
    if _symbolic(padded):  # may not be compared: that would hold for the example's size alone
        rows, columns = (shift if always_shift else _shift_of(length, window, shift) for length in padded)
    else:
        rows, columns = (shift if always_shift or length > window else 0 for length in padded)
    return padded, (rows, columns)


def _shift_of(length: int, window: int, shift: int) -> Any:
    """``shift``, or 0 where one window spans the length, as a tensor [1]."""
    return (torch.arange(length)[-1:] + 1 - window).clamp(max=shift)


def _symbolic(size: Grid) -> bool:
    """Whether a height or width is that of any image, in a graph that is exported."""
    return not all(isinstance(length, int) for length in size)


def _bias(table: Tensor, size: Grid, shift: Grid) -> Tensor:
    """Bias of every pair of tokens of a window, ``[windows or 1, num_heads, window ** 2, window ** 2]``."""
    window = (table.shape[1] + 1) // 2
    position = torch.arange(window, device=table.device)
    offset = position[:, None] - position + window - 1  # query minus key
    bias = table[:, offset[:, None, :, None], offset[None, :, None, :]].flatten(3).flatten(1, 2)[None]
    if not _symbolic(size) and not any(shift):
        return bias
    # The rolled map consists of up to 3 x 3 parts that were no neighbours before.
    parts = []
    for length, step in zip(size, shift, strict=True):
        index = torch.arange(length, device=table.device)
        moved = (index >= length - window).int() + (index >= length - step)
        parts.append(moved if _symbolic(size) or step else torch.zeros_like(index))
    part = window_partition((parts[0][:, None] * 3 + parts[1])[None, :, :, None], (window, window)).flatten(1)
    apart = part[:, None, :] != part[:, :, None]
    return bias + torch.where(apart[:, None], -100., 0.)
