"""Gaussian adaptive attention: a gate of every entry, from where it lies among the others of its axis.

"Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities" (arXiv
2401.11143). The paper's is :func:`gaam`; the token mixer around it is this project's own.
"""
import math
from typing import Literal

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops.dispatch import no_autocast, numbers
from .scripting import unscripted

__all__ = ["GaussianAdaptiveAttention", "gaam"]

_EPS = 1e-8


def gaam(
        x: Tensor, offsets: Tensor, c: Tensor, axis: int = -1, padding_value: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiplies every entry by a gate: the product of Gaussians of its standardised distance from the axis's mean.

    The axis is cut in order into one chunk a head, the last with the remainder; each has statistics of its own. A gate,
    ``w / max(sum of w, 1e-8)`` with ``w = prod_k N((x - mean - offset_k) / deviation; 0, c_k)`` sums to 1 over a chunk,
    less where the bound acts. As a product of Gaussians is a Gaussian, more of them express no more.

    Args:
        x: Floating-point tensor of two axes or more.
        offsets: ``[heads, gaussians]``, in units of x.
        c: ``[heads, gaussians]``, deviations in units of x's; their sign does not matter.
        axis: The axis of x.
        padding_value: Entries of this value count as 0 in mean and variance (and in the number of entries) and are
            returned as they are.

    Returns:
        ``x * gate`` and the gate, of x's shape, in the dtype of x (computed in float32 or better).

    Raises:
        ValueError: The tables do not fit each other, or a chunk has fewer than two entries.
    """
    if offsets.ndim != 2 or offsets.shape != c.shape:
        raise ValueError(
            f"offsets and c must both be [heads, gaussians], got {list(offsets.shape)} and {list(c.shape)}")
    heads, entries = offsets.shape[0], x.shape[axis]
    if x.ndim < 2 or entries // heads < 2:
        raise ValueError(f"x needs two axes or more and two entries a head ({heads} heads) on axis {axis}, got "
                         f"{list(x.shape)}")
    step = entries // heads
    sizes = [step] * (heads - 1) + [entries - step * (heads - 1)]
    parts = x.split(sizes, dim=axis)
    gate = torch.cat([_gate(part, offsets[i], c[i], axis, padding_value) for i, part in enumerate(parts)], dim=axis)
    out = (x.to(gate.dtype) * gate).to(x.dtype)
    return out if padding_value is None else torch.where(x == padding_value, x, out), gate.to(x.dtype)


def _gate(x: Tensor, offsets: Tensor, c: Tensor, axis: int, padding_value: float | None = None) -> Tensor:
    """The gate of one chunk in float32 or better.

    Args:
        x: The chunk.
        offsets: ``[..., gaussians]``; each Gaussian's broadcast to x.
        c: Likewise.
        axis: Of x.
        padding_value: As of :func:`gaam`.
    """
    with no_autocast(x.device.type):
        compute = torch.promote_types(x.dtype, torch.float32)
        x, offsets, c = x.to(compute), offsets.to(compute), c.to(compute)
        seen = x if padding_value is None else torch.where(x == padding_value, 0, x)
        mean = seen.mean(dim=axis, keepdim=True)
        variance = (seen - mean).square().sum(dim=axis, keepdim=True) / (numbers(x.shape)[axis] - 1) + _EPS
        x = x - mean
        exponent, constant = torch.zeros_like(x), torch.zeros_like(c[..., 0])
        for offset, width in zip(offsets.unbind(-1), c.square().unbind(-1), strict=True):
            exponent = exponent + (x - offset).square() / (2 * width)
            constant = constant + (2 * math.pi * width).log() / 2
        # The bound of the sum is applied to its logarithm: w alone leaves the range of float32.
        log = -exponent / variance - constant
        return (log - log.logsumexp(dim=axis, keepdim=True).clamp(min=math.log(_EPS))).exp()


@register_notrace_module
class GaussianAdaptiveAttention(nn.Module):
    """Gates of projected values, scaled to a mean of 1, between two linear layers.

    Takes maps ``[batch, height, width, dim]`` and tokens ``[batch, tokens, dim]`` alike. Along the tokens a gate tells
    a token no more of the others than the mean, the variance and the sum of gates of a channel; it is a weak mixer.

    Args:
        dim: Width of the input and of the output.
        num_heads: Groups of channels with Gaussians of their own; must divide ``dim``.
        num_gaussians: Gaussians of a head.
        axis: What the statistics are taken along: the ``"tokens"`` of a channel, or the ``"channels"`` of a head, which
            mixes no tokens at all.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: An option is out of range; in the forward pass, there are fewer than two tokens.
    """

    by_head = ("value", "offsets", "c")  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            num_gaussians: int = 4,
            axis: Literal["tokens", "channels"] = "tokens",
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim})")
        if axis not in ("tokens", "channels"):
            raise ValueError(f"axis must be tokens or channels, got {axis!r}")
        if num_gaussians < 1 or (axis == "channels" and dim // num_heads < 2):
            raise ValueError(f"a head needs a Gaussian, got {num_gaussians}, and two channels, got {dim // num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.axis = axis
        self.num_heads = num_heads
        self.offsets = nn.Parameter(torch.empty(num_heads, num_gaussians, **dd))
        self.c = nn.Parameter(torch.empty(num_heads, num_gaussians, **dd))
        self.value = nn.Linear(dim, dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Makes all Gaussians standard ones."""
        nn.init.zeros_(self.offsets)
        nn.init.ones_(self.c)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of x's shape."""
        return self.proj_drop(self.proj(self._gated(self.value(x.flatten(1, -2))))).reshape(x.shape)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_heads={self.num_heads}, axis={self.axis}"

    @unscripted
    def _gated(self, v: Tensor) -> Tensor:
        """Gated values ``[batch, tokens, dim]``, the gates' mean being 1."""
        heads = v.unflatten(-1, (self.num_heads, -1))
        axis = 1 if self.axis == "tokens" else -1
        entries = numbers(heads.shape)[axis]
        if isinstance(entries, int) and entries < 2:
            raise ValueError("Gaussian adaptive attention needs at least two tokens: take a smaller patch_size or a "
                             "larger image")
        gate = _gate(heads, self.offsets[:, None], self.c[:, None], axis)
        return (entries * gate * heads.to(gate.dtype)).to(v.dtype).flatten(2)
