"""Combiner attention as a token mixer of maps: full support for every head at the cost of a part of the keys.

"Combiner: Full Attention Transformer with Sparse Computation Cost" (arXiv 2107.05768), the patterns that are not
causal. Windows of two axes, partial segments and windows that grow with the map are this project's own.
"""
from typing import Literal, Optional, get_args

from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops import combiner_attention
from ..ops.combiner import row_attention
from ..ops.dispatch import numbers
from .scripting import unscripted

__all__ = ["CombinerAttention"]

Pattern = Literal["window", "fixed", "axial", "mixture"]
RowSummary = Literal["none", "wsum", "proj", "wsum_proj"]


class RowKeys(nn.Module):
    """Keys of axial summaries, from the tokens and what was averaged of their rows.

    Args:
        dim: Channels of the tokens.
        num_heads: Number of heads.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.key_heads = num_heads
        self.proj = nn.Linear(dim, dim, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.key = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor, averages: Tensor) -> Tensor:
        """Keys ``[B, rows, columns, heads, dim / heads]`` of tokens ``[B, rows, columns, dim]``, averages like keys."""
        x = x + self.proj(averages.to(x.dtype).flatten(-2))
        return self.key(self.norm(x)).unflatten(-1, (self.key_heads, -1))


@register_notrace_module
class CombinerAttention(nn.Module):
    """Attention of every token to some tokens and to summaries of the others, under one softmax.

    Takes maps ``[batch, height, width, dim]`` of any size; see :func:`visionattn.ops.combiner_attention` for what the
    patterns see. With ``"window"`` a token sees its window, with ``"fixed"`` its segment of the tokens row by row, with
    ``"axial"`` its row, with ``"mixture"`` its row and its column, and with all of them summaries of the rest.

    Args:
        dim: Width of the input and of the output.
        num_heads: Number of heads; must divide ``dim``.
        pattern: See above.
        window_size: Rows and columns of a window, of pattern ``"window"``; None for the fourth root of the number of
            tokens, with which the cost grows least.
        segment: Tokens of a segment, of pattern ``"fixed"``; None for the square root of the number of tokens.
        pool: ``"max"`` or ``"mean"`` of the queries and the keys of a window or segment.
        count_bias: Adds the logarithm of the number of tokens to the score of a window's or segment's summary.
        row_summary: Keys of the summaries of pattern ``"axial"``: ``"none"``, the token's own; ``"wsum"``, the average
            of the row's keys; ``"proj"``, a projection of the token and the average of the row's values;
            ``"wsum_proj"``, of the token and the average of the keys.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or an option is out of range; in the forward pass, the number
            of tokens is a symbol of an exported graph and the window or segment is to follow from it.
    """

    by_head = ("qkv",)  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            pattern: Pattern = "window",
            window_size: int | tuple[int, int] | None = None,
            segment: int | None = None,
            pool: Literal["max", "mean"] = "max",
            count_bias: bool = False,
            row_summary: RowSummary = "proj",
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim})")
        for name, value, kinds in (("pattern", pattern, Pattern), ("row_summary", row_summary, RowSummary)):
            if value not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, got {value!r}")
        if pool not in ("max", "mean"):
            raise ValueError(f"pool must be max or mean, got {pool!r}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.pattern = pattern
        self.window_size = (window_size, window_size) if isinstance(window_size, int) else window_size
        self.segment = segment
        self.pool = pool
        self.count_bias = count_bias
        self.row_summary = row_summary
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        projected = pattern == "axial" and row_summary.endswith("proj")
        self.row_keys = RowKeys(dim, num_heads, **dd) if projected else None
        self.inseparable = "the keys of its rows are projected from all heads" if projected else ""
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        qkv = self.qkv(x)
        if self.row_keys is not None:
            averages = self._row_averages(qkv)
            x = self._attend(qkv, self.row_keys(x, averages), averages)
        else:
            x = self._attend(qkv, None, None)
        return self.proj_drop(self.proj(x))

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_heads={self.num_heads}, pattern={self.pattern}"

    @unscripted
    def _row_averages(self, qkv: Tensor) -> Tensor:
        """What the keys of axial summaries are made of: averages of the rows' values, or keys."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return row_attention(q, k, k if self.row_summary.startswith("wsum") else v).to(qkv.dtype)

    @unscripted
    def _attend(
            self, qkv: Tensor, keys: Optional[Tensor], averages: Optional[Tensor],  # noqa: UP045 - TorchScript
    ) -> Tensor:
        """The heads side by side of projected tokens, for axial summaries by their keys and the rows' averages."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        height, width = numbers(qkv.shape[1:3])
        if self.pattern in ("window", "fixed"):
            size = _window(self.pattern, self.window_size, self.segment, height, width)
            if self.pattern == "fixed":
                q, k, v = (t.flatten(1, 2)[:, None] for t in (q, k, v))
            out = combiner_attention(q, k, v, window_size=size, pool=self.pool, count_bias=self.count_bias)
            return out.flatten(-2).flatten(1, 2).unflatten(1, (height, width))
        if self.pattern == "mixture":
            return combiner_attention(q, k, v, "mixture").flatten(-2)
        if self.row_summary == "wsum":
            keys = row_attention(q, k, k).to(k.dtype)
        values = averages if self.row_summary == "proj" else None  # else the op computes them
        return combiner_attention(q, k, v, "axial", summary_k=keys, summary_v=values).flatten(-2)


def _window(
        pattern: str, window_size: tuple[int, int] | None, segment: int | None, height: int, width: int,
) -> tuple[int, int]:
    """Rows and columns of a window; of one row for segments."""
    if pattern == "window" and window_size is not None:
        return window_size
    if pattern == "fixed" and segment is not None:
        return 1, segment
    if not (isinstance(height, int) and isinstance(width, int)):
        raise ValueError("a graph of free image sizes cannot choose windows by the size of the map: give the mixer a "
                         f"{'window_size' if pattern == 'window' else 'segment'}")
    if pattern == "fixed":
        return 1, max(round((height * width) ** 0.5), 1)
    side = max(round((height * width) ** 0.25), 1)
    return side, side
