"""Blocks of transformers on maps and on tokens, and stages of them, for any family."""
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from ..layers.checkpointing import checkpointed
from ..layers.full import unseen

__all__ = ["BaseBlock", "Block", "ConvBlock", "ConvEmbedding", "Perceptron", "Stage", "TokenBlock"]


class Perceptron(Mlp):
    """timm's, whose GELU works in place in inference where nobody sees it: for less memory and traffic."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of the same shape."""
        x = self.fc1(x)
        if torch.jit.is_scripting():
            x = self.act(x)
        else:
            x = torch.ops.aten.gelu_(x) if unseen(self.fc1, self.act) else self.act(x)
        return self.drop2(self.fc2(self.drop1(x)))


class BaseBlock(nn.Module):
    """A block from map to map that may compute its inner values a second time in training instead of keeping them.

    A subclass has the method ``branches``, which computes the block. One that takes more than a map, such as tokens of
    earlier blocks, overrides ``forward`` too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpointed(self, self.branches, x)
        return self.branches(x)

    def branches(self, x: Tensor) -> Tensor:
        """What the block computes."""
        raise NotImplementedError


class ConvBlock(BaseBlock):
    """ConvNeXt's block on maps ``[B, H, W, dim]``: depthwise convolution, norm and perceptron beside a shortcut.

    Args:
        dim: Channels.
        mlp_ratio: Width of the perceptron's hidden layer, in ``dim``.
        layer_scale: Initial value of a learnt factor per channel on the branch.
        drop_path: Rate at which a sample skips the branch in training.
        norm_layer: Makes the norm: ``norm_layer(dim)``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            mlp_ratio: float,
            layer_scale: float,
            drop_path: float = 0.,
            norm_layer: Callable[..., nn.Module] = partial(nn.LayerNorm, eps=1e-6),
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **dd)
        self.norm = norm_layer(dim, **dd)
        self.mlp = Perceptron(dim, int(dim * mlp_ratio), **dd)
        self.ls = LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def branches(self, x: Tensor) -> Tensor:
        """What the block computes."""
        y = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.ls(self.mlp(self.norm(y))))


class Block(BaseBlock):
    """Pre-norm transformer block on maps ``[B, H, W, dim]``: attention, then a perceptron, each beside a shortcut.

    Args:
        dim: Channels.
        attn: The attention module.
        mlp_ratio: Width of the perceptron's hidden layer, in ``dim``.
        layer_scale: Initial value of a learnt factor per channel on both branches; None for no such factor.
        proj_drop: Dropout rate in the perceptron.
        drop_path: Rate at which a sample skips a branch in training.
        norm_layer: Makes a norm: ``norm_layer(dim)``.
        mlp_layer: Makes the perceptron: ``mlp_layer(dim, hidden_dim, drop=rate)``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            attn: nn.Module,
            mlp_ratio: float,
            layer_scale: float | None = None,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
            mlp_layer: Callable[..., nn.Module] = Perceptron,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        scale = partial(LayerScale, dim, init_values=layer_scale, **dd) if layer_scale else nn.Identity
        path = partial(DropPath, drop_path) if drop_path > 0. else nn.Identity
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.ls1, self.drop_path1 = scale(), path()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2, self.drop_path2 = scale(), path()

    def branches(self, x: Tensor) -> Tensor:
        """What the block computes."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class TokenBlock(Block):
    """:class:`Block` on tokens ``[B, prefix + H * W, dim]``, which it takes with height and width of their map."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # type: ignore[override]
        """Returns tokens of the same shape."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpointed(self, self.token_branches, x, height, width)
        return self.token_branches(x, height, width)

    def token_branches(self, x: Tensor, height: int, width: int) -> Tensor:
        """What the block computes."""
        x = x + self.drop_path1(self.ls1(self.attend(self.norm1(x), height, width)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def attend(self, x: Tensor, height: int, width: int) -> Tensor:
        """Attention of normed tokens; to be overridden where it depends on their places."""
        return self.attn(x)


class Stage(nn.Module):
    """A downsampler (not in the first stage), the blocks that work at its resolution, and a norm after them if any.

    Args:
        downsample: From the map of the stage before to this one's.
        blocks: From map to map.
        norm: A norm that the next stage and the heads take the map through (None for none). Norms for the heads alone
            are no part of a backbone: :class:`visionattn.models.Family` names them.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map after the last block."""
        return self.norm(self.blocks(self.downsample(x)))


class ConvEmbedding(nn.Module):
    """A convolution of an image or a map, then a norm.

    Args:
        in_chans: Channels of the input.
        dim: Channels of the output.
        kernel_size: Of the convolution.
        stride: Of the convolution.
        padding: Of the convolution.
        from_map: Whether the input is a map ``[B, H, W, in_chans]``, not an image ``[B, in_chans, H, W]``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            in_chans: int,
            dim: int,
            kernel_size: int,
            stride: int,
            padding: int,
            from_map: bool = True,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.from_map = from_map
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=padding, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map ``[B, H / stride, W / stride, dim]``, rounded."""
        if self.from_map:
            x = x.permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))
