"""EfficientViT (MSRA): few attention blocks between convolutions and perceptrons, on maps of stride 16, 32 and 64.

Paper: "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention" (CVPR 2023, arXiv 2305.07027).
Official code and weights: https://github.com/microsoft/Cream/tree/main/EfficientViT (MIT licence). The names say "cga"
because timm has the models as ``efficientvit_m0`` to ``efficientvit_m5``, and others under the same family name. The
authors' checkpoints load, and timm's.
"""
import re
from collections.abc import Sequence
from itertools import pairwise
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d, SqueezeExcite, to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.utils import reparameterize_model
from torch import Tensor, nn

from ..layers.cascaded_group import CascadedGroupAttention, resize_bias_table
from ..layers.conv_norm import ConvNorm, NormLinear
from ..layers.full import unseen
from ..ops.dispatch import transforming
from ._backbone import Backbone, stage_levels
from ._blocks import BaseBlock, Stage
from ._builder import build_model, cfg
from ._family import Family, Peer, Published

__all__ = ["EfficientViTCGA", "dense_args"]


def _relu(x: Tensor, producer: nn.Module) -> Tensor:
    """Of what ``producer`` returned; in place where nobody sees it, for less memory and traffic."""
    return F.relu(x, inplace=unseen(producer))


class Stem(nn.Sequential):
    """Convolutions with norms, and the ReLUs between them."""

    def forward(self, x: Tensor) -> Tensor:
        """The first map."""
        if torch.jit.is_scripting():
            for layer in self:
                x = layer(x)
        else:
            producer: nn.Module = self
            for layer in self:
                x = F.relu(x, inplace=unseen(producer, layer)) if type(layer) is nn.ReLU else layer(x)
                producer = layer
        return x


class Ffn(nn.Module):
    """Perceptron on every token of a map ``[batch, dim, height, width]``, twice as wide inside, beside a shortcut."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = ConvNorm(dim, 2 * dim, **dd)
        self.fc2 = ConvNorm(2 * dim, dim, gain=0., **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        hidden = self.fc1(x)
        if torch.jit.is_scripting():
            hidden = F.relu(hidden)
        else:
            hidden = _relu(hidden, self.fc1)
        return x + self.fc2(hidden)


class Block(BaseBlock):
    """Attention in the middle, a depthwise convolution and a perceptron on either side; each beside a shortcut.

    Args:
        dim: Channels of the maps ``[batch, dim, height, width]``.
        attn: The attention module.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, attn: nn.Module, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = ConvNorm(dim, dim, 3, groups=dim, shortcut=True, gain=0., **dd)
        self.ffn1 = Ffn(dim, **dd)
        self.attn = attn
        self.conv2 = ConvNorm(dim, dim, 3, groups=dim, shortcut=True, gain=0., **dd)
        self.ffn2 = Ffn(dim, **dd)

    def branches(self, x: Tensor) -> Tensor:
        """What the block computes."""
        x = self.ffn1(self.conv1(x))
        x = x + self.attn(x)
        return self.ffn2(self.conv2(x))


class PatchMerging(nn.Module):
    """Map ``[B, dim, H, W]`` to ``[B, out_dim, H / 2, W / 2]`` (rounded up): an inverted bottleneck."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = ConvNorm(dim, 4 * dim, **dd)
        self.conv2 = ConvNorm(4 * dim, 4 * dim, 3, stride=2, groups=4 * dim, **dd)
        self.se = SqueezeExcite(4 * dim, rd_ratio=0.25, **dd)
        self.se.act.inplace = False  # hooks may have been given what it would write over
        self.conv3 = ConvNorm(4 * dim, out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the smaller map."""
        if torch.jit.is_scripting():
            x = F.relu(self.conv2(F.relu(self.conv1(x))))
        else:
            x = _relu(self.conv1(x), self.conv1)
            x = _relu(self.conv2(x), self.conv2)
        return self.conv3(self.se(x))


class Downsample(nn.Module):
    """Patch merging with a depthwise convolution and a perceptron, beside shortcuts, before and after it."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.res1 = nn.Sequential(ConvNorm(dim, dim, 3, groups=dim, shortcut=True, **dd), Ffn(dim, **dd))
        self.merge = PatchMerging(dim, out_dim, **dd)
        self.res2 = nn.Sequential(
            ConvNorm(out_dim, out_dim, 3, groups=out_dim, shortcut=True, **dd), Ffn(out_dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the smaller map."""
        return self.res2(self.merge(self.res1(x)))


