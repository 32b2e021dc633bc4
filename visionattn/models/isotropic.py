"""Isotropic NAT and DiNAT, and ViT with relative position bias: twelve blocks on one map of 16x16 patches.

Paper: "Dilated Neighborhood Attention Transformer" (arXiv 2209.15001), section 4.4. Official code and weights:
https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT licence).
"""
from typing import Any

import torch
from timm.layers import PatchEmbed, calculate_drop_path_rates, register_notrace_module, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import NeighborhoodAttention2d
from ..layers.full import attend
from ..layers.scripting import unscripted
from . import nat
from ._backbone import Backbone
from ._blocks import Block
from ._builder import build_model
from ._family import Family, Peer, Published
from ._tables import resize_rpb
from .nat import dinat_cfg, fit_dilations

__all__ = ["IsotropicTransformer"]


@register_notrace_module
class RelativePositionAttention(nn.Module):
    """Full attention on a map ``[B, H, W, dim]`` of any size, with a bias for every offset of key from query.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        grid_size: Rows and columns of the maps that the bias table ``[num_heads, 2 * grid_size - 1, same]`` is for; it
            is interpolated (bicubic) for maps of other sizes.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    by_head = ("qkv", "rpb")  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            grid_size: int,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * grid_size - 1, 2 * grid_size - 1, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the bias table anew."""
        trunc_normal_(self.rpb, std=.02)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        qkv = self.qkv(x)
        B, H, W, C = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
        q, k, v = qkv.reshape(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        bias = _pairwise_bias(self.rpb, H, W).to(q.dtype)
        x = attend(q, k, v, bias)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, H, W, C)))


