"""Mixer ViT: one plain vision transformer in which the attention can be any of several token mixers, to compare them.

The frame is this project's own: patches, learned positions, pre-norm blocks of a mixer and a perceptron, the mean of the
tokens. What a mixer's paper, code and licence are, and what of it is this project's own, stands in
docs/models/mixer_vit.md.
"""
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed, calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import (
    AgentAttention,
    BiLevelRoutingAttention,
    CombinerAttention,
    FlowAttention,
    GaussianAdaptiveAttention,
    GroupedQueryAttention,
    LongRangeAttention,
    NeighborhoodAttention2d,
    TokenMerging,
    UnionOfExpertsAttention,
    UnionOfPerceptrons,
)
from ._backbone import Backbone
from ._blocks import Perceptron, PooledBlock
from ._builder import build_model, cfg
from ._family import Family, Peer, same_names
from ._tables import Grid, PositionEmbedding

__all__ = ["MIXERS", "PERCEPTRONS", "MixerViT"]


def _agent(dim: int, num_heads: int, grid: Grid, agents: int = 7, **options: Any) -> nn.Module:
    return AgentAttention(dim, num_heads, grid, (agents, agents), **options)


# Each makes the mixer of a block: ``MIXERS[name](dim, num_heads, grid, **options)``, the grid being the rows and columns
# of tokens that tables are for.
MIXERS: dict[str, Callable[..., nn.Module]] = {
    "full": lambda dim, heads, grid, **options: GroupedQueryAttention(dim, heads, heads, **options),
    "gqa": lambda dim, heads, grid, **options: GroupedQueryAttention(dim, heads, **options),
    "agent": _agent,
    "routed": lambda dim, heads, grid, **options: BiLevelRoutingAttention(dim, heads, **options),
    "neighborhood": lambda dim, heads, grid, **options: NeighborhoodAttention2d(dim, heads, **options),
    "flow": lambda dim, heads, grid, **options: FlowAttention(dim, heads, **options),
    "maelre": lambda dim, heads, grid, **options: LongRangeAttention(dim, heads, **options),
    "uoe": lambda dim, heads, grid, **options: UnionOfExpertsAttention(dim, heads, **options),
    "gaam": lambda dim, heads, grid, **options: GaussianAdaptiveAttention(dim, heads, **options),
    "combiner": lambda dim, heads, grid, **options: CombinerAttention(dim, heads, **options),
}
# Each makes the perceptron of a block: ``PERCEPTRONS[name](dim, hidden_dim, drop=rate)``.
PERCEPTRONS: dict[str, Callable[..., nn.Module]] = {"plain": Perceptron, "uoe": UnionOfPerceptrons}


