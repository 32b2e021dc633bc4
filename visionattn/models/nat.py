"""NAT and DiNAT: hierarchical transformers of (dilated) neighborhood attention.

Papers: "Neighborhood Attention Transformer" (CVPR 2023, arXiv 2204.07143) and "Dilated Neighborhood Attention
Transformer" (arXiv 2209.15001). Official code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer
(MIT licence).
"""
import re
from collections.abc import Sequence
from typing import Any

from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import NeighborhoodAttention2d
from ._backbone import Backbone, stage_levels
from ._blocks import Block, Stage
from ._builder import build_model, cfg
from ._family import DenseNorm, Family, Peer, Published
from ._tables import resize_rpb

__all__ = ["NAT"]

Dilations = Sequence[Sequence[int]]


class ConvStem(nn.Module):
    """Image ``[B, in_chans, H, W]`` to map ``[B, H / 4, W / 4, dim]`` (rounded up): two convolutions, then a norm."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the first map."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """Map ``[B, H, W, dim]`` to ``[B, H / 2, W / 2, out_dim]`` (rounded up): a strided convolution, a norm."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the smaller map."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NAT(Backbone):
    """Four stages of neighborhood attention; takes images of any size, works on maps ``[batch, height, width, dim]``.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        embed_dim: Channels of the first stage; they double from stage to stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        kernel_size: Keys per axis that a query sees (7 in all published models but the 11x11 ones).
        dilations: For each stage the dilations of its blocks, repeated from the start if there are fewer than blocks;
            None for no dilation. They do not change the weights: dense tasks use others (docs/models/nat.md).
        mlp_ratio: Width of the perceptrons' hidden layer, in channels of the stage.
        layer_scale: Initial value of the branches' learnt factors; None for no such factors.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the projections in the blocks.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        embed_layer: Makes the first map from an image: ``embed_layer(in_chans, dim)``.
        downsample_layer: Halves a map between stages: ``downsample_layer(dim, out_dim)``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``dilations`` does not fit ``depths``.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            embed_dim: int = 64,
            depths: Sequence[int] = (3, 4, 6, 5),
            num_heads: Sequence[int] = (2, 4, 8, 16),
            kernel_size: int = 7,
            dilations: Dilations | None = None,
            mlp_ratio: float = 3.,
            layer_scale: float | None = None,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            embed_layer: type[nn.Module] = ConvStem,
            downsample_layer: type[nn.Module] = ConvDownsample,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dilations = fit_dilations(dilations, depths)
        dims = [embed_dim * 2 ** i for i in range(len(depths))]
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.in_chans = in_chans
        self.feature_info = stage_levels(dims)

        self.patch_embed = embed_layer(in_chans, embed_dim, **dd)
        self.stages = nn.Sequential(*[
            Stage(
                downsample_layer(dims[i - 1], dim, **dd) if i else nn.Identity(),
                [
                    Block(
                        dim,
                        NeighborhoodAttention2d(
                            dim, num_heads[i], kernel_size, dilation, proj_drop=proj_drop_rate, **dd),
                        mlp_ratio=mlp_ratio, layer_scale=layer_scale, proj_drop=proj_drop_rate, drop_path=drop_path,
                        **dd,
                    )
                    for dilation, drop_path in zip(dilations[i], drop_paths[i], strict=True)
                ],
            )
            for i, dim in enumerate(dims)
        ])
        self.finish(dims[-1], num_classes, global_pool, drop_rate, **dd)


def dense_args(variant: str, task: str) -> dict[str, Any]:
    """Arguments of ``NAT`` that the authors change for ``task``, ``"detection"`` or ``"segmentation"``.

    DiNAT takes longer dilations, so that its windows span the larger images; NAT has none in any task.
    """
    if variant == "test_dinat" or not variant.startswith("dinat"):
        return {}
    if "11x11" in variant:  # Mask2Former's, for every data set
        return {"dilations": ((1, 14, 1), (1, 4, 1, 7), (*(1, 2, 1, 3) * 4, 1, 3), (1,))}
    if task == "detection":
        return {"dilations": ((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1))}
    if "large" in variant:
        return {"dilations": ((1, 20, 1), (1, 5, 1, 10), DILATIONS_640, (1, 2, 1, 2, 1))}
    return {"dilations": ((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2, 1, 2, 1))}


def fit_dilations(dilations: Dilations | None, depths: Sequence[int]) -> list[list[int]]:
    """One dilation per block: each stage's list is repeated until it covers the stage's blocks."""
    if dilations is None:
        dilations = [[1]] * len(depths)
    if len(dilations) != len(depths):
        raise ValueError(f"dilations must have one list per stage, {len(depths)}, got {len(dilations)}")
    for stage, (values, depth) in enumerate(zip(dilations, depths, strict=True)):
        if not 1 <= len(values) <= depth:
            raise ValueError(f"dilations of stage {stage} must be 1 to {depth} values, one per block, got {values}")
    return [[values[j % len(values)] for j in range(depth)] for values, depth in zip(dilations, depths, strict=True)]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' entries to ours (ours stay) and fits the bias tables to the model's kernel size.

    The authors hang the downsampler at the end of a level, we put it at the start of the next stage, so that a stage's
    output is the map that dense tasks use. The norms that their dense backbones add (``norm0`` .. ``norm3``) are
    dropped: they are no part of a classifier.
    """
    tables = {name: x.shape for name, x in model.state_dict().items() if name.endswith(".rpb")}
    renamed = {}
    for key, value in state_dict.items():
        if re.match(r"norm\d\.", key):
            continue
        key = re.sub(r"^(?:levels|layers)\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", key)
        key = re.sub(r"^(?:levels|layers)\.", "stages.", key)
        key = re.sub(r"\.gamma([12])$", r".ls\1.gamma", key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        if key in tables and value.ndim == 3 and value.shape != tables[key]:
            value = resize_rpb(value, tables[key][1:])
        renamed[key] = value
    return renamed


_HOME = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"


def dinat_cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    """Pretrained cfg of a model that the authors of DiNAT published as ``file``."""
    url = f"https://shi-labs.com/projects/dinat/checkpoints/{file}" if file else ""
    return cfg(**dict(
        url=url, classifier="head.fc", license="mit", origin_url=_HOME, paper_ids="arXiv:2209.15001",
        paper_name="Dilated Neighborhood Attention Transformer",
    ) | kwargs)


def _nat_cfg(file: str) -> dict[str, Any]:
    return _cfg(
        url=f"https://shi-labs.com/projects/nat/checkpoints/CLS/{file}", paper_ids="arXiv:2204.07143",
        paper_name="Neighborhood Attention Transformer")


def _cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    return dinat_cfg(file, first_conv="patch_embed.proj.0", **kwargs)


_AT_384 = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)

