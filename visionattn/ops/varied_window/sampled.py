"""Varied-size window attention through PyTorch's ``grid_sample`` and its attention: any device, exportable."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import differentiated, exporting, in_forward_mode, numbers, transforming
from ..sdpa import sdpa
from .naive import interpolate
from .windows import cut, join, pair_bias, places

__all__ = ["run"]

_forward = torch.ops.aten.grid_sampler_2d.default
_backward = torch.ops.aten.grid_sampler_2d_backward.default
_MODE = (0, 0, False)  # linear; zeros outside; -1 and 1 are the outer edges of the map


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offset: Tensor,
        stretch: Tensor,
        window: tuple[int, int],
        bias: Tensor | None,
        scale: float,
) -> Tensor:
    """The public function with every argument explicit."""
    dtype, batch, head_dim = q.dtype, q.shape[0], q.shape[-1]
    grid = numbers(offset.shape[1:3])
    height, width = grid[0] * window[0], grid[1] * window[1]
    compute = torch.promote_types(dtype, torch.float32)
    x, y = places(offset, stretch, window, compute)
    tokens = torch.cat([k, v], dim=-1).to(compute)
    if transforming() or in_forward_mode(tokens, x, y):
        sampled = interpolate(tokens, x, y).flatten(0, 1)
    else:
        images = tokens.permute(0, 3, 4, 1, 2).flatten(0, 1).contiguous()
        where = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1).flatten(0, 1)
        sampled = _sample(images, where).permute(0, 2, 3, 1).contiguous()
    # Half precision is rounded once, at the end; the kernels of accelerators want it as it is.
    narrow = compute if q.device.type == "cpu" else dtype
    q, sampled = cut(q.to(narrow), grid, window).flatten(0, 1), sampled.to(narrow)
    mask = None
    if bias is not None:
        mask = pair_bias(bias.to(narrow), window)[:, None].expand(batch, -1, -1, -1, -1).flatten(0, 1)
    out = sdpa(q, sampled[..., :head_dim], sampled[..., head_dim:], mask, scale)
    return join(out.unflatten(0, (batch, -1)), grid, window).to(dtype)


def _sample(images: Tensor, where: Tensor) -> Tensor:
    """``grid_sample`` ``[images, channels, windows, tokens]`` at ``where [images, windows, tokens, 2]``."""
    if torch.compiler.is_compiling() or exporting() or not torch.is_grad_enabled():
        return F.grid_sample(images, where, align_corners=False)
    return _Sample.apply(images, where)


class _Sample(torch.autograd.Function):
    """PyTorch's operator; a gradient that is to be differentiated again, which it cannot, is that of the definition."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(images, where)
        return _forward(images, where, *_MODE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, where = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return tuple(differentiated(_standard, (images, where), grad, needed))
        found = _backward(grad.contiguous(), images, where, *_MODE, list(needed))
        return tuple(x if need else None for x, need in zip(found, needed, strict=True))


def _standard(images: Tensor, where: Tensor) -> Tensor:
    """What ``_Sample`` computes, of operators that can be differentiated any number of times."""
    height, width = images.shape[2:]
    x, y = ((where[..., axis] + 1) * size / 2 - 0.5 for axis, size in enumerate((width, height)))
    tokens = images.permute(0, 2, 3, 1)[:, :, :, None]
    return interpolate(tokens, x[:, None], y[:, None])[:, 0].permute(0, 3, 1, 2)