class EfficientViTCGA(Backbone):
    """Three stages of cascaded group attention on maps ``[batch, channels, height, width]``; takes images of any size.

    Args:
        img_size: The size in pixels that the attention windows are made for: a stage's windows are ``window_size`` a
            side, or the shorter side of its map at this size if that is less. Images of other sizes run all the same,
            with maps padded to whole windows; see also :meth:`set_input_size`.
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all, without classes only.
        embed_dims: Channels per stage; the first a multiple of 8.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        kernels: Kernel sizes of the convolution of the queries, for the heads in turn; only as many as there are heads.
        window_size: Largest side of an attention window.
        key_dim: Channels of the queries and keys of a head.
        distilled: Whether there is a second classifier, ``head_dist``, to be trained on a teacher's answers. The
            logits are the mean of the two; in training after ``set_distilled_training()`` they come as a pair.
        drop_rate: Dropout rate before the classifier.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: An option is out of range.
    """

    output_fmt = "NCHW"

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            embed_dims: Sequence[int] = (64, 128, 192),
            depths: Sequence[int] = (1, 2, 3),
            num_heads: Sequence[int] = (4, 4, 4),
            kernels: Sequence[int] = (5, 5, 5, 5),
            window_size: int = 7,
            key_dim: int = 16,
            distilled: bool = False,
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if embed_dims[0] % 8:
            raise ValueError(f"embed_dims must start with a multiple of 8, got {embed_dims[0]}")
        self.in_chans = in_chans
        self.img_size = to_2tuple(img_size)
        self.num_features = embed_dims[-1]
        self.window_size = window_size
        self.drop_rate = drop_rate
        self.distilled = distilled
        self.distilled_training = False
        self.feature_info = stage_levels(embed_dims, stride=16)

        dims = [in_chans, *(embed_dims[0] // part for part in (8, 4, 2, 1))]
        self.patch_embed = Stem(*[
            layer for dim, out_dim in pairwise(dims)
            for layer in (ConvNorm(dim, out_dim, 3, stride=2, **dd), nn.ReLU())][:-1])
        windows = _windows(img_size, window_size, len(depths))
        self.stages = nn.Sequential(*[
            Stage(
                Downsample(embed_dims[i - 1], dim, **dd) if i else nn.Identity(),
                [
                    Block(dim, CascadedGroupAttention(dim, num_heads[i], windows[i], key_dim, kernels, **dd), **dd)
                    for _ in range(depth)
                ],
            )
            for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True))
        ])
        self.norm = nn.Identity()
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Fits the windows to another size of the image, height and width in pixels.

        Bias tables of windows that change are interpolated and become new parameters: call it before an optimizer
        takes them.
        """
        windows = _windows(img_size, self.window_size, len(self.feature_info))
        for stage, window in zip(self.stages, windows[:len(self.stages)], strict=True):
            for block in stage.blocks:  # type: ignore[union-attr]
                block.attn.resize_window(window)

    @torch.jit.ignore
    def fuse(self) -> "EfficientViTCGA":
        """Folds all norms and the convolutions' shortcuts into the layers before them, in place, and returns self.

        For inference, from a model in eval mode: the same answers with fewer passes. Training such a model is
        training without norms.
        """
        reparameterize_model(self, inplace=True)
        return self

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether a distilled model in training mode returns the logits of its two classifiers as a pair."""
        if enable and not self.distilled:
            raise ValueError("the model has one classifier; create it with distilled=True")
        self.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> Any:
        """The last linear layer; of a distilled model, both."""
        layers = tuple(getattr(head, "linear", head) for head in (self.head, self.head_dist))
        return layers if self.distilled else layers[0]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier (0 classes: none) and, if given, the pooling ("": none, without classes only)."""
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        if num_classes and self.global_pool.is_identity():
            raise ValueError('a classifier needs pooled features: global_pool "" goes with num_classes=0')
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        weight = next(self.patch_embed.parameters())
        self.head, self.head_dist = (
            NormLinear(
                self.head_hidden_size, num_classes, self.drop_rate, device=weight.device, dtype=weight.dtype,
            ).train(self.training) if num_classes and wanted else nn.Identity()
            for wanted in (True, self.distilled))

    def forward_head(self, x: Tensor, pre_logits: bool = False):
        """Pools and classifies a map of :meth:`forward_features`; ``pre_logits`` stops before the classifier."""
        x = self.global_pool(x)
        if pre_logits:
            return x
        if not self.distilled:
            return self.head(x)
        x, x_dist = self.head(x), self.head_dist(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return x, x_dist
        return (x + x_dist) / 2

    def forward(self, x: Tensor):  # type: ignore[override]
        """Logits ``[batch, num_classes]`` of images ``[batch, in_chans, height, width]``, or a pair (``distilled``)."""
        return self.forward_head(self.forward_features(x))

    def embed(self, x: Tensor) -> Tensor:
        """The first map of images ``[batch, in_chans, height, width]``."""
        # The one change of layout: all that follows keeps channels last.
        if torch.jit.is_scripting():
            x = x.contiguous(memory_format=torch.channels_last)
        elif not transforming():  # vmap knows no formats of memory
            x = x.contiguous(memory_format=torch.channels_last)
        return self.patch_embed(x)


def dense_args(variant: str, task: str) -> dict[str, Any]:
    """Constructor arguments of the backbone for dense tasks: windows of 7 in every stage, as in the authors' detectors.

    The classification weights fit: the tables of the last stage, made for windows of 4, are interpolated. The authors
    have no segmentation code; for it the arguments are the same.

    Args:
        variant: Registered name.
        task: "detection" or "segmentation".

    Raises:
        ValueError: There is no such variant or task.
    """
    if variant not in _VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(_VARIANTS)}")
    if task not in ("detection", "segmentation"):
        raise ValueError(f"task must be 'detection' or 'segmentation', got {task!r}")
    return dict(img_size=800)  # the shorter side in detection: all maps are larger than a window


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: EfficientViTCGA) -> dict[str, Tensor]:
    """Renames the authors' entries and timm's to ours (ours stay) and fits the bias tables to the model's windows.

    A checkpoint with one classifier fills both of a distilled model, which then gives the checkpoint's logits. A
    classifier is left out if the model has none.
    """
    wanted = {name: x.shape for name, x in model.state_dict().items()}
    renamed = {}
    for name, value in state_dict.items():
        if name.endswith(".attention_bias_idxs") or (name.startswith("head") and not model.num_classes):
            continue
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        shape = wanted.get(name)
        if shape is not None and value.shape != shape:
            if name.endswith(".rpb") and value.ndim == 2 and isqrt(value.shape[1]) ** 2 == value.shape[1]:
                value = resize_bias_table(value, isqrt(shape[1]))
            elif value.ndim == 2 and len(shape) == 4:  # an early format of 1x1 convolutions
                value = value[:, :, None, None]
        renamed[name] = value
    if model.distilled and not any(name.startswith("head_dist.") for name in renamed):
        renamed |= {
            name.replace("head.", "head_dist.", 1): x for name, x in renamed.items() if name.startswith("head.")}
    return renamed


def _windows(img_size: int | tuple[int, int], window_size: int, stages: int) -> list[int]:
    """Sides of the stages' windows."""
    side = min(to_2tuple(img_size)) // 16
    if side < 1:
        raise ValueError(f"img_size must be at least 16 pixels a side, got {img_size}")
    windows = []
    for _ in range(stages):
        windows.append(min(window_size, side))
        side = (side + 1) // 2
    return windows


