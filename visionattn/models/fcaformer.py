"""FcaFormer: attention that also sees tokens of all earlier blocks of its stage, beside and between convolutions.

Paper: "FcaFormer: Forward Cross Attention in Hybrid Vision Transformer" (ICCV 2023, arXiv 2211.07198). Official code:
https://github.com/hkzhang-git/FcaFormer (without a licence file).
"""
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Optional, Tuple  # noqa: UP035 - TorchScript reads Tuple

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerScale,
    calculate_drop_path_rates,
    register_notrace_module,
    to_2tuple,
)
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import ForwardCrossAttention
from ..layers.agent import resize
from ..layers.checkpointing import checkpointed
from ..layers.conv_norm import ConvNorm
from ..layers.forward_cross import resize_offsets
from ..layers.scripting import unscripted
from ..ops.dispatch import no_autocast, numbers
from ._backbone import Backbone, stage_levels
from ._blocks import ConvBlock, NormHead, Perceptron, Stage
from ._builder import build_model, cfg
from ._family import DenseNorm, Family, Peer, Published
from ._tables import Grid

__all__ = ["FcaFormer"]


class HandingConv2d(nn.Conv2d):
    """A convolution that learns in float32 where a CPU's autocast or weights are of half precision.

    On maps that its kernel reaches beyond, PyTorch (2.14) leaves the gradients in bfloat16 of weights that meet nothing
    but padding as the memory was: any numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Takes maps ``[batch, channels, height, width]`` to smaller ones."""
        if not torch.jit.is_scripting():
            autocast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
            half = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
            if (autocast or half) and x.dtype != torch.float64 and torch.is_grad_enabled():
                dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
                with no_autocast("cpu"):
                    return self._conv_forward(x.float(), self.weight.float(), None).to(dtype)
        return self._conv_forward(x, self.weight, self.bias)


@register_notrace_module
class FcaBlock(nn.Module):
    """Attention beside a shortcut, tokens for later blocks, a convolution, a perceptron beside a shortcut.

    With a ``window`` all of it, the convolutions too, happens in each window of that side by itself. The map is padded
    with zeros to whole windows, which nothing masks, in front in every other block: so windows shift.

    Args:
        dim: Channels.
        num_heads: Heads of the attention.
        size: Height and width of the map, or of a window, that the tables are for.
        index: Number of the block in its stage, which has as many sources of tokens.
        last: Whether the block is the stage's last, which hands on nothing.
        window: Side of a window; None for the whole map.
        mlp_ratio: Width of the perceptron's hidden layer, in ``dim``.
        layer_scale: Initial value of the branches' learnt factors.
        drop_path: Rate at which a sample skips a branch in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            size: Grid,
            index: int,
            last: bool,
            window: int | None,
            mlp_ratio: float,
            layer_scale: float,
            drop_path: float,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.window = window
        self.pads_front = index % 2 == 0
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = ForwardCrossAttention(dim, num_heads, size, index, **dd)
        self.ls1 = LayerScale(dim, layer_scale, **dd)
        self.cross = None if last else HandingConv2d(dim, dim, 7, stride=4, padding=3, groups=dim, bias=False, **dd)
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp_norm = nn.LayerNorm(dim, **dd)  # after norm2: the authors' perceptron has one of its own
        self.mlp = Perceptron(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = LayerScale(dim, layer_scale, **dd)
        self.drop_path1, self.drop_path2 = (
            DropPath(drop_path) if drop_path > 0. else nn.Identity() for _ in range(2))

    def forward(
            self,
            x: Tensor,
            crossed: Optional[Tensor] = None,  # noqa: UP045
    ) -> Tuple[Tensor, Optional[Tensor]]:  # noqa: UP006, UP045
        """Returns a map like ``x [batch, height, width, dim]``, and ``crossed`` with this block's tokens added."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpointed(self, self.branches, x, crossed)
        return self.branches(x, crossed)

    def branches(
            self,
            x: Tensor,
            crossed: Optional[Tensor],  # noqa: UP045
    ) -> Tuple[Tensor, Optional[Tensor]]:  # noqa: UP006, UP045
        """What the block computes."""
        batch, height, width = x.shape[0], x.shape[1], x.shape[2]
        if self.window is not None:
            x = _to_windows(x, self.window, self.pads_front)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), crossed)))
        y = x.permute(0, 3, 1, 2)
        if self.cross is not None:
            handed = self.cross(y).flatten(2).transpose(1, 2)
            crossed = handed if crossed is None else torch.cat([crossed, handed], dim=1)
        x = self.local_conv(y).permute(0, 2, 3, 1)
        x = x + self.drop_path2(self.ls2(self.mlp(self.mlp_norm(self.norm2(x)))))
        if self.window is not None:
            x = _from_windows(x, self.window, self.pads_front, batch, height, width)
        return x, crossed


