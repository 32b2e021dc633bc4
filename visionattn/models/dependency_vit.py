"""DependencyViT: a plain vision transformer of reversed attention, in which a tree of dependencies can be read.

Paper: "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention" (CVPR 2023, arXiv 2304.03282).
The authors published neither code nor weights (https://github.com/dingmyu/DependencyViT holds an MIT licence alone):
this is written from the paper's text, and what that leaves open is this project's choice. See
docs/models/dependency_vit.md.
"""
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Optional, Tuple  # noqa: UP035 - TorchScript reads Optional and Tuple

import torch
from timm.layers import (
    DropPath,
    PatchEmbed,
    calculate_drop_path_rates,
    register_notrace_module,
    to_2tuple,
    trunc_normal_,
)
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers.checkpointing import checkpointed
from ..layers.reversed import MessageController, ReversedAttention, take_tokens
from ..layers.scripting import unscripted
from ..ops.dispatch import larger, numbers
from ._backbone import TokenBackbone
from ._blocks import Perceptron
from ._builder import build_model, cfg
from ._family import Family, Peer
from ._tables import Grid, PositionEmbedding

__all__ = ["DependencyViT"]


class FeedForward(nn.Module):
    """The second half of a block: a perceptron beside a shortcut, then the tokens of the whole map again.

    Args:
        dim: Channels.
        mlp_ratio: Width of the perceptron's hidden layer, in ``dim``.
        proj_drop: Dropout rate in the perceptron.
        drop_path: Rate at which a sample skips the perceptron in training.
        norm_layer: Makes the norm.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            mlp_ratio: float,
            proj_drop: float,
            drop_path: float,
            norm_layer: Any,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = norm_layer(dim, **dd)
        self.mlp = Perceptron(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: Tensor, owner: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        """Returns ``[batch, tokens of the map, dim]``, each token that of its ``owner`` in x (None: its own)."""
        x = x + self.drop_path(self.mlp(self.norm(x)))
        return x if owner is None else _take(x, owner)


State = Tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor]]  # noqa: UP006, UP045


@register_notrace_module
class DependencyBlock(nn.Module):
    """Reversed attention, gated, and a perceptron; tokens that send least may be pruned between the two.

    Args:
        dim: Channels.
        num_heads: Heads of the attention.
        temperature: Of the head selector.
        gate_dim: Width of the message controller's hidden layer; None for ``dim``.
        cumulative: Whether gates are multiplied by those of the blocks before.
        left: Tokens that are left after the attention, in thousandths of those of the map; 1000 for all.
        mlp_ratio: Width of the perceptron's hidden layer, in ``dim``.
        proj_drop: Dropout rate of the projections.
        drop_path: Rate at which a sample skips a branch in training.
        norm_layer: Makes a norm.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            temperature: float,
            gate_dim: int | None,
            cumulative: bool,
            left: int,
            mlp_ratio: float,
            proj_drop: float,
            drop_path: float,
            norm_layer: Any,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.cumulative = cumulative
        self.left = left
        self.norm = norm_layer(dim, **dd)
        self.controller = MessageController(dim, gate_dim, **dd)
        self.attn = ReversedAttention(dim, num_heads, temperature, proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.ffn = FeedForward(dim, mlp_ratio, proj_drop, drop_path, norm_layer, **dd)

    def forward(
            self,
            x: Tensor,
            gate: Tensor,
            kept: Optional[Tensor] = None,  # noqa: UP045
            owner: Optional[Tensor] = None,  # noqa: UP045
    ) -> State:
        """One block on the tokens of a map, of which some may be pruned.

        Args:
            x: Tokens ``[batch, tokens, dim]``; a pruned one is its owner's.
            gate: Their gates ``[batch, tokens]``; of a pruned one that which it had last.
            kept: Numbers of those that are not pruned, ``[batch, count]``; None for all.
            owner: For every token the place in ``kept`` of the one that stands for it, ``[batch, tokens]``.

        Returns:
            The same four.
        """
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpointed(self, self.branches, x, gate, kept, owner)
        return self.branches(x, gate, kept, owner)

    def branches(
            self,
            x: Tensor,
            gate: Tensor,
            kept: Optional[Tensor],  # noqa: UP045
            owner: Optional[Tensor],  # noqa: UP045
    ) -> State:
        """What the block computes."""
        if kept is not None:
            x = _take(x, kept)
        y = self.norm(x)
        opened = self.controller(y)
        if kept is None:
            gate = opened = gate * opened if self.cumulative else opened
        else:
            opened = gate.gather(1, kept) * opened if self.cumulative else opened
            gate = gate.scatter(1, kept, opened)
        if self.left == 1000:
            x = x + self.drop_path(self.attn(y, opened))
        else:
            # What a token sends to all others and over all heads is its gate.
            stays, goes = _split(opened, gate, self.left)
            sent, parents = self.attn.with_parents(y, opened, goes, stays)
            x = _take(x + self.drop_path(sent), stays)
            owner = _new_owner(owner, stays, goes, parents)
            kept = stays if kept is None else kept.gather(1, stays)
        return self.ffn(x, owner), gate, kept, owner


@unscripted
def _split(score: Tensor, of_map: Tensor, left: int) -> Tuple[Tensor, Tensor]:  # noqa: UP006
    """Numbers of the tokens with the highest scores, ``left`` thousandths of those of a map, and of the others."""
    count, tokens = numbers((score.shape[1], of_map.shape[1]))
    order = score.detach().topk(count, dim=1).indices
    left = larger(tokens * left // 1000, 1)
    return order[:, :left], order[:, left:]


@unscripted
def _new_owner(owner: Optional[Tensor], stays: Tensor, goes: Tensor, parents: Tensor) -> Tensor:  # noqa: UP045
    """For every token of a map the place in ``stays`` of who stands for it, now that ``goes`` are their parents'."""
    places = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
    moved = torch.zeros_like(torch.cat([stays, goes], dim=1)).scatter(1, stays, places).scatter(1, goes, parents)
    return moved if owner is None else moved.gather(1, owner)


@unscripted
def _take(x: Tensor, index: Tensor) -> Tensor:
    return take_tokens(x, index)


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate.to(x.dtype)


class DependencyViT(TokenBackbone):
    """DependencyViT for images of any size; those that the patches do not divide are padded with zeros.

    There is no class token. After the last norm every token is multiplied by its gate, then tokens are averaged. In a
    lite model some blocks prune the tokens that send least. A pruned token is from then on its parent's, the kept token
    that got most of its last message, or who stands for that one: so features and maps have all tokens.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the tokens; "" for not at all.
        img_size: Height and width of the images that the table of positions is for.
        patch_size: Height and width of a patch.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads per block.
        temperature: Of the head selectors: the lower, the more a token favours one head.
        gate_dim: Width of the message controllers' hidden layers; None for ``embed_dim``.
        cumulative_gates: Whether a token's gate is the product of those of all blocks so far.
        prune_blocks: Numbers of the blocks, from 0, that prune.
        prune_ratio: Tokens that each of these prunes, as a share of the map's.
        mlp_ratio: Width of the perceptrons' hidden layer, in ``embed_dim``.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the projections in the blocks.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: There is no such block, or nothing would be left of the tokens.
    """

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
            num_heads: int = 12,
            temperature: float = 0.1,
            gate_dim: int | None = None,
            cumulative_gates: bool = True,
            prune_blocks: Sequence[int] = (),
            prune_ratio: float = 0.16,
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if len(set(prune_blocks)) < len(prune_blocks) or not set(prune_blocks) <= set(range(depth)):
            raise ValueError(f"prune_blocks must be different numbers from 0 to {depth - 1}, got {prune_blocks}")
        if not 0 <= prune_ratio * max(len(prune_blocks), 1) < 1:
            raise ValueError(
                f"prune_ratio must be at least 0 and, times the number of prune_blocks ({len(prune_blocks)}), less "
                f"than 1, got {prune_ratio}")
        self.in_chans = in_chans
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size, module=f"blocks.{i}.ffn") for i in range(depth)]
        self.img_size = to_2tuple(img_size)
        self.patch_embed = PatchEmbed(
            img_size=None, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, output_fmt="NHWC",
            strict_img_size=False, dynamic_img_pad=True, **dd)
        self.pos_embed = PositionEmbedding(embed_dim, self.map_size(self.img_size), mode="bicubic", **dd)

        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depth)
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        steps = [sum(j <= i for j in prune_blocks) for i in range(depth)]
        self.blocks = nn.ModuleList([
            DependencyBlock(
                embed_dim, num_heads, temperature, gate_dim, cumulative_gates,
                round(1000 * (1 - prune_ratio * steps[i])) if i in prune_blocks else 1000, mlp_ratio, proj_drop_rate,
                drop_paths[i], norm_layer, **dd)
            for i in range(depth)
        ])
        self.finish(embed_dim, num_classes, global_pool, drop_rate, norm_layer=norm_layer, num_prefix_tokens=0, **dd)

    @torch.jit.ignore
    def init_module(self, module: nn.Module, needs_reset: bool) -> None:
        """Draws the parameters of one module, so that narrow models learn too, which they hardly do from small weights.

        Of attention and perceptrons by Glorot's uniform rule, as of ViT's authors; selectors and controllers stay small.
        Positions have the deviation 0.5, about that of patches: the messages of tokens that look alike then differ.
        """
        super().init_module(module, needs_reset)
        if isinstance(module, ReversedAttention):
            nn.init.xavier_uniform_(module.qkv.weight)
            nn.init.xavier_uniform_(module.proj.weight)
        elif isinstance(module, Perceptron):
            nn.init.xavier_uniform_(module.fc1.weight)
            nn.init.xavier_uniform_(module.fc2.weight)
        elif isinstance(module, PositionEmbedding):
            trunc_normal_(module.table, std=.5)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Grid) -> None:
        """Makes the table of positions that of another image size.

        The model takes images of any size without this, interpolating the table, and computes the same after it. What
        changes is the size of the table, in which it is trained further and saved.
        """
        self.img_size = to_2tuple(img_size)
        self.pos_embed.set_input_size(self.map_size(self.img_size))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name of the position embeddings."""
        return {"pos_embed.table"}

    def as_tokens(self, x: Tensor) -> Tensor:
        """A map of patches ``[batch, height, width, dim]`` as tokens with their positions."""
        return x.flatten(1, 2) + self.pos_embed(x.shape[1], x.shape[2])

    def run_parts(self, x: Tensor, taken: Collection[int], stop: int) -> tuple[Tensor, list[Tensor]]:
        """Runs the first blocks on images, without the final norm and the gates, see :class:`TokenBackbone`."""
        x, _, maps, _ = self._run(x, taken, stop)
        return x, maps

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = "NCHW",
            intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after the blocks, see :class:`TokenBackbone`; with ``norm`` they are multiplied by the gates too."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        x, gate, maps, gates = self._run(x, taken, last + 1 if stop_early else len(self.blocks))
        if norm:
            maps = [_gated(self.norm(found), opened) for found, opened in zip(maps, gates, strict=True)]
        maps = [found.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else found.flatten(1, 2)
                for found in maps]
        return maps if intermediates_only else (_gated(self.norm(x), gate), maps)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the final norm, times their gates: ``[batch, height * width, num_features]``."""
        x = self.as_tokens(self.first_map(x))
        gate = torch.ones_like(x[:, :, 0])
        kept: Optional[Tensor] = None  # noqa: UP045
        owner: Optional[Tensor] = None  # noqa: UP045
        for block in self.blocks:
            x, gate, kept, owner = block(x, gate, kept, owner)
        return _gated(self.norm(x), gate[:, :, None])

    @torch.jit.ignore
    def _run(
            self, x: Tensor, taken: Collection[int], stop: int,
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Tokens and gates ``[batch, tokens, 1]`` after the first blocks, maps of those taken and of their gates."""
        x = self.first_map(x)
        size, maps, gates = (x.shape[1], x.shape[2]), [], []
        x = self.as_tokens(x)
        gate = torch.ones_like(x[:, :, 0])
        kept = owner = None
        for i, block in enumerate(self.blocks[:stop]):
            x, gate, kept, owner = block(x, gate, kept, owner)
            if i in taken:
                maps.append(x.unflatten(1, size))
                gates.append(gate[..., None].unflatten(1, size))
        return x, gate[..., None], maps, gates


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """There are no names but ours."""
    return state_dict


def _cfg(size: int = 224, patch: int = 16) -> dict[str, Any]:
    return cfg(
        input_size=(3, size, size), pool_size=(size // patch, size // patch), first_conv="patch_embed.proj",
        classifier="head", license="apache-2.0", origin_url="https://arxiv.org/abs/2304.03282",
        paper_name="Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
        paper_ids="arXiv:2304.03282")


default_cfgs = generate_default_cfgs({
    "dependency_vit_tiny.untrained": _cfg(),
    "dependency_vit_small.untrained": _cfg(),
    "dependency_vit_lite_tiny.untrained": _cfg(),
    "dependency_vit_lite_small.untrained": _cfg(),
    "test_dependency_vit.untrained": _cfg(64, 8),
    "test_dependency_vit_lite.untrained": _cfg(64, 8),
})

_LITE = dict(prune_blocks=(2, 5, 8, 11))
_TEST = dict(img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=4)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> DependencyViT:
    feature_cfg = dict(out_indices=3, feature_cls="getter")  # the last three blocks, as of timm's vision transformers
    return build_model(
        DependencyViT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg,
        **defaults | kwargs)


@register_model
def dependency_vit_tiny(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """As wide and deep as DeiT-Ti, 12 heads; no weights."""
    return _create("dependency_vit_tiny", pretrained, {}, **kwargs)


@register_model
def dependency_vit_small(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """As wide and deep as DeiT-S, 12 heads; no weights."""
    return _create("dependency_vit_small", pretrained, dict(embed_dim=384), **kwargs)


@register_model
def dependency_vit_lite_tiny(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """``dependency_vit_tiny`` that prunes 16 % of the tokens at a time, four times; no weights."""
    return _create("dependency_vit_lite_tiny", pretrained, _LITE, **kwargs)


@register_model
def dependency_vit_lite_small(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """``dependency_vit_small`` that prunes 16 % of the tokens at a time, four times; no weights."""
    return _create("dependency_vit_lite_small", pretrained, _LITE | dict(embed_dim=384), **kwargs)


@register_model
def test_dependency_vit(pretrained: bool = False, **kwargs: Any) -> DependencyViT:  # noqa: PT028 - no test function
    """Small enough for tests."""
    return _create("test_dependency_vit", pretrained, _TEST, **kwargs)


@register_model
def test_dependency_vit_lite(pretrained: bool = False, **kwargs: Any) -> DependencyViT:  # noqa: PT028
    """Small enough for tests, pruning in two blocks."""
    defaults = _TEST | dict(prune_blocks=(1, 2), prune_ratio=0.25)
    return _create("test_dependency_vit_lite", pretrained, defaults, **kwargs)


family = Family(
    small={"test_dependency_vit": {}, "test_dependency_vit_lite": {}},
    peers=[Peer("dependency_vit_tiny", "deit_tiny_patch16_224"),
           Peer("dependency_vit_lite_tiny", "deit_tiny_patch16_224")],
    checkpoint_filter_fn=checkpoint_filter_fn,
    reductions=lambda name: (8,) if name.startswith("test_") else (16,),
)
