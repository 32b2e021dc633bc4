"""MAFormer: windows and a learnt summary of the map, fused by attention, in two stages; then attention of all tokens.

Paper: "MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition" (arXiv 2209.01620,
Neurocomputing 2024). There is no authors' code and there are no weights: the block is as the abstract states it, and
what it does not state (widths, depths, the order of things) is a completion of ours.
"""
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.full import attend
from ..layers.local_global import LocalGlobalAttention
from ._backbone import Backbone, init_convolution, stage_levels
from ._blocks import BaseBlock, ConvEmbedding, Perceptron, Stage
from ._builder import build_model, cfg
from ._family import Family, Peer, same_names

__all__ = ["MAFormer"]

Grid = tuple[int, int]  # rows and columns


class SelfAttention(nn.Module):
    """Attention of all tokens of a map ``[batch, height, width, dim]`` to all.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    by_head = ("qkv",)  # see visionattn.analysis.prune_heads

    def __init__(self, dim: int, num_heads: int, proj_drop: float = 0., device=None, dtype=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide dim {dim}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        qkv = self.qkv(x)
        batch, height, width, dim = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
        qkv = qkv.reshape(batch, height * width, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj_drop(self.proj(attend(q, k, v).transpose(1, 2).reshape(batch, height, width, dim)))


class MAFBlock(BaseBlock):
    """A depthwise convolution that tells places, attention, a perceptron; on maps ``[batch, height, width, dim]``.

    Args:
        dim: Channels.
        attn: The attention module.
        mlp_ratio: Width of the perceptron's hidden layer, in ``dim``.
        proj_drop: Dropout rate in the perceptron.
        drop_path: Rate at which a sample skips attention or perceptron in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            attn: nn.Module,
            mlp_ratio: float,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Perceptron(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def branches(self, x: Tensor) -> Tensor:
        """What the block computes."""
        x = x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class MAFormer(Backbone):
    """Four stages on maps ``[batch, height, width, dim]``, for images of any size.

    Args:
        img_size: Height and width of the images that ``downsample="linear"`` has its maps of tokens for; one number
            for both. Images of other sizes get interpolated ones (:meth:`set_input_size` changes the maps themselves).
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        window_size: Side of the windows of the first two stages.
        reductions: Side of what a global token stands for, in the first two stages.
        downsample: How global tokens are made: ``"conv"``, by strided convolutions, or ``"linear"``, by the paper's
            linear map over all tokens (:class:`~visionattn.layers.LocalGlobalAttention`).
        mlp_ratio: Width of the perceptrons' hidden layer, in channels of the stage.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the projections in the blocks.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A sequence has another number of entries, or a value does not fit.
    """

    def __init__(
            self,
            img_size: int | Grid = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            embed_dims: Sequence[int] = (64, 128, 256, 512),
            depths: Sequence[int] = (3, 5, 9, 3),
            num_heads: Sequence[int] = (2, 4, 8, 16),
            window_size: int = 7,
            reductions: Sequence[int] = (4, 2),
            downsample: Literal["conv", "linear"] = "conv",
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        for name, values, count in (
                ("embed_dims", embed_dims, 4), ("depths", depths, 4), ("num_heads", num_heads, 4),
                ("reductions", reductions, 2)):
            if len(values) != count:
                which = "stage" if count == 4 else "stage of the first two"
                raise ValueError(f"{name} must have one entry per {which}, {count}, got {values}")
        dd: Any = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.feature_info = stage_levels(embed_dims)
        sizes = self.map_sizes(img_size)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def attention(i: int) -> nn.Module:
            if i < 2:
                return LocalGlobalAttention(
                    embed_dims[i], num_heads[i], sizes[i], window_size, reductions[i], downsample, proj_drop_rate, **dd)
            return SelfAttention(embed_dims[i], num_heads[i], proj_drop_rate, **dd)

        self.patch_embed = ConvEmbedding(in_chans, embed_dims[0], 7, stride=4, padding=3, from_map=False, **dd)
        self.stages = nn.Sequential(*[
            Stage(
                ConvEmbedding(embed_dims[i - 1], dim, 3, stride=2, padding=1, **dd) if i else nn.Identity(),
                [MAFBlock(dim, attention(i), mlp_ratio, proj_drop_rate, rate, **dd) for rate in drop_paths[i]],
            )
            for i, dim in enumerate(embed_dims)
        ])
        self.finish(embed_dims[-1], num_classes, global_pool, drop_rate, **dd)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        """Draws the parameters of one module; of convolutions normal ones, by the number of their outputs."""
        super().init_module(module, needs_reset)
        if isinstance(module, nn.Conv2d):
            init_convolution(module)

    @torch.jit.ignore
    def map_sizes(self, img_size: int | Grid) -> list[Grid]:
        """Height and width of the maps of the first two stages for images of ``img_size``."""
        height, width = to_2tuple(img_size)
        return [(-(-height // stride), -(-width // stride)) for stride in (4, 8)]

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Grid) -> None:
        """Makes the linear maps of tokens those of another image size; with convolutions there is nothing to change.

        The model takes images of any size without this, interpolating its maps, and computes the same after it. What
        changes is the size of the maps, in which they are trained further and saved: they become new parameters.
        """
        for stage, size in zip(self.stages[:2], self.map_sizes(img_size), strict=True):
            for block in stage.blocks:
                block.attn.set_input_size(size)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(**dict(
        first_conv="patch_embed.proj", classifier="head.fc", license="unspecified",
        origin_url="https://arxiv.org/abs/2209.01620", paper_ids="arXiv:2209.01620",
        paper_name="MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition",
    ) | kwargs)


default_cfgs = generate_default_cfgs({
    "maformer_s.untrained": _cfg(),
    "maformer_b.untrained": _cfg(),
    "maformer_l.untrained": _cfg(),
    "test_maformer.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> MAFormer:
    return build_model(MAFormer, variant, pretrained, pretrained_filter_fn=same_names, **defaults | kwargs)


@register_model
def maformer_s(pretrained: bool = False, **kwargs: Any) -> MAFormer:
    """The small one."""
    return _create("maformer_s", pretrained, {}, **kwargs)


@register_model
def maformer_b(pretrained: bool = False, **kwargs: Any) -> MAFormer:
    """The middle one."""
    model_args = dict(embed_dims=(64, 128, 320, 512), depths=(3, 5, 24, 3), num_heads=(2, 4, 10, 16))
    return _create("maformer_b", pretrained, model_args, **kwargs)


@register_model
def maformer_l(pretrained: bool = False, **kwargs: Any) -> MAFormer:
    """The large one."""
    model_args = dict(embed_dims=(96, 192, 384, 768), depths=(4, 8, 24, 4), num_heads=(3, 6, 12, 24))
    return _create("maformer_l", pretrained, model_args, **kwargs)


@register_model
def test_maformer(pretrained: bool = False, **kwargs: Any) -> MAFormer:  # noqa: PT028 - no test function
    """Small enough for tests."""
    model_args = dict(
        img_size=64, embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(2, 2, 3, 4), window_size=4,
        mlp_ratio=2.)
    return _create("test_maformer", pretrained, model_args, **kwargs)


family = Family(
    small={"test_maformer": {"downsample": "linear"}},
    peers=[Peer("maformer_s", "swin_tiny_patch4_window7_224")],
)