default_cfgs = generate_default_cfgs({
    "nat_mini.in1k": _nat_cfg("nat_mini.pth"),
    "nat_tiny.in1k": _nat_cfg("nat_tiny.pth"),
    "nat_small.in1k": _nat_cfg("nat_small.pth"),
    "nat_base.in1k": _nat_cfg("nat_base.pth"),
    "dinat_mini.in1k": _cfg("imagenet1k/dinat_mini_in1k_224.pth"),
    "dinat_tiny.in1k": _cfg("imagenet1k/dinat_tiny_in1k_224.pth"),
    "dinat_small.in1k": _cfg("imagenet1k/dinat_small_in1k_224.pth"),
    "dinat_base.in1k": _cfg("imagenet1k/dinat_base_in1k_224.pth"),
    "dinat_large.in22k_ft_in1k": _cfg("imagenet1k/dinat_large_in22k_in1k_224.pth"),
    "dinat_large_384.in22k_ft_in1k": _cfg("imagenet1k/dinat_large_in22k_in1k_384.pth", **_AT_384),
    "dinat_large_384_11x11.in22k_ft_in1k": _cfg("imagenet1k/dinat_large_in22k_in1k_384_11x11.pth", **_AT_384),
    "dinat_large_21k.in22k": _cfg("imagenet22k/dinat_large_in22k_224.pth", num_classes=21841),
    "dinat_large_21k_11x11.in22k": _cfg("imagenet22k/dinat_large_in22k_224_11x11interp.pth", num_classes=21841),
    "test_dinat.untrained": _cfg(),
})

# With these the window spans the whole map of every stage at 224 px: kernel_size * dilation = 56, 28, 14, 7.
DILATIONS_224 = ((1, 8), (1, 4), (1, 2), (1,))
DILATIONS_384 = ((1, 13), (1, 6), (1, 3), (1,))
DILATIONS_640 = (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5)  # large models' third stage in segmentation