_RENAMES: list[tuple[str, Any]] = [
    # the authors' names: the second and third stage begin with three parts of a downsampler
    (r"\.c\.", ".conv."),
    (r"\.l\.", ".linear."),
    (r"^blocks([123])\.", lambda m: f"stages.{int(m[1]) - 1}."),
    (r"^stages\.0\.(\d+)\.", r"stages.0.blocks.\1."),
    (r"^stages\.([12])\.([012])\.", lambda m: f"stages.{m[1]}.downsample.{('res1', 'merge', 'res2')[int(m[2])]}."),
    (r"^stages\.([12])\.(\d+)\.", lambda m: f"stages.{m[1]}.blocks.{int(m[2]) - 3}."),
    # timm's names
    (r"^patch_embed\.conv(\d)\.", lambda m: f"patch_embed.{2 * int(m[1]) - 2}."),
    (r"\.patchmerge\.", ".merge."),
    # both
    (r"\.dw([01])\.m\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.ffn([01])\.m\.pw", lambda m: f".ffn{int(m[1]) + 1}.fc"),
    (r"(\.res[12]\.0)\.m\.", r"\1."),
    (r"(\.res[12]\.1)\.m\.pw", r"\1.fc"),
    (r"\.mixer\.m\.attn\.", ".attn."),
    (r"\.attention_biases$", ".rpb"),
    (r"\.attn\.dws\.", ".attn.convs."),
    (r"\.attn\.proj\.1\.", ".attn.proj."),
]


def _cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    home = "https://github.com/xinyuliu-jeffrey/EfficientViT_Model_Zoo/releases/download/v1.0/"
    return cfg(**dict(
        url=home + file if file else "", pool_size=(4, 4), first_conv="patch_embed.0.conv", classifier="head.linear",
        license="mit", origin_url="https://github.com/microsoft/Cream/tree/main/EfficientViT",
        paper_name="EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention",
        paper_ids="arXiv:2305.07027",
    ) | kwargs)


default_cfgs = generate_default_cfgs({
    **{f"efficientvit_cga_m{i}.in1k": _cfg(f"efficientvit_m{i}.pth") for i in range(6)},
    "test_efficientvit_cga.untrained": _cfg(),
})

