"""ResNet-50 and MobileNetV2 with an attention layer for networks of convolutions in their blocks: ELA, ULSAM or LBA.

Papers: "ELA: Efficient Local Attention for Deep Convolutional Neural Networks" (arXiv 2403.01123), "ULSAM:
Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks" (WACV 2020, arXiv 2006.15102).
LBA is a proposal of this zoo after the aim of "A Little Bit Attention Is All You Need for Person Re-Identification"
(arXiv 2302.14574). The networks without it are timm's ``resnet50`` and ``mobilenetv2_100``, whose weights load.
"""
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.cnn_attention import EfficientLocalAttention, LittleBitAttention, SubspaceAttention
from ..layers.conv_norm import ConvNorm
from ._backbone import Backbone, init_convolution, stage_levels
from ._blocks import BaseBlock, Stage
from ._builder import build_model, cfg
from ._family import Family, Peer

__all__ = ["AttentionMobileNetV2", "AttentionResNet"]

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "ela": EfficientLocalAttention, "ulsam": SubspaceAttention, "lba": LittleBitAttention}


class Places:
    """Which block of a network has an attention layer, and where in it.

    Args:
        attn: "ela", "ulsam" or "lba".
        attn_args: Arguments of the layers but the channels.
        positions: Names of stages (after their last block) and blocks to put a layer after; "branches" for one in the
            branch of every block, where timm's networks have theirs.
        depths: Blocks of each stage.
        dd: Device and dtype of the parameters.

    Raises:
        ValueError: There is no such layer or position.
    """

    def __init__(
            self,
            attn: str,
            attn_args: dict[str, Any] | None,
            positions: Sequence[str],
            depths: Sequence[int],
            **dd: Any,
    ):
        if attn not in LAYERS:
            raise ValueError(f"attn must be one of {', '.join(LAYERS)}, got {attn!r}")
        self.layer, self.args = LAYERS[attn], (attn_args or {}) | dd
        self.in_branches = positions == "branches"
        self.after: set[tuple[int, int]] = set()
        named = [positions] if isinstance(positions, str) else positions
        for name in () if self.in_branches else named:
            match = re.fullmatch(r"stages\.(\d+)(?:\.blocks\.(\d+))?", str(name))
            stage = int(match[1]) if match else len(depths)
            block = int(match[2] or depths[stage] - 1) if match and stage < len(depths) else 0
            if stage >= len(depths) or block >= depths[stage]:
                raise ValueError(
                    f"positions must be 'branches', or a list of stages.0 to stages.{len(depths) - 1} and of their "
                    f"{list(depths)} blocks as stages.0.blocks.0, got {name!r}")
            self.after.add((stage, block))

    def in_branch(self, channels: int) -> nn.Module:
        """The layer in a block's branch, on so many channels; nothing if layers stand after blocks."""
        return self.layer(channels, **self.args) if self.in_branches else nn.Identity()

    def after_block(self, stage: int, block: int, channels: int) -> nn.Module:
        """The layer after a block of so many channels; nothing where none was asked for."""
        return self.layer(channels, **self.args) if (stage, block) in self.after else nn.Identity()


