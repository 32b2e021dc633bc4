"""Agent-DeiT: the plain vision transformer with agent attention.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention" (ECCV 2024, arXiv 2312.08874). Official
code and weights: https://github.com/LeapLabTHU/Agent-Attention (without a licence file).
"""
from functools import partial
from typing import Any, Optional, Tuple  # noqa: UP035 - TorchScript reads Optional and Tuple

import torch
from timm.layers import PatchEmbed, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from ..layers import AgentAttention
from ..layers.full import attend
from . import nat
from ._agent import Grid, PositionEmbedding, agent_cfg, our_tables, set_input_size
from ._builder import build_model

__all__ = ["AgentDeiT"]


class FullAttention(nn.Module):
    """Attention of all tokens ``[B, N, dim]`` to all.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, proj_drop: float = 0., device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: Optional[Tuple[int, int]] = None) -> Tensor:  # noqa: UP006, UP045
        """Returns ``[B, N, dim]``; takes the size of the map only to be called as agent attention is."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = attend(q, k, v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class Block(nat.Block):
    """Pre-norm transformer block on tokens ``[B, 1 + H * W, dim]``, the class token first."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # type: ignore[override]
        """Returns tokens of the same shape."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self._of_tokens, x, height, width)
        return self._of_tokens(x, height, width)

    def _of_tokens(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), (height, width)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class AgentDeiT(nat.Backbone):
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

    parts = "blocks"
    output_fmt = "NLC"
    num_prefix_tokens = 1

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
        self.patch_size = patch_size
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size, module=f"blocks.{i}") for i in range(depth)]
        size = self._map_size(img_size)
        self.patch_embed = PatchEmbed(
            img_size=None, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, output_fmt="NHWC",
            strict_img_size=False, dynamic_img_pad=True, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = PositionEmbedding(embed_dim, size, num_prefix_tokens=1, mode="bicubic", **dd)

        def attention(i: int) -> nn.Module:
            if i >= agent_depth:
                return FullAttention(embed_dim, num_heads, proj_drop=proj_drop_rate, **dd)
            return AgentAttention(
                embed_dim, num_heads, size, (agents, agents), agent_grid, num_prefix_tokens=1,
                proj_drop=proj_drop_rate, **dd)

        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depth)
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList([
            Block(
                embed_dim, attention(i), mlp_ratio, proj_drop=proj_drop_rate, drop_path=drop_paths[i],
                norm_layer=norm_layer, **dd)
            for i in range(depth)
        ])
        self.norm = norm_layer(embed_dim, **dd)
        self.global_pool = global_pool
        self.head_drop = nn.Dropout(drop_rate)
        self.num_features = self.head_hidden_size = embed_dim
        self.reset_classifier(num_classes)
        self.init_weights(needs_reset=False)

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
        set_input_size(self, None if img_size is None else self._map_size(img_size), agent_grid)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the class token and of the position embeddings."""
        return {"cls_token", "pos_embed.table"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters into layers, for layer decay."""
        return dict(
            stem=r"^(?:cls_token|pos_embed|patch_embed)", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier (0 classes: none) and, if given, what it takes ("": all tokens)."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        weight = self.cls_token
        self.head = nn.Identity() if num_classes == 0 else nn.Linear(
            self.num_features, num_classes, device=weight.device, dtype=weight.dtype)

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = "NCHW",
            intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after the blocks, without the class token.

        Args:
            x: Images ``[batch, in_chans, height, width]``.
            indices: Blocks whose maps to return: the last n if an int, all if None.
            norm: Apply the final norm to all maps.
            stop_early: Compute no block after the last one that is asked for.
            output_fmt: "NCHW" or "NLC", of the returned maps.
            intermediates_only: Return these maps only.

        Returns:
            The final features (as :meth:`forward_features`) and the maps, or the latter only.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        intermediates = []
        x = self.patch_embed(x)
        height, width = x.shape[1:3]
        x = self._tokens(x)
        for i, block in enumerate(self.blocks[:max_index + 1] if stop_early else self.blocks):
            x = block(x, height, width)
            if i in take_indices:
                taken = (self.norm(x) if norm else x)[:, self.num_prefix_tokens:]
                intermediates.append(
                    taken.mT.unflatten(2, (height, width)).contiguous() if output_fmt == "NCHW" else taken)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the final norm, the class token first: ``[batch, 1 + height / 16 * width / 16, embed_dim]``."""
        x = self.patch_embed(x)
        height, width = x.shape[1], x.shape[2]
        x = self._tokens(x)
        for block in self.blocks:
            x = block(x, height, width)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies tokens of :meth:`forward_features`; ``pre_logits`` stops before the classifier."""
        x = global_pool_nlc(x, self.global_pool, num_prefix_tokens=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def _tokens(self, x: Tensor) -> Tensor:
        """A map of patches as tokens with their positions, after the class token."""
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        return tokens + self.pos_embed(x.shape[1], x.shape[2])

    @torch.jit.ignore
    def _map_size(self, img_size: int | Grid) -> Grid:
        height, width = to_2tuple(img_size)
        return -(-height // self.patch_size), -(-width // self.patch_size)


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
