"""ViTAEv2-VSA: convolutions beside varied-size windows, in cells that shrink a map and in cells that keep its size.

Papers: "VSA: Learning Varied-Size Window Attention in Vision Transformers" (ECCV 2022, arXiv 2204.08446) and "ViTAEv2:
Vision Transformer Advanced by Exploring Inductive Bias for Image Recognition and Beyond" (arXiv 2202.10108). Official
code and weights: https://github.com/ViTAE-Transformer/ViTAE-VSA (without a licence file).
"""
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, register_notrace_function
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.scripting import unscripted
from ..layers.varied_window import VariedSizeWindowAttention
from ..ops.dispatch import numbers
from ._backbone import Backbone, stage_levels
from ._blocks import BaseBlock, Perceptron, Stage
from ._builder import build_model, cfg
from ._family import Family, Peer, Published
from ._tables import rpb_of_windows

__all__ = ["ViTAEv2VSA", "dense_args"]

Rules = Literal["vitae", "vitae_dense"]


class ReductionCell(nn.Module):
    """From a map ``[B, H, W, dim]`` to ``[B, H / ratio, W / ratio, out_dim]`` (rounded up; ViTAEv2, section 3.2).

    Strided convolutions of several dilations, side by side, are attended to; three more convolutions of the input are
    added. There is no shortcut around the attention.

    Args:
        dim: Channels of the input.
        embed_dim: Channels of each of the dilated convolutions.
        out_dim: Channels of the output.
        ratio: Stride, 4 or 2.
        kernel_size: Of the dilated convolutions.
        dilations: Of these.
        num_heads: Heads of the attention.
        window_size: Height and width of its windows, in tokens.
        groups: Groups of the convolutions beside it.
        wide: Whether these are twice as wide inside as the output; otherwise they are as wide as ``embed_dim``.
        rules: Where windows are padded, see :class:`~visionattn.layers.VariedSizeWindowAttention`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            embed_dim: int,
            out_dim: int,
            ratio: int,
            kernel_size: int,
            dilations: Sequence[int],
            num_heads: int,
            window_size: int,
            groups: int,
            wide: bool,
            rules: Rules,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.ratio = ratio
        width = embed_dim * len(dilations)
        self.prm = nn.ModuleList([
            nn.Conv2d(dim, embed_dim, kernel_size, stride=ratio, dilation=dilation,
                      padding=((kernel_size - 1) * dilation + 2 - ratio) // 2, **dd)
            for dilation in dilations])
        hidden = 2 * out_dim if wide else embed_dim
        self.pcm = parallel_convs((dim, hidden, hidden, out_dim), (2, 2, 1) if ratio == 4 else (2, 1, 1), groups, **dd)
        self.pos = nn.Conv2d(width, width, 7, padding=3, groups=width, **dd)
        self.norm1 = nn.LayerNorm(width, **dd)
        self.attn = VariedSizeWindowAttention(width, num_heads, window_size, out_dim, rules, **dd)
        self.norm2 = nn.LayerNorm(out_dim, **dd)
        self.mlp = Perceptron(out_dim, out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the smaller map."""
        x = x.permute(0, 3, 1, 2)
        beside = self.pcm(x)
        if self.ratio == 4:
            x = widen(x)
        x = torch.cat([F.gelu(conv(x)) for conv in self.prm], dim=1)
        x = (x + self.pos(x)).permute(0, 2, 3, 1)
        x = self.attn(self.norm1(x)) + beside.permute(0, 2, 3, 1)
        return x + self.mlp(self.norm2(x))


@register_notrace_function
@unscripted
def widen(x: Tensor) -> Tensor:
    """An image ``[B, C, H, W]`` with a row or column of zeros on both ends of a side that 4 does not divide.

    So the stem gives as many tokens as patches of 4 pixels cover the side. A graph that is exported for any size is for
    sizes that 4 divides, if the example's is; PyTorch says so where others are wanted.
    """
    rows, columns = (1 if length % 4 else 0 for length in numbers(x.shape[2:]))
    return F.pad(x, (columns, columns, rows, rows)) if rows or columns else x


