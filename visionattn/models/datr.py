"""DATR: SegFormer's Mix Transformer with neighborhood attention in its last stage, for panoramas.

Papers: "Look at the Neighbor: Distortion-aware Unsupervised Domain Adaptation for Panoramic Semantic Segmentation"
(ICCV 2023, arXiv 2308.05493); "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers"
(NeurIPS 2021, arXiv 2105.15203). Official code: https://github.com/zhengxuJosh/DATR (without a licence file); no
weights were published. SegFormer's Mix Transformers (MiT) load as a start; their licence allows research only.
"""
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import NeighborhoodAttention2d
from ..layers.full import attend
from ._backbone import Backbone, init_convolution, stage_levels
from ._blocks import Block, ConvEmbedding, MixFeedForward, Stage
from ._builder import build_model, cfg
from ._family import Family, Peer

__all__ = ["DATR"]


class SpatialReductionAttention(nn.Module):
    """Attention of all tokens of a map ``[B, H, W, dim]`` to patches of it (SegFormer, section 3.1).

    Rows and columns beyond the last whole patch, at the bottom and the right, are queries but not keys.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        sr_ratio: Side of the patches that are a key each.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    by_head = ("q", "kv")  # see visionattn.analysis.prune_heads

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, proj_drop: float = 0., device=None, dtype=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim})")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.q = nn.Linear(dim, dim, **dd)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        B, H, W = x.shape[0], x.shape[1], x.shape[2]
        C = self.num_heads * self.head_dim
        q = self.q(x).reshape(B, H * W, self.num_heads, self.head_dim).transpose(1, 2)
        patches = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).flatten(1, 2)
        k, v = self.kv(patches).unflatten(2, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj_drop(self.proj(attend(q, k, v).transpose(1, 2).reshape(B, H, W, C)))


class DATR(Backbone):
    """Four stages on maps ``[batch, height, width, dim]``, for images of any size from 29 x 29 pixels.

    The first three attend to patches of the whole map, the last within windows around each token. A norm ends every
    stage, in the way of the map to the next one.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none. (The authors have no classifier; this one is MiT's.)
        global_pool: How the head pools the last map; "" for not at all.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        sr_ratios: Side of the patches that are a key each, of each stage but the last.
        kernel_size: Keys per axis that a query of the last stage sees.
        wrap: The windows of the last stage go around the left and right edge, as a panorama does; changes no weights.
        mlp_ratio: Width of the perceptrons' hidden layer, in channels of the stage.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the projections in the blocks.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A sequence has not one entry per stage (``sr_ratios``: per stage but the last).
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            embed_dims: Sequence[int] = (64, 128, 320, 512),
            depths: Sequence[int] = (2, 2, 2, 2),
            num_heads: Sequence[int] = (1, 2, 5, 8),
            sr_ratios: Sequence[int] = (8, 4, 2),
            kernel_size: int = 13,
            wrap: bool = False,
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        stages = len(depths)
        for name, values, wanted in (("embed_dims", embed_dims, stages), ("num_heads", num_heads, stages),
                                     ("sr_ratios", sr_ratios, stages - 1)):
            if len(values) != wanted:
                raise ValueError(f"{name} must have {wanted} entries for {stages} stages, got {values}")
        dd = {"device": device, "dtype": dtype}
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.in_chans = in_chans
        self.feature_info = stage_levels(embed_dims)
        # A map must hold a whole patch, ratio tokens; maps are rounded up, so one pixel makes the last of these.
        least = [(ratio - 1) * 4 * 2 ** i + 1 for i, ratio in enumerate((*sr_ratios, 1))]
        self.min_sizes = [max(least[:i + 1]) for i in range(stages)]

        def attention(i: int) -> nn.Module:
            if i == stages - 1:
                return NeighborhoodAttention2d(
                    embed_dims[i], num_heads[i], kernel_size, wrap=wrap, proj_drop=proj_drop_rate, **dd)
            return SpatialReductionAttention(embed_dims[i], num_heads[i], sr_ratios[i], proj_drop_rate, **dd)

        self.patch_embed = ConvEmbedding(in_chans, embed_dims[0], 7, stride=4, padding=3, from_map=False, **dd)
        self.stages = nn.Sequential(*[
            Stage(
                ConvEmbedding(embed_dims[i - 1], dim, 3, stride=2, padding=1, **dd) if i else nn.Identity(),
                [
                    Block(
                        dim, attention(i), mlp_ratio, proj_drop=proj_drop_rate, drop_path=drop_path,
                        norm_layer=norm_layer, mlp_layer=MixFeedForward, **dd)
                    for drop_path in drop_paths[i]
                ],
                norm_layer(dim, **dd),
            )
            for i, dim in enumerate(embed_dims)
        ])
        self.finish(embed_dims[-1], num_classes, global_pool, drop_rate, norm_layer=None, **dd)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        """Draws the parameters of one module as the authors do: of convolutions from He's normal distribution."""
        super().init_module(module, needs_reset)
        if isinstance(module, nn.Conv2d):
            init_convolution(module)


# What turns names of SegFormer's checkpoints, stages counted from 0, into ours: those of mmsegmentation, then those of
# transformers, then what all have.
_NAMES = (
    (r"^layers\.(\d)\.0\.", r"patch_embed.\1."), (r"^layers\.(\d)\.1\.", r"block.\1."),
    (r"^layers\.(\d)\.2\.", r"norm.\1."), (r"\.projection\.", ".proj."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."), (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ffn\.layers\.0\.", ".mlp.fc1."), (r"\.ffn\.layers\.1\.", ".mlp.conv."), (r"\.ffn\.layers\.4\.", ".mlp.fc2."),
    (r"^patch_embeddings\.", "patch_embed."), (r"^layer_norm\.", "norm."), (r"^classifier\.", "head."),
    (r"\.layer_norm_([12])\.", r".norm\1."), (r"\.layer_norm\.", ".norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."), (r"\.attention\.self\.", ".attn."),
    (r"\.attn\.query\.", ".attn.q."), (r"\.attn\.key\.", ".attn.k."), (r"\.attn\.value\.", ".attn.v."),
    (r"\.mlp\.dense([12])\.", r".mlp.fc\1."), (r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."), (r"\.nattn\.", ".attn."),
    (r"^patch_embed\.0\.", "patch_embed."), (r"^patch_embed\.(\d)\.", r"stages.\1.downsample."),
    (r"^block\.(\d)\.", r"stages.\1.blocks."), (r"^norm\.(\d)\.", r"stages.\1.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames entries of DATR's and SegFormer's checkpoints to ours (ours stay); leaves out their segmentation heads.

    SegFormer's may be of NVlabs (the classifier or a whole segmenter), transformers or mmsegmentation. The full
    attention of their last stage becomes neighborhood attention with biases of zero: the same on maps of 13 x 13.
    """
    full = not any(".nattn." in key or "stages." in key for key in state_dict)
    renamed, wanted = {}, model.state_dict()
    for key, x in state_dict.items():
        if key.startswith(("decoder.", "decode_head.")) or (key == "classifier.weight" and x.ndim == 4):
            continue
        key = re.sub(r"^(?:segformer\.|backbone\.)?(?:encoder\.)?", "", key)
        key = re.sub(r"^(patch_embed|block|norm)([1-4])\.", lambda m: f"{m[1]}.{int(m[2]) - 1}.", key)
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        # mmsegmentation has convolutions of 1 x 1 in the place of linear layers.
        renamed[key] = x.flatten(1) if key.endswith((".fc1.weight", ".fc2.weight")) else x
    for stem in {key.partition(".attn.")[0] for key in wanted if ".attn." in key}:
        for leaf in ("weight", "bias"):
            names = [f"{stem}.attn.{part}.{leaf}" for part in ("q", "k", "v", "kv", "qkv")]
            given, ours = ([name for name in names if name in entries] for entries in (renamed, wanted))
            sizes = [len(wanted[name]) for name in ours]
            if given != ours and sum(len(renamed[name]) for name in given) == sum(sizes):
                rows = torch.cat([renamed.pop(name) for name in given])
                renamed.update(zip(ours, rows.split(sizes), strict=True))
    if full:
        like = next(iter(renamed.values()), torch.empty(0))
        renamed |= {key: like.new_zeros(x.shape) for key, x in wanted.items() if key.endswith(".rpb")}
    return renamed


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(**dict(
        first_conv="patch_embed.proj", classifier="head.fc", license="unspecified",
        origin_url="https://github.com/zhengxuJosh/DATR", paper_ids="arXiv:2308.05493",
        paper_name="Look at the Neighbor: Distortion-aware Unsupervised Domain Adaptation for Panoramic Semantic "
                   "Segmentation",
    ) | kwargs)


default_cfgs = generate_default_cfgs({
    "datr_m.untrained": _cfg(),
    "datr_t.untrained": _cfg(),
    "datr_s.untrained": _cfg(),
    "test_datr.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> DATR:
    return build_model(DATR, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **defaults | kwargs)


@register_model
def datr_m(pretrained: bool = False, **kwargs: Any) -> DATR:
    """The body of MiT-B0: 3.3 M parameters without a classifier."""
    return _create("datr_m", pretrained, dict(embed_dims=(32, 64, 160, 256)), **kwargs)


@register_model
def datr_t(pretrained: bool = False, **kwargs: Any) -> DATR:
    """The body of MiT-B1: 13.2 M parameters without a classifier."""
    return _create("datr_t", pretrained, {}, **kwargs)


@register_model
def datr_s(pretrained: bool = False, **kwargs: Any) -> DATR:
    """The body of MiT-B2: 24.2 M parameters without a classifier."""
    return _create("datr_s", pretrained, dict(depths=(3, 4, 6, 3)), **kwargs)


@register_model
def test_datr(pretrained: bool = False, **kwargs: Any) -> DATR:  # noqa: PT028 - no test function
    """Small enough for tests."""
    defaults = dict(
        embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), kernel_size=3, mlp_ratio=2.)
    return _create("test_datr", pretrained, defaults, **kwargs)


family = Family(
    small={"test_datr": {}},
    goldens={"datr_m_dense": "datr_m", "datr_m_seg": "datr_m"},
    peers=[Peer("datr_t", "pvt_v2_b1")],
    checkpoint_filter_fn=checkpoint_filter_fn,
)
