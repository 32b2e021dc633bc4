"""Sparsifiner: DeiT whose tokens attend to a few keys that a cheap predictor finds for every image, head and query.

Paper: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers" (CVPR 2023, arXiv
2303.13755). Official code: https://github.com/lim142857/Sparsifiner (MIT licence). Its authors publish no trained
weights, so that nothing here could be compared with theirs; the weights of DeiT, timm's, load as a start. See
docs/models/sparsifiner.md.
"""
import math
import re
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.sparsified import KeyPredictor, SparsifiedAttention, resize_factors
from ._backbone import TokenBackbone
from ._blocks import PlacedBlock
from ._builder import build_model, cfg
from ._family import Family, Peer
from ._tables import Grid, PositionEmbedding, resize_positions

__all__ = ["Sparsifiner"]


class Sparsifiner(TokenBackbone):
    """Sparsifiner on DeiT for images of any size; those that the patches do not divide are padded with zeros.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: What the head takes: ``"token"``, the class token; ``"avg"``, the mean of the others; "", all.
        img_size: Height and width of the images that the tables of positions and the predictors' factors are for.
        patch_size: Height and width of a patch.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads per block.
        budget: Keys of a query as a share of all, rounded up to whole keys; 1 for DeiT itself.
        queries_per_list: Consecutive queries that have their keys in common, for speed; 1 lets each have its own.
        rank: Columns of the predictors' factors.
        reconstruct: Whether training is the first phase, in which attention is to all keys and the predictors learn to
            guess it, by an auxiliary loss. If not, training attends to the chosen keys, as evaluation always does, and
            the predictors are frozen.
        reconstruct_weight: Weight of that loss, averaged over the blocks.
        mlp_ratio: Width of the perceptrons' hidden layer, in ``embed_dim``.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the projections in the blocks.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: An option is out of range.
    """

    stem_parts = ("cls_token", "pos_embed", "patch_embed")

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "token",
            img_size: int | Grid = 224,
            patch_size: int = 16,
            embed_dim: int = 192,
            depth: int = 12,
            num_heads: int = 3,
            budget: float = 0.25,
            queries_per_list: int = 1,
            rank: int = 32,
            reconstruct: bool = True,
            reconstruct_weight: float = 0.01,
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size, module=f"blocks.{i}") for i in range(depth)]
        self.img_size = to_2tuple(img_size)
        size = self.map_size(self.img_size)
        self.patch_embed = PatchEmbed(
            img_size=None, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, output_fmt="NHWC",
            strict_img_size=False, dynamic_img_pad=True, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = PositionEmbedding(embed_dim, size, num_prefix_tokens=1, mode="bicubic", **dd)

        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depth)
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList([
            PlacedBlock(
                embed_dim,
                SparsifiedAttention(
                    embed_dim, num_heads, size, budget, queries_per_list, rank, reconstruct, reconstruct_weight / depth,
                    num_prefix_tokens=1, proj_drop=proj_drop_rate, **dd),
                mlp_ratio, proj_drop=proj_drop_rate, drop_path=drop_paths[i], norm_layer=norm_layer, **dd)
            for i in range(depth)
        ])
        self.finish(embed_dim, num_classes, global_pool, drop_rate, norm_layer=norm_layer, **dd)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draws all parameters anew, e.g. after ``to_empty`` of a model that was built on the meta device."""
        super().init_weights(needs_reset)
        trunc_normal_(self.cls_token, std=.02)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        """Draws the parameters of one module; of the blocks' linear layers by Glorot's uniform rule, as ViT's authors.

        From weights as small as other families' a narrow model learns slowly, and its predictors, whose coefficients
        are then nearly even, choose keys by rounding.
        """
        super().init_module(module, needs_reset)
        if isinstance(module, nn.Linear) and module is not self.get_classifier():
            nn.init.xavier_uniform_(module.weight)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Grid) -> None:
        """Makes the table of positions and the predictors' factors those of another image size.

        The model takes images of any size without this, interpolating them, and computes the same after it. What
        changes is their size, in which they are trained further and saved.
        """
        self.img_size = to_2tuple(img_size)
        for part in self.modules():
            if isinstance(part, KeyPredictor | PositionEmbedding):
                part.set_input_size(self.map_size(self.img_size))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the class token and of the position embeddings."""
        return {"cls_token", "pos_embed.table"}

    def as_tokens(self, x: Tensor) -> Tensor:
        """A map of patches ``[batch, height, width, dim]`` as tokens with their positions, after the class token."""
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        return tokens + self.pos_embed(x.shape[1], x.shape[2])


