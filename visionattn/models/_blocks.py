"""Blocks of transformers on maps and on tokens, and stages of them, for any family."""
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerScale, Mlp
from torch import Tensor, nn

from ..layers import TokenAwarePooling
from ..layers.checkpointing import checkpointed
from ..layers.full import unseen

__all__ = [
    "BaseBlock", "Block", "ConvBlock", "ConvEmbedding", "MixFeedForward", "NormHead", "Perceptron", "PlacedBlock",
    "PooledBlock", "Stage", "TokenBlock",
]


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


class MixFeedForward(nn.Module):
    """A perceptron on the tokens of a map ``[B, H, W, dim]``, with a depthwise 3x3 convolution before its activation.

    Args:
        dim: Channels.
        hidden_dim: Channels of the convolution.
        drop: Dropout rate after the activation and of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0., device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        x = self.conv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.drop(self.act(x))))


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


class PooledBlock(Block):
    """:class:`Block` whose attention sees pooled tokens (TAP), not the shortcut beside it.

    Args:
        dim: Channels.
        attn: The attention module.
        mlp_ratio: Width of the perceptron's hidden layer, in ``dim``.
        num_scales: Scales of the pooling; 0 for none.
        downsample: Makes the block's map of the one of the block before; None for nothing.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        options: Further arguments of :class:`Block`.
    """

    def __init__(
            self,
            dim: int,
            attn: nn.Module,
            mlp_ratio: float,
            num_scales: int = 0,
            downsample: nn.Module | None = None,
            device=None,
            dtype=None,
            **options: Any,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        super().__init__(dim, attn, mlp_ratio, **options, **dd)
        self.downsample = nn.Identity() if downsample is None else downsample
        self.pool = TokenAwarePooling(dim, num_scales, **dd) if num_scales else nn.Identity()

    def branches(self, x: Tensor) -> Tensor:
        """What the block computes."""
        x = self.downsample(x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(self.pool(x)))))
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


class PlacedBlock(TokenBlock):
    """:class:`TokenBlock` whose attention must know the tokens' places."""

    def attend(self, x: Tensor, height: int, width: int) -> Tensor:
        """Attention of normed tokens of a map of this size."""
        return self.attn(x, (height, width))


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


class NormHead(ClassifierHead):
    """timm's, with a norm between pooling and classifier; without pooling the norm is of every token."""

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            pool_type: str,
            drop_rate: float,
            input_fmt: str,
            eps: float = 1e-5,
            device=None,
            dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        _check_pooling(pool_type)
        super().__init__(in_features, num_classes, pool_type, drop_rate=drop_rate, input_fmt=input_fmt, **dd)
        self.norm = nn.LayerNorm(in_features, eps=eps, **dd)

    @torch.jit.ignore
    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replaces the classifier and, if given, the pooling."""
        _check_pooling(pool_type)
        super().reset(num_classes, pool_type)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or what the classifier takes, of maps ``[B, H, W, dim]``."""
        x = self.drop(self.norm(self.global_pool(x)))
        return x if pre_logits else self.fc(x)


def _check_pooling(pool_type: str | None) -> None:
    if pool_type == "catavgmax":
        raise ValueError("global_pool 'catavgmax' doubles the channels, which the norm after it does not allow")