class Bottleneck(BaseBlock):
    """ResNet's bottleneck block (the stride in its 3x3 convolution) on maps ``[batch, dim, height, width]``.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output, of which the 3x3 convolution has a quarter.
        stride: Stride.
        attn: On the branch before the shortcut is added; any module that keeps the shape.
        attn_out: On what the block gives.
        drop_path: Rate at which a sample skips the branch in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            out_dim: int,
            stride: int,
            attn: nn.Module,
            attn_out: nn.Module,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        width = out_dim // 4
        self.conv1 = ConvNorm(dim, width, **dd)
        self.conv2 = ConvNorm(width, width, 3, stride=stride, **dd)
        self.conv3 = ConvNorm(width, out_dim, gain=0., **dd)
        self.attn = attn
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.shortcut = ConvNorm(dim, out_dim, stride=stride, **dd) if stride > 1 or dim != out_dim else nn.Identity()
        self.attn_out = attn_out

    def branches(self, x: Tensor) -> Tensor:
        """What the block computes."""
        y = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return self.attn_out(F.relu(self.shortcut(x) + self.drop_path(self.attn(y))))


class InvertedResidual(BaseBlock):
    """MobileNetV2's block on maps ``[batch, dim, height, width]``: wide inside, with a depthwise 3x3 convolution.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output.
        stride: Stride; the input is added where it is 1 and the channels are the same.
        expand: Channels inside, in ``dim``.
        attn: On what the depthwise convolution gives; any module that keeps the shape.
        attn_out: On what the block gives.
        drop_path: Rate at which a sample skips the branch in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            out_dim: int,
            stride: int,
            expand: int,
            attn: nn.Module,
            attn_out: nn.Module,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.residual = stride == 1 and dim == out_dim
        self.conv1 = ConvNorm(dim, expand * dim, **dd) if expand > 1 else nn.Identity()
        self.conv2 = ConvNorm(expand * dim, expand * dim, 3, stride=stride, groups=expand * dim, **dd)
        self.attn = attn
        self.conv3 = ConvNorm(expand * dim, out_dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. and self.residual else nn.Identity()
        self.attn_out = attn_out

    def branches(self, x: Tensor) -> Tensor:
        """What the block computes."""
        y = F.relu6(self.conv2(F.relu6(self.conv1(x))))
        y = self.drop_path(self.conv3(self.attn(y)))
        return self.attn_out(x + y if self.residual else y)


class CnnBackbone(Backbone):
    """What the two networks share: maps ``[batch, channels, height, width]``, and how weights are drawn."""

    output_fmt = "NCHW"

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        """Draws the parameters of one module; of the networks' own convolutions normal ones, by their outputs."""
        super().init_module(module, needs_reset)
        if isinstance(module, ConvNorm):  # not of attention layers, which have their own way to start
            init_convolution(module.conv)


class AttentionResNet(CnnBackbone):
    """A ResNet of bottleneck blocks with attention, for images of any size.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        attn: The attention layer: "ela", "ulsam" or "lba".
        attn_args: Its arguments but the channels, such as ``{"variant": "L"}``.
        positions: Names of the stages (``stages.1``: after its last block) and blocks (``stages.1.blocks.0``) that a
            layer follows; "branches" for a layer in every block, on the branch before the shortcut is added.
        stem_width: Channels of the first convolution.
        embed_dims: Channels of each stage, multiples of 4.
        depths: Blocks of each stage.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: There is no such layer or position, or the layer does not fit the channels.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            attn: str = "ela",
            attn_args: dict[str, Any] | None = None,
            positions: Sequence[str] = "branches",
            stem_width: int = 64,
            embed_dims: Sequence[int] = (256, 512, 1024, 2048),
            depths: Sequence[int] = (3, 4, 6, 3),
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.feature_info = stage_levels(embed_dims)
        places = Places(attn, attn_args, positions, depths, **dd)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("conv", ConvNorm(in_chans, stem_width, 7, stride=2, **dd))
        self.patch_embed.add_module("act", nn.ReLU())
        self.patch_embed.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
        self.stages = nn.Sequential(*[
            Stage(nn.Identity(), [
                Bottleneck(
                    dim if j else before, dim, 2 if i and not j else 1, places.in_branch(dim),
                    places.after_block(i, j, dim), rate, **dd)
                for j, rate in enumerate(drop_paths[i])
            ])
            for i, (before, dim) in enumerate(pairwise((stem_width, *embed_dims)))
        ])
        self.finish(embed_dims[-1], num_classes, global_pool, drop_rate, norm_layer=None, **dd)


class AttentionMobileNetV2(CnnBackbone):
    """MobileNetV2 with attention, for images of any size.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        attn: The attention layer: "ela", "ulsam" or "lba".
        attn_args: Its arguments but the channels, such as ``{"groups": 8}``.
        positions: Names of the stages (``stages.1``: after its last block) and blocks (``stages.1.blocks.0``) that a
            layer follows; "branches" for a layer in every block of the stages, after the depthwise convolution.
        stem_widths: Channels of the first convolution and of the block after it, both of stride 2.
        widths: Channels of the blocks of each stage.
        num_features: Channels of the last 1x1 convolution.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: There is no such layer or position, or the layer does not fit the channels.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            attn: str = "ela",
            attn_args: dict[str, Any] | None = None,
            positions: Sequence[str] = "branches",
            stem_widths: Sequence[int] = (32, 16),
            widths: Sequence[Sequence[int]] = ((24,) * 2, (32,) * 3, (64,) * 4 + (96,) * 3, (160,) * 3 + (320,)),
            num_features: int = 1280,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.feature_info = stage_levels([dims[-1] for dims in widths])
        depths = [len(dims) for dims in widths]
        places = Places(attn, attn_args, positions, depths, **dd)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        first, before = stem_widths
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("conv", ConvNorm(in_chans, first, 3, stride=2, **dd))
        self.patch_embed.add_module("act", nn.ReLU6())
        self.patch_embed.add_module("block", InvertedResidual(
            first, before, 1, 1, nn.Identity(), nn.Identity(), **dd))
        stages = []
        for i, dims in enumerate(widths):
            blocks = []
            for j, (dim, rate) in enumerate(zip(dims, drop_paths[i], strict=True)):
                blocks.append(InvertedResidual(
                    before, dim, 1 if j else 2, 6, places.in_branch(6 * before), places.after_block(i, j, dim), rate,
                    **dd))
                before = dim
            stages.append(Stage(nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)

        def last_convolution(out_dim: int, **dd: Any) -> nn.Module:
            layers = nn.Sequential()
            layers.add_module("conv", ConvNorm(before, out_dim, **dd))
            layers.add_module("act", nn.ReLU6())
            return layers

        self.finish(num_features, num_classes, global_pool, drop_rate, norm_layer=last_convolution, **dd)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Renames the entries of timm's and torchvision's ResNets and of timm's MobileNetV2 to ours (ours stay).

    If they have no attention layers, the model's stay as they were drawn.
    """
    resnet, mobilenet = "conv1.weight" in state_dict, "conv_stem.weight" in state_dict
    if not resnet and not mobilenet:
        return state_dict
    renamed = {}
    for key, x in state_dict.items():
        for pattern, new in _RESNET if resnet else _MOBILENET:
            key = re.sub(pattern, new, key)
        renamed[key] = x
    if not any(".attn." in key for key in renamed):
        renamed |= {key: x for key, x in model.state_dict().items() if ".attn." in key or ".attn_out." in key}
    return renamed


def _block_of(match: re.Match[str]) -> str:
    """Our name of a block of timm's MobileNetV2, which counts groups of blocks of the same width."""
    stage, before = ((0, 0), (1, 0), (2, 0), (2, 4), (3, 0), (3, 3))[int(match[1]) - 1]
    return f"stages.{stage}.blocks.{before + int(match[2])}."


_Renames = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
_RESNET: _Renames = (
    (r"^conv1\.", "patch_embed.conv.conv."), (r"^bn1\.", "patch_embed.conv.bn."),
    (r"^layer([1-4])\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"\.conv([1-3])\.weight$", r".conv\1.conv.weight"), (r"\.bn([1-3])\.", r".conv\1.bn."),
    (r"\.downsample\.0\.", ".shortcut.conv."), (r"\.downsample\.1\.", ".shortcut.bn."), (r"\.se\.", ".attn."),
    (r"^fc\.", "head.fc."),
)
_MOBILENET: _Renames = (
    (r"^conv_stem\.", "patch_embed.conv.conv."), (r"^bn1\.", "patch_embed.conv.bn."),
    (r"^conv_head\.", "norm.conv.conv."), (r"^bn2\.", "norm.conv.bn."), (r"^classifier\.", "head.fc."),
    (r"^blocks\.0\.0\.conv_dw\.", "patch_embed.block.conv2.conv."),
    (r"^blocks\.0\.0\.conv_pw\.", "patch_embed.block.conv3.conv."),
    (r"^blocks\.0\.0\.bn1\.", "patch_embed.block.conv2.bn."), (r"^blocks\.0\.0\.bn2\.", "patch_embed.block.conv3.bn."),
    (r"^blocks\.([1-6])\.(\d+)\.", _block_of), (r"\.conv_pw\.", ".conv1.conv."), (r"\.conv_dw\.", ".conv2.conv."),
    (r"\.conv_pwl\.", ".conv3.conv."), (r"^(stages\..*)\.bn([1-3])\.", r"\1.conv\2.bn."), (r"\.se\.", ".attn."),
)

_PAPERS = {"ela": "2403.01123", "ulsam": "2006.15102", "lba": "2302.14574"}


def _cfg(attn: str, **kwargs: Any) -> dict[str, Any]:
    return cfg(**dict(
        first_conv="patch_embed.conv.conv", classifier="head.fc", license="unspecified",
        origin_url="https://github.com/Nandan91/ULSAM" if attn == "ulsam" else f"https://arxiv.org/abs/{_PAPERS[attn]}",
        paper_ids=f"arXiv:{_PAPERS[attn]}",
    ) | kwargs)


default_cfgs = generate_default_cfgs({
    **{f"{network}_{attn}.untrained": _cfg(attn) for network in ("resnet50", "mobilenetv2_100") for attn in LAYERS},
    "test_resnet_ela.untrained": _cfg("ela", input_size=(3, 64, 64), pool_size=(2, 2)),
    "test_mobilenetv2_ulsam.untrained": _cfg("ulsam", input_size=(3, 64, 64), pool_size=(2, 2)),
})

_LBA_POSITIONS = ("stages.1", "stages.2")  # cheap maps that mean something already


def _resnet(variant: str, pretrained: bool, **kwargs: Any) -> AttentionResNet:
    return build_model(AttentionResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


def _mobilenet(variant: str, pretrained: bool, **kwargs: Any) -> AttentionMobileNetV2:
    return build_model(AttentionMobileNetV2, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def resnet50_ela(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """ELA-S in every block."""
    return _resnet("resnet50_ela", pretrained, **dict(attn="ela", attn_args={"variant": "S"}) | kwargs)


@register_model
def resnet50_ulsam(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """ULSAM of 4 groups in every block."""
    return _resnet("resnet50_ulsam", pretrained, **dict(attn="ulsam") | kwargs)


@register_model
def resnet50_lba(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:
    """LBA after the second and the third stage; with ``resnet50``'s weights it starts as that."""
    return _resnet("resnet50_lba", pretrained, **dict(attn="lba", positions=_LBA_POSITIONS) | kwargs)


@register_model
def mobilenetv2_100_ela(pretrained: bool = False, **kwargs: Any) -> AttentionMobileNetV2:
    """ELA-T in every block."""
    return _mobilenet("mobilenetv2_100_ela", pretrained, **dict(attn="ela", attn_args={"variant": "T"}) | kwargs)


@register_model
def mobilenetv2_100_ulsam(pretrained: bool = False, **kwargs: Any) -> AttentionMobileNetV2:
    """ULSAM of 4 groups in every block."""
    return _mobilenet("mobilenetv2_100_ulsam", pretrained, **dict(attn="ulsam") | kwargs)


@register_model
def mobilenetv2_100_lba(pretrained: bool = False, **kwargs: Any) -> AttentionMobileNetV2:
    """LBA after the second and the third stage; with ``mobilenetv2_100``'s weights it starts as that."""
    return _mobilenet("mobilenetv2_100_lba", pretrained, **dict(attn="lba", positions=_LBA_POSITIONS) | kwargs)


@register_model
def test_resnet_ela(pretrained: bool = False, **kwargs: Any) -> AttentionResNet:  # noqa: PT028 - no test function
    """Small enough for tests."""
    model_args = dict(stem_width=16, embed_dims=(32, 64, 96, 128), depths=(1, 1, 1, 1))
    return _resnet("test_resnet_ela", pretrained, **model_args | kwargs)


@register_model
def test_mobilenetv2_ulsam(  # noqa: PT028 - no test function
        pretrained: bool = False, **kwargs: Any) -> AttentionMobileNetV2:
    """Small enough for tests."""
    model_args = dict(attn="ulsam", stem_widths=(8, 8), widths=((12,), (16, 16), (24,), (32,)), num_features=64)
    return _mobilenet("test_mobilenetv2_ulsam", pretrained, **model_args | kwargs)


family = Family(
    small={"test_resnet_ela": {}, "test_mobilenetv2_ulsam": {}},
    goldens={"ulsam_ops": "*_ulsam"},
    peers=[
        Peer(f"{network}_{attn}", network, same_weights=attn == "lba") for network in ("resnet50", "mobilenetv2_100") for attn in LAYERS
    ],
    checkpoint_filter_fn=checkpoint_filter_fn,
)