@unscripted
def _to_windows(x: Tensor, window: int, front: bool) -> Tensor:
    """Map ``[B, H, W, dim]`` to windows ``[windows, window, window, dim]``, those of an image row by row."""
    batch, (height, width), dim = x.shape[0], numbers(x.shape[1:3]), x.shape[3]
    # Whole windows first, the padding from them: so compilers that know no sizes see that the reshape fits.
    rows, columns = (height + window - 1) // window, (width + window - 1) // window
    more_rows, more_columns = rows * window - height, columns * window - width
    x = F.pad(x, (0, 0, more_columns, 0, more_rows, 0) if front else (0, 0, 0, more_columns, 0, more_rows))
    x = x.reshape(batch, rows, window, columns, window, dim).transpose(2, 3)
    return x.reshape(batch * rows * columns, window, window, dim)


@unscripted
def _from_windows(x: Tensor, window: int, front: bool, batch: int, height: int, width: int) -> Tensor:
    """The map ``[batch, height, width, dim]`` of windows, without the padding."""
    (height, width), dim = numbers((height, width)), x.shape[3]
    rows, columns = (height + window - 1) // window, (width + window - 1) // window
    x = x.reshape(batch, rows, columns, window, window, dim).transpose(2, 3)
    x = x.reshape(batch, rows * window, columns * window, dim)
    top, left = (rows * window - height, columns * window - width) if front else (0, 0)
    return x.narrow(1, top, height).narrow(2, left, width)


class CrossStage(nn.Module):
    """A downsampler and blocks, each of which takes the tokens that those before it handed on."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[FcaBlock]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map after the last block."""
        x = self.downsample(x)
        crossed: Optional[Tensor] = None  # noqa: UP045
        for block in self.blocks:
            x, crossed = block(x, crossed)
        return x


class Merge(nn.Module):
    """Map ``[B, H, W, dim]`` to ``[B, H / 2, W / 2, out_dim]`` (rounded up): 1x1, depthwise 3x3 and 1x1 convolution."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = ConvNorm(dim, out_dim, **dd)
        self.conv2 = ConvNorm(out_dim, out_dim, 3, stride=2, groups=out_dim, **dd)
        self.conv3 = ConvNorm(out_dim, out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the smaller map."""
        x = F.gelu(self.conv1(x.permute(0, 3, 1, 2)))
        return self.conv3(F.gelu(self.conv2(x))).permute(0, 2, 3, 1)


