"""FAN: full attention, then a perceptron with convolutions whose channels a gate weighs; with TAP, pooled tokens attend.

Papers: "Understanding The Robustness in Vision Transformers" (FAN, ICML 2022, arXiv 2204.12451) and "Robustifying Token
Attention for Vision Transformers" (TAP, ICCV 2023, arXiv 2303.11126). Official code: https://github.com/NVlabs/FAN
(NVIDIA Source Code License-NC) and https://github.com/guoyongcs/TAPADL (MIT, with parts of FAN's). The weights are for
non-commercial use.
"""
import re
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.xcit import PositionalEncodingFourier
from torch import Tensor, nn

from ..layers.full import SelfAttention
from ._backbone import TokenBackbone, check_size, init_convolution
from ._blocks import ConvEmbedding, PooledBlock
from ._builder import build_model, cfg
from ._family import Family, Peer, Published
from ._fan import ChannelProcessing, ClassBlock, PatchBlock, conv_stem, hybrid_stem, norm_layer

__all__ = ["FAN"]


class FAN(TokenBackbone):
    """FAN, plain or hybrid, for images of any size (hybrid: from 16 x 16 pixels on).

    Its maps are those of the stem's stages, if it has some; of the blocks, of a hybrid model of one of them; and that of
    the patches after the class token's blocks.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: What the head takes: ``"token"``, the class token; ``"avg"``, the mean of the others; "", all.
        embed_dims: Channels of each group of blocks; between groups a convolution halves the map.
        depths: Blocks of each group.
        num_heads: Heads of each group's blocks; the last group's also of the class token's.
        stem_depths: Blocks of the two stages of ConvNeXt in a hybrid model; None for a stem of four convolutions.
        stem_dims: Channels of these stages.
        stem_norm: Variance that the norms of these stages divide by, but for the first one: ``"biased"``, as is usual,
            or ``"unbiased"``, as the authors' code computes it on a CPU.
        out_block: The block of a hybrid model whose map is its third; None for the last one at stride 16.
        num_scales: Scales of the token-aware pooling; 0 for none.
        coarse_dim: Channels of a convolution of stride 2 on the last map, for dense tasks alone; None for none.
        mlp_ratio: Width of the perceptrons' hidden layer, in ``embed_dim``.
        head_init_scale: Factor on the classifier's first weights.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate of stochastic depth, the same in all blocks.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A sequence has another number of entries, heads do not divide channels, there is no such norm or
            block, or the stem has no such norms.
    """

    stem_parts = ("patch_embed", "pos_embed", "cls_token")
    if TYPE_CHECKING:
        patch_embed: Any
        pos_embed: nn.Module
        cls_attn_blocks: Any

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "token",
            embed_dims: Sequence[int] = (192,),
            depths: Sequence[int] = (12,),
            num_heads: Sequence[int] = (4,),
            stem_depths: Sequence[int] | None = None,
            stem_dims: Sequence[int] = (128, 256),
            stem_norm: Literal["biased", "unbiased"] = "biased",
            out_block: int | None = None,
            num_scales: int = 0,
            coarse_dim: int | None = None,
            mlp_ratio: float = 4.,
            head_init_scale: float = 1.,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        if not len(embed_dims) == len(depths) == len(num_heads) > 0:
            raise ValueError("embed_dims, depths and num_heads must have one entry per group of blocks, got "
                             f"{embed_dims}, {depths} and {num_heads}")
        if stem_norm not in ("biased", "unbiased"):
            raise ValueError(f"stem_norm must be biased or unbiased, got {stem_norm!r}")
        if stem_depths is None and stem_norm != "biased":
            raise ValueError("stem_norm is for hybrid models: a stem of convolutions has no such norms")
        out_block = depths[0] - 1 if out_block is None else out_block
        if not 0 <= out_block < sum(depths):
            raise ValueError(f"out_block must be one of blocks 0 to {sum(depths) - 1}, got {out_block}")
        self.in_chans = in_chans
        self.head_init_scale = head_init_scale
        if stem_depths is None:
            self.patch_embed = conv_stem(in_chans, embed_dims[0], **dd)
        else:
            self.patch_embed = hybrid_stem(
                in_chans, embed_dims[0], stem_dims, stem_depths, stem_norm == "unbiased", **dd)
            self.min_size = 16
        self.pos_embed = PositionalEncodingFourier(32, embed_dims[0], **dd)
        self.cls_token: nn.Parameter | None = nn.Parameter(torch.empty(1, 1, embed_dims[-1], **dd))

        def block(group: int, first: bool) -> nn.Module:
            dim, heads = embed_dims[group], num_heads[group]
            return PooledBlock(
                dim, SelfAttention(dim, heads, **dd), mlp_ratio, num_scales,
                ConvEmbedding(embed_dims[group - 1], dim, 3, 2, 1, **dd) if group and first else None,
                layer_scale=1., drop_path=drop_path_rate, norm_layer=norm_layer,
                mlp_layer=partial(ChannelProcessing, num_heads=heads), **dd)

        self.blocks = nn.ModuleList([
            block(group, first=i == 0) for group, depth in enumerate(depths) for i in range(depth)])
        self.cls_attn_blocks = nn.ModuleList([
            ClassBlock(embed_dims[-1], num_heads[-1], mlp_ratio, **dd) for _ in range(2)])
        self.downsample = None if coarse_dim is None else nn.Conv2d(
            embed_dims[-1], coarse_dim, 3, stride=2, padding=1, **dd)

        groups = [group for group, depth in enumerate(depths) for _ in range(depth)]
        self.feature_info = [] if stem_depths is None else [
            dict(num_chs=dim, reduction=4 * 2 ** i, module=f"patch_embed.stages.{i}") for i, dim in enumerate(stem_dims)]
        self.feature_info += [
            dict(num_chs=embed_dims[group], reduction=16 * 2 ** group, module=f"blocks.{i}")
            for i, group in enumerate(groups) if stem_depths is None or i == out_block]
        stride = 16 * 2 ** groups[-1]
        self.feature_info.append(
            dict(num_chs=embed_dims[-1], reduction=stride, module="cls_attn_blocks.1") if coarse_dim is None else
            dict(num_chs=coarse_dim, reduction=2 * stride, module="downsample"))
        self.num_levels = len(self.feature_info)
        self.finish(embed_dims[-1], num_classes, global_pool, drop_rate, norm_layer=norm_layer, **dd)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draws all parameters anew, e.g. after ``to_empty`` of a model that was built on the meta device."""
        super().init_weights(needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=.02)
        if isinstance(self.head, nn.Linear):
            with torch.no_grad():
                self.head.weight.mul_(self.head_init_scale)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        """Draws the parameters of one module; the blocks' convolutions by the number of their outputs."""
        super().init_module(module, needs_reset)
        if isinstance(module, ChannelProcessing):
            init_convolution(module.conv1)
            init_convolution(module.conv2)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The name of the class token."""
        return {"cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters into layers, for layer decay."""
        return dict(
            stem=rf"^(?:{'|'.join(self.stem_parts)})",
            blocks=[(r"^blocks\.(\d+)", None)],
            cls_attn_blocks=[(r"^cls_attn_blocks\.(\d+)", None), (r"^norm", (99999,))])

    def embed(self, x: Tensor) -> Tensor:
        """The first map of tokens of images ``[batch, in_chans, height, width]``, with positions."""
        return self.add_positions(self.patch_embed(x))

    def add_positions(self, x: Tensor) -> Tensor:
        """A map ``[batch, height, width, dim]`` with the sines and cosines of its rows and columns, projected."""
        return x + self.pos_embed(1, x.shape[1], x.shape[2]).permute(0, 2, 3, 1)

    def as_tokens(self, x: Tensor) -> Tensor:
        """A map of patches ``[batch, height, width, dim]`` as tokens after the class token, after the blocks of this."""
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.cls_attn_blocks:
            x = block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the final norm, the class token first: ``[batch, 1 + height * width, num_features]``."""
        x = self.first_map(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(self.as_tokens(x))

    def run_parts(self, x: Tensor, taken: Collection[int], stop: int) -> tuple[Tensor, list[Tensor]]:
        """Computes the first maps of images, but for the last one, that of the class token's blocks.

        Args:
            x: Images ``[batch, in_chans, height, width]``.
            taken: Numbers of the maps to return besides, as in ``feature_info``.
            stop: Number of maps to compute.

        Returns:
            The map after the last part that was run, and those taken, all ``[batch, height, width, channels]``.
        """
        check_size(x, self.min_size)
        levels = {info["module"]: level for level, info in enumerate(self.feature_info)}
        maps = []
        x = x.permute(0, 2, 3, 1)
        path = [(f"patch_embed.stages.{i}", stage) for i, stage in enumerate(self.patch_embed.stages)]
        path += [("patch_embed.proj", self.patch_embed.proj), ("pos_embed", self.add_positions)]
        path += [(f"blocks.{i}", block) for i, block in enumerate(self.blocks)]
        for name, part in path:
            x = part(x)
            if name in levels:
                if levels[name] in taken:
                    maps.append(x)
                if levels[name] + 1 == stop:
                    break
        return x, maps

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = "NCHW",
            intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of ``feature_info``, without the class token.

        Args:
            x: Images ``[batch, in_chans, height, width]``.
            indices: Maps to return: the last n if an int, all if None.
            norm: Apply the final norm to the last map, before it is downsampled.
            stop_early: Compute nothing that comes after the last map that is asked for.
            output_fmt: "NCHW" or "NLC", of the returned maps.
            intermediates_only: Return these maps only.

        Returns:
            The final features (as :meth:`forward_features`; of a model that stopped early the last map) and the maps, or
            the latter only.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(self.num_levels, indices)
        stop, last = max_index + 1 if stop_early else self.num_levels, len(self.feature_info) - 1
        x, maps = self.run_parts(x, take_indices, stop)
        if stop > last:
            height, width = x.shape[1], x.shape[2]
            tokens = self.as_tokens(x)
            x = self.norm(tokens)
            if last in take_indices:
                patches = (x if norm else tokens)[:, self.num_prefix_tokens:].unflatten(1, (height, width))
                maps.append(patches if self.downsample is None else self.downsample(
                    patches.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        maps = [taken.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else taken.flatten(1, 2)
                for taken in maps]
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Drops what comes after the last map of ``indices``, and what is asked for besides; returns the indices.

        With the head goes the class token, and all that only it needs. The model has its maps left, but no features.
        """
        take_indices, max_index = feature_take_indices(self.num_levels, indices)
        self.num_levels, last = max_index + 1, self.feature_info[max_index]
        prune_end = self.num_levels < len(self.feature_info)
        part, _, number = last["module"].rpartition(".")
        if prune_end:
            self.cls_attn_blocks, self.downsample = nn.ModuleList(), None
            self.blocks = self.blocks[:int(number) + 1] if part == "blocks" else nn.ModuleList()
            self.num_features = last["num_chs"]
            if part == "patch_embed.stages":
                self.patch_embed.stages = self.patch_embed.stages[:int(number) + 1]
                self.patch_embed.proj = self.pos_embed = nn.Identity()
                self.min_size = last["reduction"]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_head or prune_end:
            self.cls_attn_blocks = nn.ModuleList([PatchBlock(block) for block in self.cls_attn_blocks])
            self.cls_token, self.num_prefix_tokens = None, 0
            self.reset_classifier(0, "")
        return take_indices


