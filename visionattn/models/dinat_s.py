"""DiNAT_s: dilated neighborhood attention in Swin's layout (patches, patch merging, wider perceptrons).

Paper: "Dilated Neighborhood Attention Transformer" (arXiv 2209.15001). Official code and weights:
https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT licence).
"""
from typing import Any

import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ._builder import build_model
from ._family import DenseNorm, Family, Peer, Published
from .nat import DILATIONS_224, DILATIONS_384, DILATIONS_640, NAT, checkpoint_filter_fn, dinat_cfg

__all__ = ["DiNATs"]


class PatchMerging(nn.Module):
    """Map ``[B, H, W, dim]`` to ``[B, H / 2, W / 2, out_dim]`` (rounded up): norm and projection of 2x2 patches."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the smaller map."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        B, H, W, C = x.shape
        # Channels of a patch: top left, bottom left, top right, bottom right.
        x = x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class DiNATs(NAT):
    """:class:`visionattn.models.nat.NAT` with 4x4 patches for a stem and patch merging between stages.

    Images and maps that the patches do not divide are padded with zeros at the bottom and the right.

    Args:
        kwargs: As of ``NAT``.
    """

    def __init__(self, **kwargs: Any):
        defaults: dict[str, Any] = dict(mlp_ratio=4., embed_layer=_patch_stem, downsample_layer=PatchMerging)
        super().__init__(**defaults | kwargs)


def _patch_stem(in_chans: int, dim: int, **dd: Any) -> PatchEmbed:
    return PatchEmbed(
        img_size=None, patch_size=4, in_chans=in_chans, embed_dim=dim, norm_layer=nn.LayerNorm, output_fmt="NHWC",
        strict_img_size=False, dynamic_img_pad=True, **dd)


def dense_args(variant: str, task: str) -> dict[str, Any]:
    """Arguments of ``DiNATs`` that the authors change for ``task``, ``"detection"`` or ``"segmentation"``."""
    if task == "detection":
        return {"dilations": ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3))}
    if "large" in variant:
        return {"dilations": ((1, 20), (1, 10), DILATIONS_640, (1, 2))}
    return {"dilations": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2))}


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return dinat_cfg(file, first_conv="patch_embed.proj", **kwargs)


default_cfgs = generate_default_cfgs({
    "dinat_s_tiny.in1k": _cfg("imagenet1k/dinat_s_tiny_in1k_224.pth"),
    "dinat_s_small.in1k": _cfg("imagenet1k/dinat_s_small_in1k_224.pth"),
    "dinat_s_base.in1k": _cfg("imagenet1k/dinat_s_base_in1k_224.pth"),
    "dinat_s_large.in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_224.pth"),
    "dinat_s_large_384.in22k_ft_in1k": _cfg(
        "imagenet1k/dinat_s_large_in1k_384.pth", input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
    "dinat_s_large_21k.in22k": _cfg("imagenet22k/dinat_s_large_in22k_224.pth", num_classes=21841),
})

_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), dilations=DILATIONS_224)
_SMALL = _TINY | dict(depths=(2, 2, 18, 2))
_BASE = _SMALL | dict(embed_dim=128, num_heads=(4, 8, 16, 32))
_LARGE = _SMALL | dict(embed_dim=192, num_heads=(6, 12, 24, 48))


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> DiNATs:
    return build_model(DiNATs, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **defaults | kwargs)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """28.3 M parameters, 4.5 GMACs, published 81.8 % top-1 at 224 px."""
    return _create("dinat_s_tiny", pretrained, _TINY, **kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """49.6 M parameters, 8.7 GMACs, published 83.5 % top-1 at 224 px."""
    return _create("dinat_s_small", pretrained, _SMALL, **kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """87.8 M parameters, 15.4 GMACs, published 83.8 % top-1 at 224 px."""
    return _create("dinat_s_base", pretrained, _BASE, **kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """196.5 M parameters, 34.5 GMACs, published 86.5 % top-1 at 224 px (pre-trained on ImageNet-22k)."""
    return _create("dinat_s_large", pretrained, _LARGE, **kwargs)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """196.5 M parameters, 101.5 GMACs, published 87.4 % top-1 at 384 px (pre-trained on ImageNet-22k)."""
    return _create("dinat_s_large_384", pretrained, _LARGE | dict(dilations=DILATIONS_384), **kwargs)


@register_model
def dinat_s_large_21k(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """``dinat_s_large`` as pre-trained on ImageNet-22k, 21,841 classes."""
    return _create("dinat_s_large_21k", pretrained, _LARGE, **kwargs)


family = Family(
    small={"dinat_s_tiny": dict(embed_dim=24, depths=(2, 2, 2, 2))},
    published={
        "dinat_s_tiny": Published(81.8, 4.5), "dinat_s_small": Published(83.5, 8.7),
        "dinat_s_base": Published(83.8, 15.4), "dinat_s_large": Published(86.5, 34.5),
        "dinat_s_large_384": Published(87.4, 101.5),
    },
    goldens={"dinat_s_tiny": "dinat_s_tiny"},
    peers=[Peer("dinat_s_tiny", "swin_tiny_patch4_window7_224")],
    dense_args=dense_args,
    dense_norm=DenseNorm("norm", 1e-5),
    checkpoint_filter_fn=checkpoint_filter_fn,
)