class FcaFormer(Backbone):
    """Two stages of ConvNeXt's blocks and two of forward cross attention, on maps ``[batch, height, width, dim]``.

    Images of any size are taken. Those that ``img_size`` is not, for which the tables have no entries of their own,
    get interpolated ones (:meth:`set_input_size` changes the tables themselves); windows need none.

    Args:
        img_size: Height and width of the images that the tables are for; one number for both.
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map, without concatenation; "" for not at all.
        embed_dims: Channels of each stage, the first even.
        depths: Blocks of each stage.
        num_heads: Heads of the attention in the last two stages.
        window_sizes: Sides of the windows to which attention and convolutions of the last two stages are confined, as
            in the authors' dense backbones; tables are for windows then. None for the whole map.
        mlp_ratio: Width of the perceptrons' hidden layer, in channels of the stage.
        layer_scale: Initial value of the branches' learnt factors.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A sequence has another number of entries, or a value does not fit.
    """

    def __init__(
            self,
            img_size: int | Grid = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            embed_dims: Sequence[int] = (64, 128, 192, 320),
            depths: Sequence[int] = (2, 2, 6, 2),
            num_heads: Sequence[int] = (6, 10),
            window_sizes: Sequence[int] | None = None,
            mlp_ratio: float = 4.,
            layer_scale: float = 1e-6,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        for name, values, count in (
                ("embed_dims", embed_dims, 4), ("depths", depths, 4), ("num_heads", num_heads, 2),
                ("window_sizes", window_sizes, 2)):
            if values is not None and len(values) != count:
                which = "stage" if count == 4 else "stage of the last two"
                raise ValueError(f"{name} must have one entry per {which}, {count}, got {values}")
        if window_sizes and min(window_sizes) < 1:
            raise ValueError(f"window_sizes must be positive, got {window_sizes}")
        self.in_chans = in_chans
        self.window_sizes = window_sizes
        self.feature_info = stage_levels(embed_dims)
        sizes = self.table_sizes(img_size)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        self.patch_embed = nn.Sequential(OrderedDict(
            conv1=ConvNorm(in_chans, embed_dims[0] // 2, 3, stride=2, **dd),
            act=nn.GELU(),
            conv2=ConvNorm(embed_dims[0] // 2, embed_dims[0], 3, stride=2, **dd),
        ))
        stages: list[nn.Module] = []
        for i, (dim, rates) in enumerate(zip(embed_dims, drop_paths, strict=True)):
            downsample = Merge(embed_dims[i - 1], dim, **dd) if i else nn.Identity()
            if i < 2:
                stages.append(Stage(downsample, [ConvBlock(dim, mlp_ratio, layer_scale, rate, **dd) for rate in rates]))
            else:
                stages.append(CrossStage(downsample, [
                    FcaBlock(
                        dim, num_heads[i - 2], sizes[i - 2], j, j == depths[i] - 1,
                        window_sizes[i - 2] if window_sizes else None, mlp_ratio, layer_scale, rate, **dd)
                    for j, rate in enumerate(rates)
                ]))
        self.stages = nn.Sequential(*stages)
        self.finish(embed_dims[-1], num_classes, global_pool, drop_rate, norm_layer=None, head_layer=NormHead, **dd)

    @torch.jit.ignore
    def table_sizes(self, img_size: int | Grid) -> list[Grid]:
        """Height and width of the maps, or of the windows, of the last two stages for images of ``img_size``."""
        if self.window_sizes:
            return [(side, side) for side in self.window_sizes]
        height, width = to_2tuple(img_size)
        return [(-(-height // stride), -(-width // stride)) for stride in (16, 32)]

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Grid) -> None:
        """Makes the tables those of another image size; with windows there is nothing to change.

        The model takes images of any size without this, interpolating its tables, and computes the same after it. What
        changes is the size of the tables, in which they are trained further and saved: they become new parameters.
        """
        stages: Any = self.stages[2:]
        for stage, size in zip(stages, self.table_sizes(img_size), strict=False):
            for block in stage.blocks:
                block.attn.set_input_size(size)

    def embed(self, x: Tensor) -> Tensor:
        """The first map of images ``[batch, in_chans, height, width]``."""
        return self.patch_embed(x).permute(0, 2, 3, 1)

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Drops the stages after the last one of ``indices``, and what is asked for besides; returns the indices."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or len(self.stages) < 4:
            self.head.norm = nn.Identity()
        return taken


def dense_args(variant: str, task: str) -> dict[str, Any]:
    """Arguments of ``FcaFormer`` that the authors change for ``task``: windows as large as the maps at 224 px."""
    return {"window_sizes": (6, 3) if variant == "test_fcaformer" else (14, 7)}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' entries to ours (ours stay) and fits the tables to the model's image size.

    What their dense backbones put on the maps (``head0`` .. ``norm3``) is dropped: it is no part of a classifier.
    """
    tables = {key: x.shape for key, x in model.state_dict().items() if key.rpartition(".")[2] in _TABLES}
    renamed = {}
    for key, x in state_dict.items():
        if re.match(r"(?:head|norm)[0-3]\.", key):
            continue
        theirs = key.endswith((".attention_biases", ".s_token_bias", ".s_scale_factors"))
        if theirs and x.ndim > 2:  # [1, heads, 1, tokens] and [1, tokens, 1]
            x = x[0].squeeze(1)
        for pattern, new in _RENAMES:
            key = re.sub(pattern, new, key)
        key = re.sub(r"^stages\.(\d+)\.merge\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", key)
        renamed[key] = x if key not in tables else _fit_table(
            x, tables[key], flat=theirs, by_distance=key.endswith(".rpb"))
    return renamed


def _fit_table(x: Tensor, shape: torch.Size, flat: bool, by_distance: bool) -> Tensor:
    """A table as one of this shape, interpolated over its last two axes, which are one in a ``flat`` table.

    Of a flat table for another image size these must be equal. A table that cannot be fitted is returned as it is.
    """
    if flat:
        *sources, height, width = shape[x.ndim - 1:]
        places = x.shape[-1] // math.prod(sources)
        if places != height * width:
            height = width = math.isqrt(places)
        if x.shape[-1] != math.prod(sources) * height * width:
            return x
        x = x.reshape(*x.shape[:-1], *sources, height, width)
    if x.shape == shape or x.ndim != len(shape) or x.shape[:-2] != shape[:-2]:
        return x
    size = (shape[-2], shape[-1])
    if by_distance:
        return resize_offsets(x, size)
    return resize(x, size) if x.ndim == 4 else resize(x[None], size)[0]


_TABLES = ("rpb", "cross_scale", "cross_bias")
_RENAMES = (
    (r"^layer_(\d+)\.downsample\.", r"stages.\1.merge."),
    (r"^layer_(\d+)\.", r"stages.\1."),
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"\.c\.weight$", ".conv.weight"),
    (r"\.dwconv\.", ".conv."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"(\.blocks\.\d+)\.gamma(?:_([12]))?$", r"\1.ls\2.gamma"),
    (r"\.mlp\.norm\.", ".mlp_norm."),
    (r"(\.blocks\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),
    (r"\.attention_biases$", ".attn.rpb"),
    (r"\.s_token_bias$", ".attn.cross_bias"),
    (r"\.s_scale_factors$", ".attn.cross_scale"),
    (r"\.s_norm\.", ".attn.cross_norm."),
    (r"\.dw_conv\.", ".cross."),
    (r"^norm_head\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(**dict(
        first_conv="patch_embed.conv1.conv", classifier="head.fc", license="unspecified",
        origin_url="https://github.com/hkzhang-git/FcaFormer", paper_ids="arXiv:2211.07198",
        paper_name="FcaFormer: Forward Cross Attention in Hybrid Vision Transformer",
    ) | kwargs)


# The authors share one file, of fcaformer_l2, behind a page that cannot be fetched from.
default_cfgs = generate_default_cfgs({
    "fcaformer_l1.untrained": _cfg(),
    "fcaformer_l2.untrained": _cfg(),
    "fcaformer_l3.untrained": _cfg(),
    "fcaformer_l4.untrained": _cfg(),
    "test_fcaformer.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> FcaFormer:
    return build_model(FcaFormer, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **defaults | kwargs)


@register_model
def fcaformer_l1(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """6.2 M parameters, 1.4 GMACs, published 80.3 % top-1 at 224 px."""
    return _create("fcaformer_l1", pretrained, {}, **kwargs)


@register_model
def fcaformer_l2(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """16.3 M parameters, 3.6 GMACs, published 83.1 % top-1 at 224 px."""
    model_args = dict(embed_dims=(96, 192, 320, 480), depths=(2, 2, 7, 2), num_heads=(10, 15))
    return _create("fcaformer_l2", pretrained, model_args, **kwargs)


@register_model
def fcaformer_l3(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """27.9 M parameters, 6.7 GMACs, published 84.2 % top-1 at 224 px."""
    model_args = dict(embed_dims=(96, 192, 320, 512), depths=(3, 6, 12, 3), num_heads=(10, 16))
    return _create("fcaformer_l3", pretrained, model_args, **kwargs)


@register_model
def fcaformer_l4(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """65.6 M parameters, 14.5 GMACs, published 84.9 % top-1 at 224 px."""
    model_args = dict(embed_dims=(128, 256, 512, 768), depths=(3, 6, 12, 3), num_heads=(16, 24))
    return _create("fcaformer_l4", pretrained, model_args, **kwargs)


@register_model
def test_fcaformer(pretrained: bool = False, **kwargs: Any) -> FcaFormer:  # noqa: PT028 - no test function
    """Small enough for tests."""
    model_args = dict(
        img_size=96, embed_dims=(8, 16, 24, 32), depths=(1, 1, 3, 1), num_heads=(3, 4), mlp_ratio=2., layer_scale=1.)
    return _create("test_fcaformer", pretrained, model_args, **kwargs)


family = Family(
    small={"test_fcaformer": {}},
    published={
        "fcaformer_l1": Published(80.3, 1.4), "fcaformer_l2": Published(83.1, 3.6), "fcaformer_l3": Published(84.2, 6.7),
        "fcaformer_l4": Published(84.9, 14.5),
    },
    goldens={"fcaformer_l1": "fcaformer_l1", "fcaformer_l1_dense": "fcaformer_l1"},
    peers=[Peer("fcaformer_l2", "swin_tiny_patch4_window7_224")],
    dense_args=dense_args,
    dense_norm=DenseNorm("norm", 1e-6, widths=(96, 192, 384, 768), projection="head"),
    checkpoint_filter_fn=checkpoint_filter_fn,
)