def dense_args(variant: str, task: str) -> dict[str, Any]:
    """A map of stride 32 for ``"detection"`` with a hybrid model that has none; nothing else changes."""
    return dict(coarse_dim=768) if task == "detection" and len(_reductions(variant)) == 4 and (
        _reductions(variant)[-1] == 16) else {}


def _reductions(variant: str) -> tuple[int, ...]:
    if "hybrid" not in variant:
        return (16,)
    return (4, 8, 16, 32 if "xlarge" in variant else 16)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: FAN) -> dict[str, Tensor]:
    """Renames the authors' entries to ours (ours stay).

    A classifier's checkpoint leaves the convolution of a model for detection as it was drawn.
    """
    renamed = {}
    for key, x in state_dict.items():
        for pattern, new in _RENAMES:
            key = re.sub(pattern, new, key)
        # Between groups of blocks: the authors have it at the end of one, we at the start of the next.
        if (match := re.match(r"blocks\.(\d+)\.downsample\.", key)) and f"blocks.{int(match[1]) + 1}" in _joints(model):
            key = key.replace(match[1], str(int(match[1]) + 1), 1)
        if key.startswith("patch_embed.stages.") and ".mlp.fc" in key and x.ndim == 4:
            x = x.flatten(1)
        renamed[key] = x
    for key in list(renamed):
        prefix, _, leaf = key.rpartition("q.")
        if key.endswith(f".attn.q.{leaf}") and f"{prefix}kv.{leaf}" in renamed:
            renamed[f"{prefix}qkv.{leaf}"] = torch.cat([renamed.pop(key), renamed.pop(f"{prefix}kv.{leaf}")])
        elif key.startswith("cls_attn_blocks.") and ".attn.qkv." in key:
            parts = renamed.pop(key).chunk(3)
            renamed |= {key.replace("qkv", name): part for name, part in zip("qkv", parts, strict=True)}
    if "head.weight" in renamed and "downsample.weight" not in renamed and model.downsample is not None:
        renamed |= {f"downsample.{leaf}": x for leaf, x in model.downsample.state_dict().items()}
    return renamed