_MINI = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.)
_TINY = _MINI | dict(depths=(3, 4, 18, 5))
_SMALL = dict(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.)
_BASE = dict(embed_dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2., layer_scale=1e-5)
_LARGE = dict(embed_dim=192, depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), mlp_ratio=2.)
_LARGE_11X11 = _LARGE | dict(kernel_size=11, dilations=DILATIONS_224)
_TEST = dict(
    embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), kernel_size=3, dilations=((1, 4), (1, 2), (1, 2), (1,)),
    mlp_ratio=2.)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> NAT:
    return build_model(NAT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **defaults | kwargs)


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """20.0 M parameters, 2.7 GMACs, published 81.8 % top-1 at 224 px."""
    return _create("nat_mini", pretrained, _MINI, **kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """27.9 M parameters, 4.3 GMACs, published 83.2 % top-1 at 224 px."""
    return _create("nat_tiny", pretrained, _TINY, **kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """50.7 M parameters, 7.8 GMACs, published 83.7 % top-1 at 224 px."""
    return _create("nat_small", pretrained, _SMALL | dict(layer_scale=1e-5), **kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """89.8 M parameters, 13.7 GMACs, published 84.3 % top-1 at 224 px."""
    return _create("nat_base", pretrained, _BASE, **kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """20.0 M parameters, 2.7 GMACs, published 81.8 % top-1 at 224 px."""
    return _create("dinat_mini", pretrained, _MINI | dict(dilations=DILATIONS_224), **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """27.9 M parameters, 4.3 GMACs, published 82.7 % top-1 at 224 px."""
    return _create("dinat_tiny", pretrained, _TINY | dict(dilations=DILATIONS_224), **kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """50.7 M parameters (no layer scale, unlike NAT small), 7.8 GMACs, published 83.8 % top-1 at 224 px."""
    return _create("dinat_small", pretrained, _SMALL | dict(dilations=DILATIONS_224), **kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """89.8 M parameters, 13.7 GMACs, published 84.4 % top-1 at 224 px."""
    return _create("dinat_base", pretrained, _BASE | dict(dilations=DILATIONS_224), **kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """200.9 M parameters, 30.6 GMACs, published 86.6 % top-1 at 224 px (pre-trained on ImageNet-22k)."""
    return _create("dinat_large", pretrained, _LARGE | dict(dilations=DILATIONS_224), **kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """200.9 M parameters, 89.7 GMACs, published 87.4 % top-1 at 384 px (pre-trained on ImageNet-22k)."""
    return _create("dinat_large_384", pretrained, _LARGE | dict(dilations=DILATIONS_384), **kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Windows of 11x11 keys: 201.1 M parameters, 92.4 GMACs, published 87.5 % top-1 at 384 px."""
    return _create("dinat_large_384_11x11", pretrained, _LARGE_11X11, **kwargs)


@register_model
def dinat_large_21k(pretrained: bool = False, **kwargs: Any) -> NAT:
    """``dinat_large`` as pre-trained on ImageNet-22k, 21,841 classes."""
    return _create("dinat_large_21k", pretrained, _LARGE | dict(dilations=DILATIONS_224), **kwargs)


@register_model
def dinat_large_21k_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """``dinat_large_21k`` with its bias tables interpolated to windows of 11x11 keys."""
    return _create("dinat_large_21k_11x11", pretrained, _LARGE_11X11, **kwargs)


@register_model
def test_dinat(pretrained: bool = False, **kwargs: Any) -> NAT:  # noqa: PT028 - no test function
    """Small enough for tests."""
    return _create("test_dinat", pretrained, _TEST, **kwargs)


family = Family(
    small={"test_dinat": {}, "nat_small": dict(embed_dim=24, depths=(1, 1, 1, 1))},
    published={
        "nat_mini": Published(81.8, 2.7), "nat_tiny": Published(83.2, 4.3), "nat_small": Published(83.7, 7.8),
        "nat_base": Published(84.3, 13.7), "dinat_mini": Published(81.8, 2.7), "dinat_tiny": Published(82.7, 4.3),
        "dinat_small": Published(83.8, 7.8), "dinat_base": Published(84.4, 13.7),
        "dinat_large": Published(86.6, 30.6), "dinat_large_384": Published(87.4, 89.7),
        "dinat_large_384_11x11": Published(87.5, 92.4),
    },
    goldens={"nat_mini": "nat_mini", "dinat_tiny": "dinat_tiny", "dinat_mini_coco_backbone": "dinat_mini"},
    peers=[Peer("dinat_tiny", "swin_tiny_patch4_window7_224"), Peer("nat_tiny", "swin_tiny_patch4_window7_224")],
    dense_args=dense_args,
    dense_norm=DenseNorm("norm", 1e-5),
    checkpoint_filter_fn=checkpoint_filter_fn,
)
