"""Modular ViT: a vision transformer whose attention and perceptrons are mixtures of experts, with a router per task.

Papers: "Mod-Squad: Designing Mixture of Experts As Modular Multi-Task Learners" (CVPR 2023, arXiv 2212.08066) and "An
Efficient General-Purpose Modular Vision Model via Multi-Task Heterogeneous Training" (arXiv 2306.17165). The layers
follow them; the frame (stem, widths, depths, head) is this project's own, see docs/models/modular_vit.md.
"""
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import ExpertAttention, ExpertMlp, set_task
from ..layers.experts import expert_counts
from ._backbone import Backbone
from ._blocks import Block, ConvEmbedding
from ._builder import build_model, cfg
from ._family import Family, Peer, same_names
from ._tables import Grid, PositionEmbedding

__all__ = ["ModularViT"]

_norm = partial(nn.LayerNorm, eps=1e-6)


class ModularViT(Backbone):
    """Pre-norm blocks of expert attention and expert perceptrons on one map of patches.

    Images of any size: sides that the patches do not divide are padded with zeros, and the positions are interpolated
    (bicubic).

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        img_size: Height and width of the images that the table of positions is for.
        patch_size: Height and width of a patch, a power of two: the stem has a convolution of stride 2 for each doubling.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads of a token: experts of the attention that it chooses.
        head_dim: Channels of a head.
        attn_experts: Experts of the attention, of all blocks or of each.
        mlp_experts: Experts of the perceptrons, of all blocks or of each.
        mlp_topk: Experts that a token chooses of the perceptrons.
        mlp_ratio: Width of the perceptrons that a token chooses, together, in ``embed_dim``.
        tasks: Names of the tasks, each with routers of its own; a number for the names "0", "1" and so on; 1 for one
            set of routers that serves any task. The first is set, see :meth:`set_task`.
        task: The task that is set instead.
        router_noise: Add learnt noise to the routers' logits in training.
        router_losses: Weights of each router's auxiliary losses: balance, z-loss, mutual information.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the branches' outputs.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``patch_size`` is no power of two, numbers of experts do not fit, or tasks are not told apart.
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
            head_dim: int = 64,
            attn_experts: int | Sequence[int] = 24,
            mlp_experts: int | Sequence[int] = 16,
            mlp_topk: int = 2,
            mlp_ratio: float = 4.,
            tasks: int | Sequence[str] = 1,
            task: str | None = None,
            router_noise: bool = True,
            router_losses: tuple[float, float, float] = (0.01, 0.001, 5e-4),
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        attn_counts = _of_blocks("attn_experts", attn_experts, depth)
        mlp_counts = _of_blocks("mlp_experts", mlp_experts, depth)
        routing: Any = {"tasks": _names(tasks), "noise": router_noise, "loss_weights": tuple(router_losses)}
        self.in_chans = in_chans
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size, module=f"blocks.{i}") for i in range(depth)]
        self.patch_embed = _stem(in_chans, embed_dim, patch_size, **dd)
        grid = [-(-side // patch_size) for side in to_2tuple(img_size)]
        self.pos_embed = PositionEmbedding(embed_dim, (grid[0], grid[1]), mode="bicubic", **dd)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depth)

        def block(i: int) -> nn.Module:
            attn = ExpertAttention(
                embed_dim, head_dim, attn_counts[i], num_heads, proj_drop=proj_drop_rate, **routing, **dd)
            mlp = partial(ExpertMlp, num_experts=mlp_counts[i], topk=mlp_topk, **routing)
            return Block(embed_dim, attn, mlp_ratio / mlp_topk, proj_drop=proj_drop_rate, drop_path=drop_paths[i],
                         norm_layer=_norm, mlp_layer=mlp, **dd)

        self.blocks = nn.Sequential(*[block(i) for i in range(depth)])
        self.finish(embed_dim, num_classes, global_pool, drop_rate, norm_layer=_norm, **dd)
        if task is not None:
            self.set_task(task)

    @torch.jit.ignore
    def set_task(self, task: str) -> None:
        """Routes as ``task`` does from now on; a model with one set of routers takes any name.

        Raises:
            ValueError: It is none of the model's tasks.
        """
        set_task(self, task)

    @torch.jit.ignore
    def expert_args(self) -> dict[str, Any]:
        """The arguments that build a model with as many experts and the same tasks, as of one cut to a task."""
        blocks: Any = self.blocks
        counts, tasks = expert_counts(self), blocks[0].attn.router.tasks
        return {"attn_experts": counts["attn"], "mlp_experts": counts["mlp"], "tasks": list(tasks) or 1}

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Grid) -> None:
        """Makes the table of positions that of another image size, to train it further and save it.

        The model takes images of any size without this and computes the same after it.
        """
        patch = self.feature_info[0]["reduction"]
        height, width = (-(-side // patch) for side in to_2tuple(img_size))
        self.pos_embed.set_input_size((height, width))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the positions and of the experts' biases."""
        return {"pos_embed.table"} | {name for name, _ in self.named_parameters() if name.endswith("_bias")}

    def embed(self, x: Tensor) -> Tensor:
        """The first map of images: patches with their positions."""
        x = self.patch_embed(x)
        return x + self.pos_embed(x.shape[1], x.shape[2]).reshape(1, x.shape[1], x.shape[2], x.shape[3])

    def forward_features(self, x: Tensor) -> Tensor:
        """Last map after the final norm, ``[batch, height, width, embed_dim]``."""
        return self.norm(self.blocks(self.first_map(x)))


