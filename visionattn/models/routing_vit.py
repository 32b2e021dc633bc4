"""Routing ViT: a hierarchical backbone around k-means routed attention

Paper: `Efficient Content-Based Sparse Attention with Routing Transformers` - https://arxiv.org/abs/2003.05997
(TACL 2021), which defines the attention, for language models.

The backbone is this project's own: nobody has published one, nor weights for vision. Its layout is BiFormer's: widths,
depths, head width, stem and downsampling, a depthwise convolution before every block that tells the tokens where they
are, attention of all tokens in the last stage. What was added to the paper's attention is told in
:mod:`visionattn.layers.kmeans_routing`.
"""
from collections.abc import Sequence
from typing import Any, Literal

from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import FullAttention, KMeansRoutingAttention
from ._backbone import Backbone, stage_levels
from ._blocks import Block, Stage
from ._builder import build_model, cfg
from ._family import Family, Peer

__all__ = ["RoutingViT"]


class Stem(nn.Module):
    """Image ``[B, in_chans, H, W]`` to map ``[B, H / 4, W / 4, dim]`` (rounded up): two convolutions with norms."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the first map."""
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """Map ``[B, H, W, dim]`` to ``[B, H / 2, W / 2, out_dim]`` (rounded up): a strided convolution, a norm."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the smaller map."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class PositionConv(nn.Module):
    """Adds a 3x3 depthwise convolution of a map ``[B, H, W, dim]`` to it."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class RoutingViT(Backbone):
    """Four stages of k-means routed attention; takes images of any size, works on maps ``[B, H, W, dim]``.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        embed_dims: Width of each stage.
        depths: Blocks of each stage.
        num_clusters: Clusters of each head of a stage, about the square root of the number of its tokens; None for
            attention of all tokens to all.
        head_dim: Width of a head.
        assignment: How clusters take queries, ``"topk"`` or ``"capacity"``, see
            :class:`visionattn.layers.KMeansRoutingAttention`; changes no weights.
        decay: Of the centroids, per training forward.
        commitment: Weight of the commitment loss of each block.
        mlp_ratio: Hidden width of the perceptrons in units of their width.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate in the perceptrons.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            embed_dims: Sequence[int] = (64, 128, 256, 512),
            depths: Sequence[int] = (2, 2, 8, 2),
            num_clusters: Sequence[int | None] = (56, 28, 14, None),
            head_dim: int = 32,
            assignment: Literal["topk", "capacity"] = "topk",
            decay: float = 0.99,
            commitment: float = 1e-4,
            mlp_ratio: float = 3.,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.in_chans = in_chans
        self.feature_info = stage_levels(embed_dims)

        def attention(dim: int, clusters: int | None) -> nn.Module:
            if clusters is None:
                return FullAttention(dim, dim // head_dim, lepe_of="value", **dd)
            return KMeansRoutingAttention(
                dim, dim // head_dim, clusters, assignment=assignment, decay=decay, commitment=commitment, **dd)

        def block(dim: int, clusters: int | None, drop_path: float) -> Any:
            return nn.Sequential(PositionConv(dim, **dd), Block(
                dim, attention(dim, clusters), mlp_ratio, proj_drop=proj_drop_rate, drop_path=drop_path, **dd))

        self.patch_embed = Stem(in_chans, embed_dims[0], **dd)
        self.stages = nn.Sequential(*[
            Stage(
                Downsample(embed_dims[i - 1], dim, **dd) if i else nn.Identity(),
                [block(dim, clusters, drop_path) for drop_path in drop_paths[i]],
            )
            for i, (dim, clusters) in enumerate(zip(embed_dims, num_clusters, strict=True))
        ])
        self.finish(embed_dims[-1], num_classes, global_pool, drop_rate, **dd)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """There are no names but ours."""
    return state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(**dict(
        first_conv="patch_embed.conv1", classifier="head.fc", license="apache-2.0",
        origin_url="https://arxiv.org/abs/2003.05997",
        paper_name="Efficient Content-Based Sparse Attention with Routing Transformers", paper_ids="arXiv:2003.05997",
    ) | kwargs)


default_cfgs = generate_default_cfgs({
    "routing_vit_tiny.untrained": _cfg(),
    "routing_vit_small.untrained": _cfg(),
    "routing_vit_base.untrained": _cfg(),
    "test_routing_vit.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> RoutingViT:
    return build_model(
        RoutingViT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **defaults | kwargs)


@register_model
def routing_vit_tiny(pretrained: bool = False, **kwargs: Any) -> RoutingViT:
    """As wide and deep as ``biformer_tiny``; no weights."""
    return _create("routing_vit_tiny", pretrained, {}, **kwargs)


@register_model
def routing_vit_small(pretrained: bool = False, **kwargs: Any) -> RoutingViT:
    """As wide and deep as ``biformer_small``; no weights."""
    return _create("routing_vit_small", pretrained, dict(depths=(4, 4, 18, 4)), **kwargs)


@register_model
def routing_vit_base(pretrained: bool = False, **kwargs: Any) -> RoutingViT:
    """As wide and deep as ``biformer_base``; no weights."""
    defaults = dict(depths=(4, 4, 18, 4), embed_dims=(96, 192, 384, 768))
    return _create("routing_vit_base", pretrained, defaults, **kwargs)


@register_model
def test_routing_vit(pretrained: bool = False, **kwargs: Any) -> RoutingViT:  # noqa: PT028 - no test function
    """Small enough for tests."""
    defaults = dict(depths=(1, 1, 2, 1), embed_dims=(16, 32, 64, 128), num_clusters=(16, 8, 4, None), head_dim=16)
    return _create("test_routing_vit", pretrained, defaults, **kwargs)


family = Family(
    small={"test_routing_vit": {}},
    goldens={"kmeans_ops": "*"},
    peers=[Peer("routing_vit_tiny", "swin_tiny_patch4_window7_224")],
    checkpoint_filter_fn=checkpoint_filter_fn,
)
