"""RVT: attention whose scores a learnt mask weighs, and perceptrons with convolutions; with TAP, pooled tokens attend.

Papers: "Towards Robust Vision Transformer" (RVT, CVPR 2022, arXiv 2105.07926) and "Robustifying Token Attention for
Vision Transformers" (TAP, ICCV 2023, arXiv 2303.11126), whose code https://github.com/guoyongcs/TAPADL (MIT licence)
has these models.
"""
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.full import SelfAttention
from ..layers.scripting import unscripted
from ._backbone import Backbone
from ._blocks import NormHead, PooledBlock
from ._builder import build_model, cfg
from ._family import Family, Peer
from ._tables import Grid, resize_pairs

__all__ = ["RVT", "MaskedAttention"]


class Stem(nn.Module):
    """Image ``[B, in_chans, H, W]`` to map ``[B, H / 16, W / 16, dim]``: two convolutions, a norm and pooling between."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, 32, 7, stride=2, padding=2, **dd),
            nn.BatchNorm2d(32, **dd),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(32, dim, 4, stride=4, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the first map."""
        return self.proj(x).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """Map ``[B, H, W, dim]`` to ``[B, H / 2, W / 2, out_dim]`` (rounded up), each channel by itself."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the smaller map."""
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class MaskedAttention(SelfAttention):
    """Attention of all tokens to all whose scores are multiplied by the sigmoid of a learnt number for every pair.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        size: Rows and columns of the maps that the numbers ``[num_heads, tokens, tokens]`` are for; they are interpolated
            (bilinear, both for queries and for keys) for maps of other sizes.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    by_head = ("qkv", "mask")

    def __init__(self, dim: int, num_heads: int, size: Grid, device=None, dtype=None):
        super().__init__(dim, num_heads, device=device, dtype=dtype)
        self.size = size
        self.scale = (dim // num_heads) ** -0.5
        self.mask = nn.Parameter(torch.empty(num_heads, *2 * (size[0] * size[1],), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Sets the numbers to zero: all pairs alike."""
        nn.init.zeros_(self.mask)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """The attention of ``q, k, v [batch, heads, height * width, head_dim]``, before the output projection."""
        mask = _mask_at(self.mask, self.size, height, width).sigmoid()
        weights = ((q * self.scale) @ k.transpose(-2, -1) * mask).softmax(dim=-1)
        return weights @ v


@unscripted
def _mask_at(mask: Tensor, size: Grid, height: int, width: int) -> Tensor:
    """A table of pairs for maps of this size."""
    # A symbolic size (export) must not be compared: the answer would hold for the example's size only.
    if isinstance(height, int) and isinstance(width, int) and (height, width) == tuple(size):
        return mask
    return resize_pairs(mask, size, (height, width))


