"""BiFormer

Paper: `BiFormer: Vision Transformer with Bi-Level Routing Attention` - https://arxiv.org/abs/2303.08810 (CVPR 2023)

Code: https://github.com/rayleizhu/BiFormer (MIT licence)

@inproceedings{zhu2023biformer,
  author={Zhu, Lei and Wang, Xinjiang and Ke, Zhanghan and Zhang, Wayne and Lau, Rynson},
  title={BiFormer: Vision Transformer with Bi-Level Routing Attention},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year={2023}
}
"""
import re
from collections import OrderedDict
from typing import Any

from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import BiLevelRoutingAttention, FullAttention
from ._backbone import Backbone, stage_levels
from ._blocks import BaseBlock, Stage
from ._builder import build_model, cfg
from ._family import DenseNorm, Family, Peer, Published

__all__ = ["BiFormer"]


class Block(BaseBlock):
    """Depthwise position convolution (optional), attention and MLP, each added to its input; NCHW in and out."""

    def __init__(
            self,
            dim: int,
            attn: nn.Module,
            mlp_ratio: float,
            pos_conv: bool,
            drop_path: float,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pos_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if pos_conv else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def branches(self, x: Tensor) -> Tensor:
        """What the block computes."""
        if self.pos_conv is not None:
            x = x + self.pos_conv(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class BiFormer(Backbone):
    """BiFormer: stages of bi-level routing attention on maps of stride 4, 8 and 16, full attention at stride 32.

    Args:
        in_chans: Number of input channels.
        num_classes: Number of classes; 0 for no classifier.
        global_pool: Pooling before the classifier, ``"avg"``, ``"max"``, ...; ``""`` for none.
        depths: Number of blocks of each stage.
        embed_dims: Width of each stage.
        topks: Number of regions that a region attends to, for each stage; None for full attention.
        head_dim: Width of a head of routed attention. Full attention has eight heads.
        n_win: Number of regions per side; 7 for classification at 224 px, the authors take 16 for detection and 8 for
            segmentation with the same weights.
        mlp_ratio: Hidden width of the MLPs in units of their width.
        overlap: Stem and downsampling by overlapping 3x3 convolutions, norm after each; else by 4x4 and 2x2 patches
            with the norm before downsampling, which drops the last row or column of an odd map.
        pos_conv: Blocks begin with a depthwise convolution.
        nchw_attention: The authors' later version of the attention: pads after the projection and convolves the values
            in the last stage too (see :mod:`visionattn.layers.bilevel_routing`).
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; grows linearly from 0 in the first.
    """

    stem_parts = ("stem",)
    output_fmt = "NCHW"

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            depths: tuple[int, ...] = (2, 2, 8, 2),
            embed_dims: tuple[int, ...] = (64, 128, 256, 512),
            topks: tuple[int | None, ...] = (1, 4, 16, None),
            head_dim: int = 32,
            n_win: int = 7,
            mlp_ratio: float = 3.,
            overlap: bool = True,
            pos_conv: bool = True,
            nchw_attention: bool = False,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.nchw_attention = nchw_attention
        self.feature_info = stage_levels(embed_dims)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def attention(dim: int, topk: int | None) -> nn.Module:
            if topk is None:
                return FullAttention(dim, lepe_of="value" if nchw_attention else "input", **dd)
            return BiLevelRoutingAttention(
                dim, dim // head_dim, n_win=n_win, topk=topk, pad="qkv" if nchw_attention else "input", **dd)

        self.stem = _stem(in_chans, embed_dims[0], overlap, **dd)
        stages = []
        for i, (dim, rates, topk) in enumerate(zip(embed_dims, drop_paths, topks, strict=True)):
            blocks = [Block(dim, attention(dim, topk), mlp_ratio, pos_conv, rate, **dd) for rate in rates]
            stages.append(Stage(_downsample(embed_dims[i - 1], dim, overlap, **dd) if i else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        if not overlap:
            self.min_sizes = [info["reduction"] for info in self.feature_info]
        self.finish(embed_dims[-1], num_classes, global_pool, drop_rate, norm_layer=nn.BatchNorm2d, **dd)

    def embed(self, x: Tensor) -> Tensor:
        """The first map of images ``[batch, in_chans, height, width]``."""
        return self.stem(x)


def _stem(in_chans: int, dim: int, overlap: bool, **dd: Any) -> nn.Module:
    if not overlap:
        return nn.Sequential(OrderedDict(
            conv=nn.Conv2d(in_chans, dim, 4, stride=4, **dd),
            norm=nn.BatchNorm2d(dim, **dd),
        ))
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
        norm1=nn.BatchNorm2d(dim // 2, **dd),
        act=nn.GELU(),
        conv2=nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        norm2=nn.BatchNorm2d(dim, **dd),
    ))


def _downsample(in_dim: int, dim: int, overlap: bool, **dd: Any) -> nn.Module:
    if not overlap:
        return nn.Sequential(OrderedDict(
            norm=nn.BatchNorm2d(in_dim, **dd),
            conv=nn.Conv2d(in_dim, dim, 2, stride=2, **dd),
        ))
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd),
        norm=nn.BatchNorm2d(dim, **dd),
    ))


def dense_args(variant: str, task: str) -> dict[str, Any]:
    """Arguments of ``BiFormer`` that the authors change for ``task``, ``"detection"`` or ``"segmentation"``."""
    return {"n_win": {"detection": 16, "segmentation": 8}[task]}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: BiFormer) -> dict[str, Tensor]:
    """Gives the entries of an official checkpoint our names and shapes; leaves a checkpoint of ours as it is."""
    if not any(name.startswith("downsample_layers.") for name in state_dict):
        return state_dict
    if any(".qkv_linear." in name for name in state_dict) != model.nchw_attention:
        versions = ("legacy", "nchw") if model.nchw_attention else ("nchw", "legacy")
        raise ValueError("the checkpoint is of the {} version of BiFormer, the model of the {} one, which computes "
                         "something else from the same weights".format(*versions))
    if "downsample_layers.0.3.weight" in state_dict:
        names = {"0.0": "stem.conv1", "0.1": "stem.norm1", "0.3": "stem.conv2", "0.4": "stem.norm2"}
        order = ("conv", "norm")
    else:
        names = {"0.0": "stem.conv", "0.1": "stem.norm"}
        order = ("norm", "conv")
    names |= {f"{i}.{j}": f"stages.{i}.downsample.{part}" for i in (1, 2, 3) for j, part in enumerate(order)}
    rules = [(rf"^downsample_layers\.{re.escape(old)}\.", f"{new}.") for old, new in names.items()] + [
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.pos_embed\.", ".pos_conv."),
        (r"\.attn\.(qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
        (r"\.attn\.(wo|output_linear)\.", ".attn.proj."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.[23]\.", ".mlp.fc2."),
        (r"^head\.", "head.fc."),
    ]
    renamed = {}
    for name, x in state_dict.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        # 1x1 convolutions of the nchw version are linear layers here.
        is_linear = name.endswith((".qkv.weight", ".proj.weight", ".fc1.weight", ".fc2.weight"))
        renamed[name] = x.flatten(1) if is_linear else x
    return renamed


def _cfg(share: str = "", **kwargs: Any) -> dict[str, Any]:
    return cfg(**dict(
        url=f"https://api.onedrive.com/v1.0/shares/{share}/root/content" if share else "",
        first_conv="stem.conv1", classifier="head.fc", license="mit", origin_url="https://github.com/rayleizhu/BiFormer",
        paper_name="BiFormer: Vision Transformer with Bi-Level Routing Attention", paper_ids="arXiv:2303.08810",
    ) | kwargs)


default_cfgs = generate_default_cfgs({
    "biformer_tiny.in1k": _cfg("s!AkBbczdRlZvChHEOoGkgwgQzEDlM"),
    "biformer_small.in1k": _cfg("s!AkBbczdRlZvChHDyM-x9KWRBZ832"),
    "biformer_base.in1k": _cfg("s!AkBbczdRlZvChHI_XPhoadjaNxtO"),
    "biformer_stl.in1k": _cfg("s!AkBbczdRlZvChSf-m7ujkvx9lIQ1", first_conv="stem.conv"),
    "biformer_stl_nchw.in1k": _cfg("s!AkBbczdRlZvChWYrKbWbMgqd2Ai0", first_conv="stem.conv"),
    "test_biformer.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
})


def _create_biformer(variant: str, pretrained: bool, **kwargs: Any) -> BiFormer:
    return build_model(BiFormer, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """13.1 M parameters, 2.2 GMACs, published 81.4 % top-1 at 224 px."""
    return _create_biformer("biformer_tiny", pretrained, **kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """25.5 M parameters, 4.5 GMACs, published 83.8 % top-1 at 224 px."""
    return _create_biformer("biformer_small", pretrained, **dict(depths=(4, 4, 18, 4)) | kwargs)


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """56.8 M parameters, 9.8 GMACs, published 84.3 % top-1 at 224 px."""
    model_args = dict(depths=(4, 4, 18, 4), embed_dims=(96, 192, 384, 768))
    return _create_biformer("biformer_base", pretrained, **model_args | kwargs)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """In Swin-T's layout: 28.4 M parameters, 4.6 GMACs, published 82.7 % top-1 at 224 px."""
    model_args = dict(
        depths=(2, 2, 6, 2), embed_dims=(96, 192, 384, 768), mlp_ratio=4., overlap=False, pos_conv=False)
    return _create_biformer("biformer_stl", pretrained, **model_args | kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """``biformer_stl`` with the later version of the attention, published 82.7 % top-1 at 224 px."""
    model_args = dict(
        depths=(2, 2, 6, 2), embed_dims=(96, 192, 384, 768), mlp_ratio=4., overlap=False, pos_conv=False,
        nchw_attention=True)
    return _create_biformer("biformer_stl_nchw", pretrained, **model_args | kwargs)


@register_model
def test_biformer(pretrained: bool = False, **kwargs: Any) -> BiFormer:  # noqa: PT028 - no pytest function
    """Small enough for tests and for the demo."""
    model_args = dict(depths=(1, 1, 2, 1), embed_dims=(16, 32, 64, 128), head_dim=16)
    return _create_biformer("test_biformer", pretrained, **model_args | kwargs)


family = Family(
    small={
        "test_biformer": {},
        "biformer_stl": dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128), head_dim=16),
        "biformer_stl_nchw": dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128), head_dim=16),
    },
    published={
        "biformer_tiny": Published(81.4, 2.2), "biformer_small": Published(83.8, 4.5),
        "biformer_base": Published(84.3, 9.8), "biformer_stl": Published(82.7, 4.6),
        "biformer_stl_nchw": Published(82.7, 4.6),
    },
    goldens={
        "biformer_tiny": "biformer_tiny", "biformer_tiny_seg": "biformer_tiny", "biformer_stl": "biformer_stl",
        "biformer_stl_nchw": "biformer_stl_nchw",
    },
    peers=[Peer("biformer_tiny", "swin_tiny_patch4_window7_224")],
    dense_args=dense_args,
    dense_norm=DenseNorm("extra_norms.", 1e-6),
    checkpoint_filter_fn=checkpoint_filter_fn,
)
