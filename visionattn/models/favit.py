"""FaViT: attention whose channels are cut into groups of different reach, at a cost near linear in the tokens.

Paper: "FaViT: Factorization Vision Transformers" (IEEE TNNLS 2023, arXiv 2312.08614). Official code:
https://github.com/q2479036243/FaViT (without a licence file); no weights were published.
"""
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import FactorizedAttention
from ._backbone import Backbone, init_convolution, stage_levels
from ._blocks import Block, ConvEmbedding, MixFeedForward, Stage
from ._builder import build_model, cfg
from ._family import Family, Peer, Published

__all__ = ["FaViT"]


class FaViT(Backbone):
    """Four stages on maps ``[batch, height, width, dim]``, for images of any size from 29 x 29 pixels.

    The authors' padding, by reflection, takes images from about 100 x 100 pixels; here smaller maps are reflected
    repeatedly, which changes nothing where theirs works. A norm ends every stage, in the way of the map to the next one
    and to the heads, also of dense tasks.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        embed_dims: Channels of each stage, multiples of 16.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        sr_ratios: Side of the patches that are a key each for the first group of channels, and dilation of the tiles of
            the last group, of each stage.
        mlp_ratios: Width of the perceptrons' hidden layer in channels of the stage, per stage.
        merging: How tiles are merged: ``"runs"`` as the authors do, which mixes channels, or ``"tiles"``, their mean.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the projections in the blocks.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            embed_dims: Sequence[int] = (32, 64, 128, 256),
            depths: Sequence[int] = (2, 2, 6, 2),
            num_heads: Sequence[int] = (1, 2, 4, 8),
            sr_ratios: Sequence[int] = (8, 4, 2, 1),
            mlp_ratios: Sequence[float] = (8., 6., 4., 4.),
            merging: Literal["runs", "tiles"] = "runs",
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
        # A map must hold a whole patch, ratio tokens; maps are rounded up, so one pixel makes the last of these.
        least = [(ratio - 1) * 4 * 2 ** i + 1 for i, ratio in enumerate(sr_ratios)]
        self.min_sizes = [max(least[:i + 1]) for i in range(len(least))]
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.patch_embed = ConvEmbedding(in_chans, embed_dims[0], 7, stride=4, padding=3, from_map=False, **dd)
        self.stages = nn.Sequential(*[
            Stage(
                ConvEmbedding(embed_dims[i - 1], dim, 3, stride=2, padding=1, **dd) if i else nn.Identity(),
                [
                    Block(
                        dim, FactorizedAttention(
                            dim, num_heads[i], sr_ratios[i], merging=merging, proj_drop=proj_drop_rate, **dd),
                        mlp_ratios[i], proj_drop=proj_drop_rate, drop_path=rate, norm_layer=norm_layer,
                        mlp_layer=MixFeedForward, **dd)
                    for rate in drop_paths[i]
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


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' entries to ours; leaves a checkpoint of ours as it is."""
    rules: list[tuple[str, Any]] = [
        (r"^patch_embed1\.", "patch_embed."),
        (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
        (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
        (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
        (r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."),
        (r"\.attn\.kv_l\.", ".attn."),
        (r"\.attn\.fcs\.(\d)\.", r".attn.groups.\1.fc."),
        (r"\.attn\.single_heads\.(\d)\.", r".attn.groups.\1.kv."),
        (r"\.attn\.local_convs\.(\d)\.", r".attn.groups.\1.conv."),
    ]
    renamed = {}
    for name, x in state_dict.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed[name] = x
    return renamed


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(
        first_conv="patch_embed.proj", classifier="head.fc", license="unspecified",
        origin_url="https://github.com/q2479036243/FaViT", paper_ids="arXiv:2312.08614",
        paper_name="FaViT: Factorization Vision Transformers", **kwargs)


default_cfgs = generate_default_cfgs({
    "favit_b0.untrained": _cfg(),
    "favit_b1.untrained": _cfg(),
    "favit_b2.untrained": _cfg(),
    "favit_b3.untrained": _cfg(),
    "test_favit.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> FaViT:
    return build_model(FaViT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def favit_b0(pretrained: bool = False, **kwargs: Any) -> FaViT:
    """3.4 M parameters, 0.6 GMACs, published 71.5 % top-1 at 224 px."""
    return _create("favit_b0", pretrained, **kwargs)


@register_model
def favit_b1(pretrained: bool = False, **kwargs: Any) -> FaViT:
    """13.0 M parameters, 2.3 GMACs, published 79.4 % top-1 at 224 px."""
    return _create("favit_b1", pretrained, **dict(embed_dims=(64, 128, 256, 512)) | kwargs)


@register_model
def favit_b2(pretrained: bool = False, **kwargs: Any) -> FaViT:
    """24.9 M parameters, 4.5 GMACs, published 82.3 % top-1 at 224 px."""
    return _create("favit_b2", pretrained, **dict(embed_dims=(64, 128, 256, 512), depths=(2, 3, 18, 3)) | kwargs)


@register_model
def favit_b3(pretrained: bool = False, **kwargs: Any) -> FaViT:
    """48.7 M parameters, 8.5 GMACs, published 83.4 % top-1 at 224 px."""
    return _create("favit_b3", pretrained, **dict(embed_dims=(96, 192, 384, 768), depths=(2, 3, 14, 3)) | kwargs)


@register_model
def test_favit(pretrained: bool = False, **kwargs: Any) -> FaViT:  # noqa: PT028 - no pytest function
    """Small enough for tests."""
    model_args = dict(
        embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), mlp_ratios=(2., 2., 2., 2.))
    return _create("test_favit", pretrained, **model_args | kwargs)


family = Family(
    small={"test_favit": {}},
    published={
        "favit_b0": Published(71.5, 0.6), "favit_b1": Published(79.4, 2.4), "favit_b2": Published(82.3, 4.5),
        "favit_b3": Published(83.4, 8.5),
    },
    goldens={"favit_b0": "favit_b0"},
    peers=[Peer("favit_b0", "pvt_v2_b0"), Peer("favit_b2", "pvt_v2_b2")],
    checkpoint_filter_fn=checkpoint_filter_fn,
)
