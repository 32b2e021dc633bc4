"""What the Agent Attention families share: the frame of four stages, and the authors' names.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention" (ECCV 2024, arXiv 2312.08874). Official
code and weights: https://github.com/LeapLabTHU/Agent-Attention (without a licence file).
"""
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..layers.agent import AgentAttention, resize
from ._backbone import Backbone, stage_levels
from ._blocks import Block, Stage
from ._builder import cfg
from ._tables import Grid, PositionEmbedding, resize_positions

__all__ = ["AgentBackbone", "agent_cfg", "our_tables", "set_input_size"]


class AgentBackbone(Backbone):
    """Four stages of agent attention and, beside it, of another attention, on maps ``[batch, height, width, dim]``.

    A subclass says in :meth:`map_sizes` how large the maps are, and in its constructor sets ``patch_embed`` and calls
    :meth:`build_stages` and ``finish``.
    """

    @torch.jit.ignore
    def map_sizes(self, img_size: Grid) -> list[Grid]:
        """Height and width of each stage's map for images of ``img_size``."""
        raise NotImplementedError

    @torch.jit.ignore
    def build_stages(
            self,
            img_size: int | Grid,
            embed_dims: Sequence[int],
            depths: Sequence[int],
            num_heads: Sequence[int],
            agents: Sequence[int],
            agent_grids: Sequence[Grid] | None,
            agent_depths: Sequence[int],
            mlp_ratios: Sequence[float],
            downsample: Callable[[int], nn.Module],
            other_attention: Callable[[int, int], nn.Module] | None = None,
            norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
            drop_path_rate: float = 0.,
            proj_drop_rate: float = 0.,
            **dd: Any,
    ) -> None:
        """Makes ``stages`` and ``feature_info``.

        Args:
            img_size: Height and width of the images that the bias tables are for.
            embed_dims: Channels of the stages.
            depths: Blocks per stage.
            num_heads: Heads per stage.
            agents: Rows (and columns) of agents that the bias tables are for, per stage.
            agent_grids: Rows and columns of agents to work with, per stage; None for those of the tables.
            agent_depths: Number of blocks of each stage, from its first, that have agent attention.
            mlp_ratios: Width of the perceptrons' hidden layer in channels of the stage, per stage.
            downsample: Makes what stands at the start of a stage after the first, by the stage's number.
            other_attention: Makes the attention of other blocks, by the numbers of stage and block.
            norm_layer: Makes the blocks' norms.
            drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
            proj_drop_rate: Dropout rate of the projections in the blocks.
            dd: Device and dtype of the parameters.

        Raises:
            ValueError: A sequence has not one entry per stage.
        """
        stages = len(depths)
        for name, values in dict(
                embed_dims=embed_dims, num_heads=num_heads, agents=agents, agent_grids=agent_grids,
                agent_depths=agent_depths, mlp_ratios=mlp_ratios).items():
            if values is not None and len(values) != stages:
                raise ValueError(f"{name} must have one entry per stage, {stages}, got {values}")
        self.img_size = to_2tuple(img_size)
        sizes = self.map_sizes(self.img_size)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.feature_info = stage_levels(embed_dims)

        def attention(stage: int, block: int) -> nn.Module:
            if block >= agent_depths[stage] and other_attention is not None:
                return other_attention(stage, block)
            grid = to_2tuple(agent_grids[stage]) if agent_grids else None
            return AgentAttention(
                embed_dims[stage], num_heads[stage], sizes[stage], (agents[stage],) * 2, grid,  # type: ignore[arg-type]
                proj_drop=proj_drop_rate, **dd)

        self.stages = nn.Sequential(*[
            Stage(downsample(i) if i else nn.Identity(), [
                Block(
                    embed_dims[i], attention(i, j), mlp_ratios[i], proj_drop=proj_drop_rate, drop_path=drop_paths[i][j],
                    norm_layer=norm_layer, **dd)
                for j in range(depths[i])
            ])
            for i in range(stages)
        ])

    @torch.jit.ignore
    def set_input_size(
            self,
            img_size: int | Grid | None = None,
            agent_grids: Sequence[Grid] | None = None,
    ) -> None:
        """Makes the tables those of another image size, and sets other grids of agents to work with.

        The model takes images of any size without this, interpolating its tables, and computes the same after it. What
        changes is the size of the tables, in which they are trained further and saved.

        Args:
            img_size: Height and width of the images; None leaves the tables as they are.
            agent_grids: Rows and columns of agents per stage; None leaves them as they are.
        """
        sizes: list[Any] = [None] * len(self.stages)
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
            sizes = self.map_sizes(self.img_size)
        grids = agent_grids or [None] * len(self.stages)  # type: ignore[list-item]
        for i, (stage, size, grid) in enumerate(zip(self.stages, sizes, grids, strict=True)):
            set_input_size(stage, size, grid)
            if i == 0:
                set_input_size(self.patch_embed, size, grid)


def set_input_size(module: nn.Module, size: Grid | None, agent_grid: Grid | None) -> None:
    """Gives all tables of a module the size of another map, and its attention another grid; None changes nothing."""
    for part in module.modules():
        if isinstance(part, AgentAttention):
            part.set_input_size(size, agent_grid)
        elif isinstance(part, PositionEmbedding) and size is not None:
            part.set_input_size(size)


_TABLES = {"n": "map", "h": "rows", "w": "columns", "c": "prefix"}


def our_tables(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names and axes of ours for the authors' bias tables; what is for another image size gets the model's.

    Leaves out the tables of Swin that a model computes itself. The other names must be ours already.
    """
    wanted = model.state_dict()
    positions = {f"{name}.table": part for name, part in model.named_modules() if isinstance(part, PositionEmbedding)}
    renamed = {}
    for key, x in state_dict.items():
        if key.endswith((".relative_position_index", ".attn_mask")):
            continue
        if (match := re.search(r"\.(a([nhwc])|([nhwc])a)_bias$", key)) is not None:
            kind = match[2] or match[3]
            tables = "agent_bias" if match[2] else "query_bias"
            key = f"{key[:match.start()]}.{tables}.{_TABLES[kind]}"
            if kind != "n":
                x = x[0]
                if tables == "query_bias":  # the authors put agents last
                    x = x.movedim(-1, 1)
        if key in wanted and x.shape != wanted[key].shape:
            if key.endswith((".rows", ".columns")):
                x = resize(x, wanted[key].shape[2:])  # type: ignore[arg-type]
            elif key in positions:
                part = positions[key]
                side = round((x.shape[1] - part.num_prefix_tokens) ** 0.5)
                if part.num_prefix_tokens + side * side == x.shape[1]:
                    x = resize_positions(x, (side, side), part.size, part.num_prefix_tokens, part.mode)
        renamed[key] = x
    return renamed


def agent_cfg(file: str = "", size: int = 224, **kwargs: Any) -> dict[str, Any]:
    """Pretrained cfg of a model that the authors published as the share ``file``, for images of ``size`` pixels."""
    url = f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1" if file else ""
    return cfg(**dict(
        url=url, input_size=(3, size, size), pool_size=(size // 32, size // 32), first_conv="patch_embed.proj",
        classifier="head.fc", crop_mode="squash", license="unspecified",
        origin_url="https://github.com/LeapLabTHU/Agent-Attention", paper_ids="arXiv:2312.08874",
        paper_name="Agent Attention: On the Integration of Softmax and Linear Attention",
    ) | kwargs)
