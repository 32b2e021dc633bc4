"""Flowformer: four stages of flow attention, whose cost is linear in the number of tokens; the model of images.

Paper: "Flowformer: Linearizing Transformers with Conservation Flows" (ICML 2022, arXiv 2202.06258). Official code:
https://github.com/thuml/Flowformer (MIT licence). Its weights are behind a page that no program can fetch from.
"""
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, PatchEmbed, calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import FlowAttention
from ._backbone import Backbone, stage_levels
from ._blocks import Block, Stage
from ._builder import build_model, cfg
from ._family import Family, Peer, Published
from ._tables import Grid, PositionEmbedding, resize_positions

__all__ = ["Flowformer"]


class PatchMerging(nn.Module):
    """Map ``[B, H, W, dim]`` to ``[B, H / 2, W / 2, out_dim]``: its 2 x 2 patches, odd sides padded with zeros."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 2, stride=2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the smaller map."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class FlowBlock(Block):
    """A block with flow attention whose perceptron alone has a learnt factor per channel.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        mlp_ratio: Width of the perceptron's hidden layer, in ``dim``.
        layer_scale: Initial value of the factor.
        proj_drop: Dropout rate of the projections.
        drop_path: Rate at which a sample skips a branch in training.
        dd: Device and dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            mlp_ratio: float,
            layer_scale: float,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            **dd: Any,
    ):
        super().__init__(
            dim, FlowAttention(dim, num_heads, proj_drop, **dd), mlp_ratio, proj_drop=proj_drop, drop_path=drop_path,
            norm_layer=_norm, **dd)
        self.ls2 = LayerScale(dim, init_values=layer_scale, **dd)


_norm = partial(nn.LayerNorm, eps=1e-6)


class Flowformer(Backbone):
    """Flowformer on maps ``[batch, height, width, dim]``, for images of any size.

    Positions are added to the first map alone, from a table that is interpolated for images of other sizes than
    ``img_size``. Sides that the patches do not divide are padded with zeros, at the bottom and the right.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        img_size: Height and width of the images that the table of positions is for.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of all stages.
        mlp_ratio: Width of the perceptrons' hidden layer, in channels of the stage.
        layer_scale: Initial value of the learnt factors on the perceptrons.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the projections in the blocks.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    stem_parts = ("patch_embed", "pos_embed")

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            img_size: int | Grid = 224,
            embed_dims: Sequence[int] = (96, 192, 384, 768),
            depths: Sequence[int] = (3, 3, 10, 3),
            num_heads: int = 12,
            mlp_ratio: float = 4.,
            layer_scale: float = 1e-5,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.feature_info = stage_levels(embed_dims)
        self.patch_embed = PatchEmbed(
            img_size=None, patch_size=4, in_chans=in_chans, embed_dim=embed_dims[0], output_fmt="NHWC",
            strict_img_size=False, dynamic_img_pad=True, **dd)
        self.pos_embed = PositionEmbedding(embed_dims[0], _first_map(img_size), mode="bicubic", **dd)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.Sequential(*[
            Stage(
                PatchMerging(embed_dims[i - 1], dim, **dd) if i else nn.Identity(),
                [FlowBlock(dim, num_heads, mlp_ratio, layer_scale, proj_drop_rate, rate, **dd) for rate in drop_paths[i]],
            )
            for i, dim in enumerate(embed_dims)
        ])
        self.finish(embed_dims[-1], num_classes, global_pool, drop_rate, norm_layer=_norm, **dd)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Grid) -> None:
        """Makes the table of positions that of another image size, to train it further and save it.

        The model takes images of any size without this and computes the same after it.
        """
        self.pos_embed.set_input_size(_first_map(img_size))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the positions."""
        return {"pos_embed.table"}

    def embed(self, x: Tensor) -> Tensor:
        """The first map of images, with positions."""
        x = self.patch_embed(x)
        return x + self.pos_embed(x.shape[1], x.shape[2]).reshape(1, x.shape[1], x.shape[2], x.shape[3])


def _first_map(img_size: int | Grid) -> Grid:
    """Rows and columns of the first map of images of this size."""
    height, width = to_2tuple(img_size)
    return -(-height // 4), -(-width // 4)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Renames the authors' entries to ours (ours stay); positions of square images are fitted to the model's size."""
    rules: list[tuple[str, Any]] = [
        (r"^patch_embed\.0\.", "patch_embed."),
        (r"^patch_embed\.(\d)\.", r"stages.\1.downsample."),
        (r"^blocks\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.gamma$", ".ls2.gamma"),
        (r"^pos_embed$", "pos_embed.table"),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ]
    renamed = {}
    for name, x in state_dict.items():
        for pattern, new in rules if not name.startswith("stages.") else []:
            name = re.sub(pattern, new, name)
        renamed[name] = x
    table, size = renamed.get("pos_embed.table"), model.pos_embed.size
    if table is not None and table.ndim == 3 and table.shape[1] != math.prod(size):
        side = math.isqrt(table.shape[1])
        if side * side == table.shape[1]:
            renamed["pos_embed.table"] = resize_positions(table, (side, side), size, 0, "bicubic")
    return renamed


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(
        first_conv="patch_embed.proj", classifier="head.fc", license="mit", crop_pct=0.9,
        origin_url="https://github.com/thuml/Flowformer", paper_ids="arXiv:2202.06258",
        paper_name="Flowformer: Linearizing Transformers with Conservation Flows", **kwargs)


default_cfgs = generate_default_cfgs({
    "flowformer.untrained": _cfg(),
    "test_flowformer.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Flowformer:
    return build_model(Flowformer, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def flowformer(pretrained: bool = False, **kwargs: Any) -> Flowformer:
    """43.3 M parameters, 6.9 GMACs, published 80.6 % top-1 at 224 px."""
    return _create("flowformer", pretrained, **kwargs)


@register_model
def test_flowformer(pretrained: bool = False, **kwargs: Any) -> Flowformer:  # noqa: PT028 - no pytest function
    """Small enough for tests."""
    model_args = dict(
        img_size=64, embed_dims=(16, 32, 64, 96), depths=(1, 1, 2, 1), num_heads=4, mlp_ratio=2., layer_scale=1.)
    return _create("test_flowformer", pretrained, **model_args | kwargs)


family = Family(
    small={"test_flowformer": {}},
    published={"flowformer": Published(80.6, None)},
    goldens={"flow_ops": "*"},
    peers=[Peer("flowformer", "pvt_v2_b3")],
    checkpoint_filter_fn=checkpoint_filter_fn,
)
