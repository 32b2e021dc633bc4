"""Agent-PVT: the pyramid vision transformer with agent attention in all stages, at full resolution.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention" (ECCV 2024, arXiv 2312.08874). Official
code and weights: https://github.com/LeapLabTHU/Agent-Attention (without a licence file).
"""
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ._agent import AgentBackbone, agent_cfg, our_tables
from ._builder import build_model
from ._family import Family, Peer, Published
from ._tables import Grid, PositionEmbedding

__all__ = ["AgentPVT"]


class PatchEmbedding(nn.Module):
    """A map or an image in patches, each normed and given its position's embedding; a remainder is dropped.

    Args:
        in_chans: Channels of the input.
        dim: Channels of the output.
        patch_size: Height and width of a patch.
        size: Height and width, in patches, that the position embeddings are for.
        from_map: Whether the input is a map ``[B, H, W, in_chans]``, not an image ``[B, in_chans, H, W]``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            in_chans: int,
            dim: int,
            patch_size: int,
            size: Grid,
            from_map: bool,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.from_map = from_map
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.pos_embed = PositionEmbedding(dim, size, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map ``[B, H / patch_size, W / patch_size, dim]``, rounded down."""
        if self.from_map:
            x = x.permute(0, 3, 1, 2)
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return x + self.pos_embed(x.shape[1], x.shape[2]).reshape(1, x.shape[1], x.shape[2], x.shape[3])