class ConvMlp(nn.Module):
    """A perceptron on maps ``[B, H, W, dim]`` with a depthwise convolution inside and batch norms after each step."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0., device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.bn1 = nn.BatchNorm2d(hidden_dim, **dd)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.bn2 = nn.BatchNorm2d(hidden_dim, **dd)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.bn3 = nn.BatchNorm2d(dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        x = F.gelu(self.bn1(self.fc1(x.permute(0, 3, 1, 2))))
        x = F.gelu(self.bn2(self.conv(x)))
        return self.drop(self.bn3(self.fc2(x)).permute(0, 2, 3, 1))


class RVT(Backbone):
    """RVT for images of any size from 15 x 15 pixels on, on maps ``[batch, height, width, dim]``.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map, without concatenation; "" for not at all.
        img_size: Height and width of the images that the masks are for.
        embed_dims: Channels of each stage, multiples of those of the stage before.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        masked_blocks: Number of blocks of the first stage, from its first, whose attention has a mask.
        num_scales: Scales of the token-aware pooling; 0 for none.
        mlp_ratio: Width of the perceptrons' hidden layer in channels of the stage.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate of stochastic depth, which grows linearly from 0 at the first block and is reached one block
            after the last.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A sequence has another number of entries, there are fewer blocks than ``masked_blocks``, heads do not
            divide channels, or the images are too small.
    """

    parts = "blocks"
    min_size = 15  # of fewer pixels the stem makes an empty map

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            img_size: int | Grid = 224,
            embed_dims: Sequence[int] = (384,),
            depths: Sequence[int] = (12,),
            num_heads: Sequence[int] = (6,),
            masked_blocks: int = 5,
            num_scales: int = 0,
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        if not len(embed_dims) == len(depths) == len(num_heads) > 0:
            raise ValueError("embed_dims, depths and num_heads must have one entry per stage, got "
                             f"{embed_dims}, {depths} and {num_heads}")
        if not 0 <= masked_blocks <= depths[0]:
            raise ValueError(f"masked_blocks must be 0 to {depths[0]}, the blocks of the first stage, got {masked_blocks}")
        self.in_chans = in_chans
        height, width = to_2tuple(img_size)
        if min(height, width) < self.min_size:
            raise ValueError(f"img_size must be {self.min_size} or more, got {img_size}")
        size = ((height - 1) // 2 + 1) // 2 // 4, ((width - 1) // 2 + 1) // 2 // 4
        stages = [(stage, i) for stage, depth in enumerate(depths) for i in range(depth)]
        self.feature_info = [
            dict(num_chs=embed_dims[stage], reduction=16 * 2 ** stage, module=f"blocks.{index}")
            for index, (stage, _) in enumerate(stages)]

        def block(index: int, stage: int, i: int) -> nn.Module:
            dim, heads = embed_dims[stage], num_heads[stage]
            masked = stage == 0 and i < masked_blocks
            attn = MaskedAttention(dim, heads, size, **dd) if masked else SelfAttention(dim, heads, **dd)
            downsample = Downsample(embed_dims[stage - 1], dim, **dd) if stage and i == 0 else None
            return PooledBlock(
                dim, attn, mlp_ratio, num_scales, downsample, drop_path=drop_path_rate * index / len(stages),
                norm_layer=partial(nn.LayerNorm, eps=1e-6), mlp_layer=ConvMlp, **dd)

        self.patch_embed = Stem(in_chans, embed_dims[0], **dd)
        self.blocks = nn.Sequential(*[block(index, *place) for index, place in enumerate(stages)])
        self.finish(
            embed_dims[-1], num_classes, global_pool, drop_rate, norm_layer=None,
            head_layer=partial(NormHead, eps=1e-6), **dd)

    def forward_features(self, x: Tensor) -> Tensor:
        """Last map, before the norm, which comes after the pooling: ``[batch, height, width, num_features]``."""
        return self.blocks(self.first_map(x))

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Drops the blocks after the last one of ``indices``, and what is asked for besides; returns the indices."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or len(self.blocks) < len(self.feature_info):
            self.head.norm = nn.Identity()
        return taken


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: RVT) -> dict[str, Tensor]:
    """Renames the authors' entries to ours (ours stay), and fits masks to the model's image size.

    What the authors call theirs is a guess, by the layout of PiT that RVT is built on.
    """
    strides = [info["reduction"] for info in model.feature_info]
    starts = [strides.index(stride) for stride in dict.fromkeys(strides)]
    masks = {f"{name}.mask": module for name, module in model.named_modules() if isinstance(module, MaskedAttention)}
    renamed = {}
    for key, x in state_dict.items():
        for pattern, new in _RENAMES:
            key = re.sub(pattern, new, key)
        if match := re.match(r"transformers\.(\d+)\.blocks\.(\d+)\.", key):
            key = f"blocks.{starts[int(match[1])] + int(match[2])}.{key[match.end():]}"
        elif match := re.match(r"pools\.(\d+)\.", key):
            key = f"blocks.{starts[int(match[1]) + 1]}.downsample.{key[match.end():]}"
        if key in masks and x.ndim == 3 and x.shape[1:] != masks[key].mask.shape[1:]:
            side = round(x.shape[1] ** 0.5)  # of square images
            if side * side == x.shape[1] == x.shape[2]:
                x = resize_pairs(x, (side, side), masks[key].size)
        renamed[key] = x
    return renamed


_RENAMES = (
    (r"^module\.", ""),
    (r"\.dilation_predictor\.proj\.", ".pool.predictor."),
    (r"(?:\.attn)?\.att_mask$", ".attn.mask"),
    (r"\.mlp\.conv1\.", ".mlp.fc1."),
    (r"\.mlp\.conv2\.", ".mlp.fc2."),
    (r"\.mlp\.dwconv\.(?:dwconv\.)?", ".mlp.conv."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _reductions(variant: str) -> tuple[int, ...]:
    return (16, 16, 32) if "tiny" in variant or variant.startswith("test_") else (16,)


def _cfg(name: str, size: int = 224) -> dict[str, Any]:
    stride = _reductions(name)[-1]
    return cfg(
        input_size=(3, size, size), pool_size=(size // stride, size // stride), first_conv="patch_embed.proj.0",
        classifier="head.fc", license="mit", origin_url="https://github.com/guoyongcs/TAPADL",
        paper_ids=("arXiv:2105.07926", "arXiv:2303.11126"))


_ARGS: dict[str, dict[str, Any]] = {
    "rvt_tiny_plus": dict(embed_dims=(192, 384), depths=(10, 2), num_heads=(6, 12), masked_blocks=10),
    "rvt_small_plus": {},
    "rvt_base_plus": dict(embed_dims=(768,), num_heads=(12,)),
}
_ARGS |= {f"tap_{name}": args | dict(num_scales=4) for name, args in _ARGS.items()} | {
    "test_tap_rvt": dict(
        img_size=64, embed_dims=(24, 48), depths=(2, 1), num_heads=(2, 4), masked_blocks=1, num_scales=3, mlp_ratio=2.)}

default_cfgs = generate_default_cfgs({
    f"{name}.untrained": _cfg(name, 64 if name.startswith("test_") else 224) for name in _ARGS})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RVT:
    args = _ARGS[variant] | kwargs
    depths = args.get("depths", (12,))
    # Of two stages the middle and the end of the first, and the end of the second; of one the last blocks.
    out_indices = 3 if len(depths) == 1 else (depths[0] // 2 - 1, depths[0] - 1, sum(depths) - 1)
    return build_model(
        RVT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"), **args)


@register_model
def rvt_tiny_plus(pretrained: bool = False, **kwargs: Any) -> RVT:
    """10 blocks at stride 16, 2 at stride 32: 11.0 M parameters, 1.28 GMACs."""
    return _create("rvt_tiny_plus", pretrained, **kwargs)


@register_model
def rvt_small_plus(pretrained: bool = False, **kwargs: Any) -> RVT:
    """23.3 M parameters, 4.65 GMACs."""
    return _create("rvt_small_plus", pretrained, **kwargs)


@register_model
def rvt_base_plus(pretrained: bool = False, **kwargs: Any) -> RVT:
    """89.1 M parameters, 17.56 GMACs."""
    return _create("rvt_base_plus", pretrained, **kwargs)


@register_model
def tap_rvt_tiny_plus(pretrained: bool = False, **kwargs: Any) -> RVT:
    """``rvt_tiny_plus`` with TAP: 11.0 M parameters."""
    return _create("tap_rvt_tiny_plus", pretrained, **kwargs)


@register_model
def tap_rvt_small_plus(pretrained: bool = False, **kwargs: Any) -> RVT:
    """``rvt_small_plus`` with TAP: 23.5 M parameters."""
    return _create("tap_rvt_small_plus", pretrained, **kwargs)


@register_model
def tap_rvt_base_plus(pretrained: bool = False, **kwargs: Any) -> RVT:
    """``rvt_base_plus`` with TAP: 89.4 M parameters."""
    return _create("tap_rvt_base_plus", pretrained, **kwargs)


@register_model
def test_tap_rvt(pretrained: bool = False, **kwargs: Any) -> RVT:  # noqa: PT028 - no test function
    """With TAP, small enough for tests."""
    return _create("test_tap_rvt", pretrained, **kwargs)


family = Family(
    small={"test_tap_rvt": {}},
    goldens={"tapadl_tap": "*tap_*"},
    peers=[Peer("rvt_small_plus", "deit_small_patch16_224")],
    checkpoint_filter_fn=checkpoint_filter_fn,
    reductions=_reductions,
)