_FALLING = (7, 5, 3, 3)
_VARIANTS: dict[str, dict[str, Any]] = dict(
    efficientvit_cga_m0=dict(),
    efficientvit_cga_m1=dict(embed_dims=(128, 144, 192), num_heads=(2, 3, 3), kernels=_FALLING),
    efficientvit_cga_m2=dict(embed_dims=(128, 192, 224), num_heads=(4, 3, 2), kernels=_FALLING),
    efficientvit_cga_m3=dict(embed_dims=(128, 240, 320), num_heads=(4, 3, 4)),
    efficientvit_cga_m4=dict(embed_dims=(128, 256, 384), num_heads=(4, 4, 4), kernels=_FALLING),
    efficientvit_cga_m5=dict(embed_dims=(192, 288, 384), depths=(1, 3, 4), num_heads=(3, 3, 4), kernels=_FALLING),
    test_efficientvit_cga=dict(
        embed_dims=(16, 32, 48), depths=(1, 1, 2), num_heads=(2, 2, 3), kernels=(5, 3, 3), key_dim=8),
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> EfficientViTCGA:
    if kwargs.get("distilled"):
        both = dict(classifier=("head.linear", "head_dist.linear"))
        kwargs["pretrained_cfg_overlay"] = both | (kwargs.get("pretrained_cfg_overlay") or {})
    return build_model(
        EfficientViTCGA, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2), feature_cls="getter"), **_VARIANTS[variant] | kwargs)


@register_model
def efficientvit_cga_m0(pretrained: bool = False, **kwargs: Any) -> EfficientViTCGA:
    """2.3 M parameters, 79 MMACs, published 63.2 % top-1 at 224 px."""
    return _create("efficientvit_cga_m0", pretrained, **kwargs)


@register_model
def efficientvit_cga_m1(pretrained: bool = False, **kwargs: Any) -> EfficientViTCGA:
    """3.0 M parameters, 167 MMACs, published 68.4 % top-1 at 224 px."""
    return _create("efficientvit_cga_m1", pretrained, **kwargs)


@register_model
def efficientvit_cga_m2(pretrained: bool = False, **kwargs: Any) -> EfficientViTCGA:
    """4.2 M parameters, 201 MMACs, published 70.8 % top-1 at 224 px."""
    return _create("efficientvit_cga_m2", pretrained, **kwargs)


@register_model
def efficientvit_cga_m3(pretrained: bool = False, **kwargs: Any) -> EfficientViTCGA:
    """6.9 M parameters, 263 MMACs, published 73.4 % top-1 at 224 px."""
    return _create("efficientvit_cga_m3", pretrained, **kwargs)


@register_model
def efficientvit_cga_m4(pretrained: bool = False, **kwargs: Any) -> EfficientViTCGA:
    """8.8 M parameters, 299 MMACs, published 74.3 % top-1 at 224 px."""
    return _create("efficientvit_cga_m4", pretrained, **kwargs)


@register_model
def efficientvit_cga_m5(pretrained: bool = False, **kwargs: Any) -> EfficientViTCGA:
    """12.5 M parameters, 522 MMACs, published 77.1 % top-1 at 224 px."""
    return _create("efficientvit_cga_m5", pretrained, **kwargs)


@register_model
def test_efficientvit_cga(pretrained: bool = False, **kwargs: Any) -> EfficientViTCGA:  # noqa: PT028 - no pytest function
    """Small enough for tests and for the demo."""
    return _create("test_efficientvit_cga", pretrained, **kwargs)


family = Family(
    small={"test_efficientvit_cga": {}},
    published={
        "efficientvit_cga_m0": Published(63.2, 0.079), "efficientvit_cga_m1": Published(68.4, 0.167),
        "efficientvit_cga_m2": Published(70.8, 0.201), "efficientvit_cga_m3": Published(73.4, 0.263),
        "efficientvit_cga_m4": Published(74.3, 0.299), "efficientvit_cga_m5": Published(77.1, 0.522),
    },
    goldens={
        "efficientvit_m0": "efficientvit_cga_m0", "efficientvit_m2": "efficientvit_cga_m2",
        "efficientvit_m4_det": "efficientvit_cga_m4", "efficientvit_m4_img320": "efficientvit_cga_m4",
    },
    peers=[
        Peer("efficientvit_cga_m0", "efficientvit_m0", fused=True, same_weights=True),
        Peer("efficientvit_cga_m5", "efficientvit_m5", fused=True, same_weights=True),
    ],
    dense_args=dense_args,
    checkpoint_filter_fn=checkpoint_filter_fn,
    reductions=(16, 32, 64),
)
