"""Attention within windows whose keys come from windows of a predicted size and place.

"VSA: Learning Varied-Size Window Attention in Vision Transformers" (ECCV 2022, arXiv 2204.08446), section 3.2. The
authors published three versions of the code, which pad and measure differently; all are here. Any Swin transformer of
timm's can be given this attention.
"""
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..ops import varied_window_attention
from ..ops.dispatch import larger, numbers
from .scripting import unscripted

__all__ = ["VariedSizeWindowAttention", "vary_windows"]

RULES = ("swin", "vitae", "vitae_dense")


@register_notrace_module
class VariedSizeWindowAttention(nn.Module):
    """Window attention on maps ``[batch, height, width, dim]``: for every head, each window's keys have a place of
    their own.

    The mean of a window, through a leaky ReLU and a linear layer, gives four numbers a head: offset to the right and
    down, growth in width and in height. A growth of 1 doubles the window. An offset is measured in windows, more or
    less: 1 is ``(padded side - 1) / 2`` tokens divided by the number of windows along a side; which sides the authors
    take differs between their versions of the code, and so does where a map that windows do not fill is padded:

    ================= =================== ==================================== ====================================
    ``rules``         padding             an offset to the right is divided by an offset down is divided by
    ================= =================== ==================================== ====================================
    ``"swin"``        bottom and right    padded width / window                padded height / window
    ``"vitae"``       bottom and right    whole windows in the width           whole windows in the height
    ``"vitae_dense"`` on all four sides   whole windows in the height          whole windows in the width
    ================= =================== ==================================== ====================================

    (A map with no whole window counts as one.) Padded queries, keys and values are zero, and not masked. Scores are
    scaled by ``(dim / num_heads) ** -0.5``, also where ``dim_out`` is another width.

    With ``rules="swin"`` the predictor starts with zeros, so that training starts as plain attention within windows
    that are not shifted; with the others it starts at random, as the authors' does.

    Args:
        dim: Width of the input.
        num_heads: Number of heads; divides ``dim_out``.
        window_size: Height and width of a window, in tokens.
        dim_out: Width of queries, keys, values and the output; None for ``dim``.
        rules: Which version of the authors' code to follow, see above.
        qkv_bias: Whether queries, keys and values have learnt biases.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim_out``, or there are no such rules.
    """

    by_head = ("qkv", "predictor", "rpb")  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            window_size: int | tuple[int, int] = 7,
            dim_out: int | None = None,
            rules: Literal["swin", "vitae", "vitae_dense"] = "swin",
            qkv_bias: bool = True,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dim_out = dim_out or dim
        if dim_out % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide the width {dim_out}")
        if rules not in RULES:
            raise ValueError(f"rules must be one of {', '.join(RULES)}, got {rules!r}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size if isinstance(window_size, tuple) else (window_size, window_size)
        self.rules = rules
        self.scale = (dim / num_heads) ** -0.5
        self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * side - 1 for side in self.window_size), **dd))
        self.predictor = nn.Linear(dim, 4 * num_heads, **dd)  # x and y of the offset, x and y of the growth, by head
        self.qkv = nn.Linear(dim, 3 * dim_out, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim_out, dim_out, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the bias table anew, and the predictor unless it starts with zeros."""
        trunc_normal_(self.rpb, std=.02)
        self.predictor.reset_parameters()
        if self.rules == "swin":
            nn.init.zeros_(self.predictor.weight)
            nn.init.zeros_(self.predictor.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map ``[batch, height, width, dim_out]``."""
        windows = self.predictor(F.leaky_relu(self._means(x)))
        return self.proj_drop(self.proj(self._attend(self.qkv(x), windows)))

    @unscripted
    def windows(self, x: Tensor) -> Tensor:
        """Where ``forward(x)`` takes keys from, for those who want to look at it.

        Returns:
            ``[batch, rows, columns, num_heads, 4]``, for every window and head left, top, right and bottom edges in
            tokens of the map ``x``, which may lie outside of it (or be turned around, where the growth is below -1).
        """
        size = x.shape[1], x.shape[2]
        predicted = self.predictor(F.leaky_relu(self._means(x)))
        before, _, (rows, columns) = _padding(size, self.window_size, self.rules == "vitae_dense")
        offset, stretch = _places(predicted, size, self.num_heads, self.window_size, self.rules)
        side = offset.new_tensor(self.window_size[::-1])
        index = [torch.arange(count, device=x.device, dtype=offset.dtype) for count in (rows, columns)]
        corner = torch.stack(torch.meshgrid(*index, indexing="ij")[::-1], dim=-1) * side
        centre = (corner - offset.new_tensor(before[::-1]) + side / 2)[:, :, None] + offset
        half = (1 + stretch) * side / 2
        return torch.cat([centre - half, centre + half], dim=-1)

    @unscripted
    def _means(self, x: Tensor) -> Tensor:
        """Means of the windows of a map, ``[batch, rows, columns, dim]``; the zeros of the padding count."""
        size = numbers(x.shape[1:3])
        before, after, (rows, columns) = _padding(size, self.window_size, self.rules == "vitae_dense")
        x = _pad(x, before, after)
        return x.unflatten(2, (columns, self.window_size[1])).unflatten(1, (rows, self.window_size[0])).mean(dim=(2, 4))

    @unscripted
    def _attend(self, qkv: Tensor, predicted: Tensor) -> Tensor:
        """Attention of the heads, side by side, of queries, keys and values ``[batch, height, width, 3 * dim]``."""
        size = numbers(qkv.shape[1:3])
        before, after, _ = _padding(size, self.window_size, self.rules == "vitae_dense")
        offset, stretch = _places(predicted, size, self.num_heads, self.window_size, self.rules)
        q, k, v = _pad(qkv, before, after).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        x = varied_window_attention(q, k, v, offset, stretch, self.window_size, self.rpb, self.scale).flatten(-2)
        return x[:, before[0]:before[0] + size[0], before[1]:before[1] + size[1]]


def _places(
        predicted: Tensor, size: tuple[int, int], num_heads: int, window: tuple[int, int], rules: str,
) -> tuple[Tensor, Tensor]:
    """Offset in tokens and growth of every window and head, of what the predictor gave for a map of this size."""
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32)).unflatten(-1, (num_heads, 4))
    counts = numbers(predicted.shape[1:3])
    padded = [count * side for count, side in zip(counts, window, strict=True)]
    if rules != "swin":
        counts = tuple(larger(length // side, 1) for length, side in zip(size, window, strict=True))
    down, right = counts[::-1] if rules == "vitae_dense" else counts
    offset = [predicted[..., axis] * (padded[1 - axis] - 1) / (2 * (right, down)[axis]) for axis in range(2)]
    return torch.stack(offset, dim=-1), predicted[..., 2:]


def _padding(
        size: tuple[int, int], window: tuple[int, int], centred: bool,
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Rows and columns to add before the first and after the last ones, and rows and columns of windows then."""
    grid: Any = tuple((length + side - 1) // side for length, side in zip(size, window, strict=True))
    total = [count * side - length for count, side, length in zip(grid, window, size, strict=True)]
    before: Any = tuple(n // 2 if centred else 0 for n in total)
    after: Any = tuple(n - first for n, first in zip(total, before, strict=True))
    return before, after, grid


def _pad(x: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """A map ``[batch, height, width, dim]`` with zeros around it."""
    if all(statically_known_true(n == 0) for n in (*before, *after)):
        return x  # where F.pad would copy
    return F.pad(x, (0, 0, before[1], after[1], before[0], after[0]))


class _VariedBlock(SwinTransformerBlock):
    """timm's block with attention that takes the whole map and shifts nothing."""

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: any size will do."""


def vary_windows(model: nn.Module) -> nn.Module:
    """Gives varied-size windows to all blocks of timm's Swin transformer (first version) in ``model``, in place.

    Weights stay as they are. As no window is shifted, the model computes at first what the Swin would without shifts,
    if windows fill its maps (where they do not, Swin pads before the projection and this after it). It takes maps of
    any size wherever its other parts do.

    Returns:
        The model.

    Raises:
        ValueError: The model has no such block, or attention with dropout or of another width than the block's.
    """
    blocks: list[Any] = [module for module in model.modules()
                         if isinstance(module, SwinTransformerBlock) and not isinstance(module, _VariedBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no SwinTransformerBlock of timm.models.swin_transformer")
    for block in blocks:
        plain = block.attn
        dim, width = plain.proj.out_features, plain.proj.in_features
        if width != dim:
            raise ValueError(f"the heads must have the width of the block, {dim}, got {width}")
        if plain.attn_drop.p:
            raise ValueError(f"varied-size windows have no attn_drop, got {plain.attn_drop.p}")
    for block in blocks:
        plain = block.attn
        table, window = plain.relative_position_bias_table, tuple(plain.window_size)
        attn = VariedSizeWindowAttention(
            plain.proj.out_features, plain.num_heads, window, qkv_bias=plain.qkv.bias is not None,
            proj_drop=plain.proj_drop.p, device=table.device, dtype=table.dtype)
        attn.qkv, attn.proj = plain.qkv, plain.proj
        with torch.no_grad():
            attn.rpb.copy_(table.T.reshape(attn.rpb.shape))
        attn.train(plain.training)
        block.attn = attn
        block.register_buffer("attn_mask", None, persistent=False)
        block.__class__ = _VariedBlock
    return model
