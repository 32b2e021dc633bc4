"""Attention that is linear in the tokens while they are many, and the merging of tokens that makes them few.

A proposal after the abstract of "Modality Agnostic Efficient Long Range Encoder" (arXiv 2507.19409), which has no
public code and does not say there which linear attention and which merging it means: both are this project's own.
"""
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops.dispatch import no_autocast, numbers
from ..ops.recording import current_recorder
from .full import attend
from .scripting import unscripted

__all__ = ["LongRangeAttention", "TokenMerging"]


@register_notrace_module
class LongRangeAttention(nn.Module):
    """Linear attention of more than ``switch`` tokens, full attention of others, with the same weights.

    Takes maps ``[batch, height, width, dim]`` and tokens ``[batch, tokens, dim]`` alike. Linear attention is ``softmax
    over channels(q) (softmax over tokens(k)^T v)``, full attention the usual one: in both a token gets an average of
    the values. The function changes where the modes do, so train on the side of the switch where you evaluate, or fix
    the mode.

    Args:
        dim: Width of the input and of the output.
        num_heads: Number of heads; must divide ``dim``.
        mode: ``"linear"`` or ``"full"`` whatever the number of tokens; ``"auto"`` as above.
        switch: The most tokens of full attention; None for ``dim``.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or there is no such mode; in the forward pass, the number of
            tokens is a symbol of an exported graph, which cannot choose a mode.
    """

    by_head = ("qkv",)  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            mode: Literal["auto", "linear", "full"] = "auto",
            switch: int | None = None,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim})")
        if mode not in ("auto", "linear", "full"):
            raise ValueError(f"mode must be auto, linear or full, got {mode!r}")
        self.num_heads = num_heads
        self.mode = mode
        self.switch = dim if switch is None else switch
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of x's shape."""
        return self.proj_drop(self.proj(self._attend(self.qkv(x.flatten(1, -2))))).reshape(x.shape)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_heads={self.num_heads}, mode={self.mode}, switch={self.switch}"

    @unscripted
    def _attend(self, qkv: Tensor) -> Tensor:
        """The heads side by side, of projected tokens ``[batch, tokens, 3 * dim]``."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        linear = self.mode == "linear"
        if self.mode == "auto":
            tokens, = numbers(qkv.shape[1:2])
            if not isinstance(tokens, int):
                raise ValueError("a graph of free image sizes cannot choose between linear and full attention: fix it "
                                 "by mode='linear' or mode='full'")
            linear = tokens > self.switch
        return (_linear(q, k, v) if linear else attend(q, k, v)).transpose(1, 2).flatten(2)


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention ``[batch, heads, tokens, dim]`` of the same."""
    recorder = current_recorder()
    if recorder is not None:
        recorder.offer(lambda: q.softmax(dim=-1) @ k.softmax(dim=-2).transpose(-2, -1),
                       lambda: q.shape[:-1].numel() * k.shape[-2])
        with recorder.paused():
            return _linear(q, k, v)
    dtype, compute = q.dtype, torch.promote_types(q.dtype, torch.float32)
    with no_autocast(q.device.type):
        q, k, v = (x.to(compute) for x in (q, k, v))
        return (q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-2, -1) @ v)).to(dtype)


@register_notrace_module
class TokenMerging(nn.Module):
    """Merges cells of 2 x 2 tokens of a map to one each: ``[B, H, W, dim]`` to ``[B, H / 2, W / 2, dim]`` (rounded up).

    A cell is an average of its normed tokens, weighted by a softmax of learnt scores (at first equally), which a linear
    layer takes on. Cells at the right and lower edge of maps of odd sizes have fewer tokens.

    Args:
        dim: Channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.score = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reduce = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Makes all tokens of a cell equal."""
        nn.init.zeros_(self.score)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the smaller map."""
        x = self.norm(x)
        return self.reduce(self._merge(x, x @ self.score))

    @unscripted
    def _merge(self, x: Tensor, scores: Tensor) -> Tensor:
        """Cells of tokens ``[batch, height, width, dim]`` by their scores ``[batch, height, width]``."""
        height, width = numbers(x.shape[1:3])
        down, right = height % 2, width % 2
        scores = scores.to(torch.promote_types(x.dtype, torch.float32))
        x, scores = F.pad(x, (0, 0, 0, right, 0, down)), F.pad(scores, (0, right, 0, down), value=-torch.inf)
        grid = (height + down) // 2, (width + right) // 2
        scores, x = (t.unflatten(2, (grid[1], 2)).unflatten(1, (grid[0], 2)).transpose(2, 3) for t in (scores, x))
        weights = scores.flatten(3).softmax(dim=-1).to(x.dtype)
        return (weights[..., None, :] @ x.flatten(3, 4)).squeeze(-2)
