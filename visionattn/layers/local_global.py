"""Multi-scale attention fusion: what a token found in its window asks a summary of the whole map.

"MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition" (arXiv 2209.01620). There is
no authors' code: what is not in the abstract is a completion of ours.
"""
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..ops.dispatch import numbers
from ..ops.kept import keep
from .agent import resize
from .full import attend
from .scripting import unscripted
from .window import WindowAttention

__all__ = ["LocalGlobalAttention"]

Grid = tuple[int, int]  # rows and columns


@register_notrace_module
class LocalGlobalAttention(nn.Module):
    """Attention within windows, then of its tokens to a downsampled map, on maps ``[batch, height, width, dim]``.

    With L the attention within windows (:class:`~visionattn.layers.window.WindowAttention`, not shifted) and G the
    global tokens, the result is ``proj(L + softmax(q(L) k(G)^T / sqrt(head_dim)) v(G))``. A global token stands for
    ``reduction`` x ``reduction`` places; there are ``ceil(height / reduction) * ceil(width / reduction)``. They are
    made by

    * ``"conv"``: a depthwise convolution of that size and stride; zeros are added at the bottom and on the right. No
      parameter depends on the size of the map.
    * ``"linear"``: a learnt linear map of all tokens to all global tokens, the same in each channel, as the paper's
      "global learning with down-sampling": ``weight [global tokens, tokens]`` for maps of ``size``. For others it is
      interpolated over both grids and scaled by the number of tokens, so that the sum over an even map stays.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        size: Height and width of the map that ``weight`` is for; only ``"linear"`` depends on it.
        window_size: Height and width of a window.
        reduction: Height and width of what a global token stands for.
        downsample: How global tokens are made.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or an option is out of range.
    """

    inseparable = "what it found in windows is added to its heads"  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            size: Grid,
            window_size: int = 7,
            reduction: int = 4,
            downsample: Literal["conv", "linear"] = "conv",
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide dim {dim}")
        if downsample not in ("conv", "linear"):
            raise ValueError(f"downsample must be 'conv' or 'linear', got {downsample!r}")
        if window_size < 1 or reduction < 1:
            raise ValueError(f"window_size and reduction must be positive, got {window_size} and {reduction}")
        dd: Any = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.reduction = reduction
        self.size = size
        self.linear = downsample == "linear"
        self.local = WindowAttention(dim, num_heads, window_size, **dd)
        if self.linear:
            self.down: nn.Module = nn.Identity()
            summary = math.prod(_summary(size, reduction))
            self.weight = nn.Parameter(torch.empty(summary, math.prod(size), **dd))
            self.bias = nn.Parameter(torch.empty(summary, **dd))
        else:
            self.down = nn.Conv2d(dim, dim, reduction, stride=reduction, groups=dim, **dd)
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the linear map of the tokens anew, its biases are zero."""
        if self.linear:
            trunc_normal_(self.weight, std=self.weight.shape[1] ** -0.5)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        batch, height, width, dim = x.shape
        local = self.local(x)
        q = self.q(local).reshape(batch, height * width, self.num_heads, dim // self.num_heads).transpose(1, 2)
        summary = self._learnt(x) if self.linear else self.down(_fill(x, self.reduction)).flatten(2).transpose(1, 2)
        kv = self.kv(summary).unflatten(2, [2, self.num_heads, dim // self.num_heads]).permute(2, 0, 3, 1, 4)
        found = attend(q, kv[0], kv[1]).transpose(1, 2).reshape(batch, height, width, dim)
        return self.proj_drop(self.proj(local + found))

    @torch.jit.ignore
    @torch.no_grad()
    def set_input_size(self, size: Grid) -> None:
        """Makes the linear map one for maps of another size; it becomes a new parameter."""
        if self.linear:
            tables = _resized(self.weight, self.bias, self.size, size, self.reduction)
            for name, table in zip(("weight", "bias"), tables, strict=True):
                setattr(self, name, nn.Parameter(table.clone(), requires_grad=getattr(self, name).requires_grad))
        self.size = size

    @unscripted
    def _learnt(self, x: Tensor) -> Tensor:
        """Global tokens ``[batch, tokens, dim]`` by the linear map."""
        size = numbers(x.shape[1:3])
        weight, bias = keep(
            "global tokens", size, lambda: _resized(self.weight, self.bias, self.size, size, self.reduction),
            sources=[self.weight, self.bias], owner=self)
        return weight.to(x.dtype) @ x.flatten(1, 2) + bias[:, None].to(x.dtype)


@unscripted
def _fill(x: Tensor, reduction: int) -> Tensor:
    """The map ``[batch, dim, height, width]`` with zeros at the bottom and on the right, up to whole global tokens."""
    size = numbers(x.shape[1:3])
    below, right = (
        grid * reduction - length for grid, length in zip(_summary(size, reduction), size, strict=True))
    return F.pad(x, (0, 0, 0, right, 0, below)).permute(0, 3, 1, 2)


def _summary(size: Grid, reduction: int) -> Grid:
    """Rows and columns of the global tokens of a map."""
    return (size[0] + reduction - 1) // reduction, (size[1] + reduction - 1) // reduction


def _resized(weight: Tensor, bias: Tensor, old: Grid, new: Grid, reduction: int) -> tuple[Tensor, Tensor]:
    """The linear map of tokens and its biases for maps of another size."""
    # A symbolic size (export) must not be compared: the answer would hold for the example's size only.
    if all(isinstance(n, int) for n in new) and new == old:
        return weight, bias
    grid, new_grid = _summary(old, reduction), _summary(new, reduction)
    # First over the tokens of the map, then over the global ones.
    table = resize(weight.unflatten(1, old)[None], new)[0].flatten(1)
    table = resize(table.T.unflatten(1, grid)[None], new_grid)[0].flatten(1).T
    return (table * (math.prod(old) / (new[0] * new[1])),
            resize(bias.unflatten(0, grid)[None, None], new_grid).flatten())
