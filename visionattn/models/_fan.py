"""What the models of FAN are made of: stems, what is in place of a perceptron, blocks of the class token."""
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn

from ..layers.full import attend
from ._blocks import BaseBlock, ConvBlock, Perceptron, Stage

__all__ = ["ChannelProcessing", "ClassBlock", "PatchBlock", "conv_stem", "hybrid_stem", "norm_layer"]

norm_layer = partial(nn.LayerNorm, eps=1e-6)


class UnbiasedNorm(nn.LayerNorm):
    """A layer norm that divides by the root of the unbiased variance (of ``n - 1``)."""

    def __init__(self, dim: int, eps: float = 1e-6, device=None, dtype=None):
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.factor = (dim - 1) / dim  # of the unbiased variance in the biased one

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of the same shape."""
        return F.layer_norm(
            x, self.normalized_shape, self.weight * self.factor ** 0.5, self.bias, self.eps * self.factor)


class PatchConv(nn.Conv2d):
    """A convolution of patches that do not overlap, on maps ``[B, H, W, C]``; what fills no patch is left out."""

    def __init__(self, dim: int, out_dim: int, patch_size: int, device=None, dtype=None):
        super().__init__(dim, out_dim, patch_size, stride=patch_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[B, H / patch_size, W / patch_size, out_dim]``, rounded down."""
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, self.stride).permute(0, 2, 3, 1)


class ChannelsFirst(nn.Sequential):
    """Layers for maps ``[B, C, H, W]`` that take and give ``[B, H, W, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map after the last layer."""
        x = x.permute(0, 3, 1, 2)
        for layer in self:
            x = layer(x)
        return x.permute(0, 2, 3, 1)


class Stem(nn.Module):
    """Stages of an own resolution each, if any, and what makes the map of tokens of the last one's map."""

    def __init__(self, stages: Sequence[Stage], proj: nn.Module):
        super().__init__()
        self.stages = nn.Sequential(*stages)
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, H, W]`` to a map ``[B, H / 16, W / 16, dim]``."""
        return self.proj(self.stages(x.permute(0, 2, 3, 1)))


def conv_stem(in_chans: int, dim: int, **dd: Any) -> Stem:
    """Four 3x3 convolutions of stride 2 with batch norms; the map is rounded up."""
    widths = [in_chans, dim // 8, dim // 4, dim // 2, dim]
    layers: list[nn.Module] = []
    for width, out in zip(widths, widths[1:], strict=False):
        conv = nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False, **dd)
        layers += [nn.Sequential(conv, nn.BatchNorm2d(out, **dd)), nn.GELU()]
    return Stem([], ChannelsFirst(*layers[:-1]))


def hybrid_stem(
        in_chans: int, dim: int, stem_dims: Sequence[int], stem_depths: Sequence[int], unbiased: bool, **dd: Any) -> Stem:
    """Two stages of ConvNeXt, at strides 4 and 8; maps are rounded down."""
    norm = UnbiasedNorm if unbiased else norm_layer
    narrow, wide = stem_dims
    downsamples = (
        nn.Sequential(PatchConv(in_chans, narrow, 4, **dd), norm_layer(narrow, **dd)),
        nn.Sequential(norm(narrow, **dd), PatchConv(narrow, wide, 2, **dd)))
    stages = [
        Stage(downsample, [ConvBlock(width, 4., layer_scale=1e-6, norm_layer=norm, **dd) for _ in range(depth)])
        for downsample, width, depth in zip(downsamples, stem_dims, stem_depths, strict=True)]
    return Stem(stages, PatchConv(wide, dim, 2, **dd))


class ChannelProcessing(nn.Module):
    """A perceptron with depthwise convolutions on maps ``[B, H, W, dim]``, whose channels a gate weighs (section 3.2).

    A channel's gate is the sigmoid of how alike two distributions over the tokens are: the softmax of its query over all
    tokens, and the mean, over the channels of a head, of that of the input itself, which are the keys.

    Args:
        dim: Channels.
        hidden_dim: Width of the perceptron's hidden layer.
        drop: Dropout rate of the result.
        num_heads: Divides ``dim``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0., num_heads: int = 8, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, **dd)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.conv1 = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.bn = nn.BatchNorm2d(hidden_dim, **dd)
        self.conv2 = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.ls = LayerScale(hidden_dim, 1., **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.drop = nn.Dropout(drop)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Sets the temperatures to one."""
        nn.init.ones_(self.temperature)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        v = self.fc1(x)
        conv = self.conv2(self.bn(F.gelu(self.conv1(v.permute(0, 3, 1, 2)))))
        v = self.norm(self.fc2(v + self.ls(conv.permute(0, 2, 3, 1))))
        return self.drop(v * self.gate(x))

    def gate(self, x: Tensor) -> Tensor:
        """The factor of every channel, ``[batch, 1, 1, dim]``, of a map."""
        B, H, W, C = x.shape
        x = x.flatten(1, 2)
        heads = (B, H * W, self.num_heads, C // self.num_heads)
        q = self.q(x).softmax(dim=1).reshape(heads)
        k = x.softmax(dim=1).reshape(heads).mean(dim=-1, keepdim=True)
        return ((q * k).sum(dim=1).sigmoid() * self.temperature.squeeze(-1)).to(x.dtype).reshape(B, 1, 1, C)


class ClassAttention(nn.Module):
    """Attention of the class token, the first of ``[B, N, dim]``, to all tokens."""

    by_head = ("q", "k", "v")  # see visionattn.analysis.prune_heads

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, **dd)
        self.k = nn.Linear(dim, dim, **dd)
        self.v = nn.Linear(dim, dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the class token's alone, ``[B, 1, dim]``."""
        q = self.q(x[:, :1])
        B, N, C = x.shape[0], x.shape[1], q.shape[2]
        heads = self.num_heads, C // self.num_heads
        q = q.reshape(B, 1, *heads).transpose(1, 2)
        k = self.k(x).reshape(B, N, *heads).transpose(1, 2)
        v = self.v(x).reshape(B, N, *heads).transpose(1, 2)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(B, 1, C))


class ClassBlock(BaseBlock):
    """A block of the class token on tokens ``[B, 1 + N, dim]``: it attends to the patches and goes through a perceptron.

    The patches go through the norms, and to each their normed selves are added twice: as they are after the first norm,
    and after the second.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = ClassAttention(dim, num_heads, **dd)
        self.ls1 = LayerScale(dim, 1., **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Perceptron(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = LayerScale(dim, 1., **dd)

    def branches(self, x: Tensor) -> Tensor:
        """What the block computes."""
        y = self.norm1(x)
        x = self.norm2(x + self.ls1(torch.cat([self.attn(y), y[:, 1:]], dim=1)))
        return x + torch.cat([self.ls2(self.mlp(x[:, :1])), x[:, 1:]], dim=1)


class PatchBlock(BaseBlock):
    """What a :class:`ClassBlock` does to the patches, which do not see the class token: for maps, without that token."""

    def __init__(self, block: ClassBlock):
        super().__init__()
        self.norm1, self.ls1, self.norm2 = block.norm1, block.ls1, block.norm2

    def branches(self, x: Tensor) -> Tensor:
        """What the block computes."""
        x = self.norm2(x + self.ls1(self.norm1(x)))
        return x + x
