"""Bi-level routing attention and the full attention that goes with it in the last stage of BiFormer.

"BiFormer: Vision Transformer with Bi-Level Routing Attention" (arXiv 2303.08810), section 3.2. The authors published
two versions of the code, which pad differently; both are here, as each has weights of its own.
"""
from typing import Literal, Tuple  # noqa: UP035 - TorchScript reads Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..ops import routed_attention
from ..ops.dispatch import numbers
from .full import attend
from .scripting import unscripted

__all__ = ["BiLevelRoutingAttention", "FullAttention"]


@register_notrace_module
class BiLevelRoutingAttention(nn.Module):
    """Attention of every region of a map to the ``topk`` regions whose mean key suits its mean query best.

    Routes and tokens both use the scale ``dim ** -0.5``, the full width. No gradient passes through the routing. A
    depthwise convolution of the values ("lepe") is added to the attention before the output projection.

    A map that cannot be cut into equal regions is padded at the bottom and on the right. Padded tokens are not masked:
    regions may attend and be routed to them. The two published versions differ in this:

    * ``pad="input"``: ``n_win x n_win`` regions, rounded up in size; the input is padded with zeros, so that padded
      tokens hold the biases of the projection and count in a region's mean.
    * ``pad="qkv"``: regions of ``height // n_win x width // n_win`` tokens (at least one), as many as cover the map;
      queries, keys and values are padded with zeros, which do not count in a region's mean.

    Args:
        dim: Width of the input and of the output.
        num_heads: Number of heads; must divide ``dim``.
        n_win: Number of regions per side.
        topk: Number of regions a region attends to; all of them where there are fewer.
        pad: What is padded, see above.
        lepe_kernel: Kernel size of the depthwise convolution; odd.
    """

    inseparable = "its routes follow the queries and keys of all heads"  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            n_win: int = 7,
            topk: int = 4,
            pad: Literal["input", "qkv"] = "input",
            lepe_kernel: int = 5,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide dim {dim}")
        if pad not in ("input", "qkv"):
            raise ValueError(f"pad must be 'input' or 'qkv', got {pad!r}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.n_win = n_win
        self.topk = topk
        self.pad = pad
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, height, width, dim]`` to the same."""
        height, width = x.shape[1], x.shape[2]
        if not torch.jit.is_scripting():
            height, width = numbers((height, width))
        grid, region_size = _cut(height, width, self.n_win, self.pad == "input")
        if self.pad == "input":
            x = _pad_to_regions(x, grid, region_size)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        lepe = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = _attend(q, k, v, self.num_heads, grid, region_size, self.topk)
        return self.proj(x + lepe)[:, :height, :width]

    @unscripted
    def route(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Returns the routes that ``forward(x)`` takes, for those who want to look at them.

        Returns:
            Routes ``[batch, 1, regions, topk]``, best first, of regions numbered row by row, and the height and width
            of a region in tokens. A side of the grid has ``n_win`` regions with ``pad="input"`` and
            ``ceil(map size / region size)`` with ``pad="qkv"``.
        """
        grid, region_size = _cut(x.shape[1], x.shape[2], self.n_win, self.pad == "input")
        if self.pad == "input":
            x = _pad_to_regions(x, grid, region_size)
        q, k, _ = self.qkv(x).chunk(3, dim=-1)
        return _route(q, k, grid, region_size, self.topk), region_size