_PREDICTORS = re.compile(r"\.attn\.predictor\.")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Takes timm's DeiT, beside which the predictors stay as they are, or entries of ours.

    Positions and factors for square images of another size are fitted to the model's.
    """
    ours = {"pos_embed.table" if key == "pos_embed" else key: x for key, x in state_dict.items()}
    if "pos_embed" in state_dict:
        ours |= {key: x for key, x in model.state_dict().items() if _PREDICTORS.search(key) and key not in ours}
    table, size = ours.get("pos_embed.table"), model.pos_embed.size
    if table is None or table.ndim != 3 or table.shape[1] == 1 + math.prod(size):
        return ours
    side = math.isqrt(table.shape[1] - 1)
    if side * side != table.shape[1] - 1:
        return ours
    ours["pos_embed.table"] = resize_positions(table, (side, side), size, 1, "bicubic")
    for key in [key for key in ours if key.endswith(".predictor.down")]:
        up = key.removesuffix("down") + "up"
        if up in ours and len(ours[key]) == len(ours[up]) == table.shape[1]:
            ours[key], ours[up] = resize_factors(ours[key], ours[up], (side, side), size, 1)
    return ours


def _cfg(size: int = 224, patch: int = 16) -> dict[str, Any]:
    return cfg(
        input_size=(3, size, size), pool_size=(size // patch, size // patch), first_conv="patch_embed.proj",
        classifier="head", license="mit", origin_url="https://github.com/lim142857/Sparsifiner",
        paper_name="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        paper_ids="arXiv:2303.13755")


default_cfgs = generate_default_cfgs({
    "sparsifiner_deit_tiny.untrained": _cfg(),
    "sparsifiner_deit_small.untrained": _cfg(),
    "test_sparsifiner.untrained": _cfg(64, 8),
})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> Sparsifiner:
    feature_cfg = dict(out_indices=3, feature_cls="getter")  # the last three blocks, as of timm's vision transformers
    return build_model(
        Sparsifiner, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg,
        **defaults | kwargs)


@register_model
def sparsifiner_deit_tiny(pretrained: bool = False, **kwargs: Any) -> Sparsifiner:
    """DeiT-Ti with a quarter of the keys; no weights."""
    return _create("sparsifiner_deit_tiny", pretrained, {}, **kwargs)


@register_model
def sparsifiner_deit_small(pretrained: bool = False, **kwargs: Any) -> Sparsifiner:
    """DeiT-S with a quarter of the keys; no weights."""
    return _create("sparsifiner_deit_small", pretrained, dict(embed_dim=384, num_heads=6), **kwargs)


@register_model
def test_sparsifiner(pretrained: bool = False, **kwargs: Any) -> Sparsifiner:  # noqa: PT028 - no test function
    """Small enough for tests; training is the second phase, as there is no DeiT of this size to start from."""
    defaults = dict(
        img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3, rank=10, reconstruct=False, global_pool="avg")
    return _create("test_sparsifiner", pretrained, defaults, **kwargs)


family = Family(
    small={"test_sparsifiner": dict(reconstruct=True, global_pool="token")},
    peers=[Peer("sparsifiner_deit_tiny", "deit_tiny_patch16_224")],
    checkpoint_filter_fn=checkpoint_filter_fn,
    auxiliary_parameters=r"\.predictor\.",
    reductions=lambda name: (8,) if name.startswith("test_") else (16,),
)