@unscripted
def _pairwise_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Bias of every (query, key) pair of a map, ``[1, heads, height * width, height * width]``."""
    size = (2 * height - 1, 2 * width - 1)
    # A symbolic size (export) must not be compared; interpolation to the same size changes nothing.
    if not (isinstance(height, int) and isinstance(width, int)) or table.shape[1:] != size:
        table = resize_rpb(table, size)
    rows = torch.arange(height, device=table.device)
    columns = torch.arange(width, device=table.device)
    rows = rows - rows[:, None] + height - 1  # key minus query
    columns = columns - columns[:, None] + width - 1
    entry = rows[:, None, :, None] * size[1] + columns[None, :, None, :]
    return table.flatten(1)[:, entry.reshape(height * width, height * width)][None]


class IsotropicTransformer(Backbone):
    """Blocks of neighborhood attention, or of full attention, on one map of patches.

    Images of any size; those that the patches do not divide are padded with zeros at the bottom and the right.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        img_size: Height and width that the bias tables of full attention are for.
        patch_size: Height and width of a patch.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads per block.
        kernel_size: Keys per axis that a query sees; None for full attention.
        dilations: Dilations of the blocks, repeated from the start if there are fewer than blocks.
        mlp_ratio: Width of the perceptrons' hidden layer, in ``embed_dim``.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the projections in the blocks.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    parts = "blocks"

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            img_size: int = 224,
            patch_size: int = 16,
            embed_dim: int = 384,
            depth: int = 12,
            num_heads: int = 12,
            kernel_size: int | None = 7,
            dilations: tuple[int, ...] = (1,),
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size, module=f"blocks.{i}") for i in range(depth)]
        self.patch_embed = PatchEmbed(
            img_size=None, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, norm_layer=nn.LayerNorm,
            output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True, **dd)

        def attention(dilation: int) -> nn.Module:
            if kernel_size is None:
                return RelativePositionAttention(
                    embed_dim, num_heads, -(-img_size // patch_size), proj_drop=proj_drop_rate, **dd)
            return NeighborhoodAttention2d(
                embed_dim, num_heads, kernel_size, dilation, proj_drop=proj_drop_rate, **dd)

        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(*[
            Block(embed_dim, attention(dilation), mlp_ratio, proj_drop=proj_drop_rate, drop_path=drop_path, **dd)
            for dilation, drop_path in zip(fit_dilations([dilations], [depth])[0], drop_paths, strict=True)
        ])
        self.finish(embed_dim, num_classes, global_pool, drop_rate, **dd)

    def forward_features(self, x: Tensor) -> Tensor:
        """Last map after the final norm, ``[batch, height / 16, width / 16, embed_dim]``."""
        return self.norm(self.blocks(self.first_map(x)))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' entries to ours (ours stay); leaves out the index tables that the model computes itself."""
    renamed = {
        f"blocks.{key.removeprefix('layers.')}" if key.startswith("layers.") else key: value
        for key, value in state_dict.items() if not key.endswith(".relative_position_index")
    }
    return nat.checkpoint_filter_fn(renamed, model)


_DEFAULTS = dict(first_conv="patch_embed.proj", pool_size=(14, 14))

default_cfgs = generate_default_cfgs({
    f"{name}_{size}.in1k": dinat_cfg(f"isotropic/{file}_{size}_in1k_224.pth", **_DEFAULTS)
    for name, file in (("nat_iso", "nat_isotropic"), ("dinat_iso", "dinat_isotropic"), ("vitrpb", "vitrpb"))
    for size in ("small", "base")
})

_SMALL = dict(embed_dim=384, num_heads=12)
_BASE = dict(embed_dim=768, num_heads=24)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> IsotropicTransformer:
    feature_cfg = dict(out_indices=3, feature_cls="getter")  # the last three blocks, as of timm's vision transformers
    return build_model(
        IsotropicTransformer, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg,
        **defaults | kwargs)


@register_model
def nat_iso_small(pretrained: bool = False, **kwargs: Any) -> IsotropicTransformer:
    """22.0 M parameters, 4.3 GMACs, published 80.0 % top-1 at 224 px."""
    return _create("nat_iso_small", pretrained, _SMALL, **kwargs)


@register_model
def nat_iso_base(pretrained: bool = False, **kwargs: Any) -> IsotropicTransformer:
    """86.5 M parameters, 16.9 GMACs, published 81.6 % top-1 at 224 px."""
    return _create("nat_iso_base", pretrained, _BASE, **kwargs)


@register_model
def dinat_iso_small(pretrained: bool = False, **kwargs: Any) -> IsotropicTransformer:
    """22.0 M parameters, 4.3 GMACs, published 80.8 % top-1 at 224 px."""
    return _create("dinat_iso_small", pretrained, _SMALL | dict(dilations=(1, 2)), **kwargs)


@register_model
def dinat_iso_base(pretrained: bool = False, **kwargs: Any) -> IsotropicTransformer:
    """86.5 M parameters, 16.9 GMACs, published 82.1 % top-1 at 224 px."""
    return _create("dinat_iso_base", pretrained, _BASE | dict(dilations=(1, 2)), **kwargs)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> IsotropicTransformer:
    """Full attention: 22.1 M parameters, 4.6 GMACs, published 81.2 % top-1 at 224 px."""
    return _create("vitrpb_small", pretrained, _SMALL | dict(kernel_size=None), **kwargs)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> IsotropicTransformer:
    """Full attention: 86.6 M parameters, 17.5 GMACs, published 82.5 % top-1 at 224 px."""
    return _create("vitrpb_base", pretrained, _BASE | dict(kernel_size=None), **kwargs)


family = Family(
    small={"dinat_iso_small": dict(embed_dim=48, depth=4), "vitrpb_small": dict(embed_dim=48, depth=4)},
    published={
        "nat_iso_small": Published(80.0, 4.3), "dinat_iso_small": Published(80.8, 4.3),
        "vitrpb_small": Published(81.2, 4.6), "nat_iso_base": Published(81.6, 16.9),
        "dinat_iso_base": Published(82.1, 16.9), "vitrpb_base": Published(82.5, 17.5),
    },
    goldens={"dinat_iso_small": "dinat_iso_small", "vitrpb_small": "vitrpb_small"},
    peers=[Peer("dinat_iso_small", "vit_small_patch16_224")],
    checkpoint_filter_fn=checkpoint_filter_fn,
    reductions=(16,),
)