class NormalCell(BaseBlock):
    """Attention, convolutions beside it, and a perceptron on maps ``[B, H, W, dim]`` (ViTAEv2, section 3.3).

    A depthwise convolution that encodes positions is added to what the attention takes, and to nothing else.

    Args:
        dim: Channels.
        num_heads: Heads of the attention.
        window_size: Height and width of its windows, in tokens.
        mlp_ratio: Width of the perceptron's hidden layer, in ``dim``.
        groups: Groups of the convolutions beside the attention.
        rules: Where windows are padded, see :class:`~visionattn.layers.VariedSizeWindowAttention`.
        proj_drop: Dropout rate of the projections.
        drop_path: Rate at which a sample skips a branch in training, each of the three for itself.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            window_size: int,
            mlp_ratio: float,
            groups: int,
            rules: Rules,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        path = partial(DropPath, drop_path) if drop_path > 0. else nn.Identity
        self.pos = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = VariedSizeWindowAttention(dim, num_heads, window_size, rules=rules, proj_drop=proj_drop, **dd)
        self.pcm = parallel_convs((dim, 4 * dim, dim, dim), (1, 1, 1), groups, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Perceptron(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path1, self.drop_path2, self.drop_path3 = path(), path(), path()

    def branches(self, x: Tensor) -> Tensor:
        """What the block computes."""
        image = x.permute(0, 3, 1, 2)
        attended = self.attn(self.norm1((image + self.pos(image)).permute(0, 2, 3, 1)))
        x = x + self.drop_path1(attended) + self.drop_path2(self.pcm(image).permute(0, 2, 3, 1))
        return x + self.drop_path3(self.mlp(self.norm2(x)))


def parallel_convs(dims: Sequence[int], strides: Sequence[int], groups: int, **dd: Any) -> nn.Sequential:
    """Three 3x3 convolutions on NCHW maps from and to these widths, a batch norm and a SiLU after the first two."""
    convs = [nn.Conv2d(dims[i], dims[i + 1], 3, stride=strides[i], padding=1, groups=groups, **dd) for i in range(3)]
    return nn.Sequential(
        convs[0], nn.BatchNorm2d(dims[1], **dd), nn.SiLU(), convs[1], nn.BatchNorm2d(dims[2], **dd), nn.SiLU(), convs[2])


class ViTAEv2VSA(Backbone):
    """Four stages, each a cell that shrinks the map and cells that keep its size; takes images of any size.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        embed_dims: Channels of each dilated convolution at the start of a stage, per stage.
        token_dims: Channels of the stages.
        depths: Cells that keep the size, per stage.
        num_heads: Heads of these, per stage.
        reduction_heads: Heads of the cells that shrink the map, per stage.
        groups: Groups of the convolutions beside the attention, per stage.
        reduction_groups: The same in the cells that shrink the map.
        wide_pcm: Whether the convolutions in these are twice as wide inside as the stage.
        window_size: Height and width of a window before it is varied, in tokens.
        mlp_ratio: Width of the perceptrons' hidden layer, in channels of the stage.
        rules: Where windows are padded and what an offset is measured in, see
            :class:`~visionattn.layers.VariedSizeWindowAttention`: as in the authors' classifiers or their dense
            backbones. It changes no weight, and nothing where square maps are whole windows.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the projections in the cells that keep the size.
        drop_path_rate: Rate of stochastic depth, see :func:`drop_path_rates`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            embed_dims: Sequence[int] = (64, 64, 128, 256),
            token_dims: Sequence[int] = (64, 128, 256, 512),
            depths: Sequence[int] = (2, 2, 8, 2),
            num_heads: Sequence[int] = (2, 4, 8, 16),
            reduction_heads: Sequence[int] = (2, 2, 4, 8),
            groups: Sequence[int] = (1, 32, 64, 128),
            reduction_groups: Sequence[int] = (1, 16, 32, 64),
            wide_pcm: bool = False,
            window_size: int = 7,
            mlp_ratio: float = 4.,
            rules: Rules = "vitae",
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.feature_info = stage_levels(token_dims)
        widths = (in_chans, *token_dims)
        rates = drop_path_rates(drop_path_rate, depths)
        cells = [
            ReductionCell(
                widths[i], embed_dims[i], token_dims[i], ratio=2 if i else 4, kernel_size=3 if i else 7,
                dilations=range(1, (4, 3, 2, 2)[i] + 1), num_heads=reduction_heads[i], window_size=window_size,
                groups=reduction_groups[i], wide=wide_pcm, rules=rules, **dd)
            for i in range(4)]
        self.patch_embed = cells[0]
        self.stages = nn.Sequential(*[
            Stage(cells[i] if i else nn.Identity(), [
                NormalCell(
                    token_dims[i], num_heads[i], window_size, mlp_ratio, groups[i], rules, proj_drop=proj_drop_rate,
                    drop_path=rate, **dd)
                for rate in rates[i]
            ])
            for i in range(4)
        ])
        self.finish(token_dims[-1], num_classes, global_pool, drop_rate, norm_layer=None, **dd)

    def embed(self, x: Tensor) -> Tensor:
        """The first map of images ``[batch, in_chans, height, width]``."""
        return self.patch_embed(x.permute(0, 2, 3, 1))

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        """As in every backbone, but that the predictors of windows start as PyTorch's layers do."""
        super().init_module(module, needs_reset)
        if isinstance(module, VariedSizeWindowAttention):
            module.reset_parameters()


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates of stochastic depth of each stage's cells, as the authors' models were trained.

    They grow linearly from 0 to ``rate`` over all cells, but a stage takes those from the number of cells of the stage
    before it on, not of all before it: late stages repeat rates of early ones, and the last ones are not used.
    """
    last = max(sum(depths) - 1, 1)
    starts = (0, *depths[:-1])
    return [[rate * (start + j) / last for j in range(depth)] for start, depth in zip(starts, depths, strict=True)]


def dense_args(variant: str, task: str) -> dict[str, Any]:
    """Arguments of ``ViTAEv2VSA`` that the authors change for ``task``, ``"detection"`` or ``"segmentation"``."""
    return {"rules": "vitae_dense"}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' entries to ours (ours stay).

    The authors predict offsets and growth by a convolution each, which give two numbers a head; ours gives all four.
    """
    renamed = {}
    for key, x in state_dict.items():
        if key.endswith(".relative_position_index"):
            continue
        if ".sampling_scales.2." in key and key.replace("scales", "offsets") in state_dict:
            continue  # goes with the offsets
        if ".sampling_offsets.2." in key and (other := key.replace("offsets", "scales")) in state_dict:
            pairs = [part.unflatten(0, (-1, 2)) for part in (x, state_dict[other])]
            x = torch.cat(pairs, dim=1).flatten(0, 1)
            key = key.replace(".sampling_offsets.2.", ".predictor.")
        if key.endswith(".relative_position_bias_table"):
            key = key.replace(".relative_position_bias_table", ".rpb")
            x = rpb_of_windows(x)
        if re.search(r"\.attn\.(predictor|qkv|proj)\.weight$", key):
            x = x.flatten(1)
        key = re.sub(r"^layers\.0\.RC\.", "patch_embed.", key)
        key = re.sub(r"^layers\.(\d+)\.RC\.", r"stages.\1.downsample.", key)
        key = re.sub(r"^layers\.(\d+)\.NC\.", r"stages.\1.blocks.", key)
        key = re.sub(r"\.PRM\.convs\.(\d+)\.0\.", r".prm.\1.", key).replace(".PCM.", ".pcm.")
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        renamed[key] = x
    return renamed


