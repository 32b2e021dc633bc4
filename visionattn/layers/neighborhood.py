"""The attention module of NAT and DiNAT: projections around neighborhood attention, and the rule for small maps."""
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..ops import neighborhood_attention
from ..ops.dispatch import larger
from .scripting import unscripted

__all__ = ["NeighborhoodAttention2d"]


@register_notrace_module
class NeighborhoodAttention2d(nn.Module):
    """Multi-head neighborhood attention on a map ``[batch, height, width, dim]`` of any size.

    A map that is lower or narrower than ``kernel_size * dilation`` is padded with zeros at the bottom or the right up
    to that size, before the projection to queries, keys and values. The padding is not masked: its tokens are keys and
    values like others. The published checkpoints were trained and measured with this rule (natten up to 0.15.1).

    "Neighborhood Attention Transformer" (arXiv 2204.07143), section 3; dilation: arXiv 2209.15001, section 3.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        kernel_size: Keys per axis that a query sees; odd, at least 3.
        dilation: Distance between neighbouring keys.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        rpb: Whether a learnt relative position bias ``[num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1]`` is added
            to the scores.
        wrap: The map goes around its left and right edge, as a panorama does: the windows of queries there hold keys of
            the other side. On a map narrower than the window they hold some columns more than once.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or the kernel size or the dilation is out of range.
    """

    by_head = ("qkv", "rpb")  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            kernel_size: int = 7,
            dilation: int = 1,
            qkv_bias: bool = True,
            rpb: bool = True,
            wrap: bool = False,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim})")
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3, got {kernel_size}")
        if dilation < 1:
            raise ValueError(f"dilation must be at least 1, got {dilation}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.margin = kernel_size // 2 * dilation if wrap else 0  # columns that are repeated on either side
        width = 2 * kernel_size - 1
        self.rpb = nn.Parameter(torch.empty(num_heads, width, width, **dd)) if rpb else None
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the bias table anew."""
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=.02)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[batch, height, width, dim]``."""
        B, H, W = x.shape[0], x.shape[1], x.shape[2]
        x = _pad_to(_wrap(x, self.margin), self.kernel_size * self.dilation)
        qkv = self.qkv(x)
        C = qkv.shape[3] // 3
        q, k, v = qkv.reshape(B, x.shape[1], x.shape[2], 3, self.num_heads, C // self.num_heads).unbind(3)
        x = _attend(q, k, v, self.kernel_size, self.dilation, self.rpb)
        return self.proj_drop(self.proj(x[:, :H, self.margin:self.margin + W].reshape(B, H, W, C)))

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        wrap = ", wrap=True" if self.margin else ""
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}{wrap}"


# torch.jit.script cannot compile the ops; it calls these functions as Python.

@unscripted
def _wrap(x: Tensor, margin: int) -> Tensor:
    """Puts ``margin`` columns of a map's other side before its first and after its last one."""
    if margin == 0:
        return x
    width = x.shape[2]
    columns = torch.arange(-margin, width + margin, device=x.device)
    # The divisor is a tensor because ONNX files of any width cannot hold another.
    return x.index_select(2, columns % torch.full((), width, dtype=columns.dtype, device=x.device))


@unscripted
def _pad_to(x: Tensor, size: int) -> Tensor:
    """Pads a map with zeros at the bottom and the right, to ``size`` tokens per axis at least."""
    pad_h, pad_w = larger(size - x.shape[1], 0), larger(size - x.shape[2], 0)
    if isinstance(pad_h, int) and isinstance(pad_w, int) and pad_h == pad_w == 0:
        return x
    return F.pad(x, (0, 0, 0, pad_w, 0, pad_h))  # type: ignore[arg-type]


@unscripted
def _attend(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, dilation: int, bias: Tensor | None) -> Tensor:
    out = neighborhood_attention(q, k, v, kernel_size, dilation, bias=bias)
    assert isinstance(out, Tensor)
    return out