class MixerViT(Backbone):
    """Pre-norm blocks of a token mixer and a perceptron on one map of patches, whose tokens may be merged on the way.

    Images of any size: those that the patches do not divide are padded with zeros at the bottom and the right, and the
    positions are interpolated (bicubic).

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        img_size: Height and width of the images that the tables are for.
        patch_size: Height and width of a patch.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads per block.
        mixer: What mixes the tokens, a key of :data:`MIXERS`.
        mixer_args: Options of the mixer: arguments of its layer.
        merge_after: Numbers of blocks, from 1 on, after which cells of 2 x 2 tokens become one, in ascending order.
        mlp: What the perceptrons are, a key of :data:`PERCEPTRONS`.
        mlp_ratio: Width of the perceptrons' hidden layer, in ``embed_dim``.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate in the perceptrons.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: There is no such mixer or perceptron, its options do not fit, or there are no such blocks to merge
            after.
    """

    parts = "blocks"
    stem_parts = ("pos_embed", "patch_embed")

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            img_size: int | Grid = 224,
            patch_size: int = 16,
            embed_dim: int = 192,
            depth: int = 12,
            num_heads: int = 3,
            mixer: str = "full",
            mixer_args: Mapping[str, Any] | None = None,
            merge_after: Sequence[int] = (),
            mlp: str = "plain",
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"mixer must be one of {', '.join(MIXERS)}, got {mixer!r}")
        if mlp not in PERCEPTRONS:
            raise ValueError(f"mlp must be one of {', '.join(PERCEPTRONS)}, got {mlp!r}")
        if list(merge_after) != sorted(set(merge_after)) or not all(0 < after < depth for after in merge_after):
            raise ValueError(f"merge_after must be ascending numbers of 1 to {depth - 1}, got {list(merge_after)}")
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        merges = [sum(after <= i for after in merge_after) for i in range(depth)]  # before or in each block
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size * 2 ** merges[i], module=f"blocks.{i}") for i in range(depth)]
        height, width = to_2tuple(img_size)
        grid = -(-height // patch_size), -(-width // patch_size)
        self.patch_embed = PatchEmbed(
            img_size=None, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, output_fmt="NHWC",
            strict_img_size=False, dynamic_img_pad=True, **dd)
        self.pos_embed = PositionEmbedding(embed_dim, grid, mode="bicubic", **dd)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depth)

        def block(i: int) -> nn.Module:
            size = -(-grid[0] // 2 ** merges[i]), -(-grid[1] // 2 ** merges[i])
            return PooledBlock(
                embed_dim, _make(mixer, embed_dim, num_heads, size, mixer_args, dd), mlp_ratio,
                downsample=TokenMerging(embed_dim, **dd) if i in merge_after else None, proj_drop=proj_drop_rate,
                drop_path=drop_paths[i], norm_layer=partial(nn.LayerNorm, eps=1e-6), mlp_layer=PERCEPTRONS[mlp], **dd)

        self.blocks = nn.Sequential(*[block(i) for i in range(depth)])
        self.finish(embed_dim, num_classes, global_pool, drop_rate, norm_layer=partial(nn.LayerNorm, eps=1e-6), **dd)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        """Draws the parameters of one module; of the blocks' linear layers by Glorot's uniform rule, as ViT's authors.

        From weights as small as other families' a narrow model learns slowly.
        """
        super().init_module(module, needs_reset)
        if isinstance(module, nn.Linear) and module is not self.get_classifier():
            nn.init.xavier_uniform_(module.weight)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the positions and of the bias tables."""
        return super().no_weight_decay() | {"pos_embed.table"}

    def embed(self, x: Tensor) -> Tensor:
        """The first map of images: patches with their positions."""
        x = self.patch_embed(x)
        return (x.flatten(1, 2) + self.pos_embed(x.shape[1], x.shape[2])).reshape(x.shape)

    def forward_features(self, x: Tensor) -> Tensor:
        """Last map after the final norm, ``[batch, height, width, embed_dim]``."""
        return self.norm(self.blocks(self.first_map(x)))


def _make(
        mixer: str, dim: int, heads: int, grid: Grid, options: Mapping[str, Any] | None, dd: dict[str, Any],
) -> nn.Module:
    try:
        return MIXERS[mixer](dim, heads, grid, **options or {}, **dd)
    except TypeError as error:
        raise ValueError(f"mixer_args do not fit mixer {mixer!r}: {error}") from None


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(
        first_conv="patch_embed.proj", classifier="head.fc", pool_size=(14, 14), license="apache-2.0",
        paper_ids="arXiv:2010.11929", origin_url="https://github.com/google-research/vision_transformer", **kwargs)


default_cfgs = generate_default_cfgs({
    "mixer_vit_tiny.untrained": _cfg(),
    "mixer_vit_small.untrained": _cfg(),
    "test_mixer_vit.untrained": _cfg() | dict(input_size=(3, 64, 64), pool_size=(8, 8)),
})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> MixerViT:
    kwargs = defaults | kwargs
    out_indices: Any = 3  # the last three blocks, as of timm's vision transformers
    if kwargs.get("merge_after"):
        out_indices = tuple(after - 1 for after in kwargs["merge_after"]) + (kwargs.get("depth", 12) - 1,)
    return build_model(
        MixerViT, variant, pretrained, pretrained_filter_fn=same_names,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"), **kwargs)


@register_model
def mixer_vit_tiny(pretrained: bool = False, **kwargs: Any) -> MixerViT:
    """Of the size of ViT-Ti."""
    return _create("mixer_vit_tiny", pretrained, {}, **kwargs)


@register_model
def mixer_vit_small(pretrained: bool = False, **kwargs: Any) -> MixerViT:
    """Of the size of ViT-S."""
    return _create("mixer_vit_small", pretrained, dict(embed_dim=384, num_heads=6), **kwargs)


@register_model
def test_mixer_vit(pretrained: bool = False, **kwargs: Any) -> MixerViT:  # noqa: PT028 - no test function
    """Small enough for tests."""
    model_args = dict(img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=4)
    return _create("test_mixer_vit", pretrained, model_args, **kwargs)


family = Family(
    small={
        "test_mixer_vit": {},
        "mixer_vit_tiny": dict(  # windows of one size, which graphs of free image sizes need
            patch_size=8, embed_dim=32, depth=3, num_heads=2, mixer="combiner", mixer_args={"window_size": 3}),
    },
    goldens={"gqa_ops": "*", "gaam_ops": "*", "uoe_ops": "*"},
    peers=[Peer("mixer_vit_tiny", "vit_tiny_patch16_224")],
    reductions=lambda name: (8,) if name.startswith("test_") else (16,),
)
