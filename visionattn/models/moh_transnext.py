"""MoH-ViT: TransNeXt whose tokens weigh the attention heads and choose some of them.

Paper: "MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842). Official code and weights:
https://github.com/SkyworkAI/MoH, folder MoH-ViT (Apache-2.0).
"""
import re
from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import HeadGates
from . import transnext
from ._builder import build_model, cfg
from ._family import Family, Peer, Published
from .transnext import TransNeXt

__all__ = ["MoHTransNeXt"]


class MoHTransNeXt(TransNeXt):
    """TransNeXt with gates of its heads; takes images of any size.

    Args:
        depths: Number of blocks of each stage.
        num_heads: Heads of each stage.
        shared_heads: How many of them, the first ones, all tokens have.
        routed_heads: How many of the others a token has; 0 where all are shared.
        balance_loss: Weight of the auxiliary loss that makes tokens spread over the routed heads, a mean over the
            attentions that have such.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        kwargs: The other arguments of :class:`TransNeXt`.
    """

    def __init__(
            self,
            *,
            depths: Sequence[int] = (5, 5, 22, 5),
            num_heads: Sequence[int] = (3, 6, 12, 24),
            shared_heads: Sequence[int] = (3, 6, 3, 4),
            routed_heads: Sequence[int] = (0, 0, 6, 12),
            balance_loss: float = 0.01,
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        routers = sum(depth for depth, routed in zip(depths, routed_heads, strict=True) if routed)

        def gates(stage: int, dim: int, heads: int) -> HeadGates:
            return HeadGates(dim, heads, shared_heads[stage], routed_heads[stage], balance_loss / max(routers, 1),
                             device=device, dtype=dtype)

        super().__init__(
            depths=depths, num_heads=num_heads, gate_layer=gates, device=device, dtype=dtype, **kwargs)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' entries to ours; leaves a checkpoint of ours as it is."""
    names = {"wg": "routed", "wg_0": "balance", "wg_1": "shared"}
    return {re.sub(r"\.attn\.(wg\w*)\.weight$", lambda m: f".attn.gate.{names[m[1]]}", name): x
            for name, x in transnext.checkpoint_filter_fn(state_dict, model).items()}


def _cfg(repo: str = "", file: str = "", **kwargs: Any) -> dict[str, Any]:
    id = f"Chat-UniVi/{repo}"
    hub = dict(hf_hub_id=id, hf_hub_filename=file, url=f"https://huggingface.co/{id}/resolve/main/{file}")
    return cfg(**(hub if repo else {}) | dict(
        first_conv="patch_embed.proj", classifier="head.fc", license="apache-2.0",
        origin_url="https://github.com/SkyworkAI/MoH", paper_ids="arXiv:2410.11842",
        paper_name="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    ) | kwargs)


default_cfgs = generate_default_cfgs({
    "moh_transnext_small_80.in1k": _cfg("MoH-ViT-S-80", "moh_transnext_small_80.pth"),
    "moh_transnext_small_75.in1k": _cfg("MoH-ViT-S-75", "moh_transnext_small_75.pth"),
    "moh_transnext_base_75.in1k": _cfg("MoH-ViT-B-75", "moh_transnext_base_75.pth"),
    "moh_transnext_base_50.in1k": _cfg("MoH-ViT-B-50", "moh_transnext_base_50.pth"),
    "test_moh_transnext.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
})

_SMALL = dict(embed_dims=(72, 144, 288, 576), depths=(5, 5, 22, 5), num_heads=(3, 6, 12, 24))
_BASE = dict(embed_dims=(96, 192, 384, 768), depths=(5, 5, 23, 5), num_heads=(4, 8, 16, 32))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MoHTransNeXt:
    return build_model(MoHTransNeXt, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def moh_transnext_small_80(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """80 % of the heads: 49.9 M parameters, published 84.7 % top-1 at 224 px."""
    model_args = _SMALL | dict(shared_heads=(3, 6, 3, 8), routed_heads=(0, 0, 6, 12))
    return _create("moh_transnext_small_80", pretrained, **model_args | kwargs)


@register_model
def moh_transnext_small_75(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """75 % of the heads: 49.9 M parameters, published 84.6 % top-1 at 224 px."""
    model_args = _SMALL | dict(shared_heads=(3, 6, 3, 4), routed_heads=(0, 0, 6, 12))
    return _create("moh_transnext_small_75", pretrained, **model_args | kwargs)


@register_model
def moh_transnext_base_75(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """75 % of the heads: 90.0 M parameters, published 84.9 % top-1 at 224 px."""
    model_args = _BASE | dict(shared_heads=(4, 8, 4, 5), routed_heads=(0, 0, 8, 16))
    return _create("moh_transnext_base_75", pretrained, **model_args | kwargs)


@register_model
def moh_transnext_base_50(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:
    """Half of the heads: 90.0 M parameters, published 84.7 % top-1 at 224 px."""
    model_args = _BASE | dict(shared_heads=(2, 2, 2, 4), routed_heads=(2, 4, 6, 8))
    return _create("moh_transnext_base_50", pretrained, **model_args | kwargs)


@register_model
def test_moh_transnext(pretrained: bool = False, **kwargs: Any) -> MoHTransNeXt:  # noqa: PT028 - no pytest function
    """Small enough for tests."""
    model_args = dict(
        embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(2, 2, 3, 4), mlp_ratios=(2, 2, 2, 2),
        shared_heads=(2, 0, 1, 2), routed_heads=(0, 1, 1, 1), pretrain_size=96)
    return _create("test_moh_transnext", pretrained, **model_args | kwargs)


family = Family(
    small={"test_moh_transnext": {}},
    published={
        "moh_transnext_small_80": Published(84.7, None), "moh_transnext_small_75": Published(84.6, None),
        "moh_transnext_base_75": Published(84.9, None), "moh_transnext_base_50": Published(84.7, None),
    },
    goldens={"moh_transnext_small_75": "moh_transnext_small_75", "moh_ops": "*"},
    peers=[Peer("moh_transnext_small_75", "convnext_small")],
    dense_args=transnext.dense_args,
    checkpoint_filter_fn=checkpoint_filter_fn,
)