class AgentPVT(AgentBackbone):
    """Agent-PVT for images of any size from 32 x 32 pixels on; a remainder of the patches is dropped.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        img_size: Height and width of the images that the tables of biases and positions are for.
        embed_dims: Channels of the stages.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        agents: Rows (and columns) of agents that the bias tables are for, per stage.
        agent_grids: Rows and columns of agents to work with, per stage; None for those of the tables.
        mlp_ratios: Width of the perceptrons' hidden layer in channels of the stage, per stage.
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the projections in the blocks.
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0 at the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = "avg",
            img_size: int | Grid = 224,
            embed_dims: Sequence[int] = (64, 128, 320, 512),
            depths: Sequence[int] = (2, 2, 2, 2),
            num_heads: Sequence[int] = (1, 2, 5, 8),
            agents: Sequence[int] = (3, 4, 7, 7),
            agent_grids: Sequence[Grid] | None = None,
            mlp_ratios: Sequence[float] = (8., 8., 4., 4.),
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        sizes = self.map_sizes(to_2tuple(img_size))
        self.patch_embed = PatchEmbedding(in_chans, embed_dims[0], 4, sizes[0], from_map=False, **dd)
        self.build_stages(
            img_size, embed_dims, depths, num_heads, agents, agent_grids, depths, mlp_ratios,
            downsample=lambda i: PatchEmbedding(embed_dims[i - 1], embed_dims[i], 2, sizes[i], from_map=True, **dd),
            norm_layer=partial(nn.LayerNorm, eps=1e-6), drop_path_rate=drop_path_rate, proj_drop_rate=proj_drop_rate,
            **dd)
        # Other than PVT, it has no final norm.
        self.min_sizes = [info["reduction"] for info in self.feature_info]
        self.finish(embed_dims[-1], num_classes, global_pool, drop_rate, norm_layer=None, **dd)

    @torch.jit.ignore
    def map_sizes(self, img_size: Grid) -> list[Grid]:
        """Height and width of each stage's map for images of ``img_size``."""
        return [(img_size[0] // n, img_size[1] // n) for n in (4, 8, 16, 32)]


def dense_args(variant: str, task: str) -> dict[str, Any]:
    """Arguments of ``AgentPVT`` that the authors change for ``task``, ``"detection"`` or ``"segmentation"``."""
    return {"agent_grids": ((12, 12), (16, 16), (28, 28), (28, 28))}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' entries to ours (ours stay), and fits tables to the model's image size."""
    def part(number: str, first: str, other: str) -> str:
        return first if number == "1" else f"stages.{int(number) - 1}.{other}"

    renamed = {}
    for key, x in state_dict.items():
        key = re.sub(r"^pos_embed([1-4])$", lambda m: part(
            m[1], "patch_embed.pos_embed.table", "downsample.pos_embed.table"), key)
        key = re.sub(r"^patch_embed([1-4])\.", lambda m: part(m[1], "patch_embed.", "downsample."), key)
        key = re.sub(r"^block([1-4])\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        renamed[key] = x
    for key in [key for key in renamed if ".attn.q." in key]:
        stem, _, leaf = key.rpartition("q.")
        renamed[f"{stem}qkv.{leaf}"] = torch.cat([renamed.pop(key), renamed.pop(f"{stem}kv.{leaf}")])
    return our_tables(renamed, model)


default_cfgs = generate_default_cfgs({
    "agent_pvt_t.in1k": agent_cfg("13fdf0e0a7c5498c934f"),
    "agent_pvt_s.in1k": agent_cfg("36b8be9a8863456685a3"),
    "agent_pvt_m.in1k": agent_cfg("4d00ecacf18b45f9b88c"),
    "agent_pvt_m_256.in1k": agent_cfg("654df734121643b19c52", size=256),
    "agent_pvt_l.in1k": agent_cfg("040cfe0cfbbe4762ad09"),
    "test_agent_pvt.untrained": agent_cfg(size=64),
})


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> AgentPVT:
    return build_model(
        AgentPVT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **defaults | kwargs)


@register_model
def agent_pvt_t(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """11.6 M parameters, 2.0 GMACs, published 78.4 % top-1 at 224 px."""
    return _create("agent_pvt_t", pretrained, {}, **kwargs)


@register_model
def agent_pvt_s(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """20.6 M parameters, 4.0 GMACs, published 82.2 % top-1 at 224 px."""
    return _create("agent_pvt_s", pretrained, dict(depths=(3, 4, 6, 3)), **kwargs)


@register_model
def agent_pvt_m(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """35.9 M parameters, 7.0 GMACs, published 83.4 % top-1 at 224 px."""
    return _create("agent_pvt_m", pretrained, dict(depths=(3, 4, 18, 3)), **kwargs)


@register_model
def agent_pvt_m_256(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """36.1 M parameters, 9.1 GMACs, published 83.8 % top-1 at 256 px."""
    return _create("agent_pvt_m_256", pretrained, dict(depths=(3, 4, 18, 3), img_size=256), **kwargs)


@register_model
def agent_pvt_l(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """48.7 M parameters, 10.3 GMACs, published 83.7 % top-1 at 224 px."""
    return _create("agent_pvt_l", pretrained, dict(depths=(3, 8, 27, 3)), **kwargs)


@register_model
def test_agent_pvt(pretrained: bool = False, **kwargs: Any) -> AgentPVT:  # noqa: PT028 - no test function
    """Small enough for tests."""
    model_args = dict(
        img_size=64, embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), agents=(3, 4, 4, 2),
        mlp_ratios=(2., 2., 2., 2.))
    return _create("test_agent_pvt", pretrained, model_args, **kwargs)


family = Family(
    small={"test_agent_pvt": {}},
    published={
        "agent_pvt_t": Published(78.4, 2.0), "agent_pvt_s": Published(82.2, 4.0), "agent_pvt_m": Published(83.4, 7.0),
        "agent_pvt_m_256": Published(83.8, 9.2), "agent_pvt_l": Published(83.7, 10.4),
    },
    goldens={"agent_pvt_t": "agent_pvt_t", "agent_pvt_t_det": "agent_pvt_t", "agent_ops": "*"},
    peers=[Peer("agent_pvt_t", "pvt_v2_b1")],
    dense_args=dense_args,
    checkpoint_filter_fn=checkpoint_filter_fn,
)