def _cfg(url: str = "", size: int = 224) -> dict[str, Any]:
    return cfg(
        url=url, input_size=(3, size, size), pool_size=(size // 32, size // 32), crop_pct=0.9, license="unspecified",
        first_conv=(*(f"patch_embed.prm.{i}" for i in range(4)), "patch_embed.pcm.0"), classifier="head.fc",
        origin_url="https://github.com/ViTAE-Transformer/ViTAE-VSA", paper_ids="arXiv:2204.08446",
        paper_name="VSA: Learning Varied-Size Window Attention in Vision Transformers")


default_cfgs = generate_default_cfgs({
    "vitaev2_vsa_s.in1k": _cfg("https://1drv.ms/u/s!AimBgYV7JjTlgcgB0Xlyc3U4WO11AQ?e=AGRBDl"),
    "vitaev2_vsa_widepcm_s.untrained": _cfg(),
    "vitaev2_vsa_widepcm_48m.in1k": _cfg("https://1drv.ms/u/s!AimBgYV7JjTlgcgCOt1UwhNQRfO0bw?e=rtEQJV"),
    "vitaev2_vsa_widepcm_b.untrained": _cfg(),
    "vitaev2_vsa_widepcm_b_ws12_384.untrained": _cfg(size=384),
    "test_vitaev2_vsa.untrained": _cfg(),
})

_WIDE_S = dict(wide_pcm=True, reduction_heads=(2, 4, 8, 16))
_WIDE_48M = dict(
    wide_pcm=True, embed_dims=(96, 96, 192, 384), token_dims=(96, 192, 384, 768), depths=(2, 2, 11, 2),
    num_heads=(3, 6, 12, 24), reduction_heads=(3, 6, 12, 24))
_WIDE_B = dict(
    wide_pcm=True, embed_dims=(128, 128, 256, 512), token_dims=(128, 256, 512, 1024), depths=(2, 2, 12, 2),
    num_heads=(4, 8, 16, 32), reduction_heads=(4, 8, 16, 32))


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> ViTAEv2VSA:
    return build_model(ViTAEv2VSA, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **defaults | kwargs)


@register_model
def vitaev2_vsa_s(pretrained: bool = False, **kwargs: Any) -> ViTAEv2VSA:
    """19.8 M parameters, 5.7 GMACs, published 82.7 % top-1 at 224 px."""
    return _create("vitaev2_vsa_s", pretrained, {}, **kwargs)


@register_model
def vitaev2_vsa_widepcm_s(pretrained: bool = False, **kwargs: Any) -> ViTAEv2VSA:
    """``vitaev2_vsa_s`` with wider convolutions and more heads: 20.3 M parameters, 6.3 GMACs; no published weights."""
    return _create("vitaev2_vsa_widepcm_s", pretrained, _WIDE_S, **kwargs)


@register_model
def vitaev2_vsa_widepcm_48m(pretrained: bool = False, **kwargs: Any) -> ViTAEv2VSA:
    """51.1 M parameters (48 M by its name), 15.0 GMACs, published 83.9 % top-1 at 224 px."""
    return _create("vitaev2_vsa_widepcm_48m", pretrained, _WIDE_48M, **kwargs)


@register_model
def vitaev2_vsa_widepcm_b(pretrained: bool = False, **kwargs: Any) -> ViTAEv2VSA:
    """93.7 M parameters, 27.1 GMACs; published accuracies are of weights that were not."""
    return _create("vitaev2_vsa_widepcm_b", pretrained, _WIDE_B, **kwargs)


@register_model
def vitaev2_vsa_widepcm_b_ws12_384(pretrained: bool = False, **kwargs: Any) -> ViTAEv2VSA:
    """``vitaev2_vsa_widepcm_b`` with windows of 12 x 12: 93.8 M parameters, 81.5 GMACs at 384 px; no weights."""
    return _create("vitaev2_vsa_widepcm_b_ws12_384", pretrained, _WIDE_B | dict(window_size=12), **kwargs)


@register_model
def test_vitaev2_vsa(pretrained: bool = False, **kwargs: Any) -> ViTAEv2VSA:  # noqa: PT028 - no test function
    """Small enough for tests."""
    defaults = dict(
        embed_dims=(8, 8, 8, 16), token_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4),
        reduction_heads=(1, 1, 2, 2), groups=(1, 4, 4, 8), reduction_groups=(1, 2, 4, 4), window_size=4, mlp_ratio=2.)
    return _create("test_vitaev2_vsa", pretrained, defaults, **kwargs)


family = Family(
    small={"test_vitaev2_vsa": {}},
    published={"vitaev2_vsa_s": Published(82.7, 5.7), "vitaev2_vsa_widepcm_48m": Published(83.9, 15.0)},
    goldens={"vitaev2_vsa_s": "vitaev2_vsa_s"},
    peers=[Peer("vitaev2_vsa_s", "swin_tiny_patch4_window7_224")],
    dense_args=dense_args,
    checkpoint_filter_fn=checkpoint_filter_fn,
)