def _joints(model: FAN) -> set[str]:
    """Names of the blocks that begin a group."""
    return {f"blocks.{i}" for i, block in enumerate(model.blocks) if isinstance(block.downsample, ConvEmbedding)}


_RENAMES = (
    (r"^module\.", ""),
    (r"^pos_embeder\.", "pos_embed."),
    (r"^learnable_downsample\.", "downsample."),
    (r"^patch_embed\.backbone\.stem\.", "patch_embed.stages.0.downsample."),
    (r"^patch_embed\.backbone\.", "patch_embed."),
    (r"^(patch_embed\.stages\.\d+\.blocks\.\d+)\.conv_dw\.", r"\1.conv."),
    (r"^(patch_embed\.stages\.\d+\.blocks\.\d+)\.gamma$", r"\1.ls.gamma"),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"\.dilation_predictor\.proj\.", ".pool.predictor."),
    (r"\.mlp\.mlp_v\.gamma$", ".mlp.ls.gamma"),
    (r"\.mlp\.mlp_v\.(?:dwconv\.)?", ".mlp."),
    (r"\.mlp\.norm_v\.", ".mlp.norm."),
)


def _cfg(file: str = "", variant: str = "", size: int = 224, **kwargs: Any) -> dict[str, Any]:
    hybrid, stride = "hybrid" in variant, _reductions(variant)[-1]
    return cfg(**dict[str, Any](
        url=f"https://github.com/zhoudaquan/fully_attentional_network_ckpt/releases/download/v1.0.0/{file}.pth.tar"
        if file else "", input_size=(3, size, size), pool_size=(size // stride, size // stride), crop_pct=1.0,
        first_conv="patch_embed.stages.0.downsample.0" if hybrid else "patch_embed.proj.0.0", classifier="head",
        license="non-commercial", origin_url="https://github.com/NVlabs/FAN", paper_ids="arXiv:2204.12451",
    ) | kwargs)


def _tap_cfg(file: str = "", variant: str = "", **kwargs: Any) -> dict[str, Any]:
    return _cfg(variant=variant, **dict[str, Any](
        url=f"https://github.com/guoyongcs/TAPADL/releases/download/v1.0/{file}.pth.tar" if file else "",
        origin_url="https://github.com/guoyongcs/TAPADL", paper_ids=("arXiv:2303.11126", "arXiv:2204.12451")) | kwargs)


# What a model has beside the plain one of 12 blocks of 192 channels.
_ARGS: dict[str, dict[str, Any]] = {
    "fan_tiny_12_p16_224": {},
    "fan_small_12_p16_224": dict(embed_dims=(384,), num_heads=(8,)),
    "fan_base_18_p16_224": dict(embed_dims=(448,), depths=(18,), num_heads=(8,)),
    "fan_large_24_p16_224": dict(embed_dims=(480,), depths=(24,), num_heads=(10,)),
    "fan_tiny_8_p4_hybrid": dict(depths=(8,), num_heads=(8,), stem_depths=(3, 3)),
    "fan_small_12_p4_hybrid": dict(embed_dims=(384,), depths=(10,), num_heads=(8,), stem_depths=(3, 3)),
    "fan_base_16_p4_hybrid": dict(embed_dims=(448,), depths=(16,), num_heads=(8,), stem_depths=(3, 3)),
    "fan_large_16_p4_hybrid": dict(
        embed_dims=(480,), depths=(22,), num_heads=(10,), stem_depths=(3, 5), out_block=18, head_init_scale=0.001),
}
_ARGS |= {f"tap_{name}": args | dict(num_scales=4) for name, args in _ARGS.items()} | {
    "fan_xlarge_16_p4_hybrid": dict(embed_dims=(528, 768), depths=(20, 3), num_heads=(11, 16), stem_depths=(3, 7)),
    "test_fan": dict(embed_dims=(32,), depths=(4,), num_heads=(4,)),
    "test_tap_fan_hybrid": dict(
        embed_dims=(24,), depths=(2,), num_heads=(2,), stem_dims=(8, 16), stem_depths=(1, 1), num_scales=3,
        mlp_ratio=2.),
}

_CFGS: dict[str, Any] = {
    "fan_tiny_12_p16_224.in1k": _cfg("fan_vit_tiny"),
    "fan_small_12_p16_224.in1k": _cfg("fan_vit_small"),
    "fan_base_18_p16_224.in1k": _cfg("fan_vit_base"),
    "fan_large_24_p16_224.untrained": _cfg(),
    "fan_tiny_8_p4_hybrid.in1k": _cfg("fan_hybrid_tiny", "hybrid"),
    "fan_small_12_p4_hybrid.in1k": _cfg("fan_hybrid_small", "hybrid"),
    "fan_base_16_p4_hybrid.in1k": _cfg("fan_hybrid_base", "hybrid"),
    "fan_base_16_p4_hybrid.in22k_ft_in1k": _cfg("fan_hybrid_base_in22k_1k", "hybrid"),
    "fan_base_16_p4_hybrid.in22k_ft_in1k_384": _cfg("fan_hybrid_base_in22k_1k_384", "hybrid", 384),
    "fan_base_16_p4_hybrid.in22k": _cfg("fan_hybrid_base_in22k", "hybrid", num_classes=21841),
    "fan_large_16_p4_hybrid.in22k_ft_in1k": _cfg("fan_hybrid_large_in22k_1k", "hybrid"),
    "fan_large_16_p4_hybrid.in22k_ft_in1k_384": _cfg("fan_hybrid_large_in22k_1k_384", "hybrid", 384),
    "fan_large_16_p4_hybrid.in22k": _cfg("fan_hybrid_large_in22k", "hybrid", num_classes=21841),
    "fan_xlarge_16_p4_hybrid.untrained": _cfg("", "xlarge_hybrid"),
    "tap_fan_base_16_p4_hybrid.in1k": _tap_cfg("tapadl_fan_base", "hybrid"),
    "test_fan.untrained": _cfg(size=64),
    "test_tap_fan_hybrid.untrained": _tap_cfg("", "hybrid", size=64),
}
default_cfgs = generate_default_cfgs(_CFGS | {
    f"{name}.untrained": _tap_cfg("", name) for name in _ARGS
    if name.startswith("tap_") and name != "tap_fan_base_16_p4_hybrid"})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> FAN:
    args = _ARGS[variant] | kwargs
    depth = sum(args.get("depths", (12,)))
    # The maps of the authors' dense backbones; of small plain models, the last ones.
    hybrid = args.get("stem_depths") is not None
    out_indices = (0, 1, 2, 3) if hybrid else (4, 7, 11, depth) if depth > 11 else min(depth + 1, 4)
    return build_model(
        FAN, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"), **args)


@register_model
def fan_tiny_12_p16_224(pretrained: bool = False, **kwargs: Any) -> FAN:
    """7.3 M parameters, 1.5 GMACs, published 79.2 % top-1 at 224 px."""
    return _create("fan_tiny_12_p16_224", pretrained, **kwargs)


@register_model
def fan_small_12_p16_224(pretrained: bool = False, **kwargs: Any) -> FAN:
    """28.3 M parameters, 5.5 GMACs, published 82.5 % top-1 at 224 px."""
    return _create("fan_small_12_p16_224", pretrained, **kwargs)


@register_model
def fan_base_18_p16_224(pretrained: bool = False, **kwargs: Any) -> FAN:
    """54.4 M parameters, 10.7 GMACs, published 83.6 % top-1 at 224 px."""
    return _create("fan_base_18_p16_224", pretrained, **kwargs)


@register_model
def fan_large_24_p16_224(pretrained: bool = False, **kwargs: Any) -> FAN:
    """80.6 M parameters, 16.0 GMACs; its weights (83.9 % top-1) were not published."""
    return _create("fan_large_24_p16_224", pretrained, **kwargs)


@register_model
def fan_tiny_8_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """7.5 M parameters, 3.6 GMACs, published 80.1 % top-1 at 224 px."""
    return _create("fan_tiny_8_p4_hybrid", pretrained, **kwargs)


@register_model
def fan_small_12_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """10 blocks: 26.1 M parameters, 7.0 GMACs, published 83.5 % top-1 at 224 px."""
    return _create("fan_small_12_p4_hybrid", pretrained, **kwargs)


@register_model
def fan_base_16_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """50.5 M parameters, 11.8 GMACs, published 83.9 % top-1 at 224 px."""
    return _create("fan_base_16_p4_hybrid", pretrained, **kwargs)


@register_model
def fan_large_16_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """22 blocks: 76.9 M parameters, 17.7 GMACs, published 86.5 % top-1 (pre-trained on ImageNet-22k)."""
    return _create("fan_large_16_p4_hybrid", pretrained, **kwargs)


@register_model
def fan_xlarge_16_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """20 blocks at stride 16, 3 at stride 32: 120.4 M parameters, 21.1 GMACs; no weights were published."""
    return _create("fan_xlarge_16_p4_hybrid", pretrained, **kwargs)


@register_model
def tap_fan_tiny_12_p16_224(pretrained: bool = False, **kwargs: Any) -> FAN:
    """``fan_tiny_12_p16_224`` with TAP: 7.4 M parameters."""
    return _create("tap_fan_tiny_12_p16_224", pretrained, **kwargs)


@register_model
def tap_fan_small_12_p16_224(pretrained: bool = False, **kwargs: Any) -> FAN:
    """``fan_small_12_p16_224`` with TAP: 28.5 M parameters."""
    return _create("tap_fan_small_12_p16_224", pretrained, **kwargs)


@register_model
def tap_fan_base_18_p16_224(pretrained: bool = False, **kwargs: Any) -> FAN:
    """``fan_base_18_p16_224`` with TAP: 54.6 M parameters."""
    return _create("tap_fan_base_18_p16_224", pretrained, **kwargs)


@register_model
def tap_fan_large_24_p16_224(pretrained: bool = False, **kwargs: Any) -> FAN:
    """``fan_large_24_p16_224`` with TAP: 81.0 M parameters."""
    return _create("tap_fan_large_24_p16_224", pretrained, **kwargs)


@register_model
def tap_fan_tiny_8_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """``fan_tiny_8_p4_hybrid`` with TAP: 7.5 M parameters."""
    return _create("tap_fan_tiny_8_p4_hybrid", pretrained, **kwargs)


@register_model
def tap_fan_small_12_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """``fan_small_12_p4_hybrid`` with TAP: 26.3 M parameters."""
    return _create("tap_fan_small_12_p4_hybrid", pretrained, **kwargs)


@register_model
def tap_fan_base_16_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """``fan_base_16_p4_hybrid`` with TAP: 50.7 M parameters, 11.8 GMACs, published 84.3 % top-1 at 224 px."""
    return _create("tap_fan_base_16_p4_hybrid", pretrained, **kwargs)


@register_model
def tap_fan_large_16_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:
    """``fan_large_16_p4_hybrid`` with TAP: 77.2 M parameters."""
    return _create("tap_fan_large_16_p4_hybrid", pretrained, **kwargs)


@register_model
def test_fan(pretrained: bool = False, **kwargs: Any) -> FAN:  # noqa: PT028 - no test function
    """Plain, small enough for tests."""
    return _create("test_fan", pretrained, **kwargs)


@register_model
def test_tap_fan_hybrid(pretrained: bool = False, **kwargs: Any) -> FAN:  # noqa: PT028 - no test function
    """Hybrid with TAP, small enough for tests."""
    return _create("test_tap_fan_hybrid", pretrained, **kwargs)


family = Family(
    small={"test_fan": {}, "test_tap_fan_hybrid": {}},
    published={
        "fan_tiny_12_p16_224": Published(79.2, None), "fan_small_12_p16_224": Published(82.5, None),
        "fan_base_18_p16_224": Published(83.6, None), "fan_tiny_8_p4_hybrid": Published(80.1, None),
        "fan_small_12_p4_hybrid": Published(83.5, None), "fan_base_16_p4_hybrid": Published(83.9, None),
        "fan_large_16_p4_hybrid": Published(86.5, None), "tap_fan_base_16_p4_hybrid": Published(84.3, None),
    },
    goldens={
        "fan_tiny_12_p16_224": "fan_tiny_12_p16_224", "fan_tiny_8_p4_hybrid": "fan_tiny_8_p4_hybrid",
        "tap_fan_tiny_12_p16_224": "tap_fan_tiny_12_p16_224",
    },
    peers=[Peer("fan_tiny_12_p16_224", "xcit_tiny_12_p16_224"), Peer("fan_small_12_p4_hybrid", "convnext_tiny")],
    dense_args=dense_args,
    checkpoint_filter_fn=checkpoint_filter_fn,
    reductions=_reductions,
)