class FullAttention(nn.Module):
    """Attention of all tokens to all, with a depthwise convolution added before the output projection.

    Args:
        dim: Width of the input and of the output.
        num_heads: Number of heads; must divide ``dim``.
        lepe_of: What is convolved: the ``"input"`` or the ``"value"`` map.
        lepe_kernel: Kernel size of the depthwise convolution; odd.
        qkv_bias: Whether the projections of queries, keys and values have biases.
    """

    by_head = ("qkv", "lepe")  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            lepe_of: Literal["input", "value"] = "input",
            lepe_kernel: int = 5,
            qkv_bias: bool = False,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide dim {dim}")
        if lepe_of not in ("input", "value"):
            raise ValueError(f"lepe_of must be 'input' or 'value', got {lepe_of!r}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.lepe_of = lepe_of
        self.inseparable = "it adds a convolution of all channels of the input" if lepe_of == "input" else ""
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, height, width, dim]`` to the same."""
        qkv = self.qkv(x)
        batch, height, width, dim = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
        lepe = self.lepe((qkv[..., 2 * dim:] if self.lepe_of == "value" else x).permute(0, 3, 1, 2))
        q, k, v = qkv.reshape(
            batch, height * width, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = attend(q, k, v).transpose(1, 2).reshape(batch, height, width, dim)
        return self.proj(x + lepe.permute(0, 2, 3, 1))


def _cut(height: int, width: int, n_win: int, round_up: bool) -> Tuple[Tuple[int, int], Tuple[int, int]]:  # noqa: UP006
    """Number of regions, and tokens of a region, along height and width."""
    if round_up:
        return (n_win, n_win), ((height + n_win - 1) // n_win, (width + n_win - 1) // n_win)
    rows, columns = max(height // n_win, 1), max(width // n_win, 1)
    return ((height + rows - 1) // rows, (width + columns - 1) // columns), (rows, columns)


@unscripted
def _pad_to_regions(x: Tensor, grid: Tuple[int, int], region_size: Tuple[int, int]) -> Tensor:  # noqa: UP006
    """Adds zeros to ``[batch, height, width, dim]`` at the bottom and on the right until the regions are full."""
    rows, columns = numbers((grid[0] * region_size[0] - x.shape[1], grid[1] * region_size[1] - x.shape[2]))
    if statically_known_true(rows == 0) and statically_known_true(columns == 0):
        return x  # where F.pad would copy
    return F.pad(x, (0, 0, 0, columns, 0, rows))


@unscripted
def _attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        num_heads: int,
        grid: Tuple[int, int],  # noqa: UP006
        region_size: Tuple[int, int],  # noqa: UP006
        topk: int,
) -> Tensor:
    """Routed attention on maps ``[batch, height, width, dim]`` of any size."""
    (height, width, dim), grid, region_size = numbers(q.shape[1:]), numbers(grid), numbers(region_size)
    routes = _route(q, k, grid, region_size, topk)
    q, k, v = (_pad_to_regions(t, grid, region_size).unflatten(-1, (num_heads, -1)) for t in (q, k, v))
    x = routed_attention(q, k, v, routes, region_size, scale=dim ** -0.5)
    return x.flatten(-2)[:, :height, :width]


def _route(q: Tensor, k: Tensor, grid: tuple[int, int], region_size: tuple[int, int], topk: int) -> Tensor:
    """The ``topk`` key regions, best first, of every query region: ``[batch, 1, regions, topk]``."""
    q_mean, k_mean = (_region_means(t.detach(), grid, region_size) for t in (q, k))
    logits = (q_mean * q.shape[-1] ** -0.5) @ k_mean.transpose(-2, -1)
    return logits.topk(min(topk, *numbers(logits.shape[-1:])), dim=-1).indices[:, None]


def _region_means(x: Tensor, grid: tuple[int, int], region_size: tuple[int, int]) -> Tensor:
    """Means over the regions of ``[batch, height, width, dim]``, ``[batch, regions, dim]``; padding does not count."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    grid, region_size = numbers(grid), numbers(region_size)
    rows, columns = ((size - step * torch.arange(count, device=x.device)).clamp(max=step).to(dtype)
                     for size, step, count in zip(numbers(x.shape[1:3]), region_size, grid, strict=True))
    x = _pad_to_regions(x, grid, region_size)
    x = x.unflatten(2, (grid[1], region_size[1])).unflatten(1, (grid[0], region_size[0])).sum(dim=(2, 4), dtype=dtype)
    return (x / (rows[:, None, None] * columns[:, None])).flatten(1, 2)
