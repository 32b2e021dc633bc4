"""SMT: modulation by convolutions of four sizes, which gives way to full attention as the maps become smaller.

Paper: "Scale-Aware Modulation Meet Transformer" (ICCV 2023, arXiv 2307.08579). Official code and weights:
https://github.com/AFeng-x/SMT (MIT licence).
"""
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import FullAttention
from ._backbone import Backbone, init_convolution, stage_levels
from ._blocks import Block, ConvEmbedding, Stage
from ._builder import build_model, cfg
from ._family import Family, Peer, Published

__all__ = ["SMT", "ScaleAwareModulation"]

_SCALES = 4  # heads of the modulation; head i has kernels of 3 + 2i
_norm = partial(nn.LayerNorm, eps=1e-6)


class Stem(nn.Module):
    """Image ``[B, in_chans, H, W]`` to map ``[B, H / 4, W / 4, dim]``, of a side of n pixels ``ceil(n / 2) // 2``."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(in_chans, dim, kernel_size, stride=2, padding=kernel_size // 2, bias=False, **dd),
            bn=nn.BatchNorm2d(dim, **dd),
            act=nn.ReLU(),
            conv2=nn.Conv2d(dim, dim, 2, stride=2, **dd),
        ))
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the first map."""
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class ScaleAwareModulation(nn.Module):
    """Values times a modulator from depthwise convolutions of four sizes, on maps ``[B, H, W, dim]`` (section 3.1).

    Multi-head mixed convolution: a quarter of the channels each is convolved with kernels of 3, 5, 7 and 9. Scale-aware
    aggregation: the four results of a channel are mixed among themselves, then all with all. There is no activation on
    the modulator.

    Args:
        dim: Channels, a multiple of 4.
        expand_ratio: Channels between the two mixing steps, in ``dim``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``dim`` is no multiple of 4.
    """

    def __init__(self, dim: int, expand_ratio: int = 2, device=None, dtype=None):
        super().__init__()
        if dim % _SCALES:
            raise ValueError(f"dim must be a multiple of {_SCALES}, got {dim}")
        dd = {"device": device, "dtype": dtype}
        group, hidden = dim // _SCALES, dim * expand_ratio
        self.group = group
        self.v = nn.Linear(dim, dim, **dd)
        self.s = nn.Linear(dim, dim, **dd)
        self.convs = nn.ModuleList([
            nn.Conv2d(group, group, 3 + 2 * i, padding=1 + i, groups=group, **dd) for i in range(_SCALES)])
        self.proj0 = nn.Conv2d(dim, hidden, 1, groups=group, **dd)
        self.bn = nn.BatchNorm2d(hidden, **dd)
        self.proj1 = nn.Conv2d(hidden, dim, 1, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        s = self.s(x).permute(0, 3, 1, 2)
        scales = []
        for i, conv in enumerate(self.convs):
            scales.append(conv(s.narrow(1, i * self.group, self.group)))
        # The shuffle: the four scales of a channel become neighbours, which are the groups of proj0.
        s = torch.stack(scales, dim=2).flatten(1, 2)
        s = self.proj1(F.gelu(self.bn(self.proj0(s))))
        return self.proj(s.permute(0, 2, 3, 1) * self.v(x))


class ConvMlp(nn.Module):
    """Perceptron on every token of a map ``[B, H, W, dim]``, with a depthwise convolution beside a shortcut inside."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0., device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        x = self.fc1(x)
        x = F.gelu(x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.drop(self.fc2(self.drop(x)))


class SMT(Backbone):
    """Four stages on maps ``[batch, height, width, dim]``; takes images of any size from 3 x 3 pixels.

    The first two stages modulate, the third modulates and attends in turn, the last attends ("evolutionary hybrid
    network", section 3.2). A norm ends every stage, in the way of the map to the next one.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        embed_dims: Channels of each stage, multiples of 4 in the first three.
        depths: Blocks of each stage.
        num_heads: Heads of the attention in the last two stages.
        mlp_ratios: Width of the perceptrons' hidden layer in channels of the stage, per stage.
        stem_kernel: Kernel size of the first convolution; odd.
        expand_ratio: Width inside the modulation in channels of the stage.
        layer_scale: Initial value of the branches' learnt factors; None for no such factors.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate in the perceptrons.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A sequence has another number of entries, or a width is not divided by heads or scales.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            embed_dims: Sequence[int] = (64, 128, 256, 512),
            depths: Sequence[int] = (2, 2, 8, 1),
            num_heads: Sequence[int] = (8, 16),
            mlp_ratios: Sequence[float] = (4., 4., 4., 2.),
            stem_kernel: int = 3,
            expand_ratio: int = 2,
            layer_scale: float | None = None,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        for name, values in dict(embed_dims=embed_dims, depths=depths, mlp_ratios=mlp_ratios).items():
            if len(values) != 4:
                raise ValueError(f"{name} must have one entry per stage, 4, got {values}")
        if len(num_heads) != 2:
            raise ValueError(f"num_heads must have one entry for each of the last two stages, got {num_heads}")
        self.in_chans = in_chans
        self.feature_info = stage_levels(embed_dims)
        self.min_sizes = [3] * len(depths)  # of fewer pixels the stem makes an empty map
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def mixer(stage: int, block: int) -> nn.Module:
            dim = embed_dims[stage]
            if stage == 3 or (stage == 2 and block % 2):
                return FullAttention(
                    dim, num_heads[stage - 2], lepe_of="value", lepe_kernel=3, qkv_bias=True, **dd)
            return ScaleAwareModulation(dim, expand_ratio, **dd)

        self.patch_embed = Stem(in_chans, embed_dims[0], stem_kernel, **dd)
        self.stages = nn.Sequential(*[
            Stage(
                ConvEmbedding(embed_dims[i - 1], dim, 3, stride=2, padding=1, **dd) if i else nn.Identity(),
                [
                    Block(
                        dim, mixer(i, j), mlp_ratios[i], layer_scale=layer_scale, proj_drop=proj_drop_rate,
                        drop_path=rate, norm_layer=_norm, mlp_layer=ConvMlp, **dd)
                    for j, rate in enumerate(drop_paths[i])
                ],
                norm=_norm(dim, **dd),
            )
            for i, dim in enumerate(embed_dims)
        ])
        self.finish(embed_dims[-1], num_classes, global_pool, drop_rate, norm_layer=None, **dd)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        """Draws the parameters of one module; of a convolution normal ones, by the number of its outputs."""
        super().init_module(module, needs_reset)
        if isinstance(module, nn.Conv2d):
            init_convolution(module)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: SMT) -> dict[str, Tensor]:
    """Renames the entries of the authors' classifiers and dense backbones to ours (ours stay).

    A checkpoint without the branches' factors fills those of a model that has them with ones: it computes the same.

    Raises:
        ValueError: The authors' checkpoint has other numbers of blocks than the model.
    """
    if "patch_embed1.conv.0.weight" in state_dict:
        _check_depths(state_dict, model)
    renamed = {}
    for key, x in state_dict.items():
        for pattern, new in _RENAMES:
            key = re.sub(pattern, new, key)
        key = re.sub(r"^(?:patch_embed|block|norm)([1-4])\.", lambda m: f"stages.{int(m[1]) - 1}.", key)
        key = re.sub(r"\.local_conv_([1-4])\.", lambda m: f".convs.{int(m[1]) - 1}.", key)
        renamed[key] = x
    for key in [key for key in renamed if ".attn.q." in key]:
        prefix, _, leaf = key.rpartition("q.")
        if f"{prefix}kv.{leaf}" in renamed:
            renamed[f"{prefix}qkv.{leaf}"] = torch.cat([renamed.pop(key), renamed.pop(f"{prefix}kv.{leaf}")])
    factors = {key: x for key, x in model.state_dict().items() if key.endswith((".ls1.gamma", ".ls2.gamma"))}
    if "stages.0.norm.weight" in renamed and not factors.keys() & renamed.keys():
        like = renamed["stages.0.norm.weight"]
        renamed |= {key: torch.ones(x.shape, dtype=like.dtype) for key, x in factors.items()}
    return renamed


_RENAMES = (
    (r"^patch_embed1\.conv\.0\.", "patch_embed.conv.conv1."),
    (r"^patch_embed1\.conv\.1\.", "patch_embed.conv.bn."),
    (r"^patch_embed1\.conv\.3\.", "patch_embed.conv.conv2."),
    (r"^patch_embed1\.norm\.", "patch_embed.norm."),
    (r"^(patch_embed[2-4])\.", r"\1.downsample."),
    (r"^(block[1-4])\.", r"\1.blocks."),
    (r"^(norm[1-4])\.", r"\1.norm."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.attn\.(?:local_conv|dw_conv)\.", ".attn.lepe."),  # the dense backbones have the second name
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _check_depths(state_dict: dict[str, Tensor], model: SMT) -> None:
    """Complains about other numbers of blocks: what the authors say of SMT-S does not fit together."""
    blocks = {match[0] for key in state_dict if (match := re.match(r"block([1-4])\.(\d+)\.", key))}
    found = tuple(sum(block.startswith(f"block{i}.") for block in blocks) for i in range(1, 5))
    depths = tuple(len(stage.blocks) for stage in model.stages)
    if found != depths:
        raise ValueError(f"the checkpoint has {found} blocks, the model {depths}: it is another model's, or this one "
                         f"must be created with depths={found}")


def _cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    return cfg(**dict(
        url=f"https://github.com/AFeng-x/SMT/releases/download/v1.0.0/{file}" if file else "",
        first_conv="patch_embed.conv.conv1", classifier="head.fc", license="mit",
        origin_url="https://github.com/AFeng-x/SMT", paper_name="Scale-Aware Modulation Meet Transformer",
        paper_ids="arXiv:2307.08579",
    ) | kwargs)


default_cfgs = generate_default_cfgs({
    "smt_t.in1k": _cfg("smt_tiny.pth"),
    "smt_s.in1k": _cfg("smt_small.pth"),
    "smt_b.in1k": _cfg("smt_base.pth"),
    "smt_l.in22k_ft_in1k": _cfg("smt_large_22k_224_ft.pth"),
    "smt_l_384.in22k_ft_in1k": _cfg(
        "smt_large_22k_384_ft.pth", input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, crop_mode="squash"),
    "smt_l_22k.in22k": _cfg("smt_large_22k.pth", num_classes=21841),
    "test_smt.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})

_LARGE = dict(
    embed_dims=(96, 192, 384, 768), depths=(4, 6, 28, 4), mlp_ratios=(8., 6., 4., 2.), stem_kernel=7, layer_scale=1e-4)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> SMT:
    return build_model(SMT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **defaults | kwargs)


@register_model
def smt_t(pretrained: bool = False, **kwargs: Any) -> SMT:
    """11.5 M parameters, 2.4 GMACs, published 82.2 % top-1 at 224 px."""
    return _create("smt_t", pretrained, {}, **kwargs)


@register_model
def smt_s(pretrained: bool = False, **kwargs: Any) -> SMT:
    """22.6 M parameters, 4.7 GMACs, published 83.7 % top-1 at 224 px."""
    return _create("smt_s", pretrained, dict(depths=(3, 4, 18, 2)), **kwargs)


@register_model
def smt_b(pretrained: bool = False, **kwargs: Any) -> SMT:
    """32.0 M parameters, 7.7 GMACs, published 84.3 % top-1 at 224 px."""
    return _create(
        "smt_b", pretrained, dict(depths=(4, 6, 28, 2), mlp_ratios=(8., 6., 4., 2.), stem_kernel=7), **kwargs)


@register_model
def smt_l(pretrained: bool = False, **kwargs: Any) -> SMT:
    """80.7 M parameters, 17.6 GMACs, published 87.1 % top-1 at 224 px (pre-trained on ImageNet-22k)."""
    return _create("smt_l", pretrained, _LARGE, **kwargs)


@register_model
def smt_l_384(pretrained: bool = False, **kwargs: Any) -> SMT:
    """``smt_l`` for images of 384 px: 51.6 GMACs, published 88.1 % top-1 (pre-trained on ImageNet-22k)."""
    return _create("smt_l_384", pretrained, _LARGE, **kwargs)


@register_model
def smt_l_22k(pretrained: bool = False, **kwargs: Any) -> SMT:
    """``smt_l`` as pre-trained on ImageNet-22k, 21,841 classes."""
    return _create("smt_l_22k", pretrained, _LARGE, **kwargs)


@register_model
def test_smt(pretrained: bool = False, **kwargs: Any) -> SMT:  # noqa: PT028 - no test function
    """Small enough for tests."""
    model_args = dict(
        embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(2, 4), mlp_ratios=(2., 2., 2., 2.), stem_kernel=7,
        layer_scale=1.)
    return _create("test_smt", pretrained, model_args, **kwargs)


family = Family(
    small={"test_smt": {}},
    published={
        "smt_t": Published(82.2, 2.4, whole=False), "smt_s": Published(83.7, 4.7, whole=False),
        "smt_b": Published(84.3, 7.7, whole=False), "smt_l": Published(87.1, 17.6, whole=False),
        "smt_l_384": Published(88.1, 51.6, whole=False),
    },
    goldens={"smt_t": "smt_t", "smt_s_dense_det": "smt_s", "smt_ops": "*"},
    peers=[Peer("smt_t", "pvt_v2_b1"), Peer("smt_s", "swin_tiny_patch4_window7_224")],
    checkpoint_filter_fn=checkpoint_filter_fn,
)
