"""Swin-VSA: the Swin transformer with varied-size windows in place of shifted ones.

Paper: "VSA: Learning Varied-Size Window Attention in Vision Transformers" (ECCV 2022, arXiv 2204.08446). The authors
published the code of this model in a later repository, https://github.com/ViTAE-Transformer/QFormer (MIT), and no
weights. Those of a plain Swin load too.
"""
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ..layers.varied_window import VariedSizeWindowAttention
from ._backbone import Backbone, stage_levels
from ._blocks import Block, Stage
from ._builder import build_model, cfg
from ._family import DenseNorm, Family, Peer, Published
from ._tables import rpb_of_windows

__all__ = ["SwinVSA"]


class PositionedBlock(Block):
    """:class:`Block` on a map to which a depthwise convolution of it is added first, which encodes positions.

    Args:
        dim: Channels.
        kernel_size: Of the convolution; odd. None for no convolution.
        kwargs: Arguments of :class:`Block`.
    """

    def __init__(self, dim: int, attn: nn.Module, kernel_size: int | None, device=None, dtype=None, **kwargs: Any):
        super().__init__(dim, attn, device=device, dtype=dtype, **kwargs)
        self.pos = None if kernel_size is None else nn.Conv2d(
            dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def branches(self, x: Tensor) -> Tensor:
        """What the block computes."""
        if self.pos is not None:
            x = x + self.pos(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class SwinVSA(Backbone):
    """Four stages of varied-size window attention; takes images of any size.

    What windows do not fill is padded with zeros at the bottom and on the right.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        embed_dim: Channels of the first stage; they double from stage to stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        window_size: Height and width of a window before it is varied, in tokens.
        mlp_ratio: Width of the perceptrons' hidden layer, in channels of the stage.
        cpe: Whether blocks start with a convolution that encodes positions, as the authors' do. Without it the only
            difference from Swin is the windows.
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
            embed_dim: int = 96,
            depths: Sequence[int] = (2, 2, 6, 2),
            num_heads: Sequence[int] = (3, 6, 12, 24),
            window_size: int = 7,
            mlp_ratio: float = 4.,
            cpe: bool = True,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        dims = [embed_dim * 2 ** i for i in range(len(depths))]
        self.feature_info = stage_levels(dims)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.patch_embed = PatchEmbed(
            img_size=None, patch_size=4, in_chans=in_chans, embed_dim=embed_dim, norm_layer=nn.LayerNorm,
            output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True, **dd)
        self.stages = nn.Sequential(*[
            Stage(PatchMerging(dims[i - 1], dim, **dd) if i else nn.Identity(), [
                PositionedBlock(
                    dim, VariedSizeWindowAttention(dim, num_heads[i], window_size, proj_drop=proj_drop_rate, **dd),
                    kernel_size=window_size // 2 * 2 + 1 if cpe else None, mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate, drop_path=rate, **dd)
                for rate in rates
            ])
            for i, (dim, rates) in enumerate(zip(dims, drop_paths, strict=True))
        ])
        self.finish(dims[-1], num_classes, global_pool, drop_rate, **dd)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        """As in every backbone, but that windows start where they are: their predictors with zeros."""
        super().init_module(module, needs_reset)
        if isinstance(module, VariedSizeWindowAttention):
            module.reset_parameters()


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' entries to ours (ours stay); takes those of a plain Swin, theirs or timm's, too.

    The authors hang the downsampler at the end of a stage, we put it at the start of the next, as timm does. A plain
    Swin has neither predictors of windows nor convolutions of positions: these become zero, so that the model starts as
    the Swin without shifts.
    """
    at_the_end = any(key.startswith("layers.0.downsample.") for key in state_dict)
    varied = any(re.search(r"\.attn\.(transform\.2|predictor)\.|\.pos\.", key) for key in state_dict)
    renamed = {}
    for key, x in state_dict.items():
        if re.match(r"norm\d\.", key) or key.endswith((".relative_position_index", ".attn_mask")):
            continue
        if at_the_end:
            key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)
        key = re.sub(r"^layers\.", "stages.", key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        if key.endswith(".attn.transform.2.weight"):
            x = x.flatten(1)
        key = key.replace(".attn.transform.2.", ".attn.predictor.")
        if key.endswith(".relative_position_bias_table"):
            key = key.replace(".relative_position_bias_table", ".rpb")
            x = rpb_of_windows(x)
        renamed[key] = x
    if not varied:
        renamed |= {key: torch.zeros_like(x, device="cpu") for key, x in model.state_dict().items()
                    if re.search(r"\.attn\.predictor\.|\.pos\.", key)}
    return renamed


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(
        crop_pct=0.9, first_conv="patch_embed.proj", classifier="head.fc", license="mit",
        paper_ids="arXiv:2204.08446", paper_name="VSA: Learning Varied-Size Window Attention in Vision Transformers",
        origin_url="https://github.com/ViTAE-Transformer/QFormer", **kwargs)


default_cfgs = generate_default_cfgs({
    "swin_vsa_tiny.untrained": _cfg(),
    "swin_vsa_small.untrained": _cfg(),
    "swin_vsa_base.untrained": _cfg(),
    "test_swin_vsa.untrained": _cfg(),
})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> SwinVSA:
    return build_model(SwinVSA, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **defaults | kwargs)


@register_model
def swin_vsa_tiny(pretrained: bool = False, **kwargs: Any) -> SwinVSA:
    """28.8 M parameters, 4.6 GMACs, published 82.24 % top-1 at 224 px (Swin: 81.2 %)."""
    return _create("swin_vsa_tiny", pretrained, {}, **kwargs)


@register_model
def swin_vsa_small(pretrained: bool = False, **kwargs: Any) -> SwinVSA:
    """50.5 M parameters, 8.9 GMACs, published 83.6 % top-1 at 224 px (Swin: 83.0 %)."""
    return _create("swin_vsa_small", pretrained, dict(depths=(2, 2, 18, 2)), **kwargs)


@register_model
def swin_vsa_base(pretrained: bool = False, **kwargs: Any) -> SwinVSA:
    """89.2 M parameters, 15.6 GMACs; nobody published an accuracy."""
    defaults = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    return _create("swin_vsa_base", pretrained, defaults, **kwargs)


@register_model
def test_swin_vsa(pretrained: bool = False, **kwargs: Any) -> SwinVSA:  # noqa: PT028 - no test function
    """Small enough for tests."""
    defaults = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=4, mlp_ratio=2.)
    return _create("test_swin_vsa", pretrained, defaults, **kwargs)


family = Family(
    small={"test_swin_vsa": {}},
    published={
        "swin_vsa_tiny": Published(82.24, None, source="https://github.com/ViTAE-Transformer/ViTAE-VSA"),
        "swin_vsa_small": Published(83.6, None, source="https://github.com/ViTAE-Transformer/ViTAE-VSA"),
    },
    goldens={"swin_vsa_tiny": "swin_vsa_tiny"},
    peers=[Peer("swin_vsa_tiny", "swin_tiny_patch4_window7_224")],
    dense_norm=DenseNorm("norm", 1e-5),
    checkpoint_filter_fn=checkpoint_filter_fn,
)