def _stem(in_chans: int, dim: int, patch_size: int, **dd: Any) -> nn.Sequential:
    """Convolutions of stride 2, each with twice the channels of the last, norms and GELU, and a linear layer."""
    doublings = patch_size.bit_length() - 1
    if patch_size != 2 ** doublings or not doublings:
        raise ValueError(f"patch_size must be a power of two, 2 at least, got {patch_size}")
    layers: list[nn.Module] = []
    for i in reversed(range(doublings)):
        width = max(dim // 2 ** i, 1)
        layers += [ConvEmbedding(in_chans, width, 3, 2, 1, from_map=bool(layers), **dd), nn.GELU()]
        in_chans = width
    return nn.Sequential(*layers, nn.Linear(dim, dim, **dd))


def _of_blocks(name: str, counts: int | Sequence[int], depth: int) -> list[int]:
    """Numbers of experts of each block."""
    counts = [counts] * depth if isinstance(counts, int) else list(counts)
    if len(counts) != depth:
        raise ValueError(f"{name} must be one number or one for each of the {depth} blocks, got {len(counts)}")
    return counts


def _names(tasks: int | Sequence[str]) -> list[str]:
    """Names of the tasks; none where all share their routers."""
    if isinstance(tasks, str) or (isinstance(tasks, int) and tasks < 1) or (not isinstance(tasks, int) and not tasks):
        raise ValueError(f"tasks must be a number of tasks, 1 at least, or a list of their names, got {tasks!r}")
    if isinstance(tasks, int):
        return [str(i) for i in range(tasks)] if tasks > 1 else []
    return list(tasks)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(
        first_conv="patch_embed.0.proj", classifier="head.fc", pool_size=(14, 14), license="apache-2.0",
        paper_ids=("arXiv:2306.17165", "arXiv:2212.08066"), origin_url="https://arxiv.org/abs/2306.17165", **kwargs)


default_cfgs = generate_default_cfgs({
    "modular_vit_tiny.untrained": _cfg(),
    "modular_vit_small.untrained": _cfg(),
    "test_modular_vit.untrained": _cfg() | dict(input_size=(3, 64, 64), pool_size=(8, 8)),
})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> ModularViT:
    feature_cfg = dict(out_indices=3, feature_cls="getter")  # the last three blocks, as of timm's vision transformers
    return build_model(
        ModularViT, variant, pretrained, pretrained_filter_fn=same_names, feature_cfg=feature_cfg, **defaults | kwargs)


@register_model
def modular_vit_tiny(pretrained: bool = False, **kwargs: Any) -> ModularViT:
    """Of the width and depth of ViT-Ti; a token uses as many weights as there."""
    return _create("modular_vit_tiny", pretrained, {}, **kwargs)


@register_model
def modular_vit_small(pretrained: bool = False, **kwargs: Any) -> ModularViT:
    """Of the width and depth of ViT-S; a token uses as many weights as there."""
    return _create("modular_vit_small", pretrained, dict(embed_dim=384, num_heads=6), **kwargs)


@register_model
def test_modular_vit(pretrained: bool = False, **kwargs: Any) -> ModularViT:  # noqa: PT028 - no test function
    """Small enough for tests."""
    model_args = dict(
        img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=2, head_dim=16, attn_experts=6, mlp_experts=4)
    return _create("test_modular_vit", pretrained, model_args | kwargs)


family = Family(
    small={"test_modular_vit": dict(router_noise=False)},  # so that two steps are the same; it needs no argument
    goldens={"experts_ops": "*"},
    peers=[Peer("modular_vit_tiny", "vit_tiny_patch16_224")],
    reductions=lambda name: (8,) if name.startswith("test_") else (16,),
)
