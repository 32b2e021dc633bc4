"""Agent-DeiT: the plain vision transformer with agent attention.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention" (ECCV 2024, arXiv 2312.08874). Official
code and weights: https://github.com/LeapLabTHU/Agent-Attention (without a licence file).
"""
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, PatchEmbed, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import AgentAttention
from ..layers.full import attend
from ._agent import agent_cfg, our_tables, set_input_size
from ._backbone import TokenBackbone
from ._blocks import PlacedBlock, TokenBlock
from ._builder import build_model
from ._family import Family, Peer, Published
from ._tables import Grid, PositionEmbedding

__all__ = ["AgentDeiT"]


class FullAttention(Attention):
    """timm's, with second derivatives and forward-mode ones, which PyTorch's fused operator alone has not."""

    by_head = ("qkv",)  # see visionattn.analysis.prune_heads

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens ``[B, N, dim]`` to the same."""
        qkv = self.qkv(x)
        B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q, k, v = qkv.reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj_drop(self.proj(attend(q, k, v).transpose(1, 2).reshape(B, N, C)))


class AgentDeiT(TokenBackbone):
    """Agent-DeiT for images of any size; those that the patches do not divide are padded with zeros.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: What the head takes: ``"token"``, the class token; ``"avg"``, the mean of the others; "", all.
        img_size: Height and width of the images that the tables of biases and positions are for.
        patch_size: Height and width of a patch.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads per block.
        agents: Rows (and columns) of agents that the bias tables are for.
        agent_grid: Rows and columns of agents to work with; None for those of the tables.
        agent_depth: Number of blocks, from the first, that have agent attention; the others have full attention.
        mlp_ratio: Width of the perceptrons' hidden layer, in ``embed_dim``.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the projections in the blocks.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
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
            agents: int = 7,
            agent_grid: Grid | None = None,
            agent_depth: int = 12,
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

        def block(i: int) -> nn.Module:
            options = dict(proj_drop=proj_drop_rate, drop_path=drop_paths[i], norm_layer=norm_layer, **dd)
            if i >= agent_depth:
                attn = FullAttention(embed_dim, num_heads, qkv_bias=True, proj_drop=proj_drop_rate, **dd)
                return TokenBlock(embed_dim, attn, mlp_ratio, **options)
            return PlacedBlock(embed_dim, AgentAttention(
                embed_dim, num_heads, size, (agents, agents), agent_grid, num_prefix_tokens=1,
                proj_drop=proj_drop_rate, **dd), mlp_ratio, **options)

        self.blocks = nn.ModuleList([block(i) for i in range(depth)])
        self.finish(embed_dim, num_classes, global_pool, drop_rate, norm_layer=norm_layer, **dd)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draws all parameters anew, e.g. after ``to_empty`` of a model that was built on the meta device."""
        super().init_weights(needs_reset)
        trunc_normal_(self.cls_token, std=.02)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Grid | None = None, agent_grid: Grid | None = None) -> None:
        """Makes the tables those of another image size, and sets another grid of agents to work with.

        The model takes images of any size without this, interpolating its tables, and computes the same after it. What
        changes is the size of the tables, in which they are trained further and saved.

        Args:
            img_size: Height and width of the images; None leaves the tables as they are.
            agent_grid: Rows and columns of agents; None leaves it as it is.
        """
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
        set_input_size(self, None if img_size is None else self.map_size(img_size), agent_grid)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the class token and of the position embeddings."""
        return {"cls_token", "pos_embed.table"}

    def as_tokens(self, x: Tensor) -> Tensor:
        """A map of patches ``[batch, height, width, dim]`` as tokens with their positions, after the class token."""
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        return tokens + self.pos_embed(x.shape[1], x.shape[2])


def dense_args(variant: str, task: str) -> dict[str, Any]:
    """Nothing: the authors have no code of this family for ``"detection"`` or ``"segmentation"``."""
    return {}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' entries to ours (ours stay), and fits tables to the model's image size."""
    renamed = {"pos_embed.table" if key == "pos_embed" else key: x for key, x in state_dict.items()}
    return our_tables(renamed, model)


def _cfg(file: str = "", size: int = 224) -> dict[str, Any]:
    return agent_cfg(file, size, pool_size=(size // 16, size // 16), classifier="head")


default_cfgs = generate_default_cfgs({
    "agent_deit_t.in1k": _cfg("57e0904221824ee7b7af"),
    "agent_deit_s.in1k": _cfg("fdd43304372541db8ea7"),
    "agent_deit_s_448.in1k": _cfg("a228f86241c445f1969b", size=448),
    "agent_deit_b.in1k": _cfg("5115f15fdd7e4ab58fbc"),
    "test_agent_deit.untrained": _cfg(size=64),
})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> AgentDeiT:
    feature_cfg = dict(out_indices=3, feature_cls="getter")  # the last three blocks, as of timm's vision transformers
    return build_model(
        AgentDeiT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg,
        **defaults | kwargs)


@register_model
def agent_deit_t(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """6.0 M parameters, 1.2 GMACs, published 74.9 % top-1 at 224 px."""
    return _create("agent_deit_t", pretrained, {}, **kwargs)


@register_model
def agent_deit_s(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """22.6 M parameters, 4.4 GMACs, published 80.5 % top-1 at 224 px."""
    return _create("agent_deit_s", pretrained, dict(embed_dim=384, num_heads=6), **kwargs)


@register_model
def agent_deit_s_448(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """23.1 M parameters, 17.6 GMACs, published 83.1 % top-1 at 448 px."""
    return _create("agent_deit_s_448", pretrained, dict(embed_dim=384, num_heads=6, img_size=448), **kwargs)


@register_model
def agent_deit_b(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """Agents in the first four blocks only: 87.2 M parameters, 17.5 GMACs, published 82.0 % top-1 at 224 px."""
    model_args = dict(embed_dim=768, num_heads=12, agents=9, agent_depth=4)
    return _create("agent_deit_b", pretrained, model_args, **kwargs)


@register_model
def test_agent_deit(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:  # noqa: PT028 - no test function
    """Small enough for tests."""
    model_args = dict(img_size=64, embed_dim=48, depth=4, num_heads=3, agents=3, agent_depth=3)
    return _create("test_agent_deit", pretrained, model_args, **kwargs)


family = Family(
    small={"test_agent_deit": {}},
    published={
        "agent_deit_t": Published(74.9, 1.2), "agent_deit_s": Published(80.5, 4.4),
        "agent_deit_s_448": Published(83.1, 17.7), "agent_deit_b": Published(82.0, 17.6),
    },
    goldens={"agent_deit_t": "agent_deit_t", "agent_ops": "*"},
    peers=[Peer("agent_deit_t", "deit_tiny_patch16_224"), Peer("agent_deit_t", "deit_tiny_patch16_224", size=672)],
    dense_args=dense_args,
    checkpoint_filter_fn=checkpoint_filter_fn,
    reductions=(16,),
)
