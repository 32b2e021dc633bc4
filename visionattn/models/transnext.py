"""TransNeXt: attention to the window around a token and to pooled keys in one softmax, with gated convolutions.

Paper: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers" (CVPR 2024, arXiv 2311.17132). Official code
and weights: https://github.com/DaiShiResearch/TransNeXt (Apache-2.0).
"""
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import AggregatedAttention, CosineAttention
from ..layers.full import unseen
from ._backbone import Backbone, init_convolution, stage_levels
from ._blocks import Block, ConvEmbedding, Stage
from ._builder import build_model, cfg
from ._family import Family, Peer, Published

__all__ = ["TransNeXt"]


class ConvGLU(nn.Module):
    """Perceptron on maps ``[B, H, W, dim]`` whose hidden values have gates, convolved from those around (section 3.5).

    ``fc2(GELU(dwconv(gate)) * value)``, where ``[gate, value] = fc1(x)``.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0., device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, 2 * hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        gate = self.dwconv(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if torch.jit.is_scripting():
            x = self.act(gate) * value
        else:
            x = torch.ops.aten.gelu_(gate).mul_(value) if unseen(self.dwconv, self.act) else self.act(gate) * value
        return self.drop(self.fc2(self.drop(x)))


def gated(dim: int, hidden_dim: int, drop: float, **dd: Any) -> ConvGLU:
    """A :class:`ConvGLU` in place of a perceptron of this hidden width, of which gates take a third."""
    return ConvGLU(dim, 2 * hidden_dim // 3, drop, **dd)


class TransNeXt(Backbone):
    """TransNeXt: stages of aggregated attention, full attention in the last one; takes images of any size.

    Args:
        in_chans: Number of input channels.
        num_classes: Number of classes; 0 for no classifier.
        global_pool: Pooling before the classifier, ``"avg"``, ``"max"``, ...; ``""`` for none.
        embed_dims: Width of each stage.
        depths: Number of blocks of each stage.
        num_heads: Heads of each stage.
        pool_ratios: By how much each stage pools the keys that all queries see, in both directions; 1 for full
            attention.
        mlp_ratios: Hidden width of each stage's perceptrons in units of their width, before gates take a third of it.
        kernel_size: Height and width of the windows.
        pool_size: The paper's linear inference mode: all stages pool to this height and width (7) whatever the size of
            the image.
        pretrain_size: Image size in pretraining, the unit of the position biases. It stays when the weights are used at
            another size.
        bias_size: Image size that the position biases are computed for and interpolated from; None computes them for
            the images themselves (the paper's extrapolation).
        gate_layer: Makes a module of each attention that computes the factors of its heads' outputs: ``gate_layer(stage,
            dim, num_heads)``; None for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; grows linearly from 0 in the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            embed_dims: Sequence[int] = (48, 96, 192, 384),
            depths: Sequence[int] = (2, 2, 15, 2),
            num_heads: Sequence[int] = (2, 4, 8, 16),
            pool_ratios: Sequence[int] = (8, 4, 2, 1),
            mlp_ratios: Sequence[int] = (8, 8, 4, 4),
            kernel_size: int = 3,
            pool_size: int | None = None,
            pretrain_size: int = 224,
            bias_size: int | None = None,
            gate_layer: Callable[[int, int, int], nn.Module] | None = None,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.feature_info = stage_levels(embed_dims)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def attention(stage: int) -> nn.Module:
            dim, heads, ratio, stride = embed_dims[stage], num_heads[stage], pool_ratios[stage], 4 * 2 ** stage
            options: dict[str, Any] = dict(
                trained_size=pretrain_size // stride, bias_size=bias_size and bias_size // stride,
                gate=gate_layer and gate_layer(stage, dim, heads), **dd)
            if ratio == 1:
                return CosineAttention(dim, heads, **options)
            return AggregatedAttention(
                dim, heads, pool_ratio=ratio, kernel_size=kernel_size, pool_size=pool_size, **options)

        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = ConvEmbedding(in_chans, embed_dims[0], 7, stride=4, padding=3, from_map=False, **dd)
        self.stages = nn.Sequential(*[
            Stage(
                ConvEmbedding(embed_dims[i - 1], dim, 3, stride=2, padding=1, **dd) if i else nn.Identity(),
                [
                    Block(dim, attention(i), mlp_ratios[i], drop_path=rate, norm_layer=norm_layer, mlp_layer=gated, **dd)
                    for rate in drop_paths[i]
                ],
                norm=norm_layer(dim, **dd),
            )
            for i, dim in enumerate(embed_dims)
        ])
        self.finish(embed_dims[-1], num_classes, global_pool, drop_rate, norm_layer=None, **dd)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        """Draws the parameters of one module; of a convolution by its outputs."""
        super().init_module(module, needs_reset)
        if isinstance(module, nn.Conv2d):
            init_convolution(module)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of what the authors do not decay."""
        kinds = ("query_embedding", "local_bias", "position_bias", "temperature")
        return {name for name, _ in self.named_parameters() if any(kind in name for kind in kinds)}


def dense_args(variant: str, task: str) -> dict[str, Any]:
    """Arguments of ``TransNeXt`` that the authors change for ``task``: biases interpolated from this image size."""
    return {"bias_size": {"detection": 800, "segmentation": 512}[task]}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' entries to ours; leaves a checkpoint of ours as it is."""
    rules: list[tuple[str, Any]] = [
        (r"^patch_embed1\.", "patch_embed."),
        (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
        (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
        (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
        (r"\.cpb_fc1\.", ".position_bias.hidden."),
        (r"\.cpb_fc2\.", ".position_bias.out."),
        (r"\.relative_pos_bias_local$", ".local_bias"),
    ]
    renamed = {}
    for name, x in state_dict.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed[name] = x
    return renamed


def _cfg(repo: str = "", **kwargs: Any) -> dict[str, Any]:
    id, file = f"DaiShiResearch/{repo}", f"{repo.replace('-', '_')}.pth"
    hub = dict(hf_hub_id=id, hf_hub_filename=file, url=f"https://huggingface.co/{id}/resolve/main/{file}")
    return cfg(**(hub if repo else {}) | dict(
        first_conv="patch_embed.proj", classifier="head.fc", license="apache-2.0",
        origin_url="https://github.com/DaiShiResearch/TransNeXt", paper_ids="arXiv:2311.17132",
        paper_name="TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
    ) | kwargs)


_AT_384 = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, crop_mode="squash")

default_cfgs = generate_default_cfgs({
    "transnext_micro.in1k": _cfg("transnext-micro-224-1k"),
    "transnext_tiny.in1k": _cfg("transnext-tiny-224-1k"),
    "transnext_small.in1k": _cfg("transnext-small-224-1k"),
    "transnext_base.in1k": _cfg("transnext-base-224-1k"),
    "transnext_small_384.in1k": _cfg("transnext-small-384-1k-ft-1k", **_AT_384),
    "transnext_base_384.in1k": _cfg("transnext-base-384-1k-ft-1k", **_AT_384),
    "transnext_micro_AAAA_256.in1k": _cfg(
        "transnext-micro-AAAA-256-1k", input_size=(3, 256, 256), pool_size=(8, 8)),
    "test_transnext.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
})

_SMALL = dict(embed_dims=(72, 144, 288, 576), depths=(5, 5, 22, 5), num_heads=(3, 6, 12, 24))
_BASE = dict(embed_dims=(96, 192, 384, 768), depths=(5, 5, 23, 5), num_heads=(4, 8, 16, 32))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> TransNeXt:
    return build_model(TransNeXt, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def transnext_micro(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """12.8 M parameters, 2.7 GMACs, published 82.5 % top-1 at 224 px."""
    return _create("transnext_micro", pretrained, **kwargs)


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """28.2 M parameters, 5.7 GMACs, published 84.0 % top-1 at 224 px."""
    return _create("transnext_tiny", pretrained, **_SMALL | dict(depths=(2, 2, 15, 2)) | kwargs)


@register_model
def transnext_small(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """49.7 M parameters, 10.3 GMACs, published 84.7 % top-1 at 224 px."""
    return _create("transnext_small", pretrained, **_SMALL | kwargs)


@register_model
def transnext_base(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """89.7 M parameters, 18.4 GMACs, published 84.8 % top-1 at 224 px."""
    return _create("transnext_base", pretrained, **_BASE | kwargs)


@register_model
def transnext_small_384(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """``transnext_small`` fine-tuned at 384 px: 32.1 GMACs, published 86.0 % top-1."""
    return _create("transnext_small_384", pretrained, **_SMALL | kwargs)


@register_model
def transnext_base_384(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """``transnext_base`` fine-tuned at 384 px: 56.3 GMACs, published 86.2 % top-1."""
    return _create("transnext_base_384", pretrained, **_BASE | kwargs)


@register_model
def transnext_micro_AAAA_256(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """Aggregated attention in all stages: 13.1 M parameters, 3.3 GMACs, published 82.6 % top-1 at 256 px."""
    return _create(
        "transnext_micro_AAAA_256", pretrained, **dict(pool_ratios=(16, 8, 4, 2), pretrain_size=256) | kwargs)


@register_model
def test_transnext(pretrained: bool = False, **kwargs: Any) -> TransNeXt:  # noqa: PT028 - no pytest function
    """Small enough for tests."""
    model_args = dict(
        embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), mlp_ratios=(2, 2, 2, 2),
        pretrain_size=96)
    return _create("test_transnext", pretrained, **model_args | kwargs)


family = Family(
    small={"test_transnext": {}},
    published={
        "transnext_micro": Published(82.5, 2.7), "transnext_tiny": Published(84.0, 5.7),
        "transnext_small": Published(84.7, 10.3), "transnext_base": Published(84.8, 18.4),
        "transnext_small_384": Published(86.0, 32.1), "transnext_base_384": Published(86.2, 56.3),
        "transnext_micro_AAAA_256": Published(82.6, 3.3),
    },
    goldens={
        "transnext_micro": "transnext_micro", "transnext_micro_384_pool7": "transnext_micro",
        "transnext_micro_AAAA_256": "transnext_micro_AAAA_256", "transnext_micro_dense_interp": "transnext_micro",
        "transnext_ops": "*",
    },
    peers=[Peer("transnext_micro", "swin_tiny_patch4_window7_224"), Peer("transnext_tiny", "convnext_tiny")],
    dense_args=dense_args,
    checkpoint_filter_fn=checkpoint_filter_fn,
)
