"""Flow attention of a map, as the models of images have it.

"Flowformer: Linearizing Transformers with Conservation Flows" (arXiv 2202.06258), section 3.2.
"""
import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops import flow_attention
from .scripting import unscripted

__all__ = ["FlowAttention"]


@register_notrace_module
class FlowAttention(nn.Module):
    """Flow attention of all tokens of a map ``[B, H, W, dim]`` to all, at a cost that is linear in their number.

    It knows nothing of the tokens' places. 1e-6 is added to all sums that norm, as in the authors' model of images.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    by_head = ("qkv",)  # see visionattn.analysis.prune_heads

    def __init__(self, dim: int, num_heads: int, proj_drop: float = 0., device=None, dtype=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim})")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        return self.proj_drop(self.proj(self._attend(self.qkv(x).flatten(1, 2)))).reshape(x.shape)

    @torch.jit.ignore
    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_heads={self.num_heads}"

    @unscripted
    def _attend(self, qkv: Tensor) -> Tensor:
        """Flow attention ``[batch, tokens, dim]`` of projected tokens ``[batch, tokens, 3 * dim]``."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return flow_attention(q, k, v, eps_of_sums=True).flatten(2)
