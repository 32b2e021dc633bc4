"""Agent-Swin: the Swin transformer with agent attention over the whole map in its first blocks.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention" (ECCV 2024, arXiv 2312.08874). Official
code and weights: https://github.com/LeapLabTHU/Agent-Attention (without a licence file).
"""
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ..layers.window import WindowAttention
from ._agent import AgentBackbone, agent_cfg, our_tables
from ._builder import build_model
from ._family import DenseNorm, Family, Peer, Published
from ._tables import Grid, resize_rpb, rpb_of_windows

__all__ = ["AgentSwin"]


class AgentSwin(AgentBackbone):
    """Agent-Swin for images of any size; zeros are added at the bottom and on the right as needed.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: How the head pools the last map; "" for not at all.
        img_size: Height and width of the images that the agents' bias tables are for.
        embed_dim: Channels of the first stage; they double from stage to stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        agents: Rows (and columns) of agents that the bias tables are for, per stage.
        agent_grids: Rows and columns of agents to work with, per stage; None for those of the tables.
        agent_depths: Number of blocks of each stage, from its first, that have agent attention; the others attend
            within windows, every second of them (by its number in the stage) within shifted ones.
        window_size: Height and width of a window.
        always_shift: Shift windows also along an axis that one window spans, as the authors do in dense tasks.
        mlp_ratio: Width of the perceptrons' hidden layer, in channels of the stage.
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
            embed_dim: int = 96,
            depths: Sequence[int] = (2, 2, 6, 2),
            num_heads: Sequence[int] = (3, 6, 12, 24),
            agents: Sequence[int] = (3, 4, 7, 7),
            agent_grids: Sequence[Grid] | None = None,
            agent_depths: Sequence[int] = (2, 2, 6, 0),
            window_size: int = 7,
            always_shift: bool = False,
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
        dims = [embed_dim * 2 ** i for i in range(len(depths))]
        self.patch_embed = PatchEmbed(
            img_size=None, patch_size=4, in_chans=in_chans, embed_dim=embed_dim, norm_layer=nn.LayerNorm,
            output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True, **dd)

        def window_attention(stage: int, block: int) -> nn.Module:
            return WindowAttention(
                dims[stage], num_heads[stage], window_size, shift=window_size // 2 if block % 2 else 0,
                always_shift=always_shift, proj_drop=proj_drop_rate, **dd)

        self.build_stages(
            img_size, dims, depths, num_heads, agents, agent_grids, agent_depths, [mlp_ratio] * len(depths),
            downsample=lambda i: PatchMerging(dims[i - 1], dims[i], **dd), other_attention=window_attention,
            drop_path_rate=drop_path_rate, proj_drop_rate=proj_drop_rate, **dd)
        self.finish(dims[-1], num_classes, global_pool, drop_rate, **dd)

    @torch.jit.ignore
    def map_sizes(self, img_size: Grid) -> list[Grid]:
        """Height and width of each stage's map for images of ``img_size``."""
        return [(-(-img_size[0] // n), -(-img_size[1] // n)) for n in (4, 8, 16, 32)]


def dense_args(variant: str, task: str) -> dict[str, Any]:
    """Arguments of ``AgentSwin`` that the authors change for ``task``, ``"detection"`` or ``"segmentation"``."""
    return {"agent_grids": ((9, 9), (12, 12), (14, 14), (7, 7)), "window_size": 7, "always_shift": True}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' entries to ours (ours stay), and fits tables to the model's image and window size.

    The authors hang the downsampler at the end of a stage, we put it at the start of the next. The norms that their
    dense backbones add (``norm0`` .. ``norm3``) are dropped: they are no part of a classifier.
    """
    tables = {name: x.shape for name, x in model.state_dict().items() if name.endswith(".rpb")}
    renamed = {}
    for key, x in state_dict.items():
        if re.match(r"norm\d\.", key):
            continue
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", key)
        key = re.sub(r"^layers\.", "stages.", key)
        key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        if key.endswith(".relative_position_bias_table"):
            key = key.replace(".relative_position_bias_table", ".rpb")
            x = rpb_of_windows(x)
        if key in tables and x.ndim == 3 and x.shape != tables[key]:
            x = resize_rpb(x, tables[key][1:])
        renamed[key] = x
    return our_tables(renamed, model)


default_cfgs = generate_default_cfgs({
    "agent_swin_t.in1k": agent_cfg("a2ddc1190c224f768a41"),
    "agent_swin_s.in1k": agent_cfg("f607172c9fea4d6e99bb"),
    "agent_swin_s_288.in1k": agent_cfg("09760394e93b4046a25e", size=288, crop_pct=1.),
    "agent_swin_b.in1k": agent_cfg("4fcd2d0114bb490483c3"),
    "agent_swin_b_384.in1k": agent_cfg("bb84ee9058954706a557", size=384, crop_pct=1.),
    "test_agent_swin.untrained": agent_cfg(size=64),
})

_SMALL = dict(depths=(2, 2, 18, 2), agent_depths=(2, 2, 0, 0))
_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), agent_depths=(2, 2, 2, 0))


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> AgentSwin:
    return build_model(
        AgentSwin, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **defaults | kwargs)


@register_model
def agent_swin_t(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """28.9 M parameters, 4.5 GMACs, published 82.6 % top-1 at 224 px."""
    return _create("agent_swin_t", pretrained, {}, **kwargs)


@register_model
def agent_swin_s(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """49.7 M parameters, 8.7 GMACs, published 83.7 % top-1 at 224 px."""
    return _create("agent_swin_s", pretrained, _SMALL, **kwargs)


@register_model
def agent_swin_s_288(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """49.7 M parameters, 14.5 GMACs, published 84.1 % top-1 at 288 px."""
    return _create("agent_swin_s_288", pretrained, _SMALL | dict(img_size=288, window_size=9), **kwargs)


@register_model
def agent_swin_b(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """88.1 M parameters, 15.4 GMACs, published 84.0 % top-1 at 224 px."""
    return _create("agent_swin_b", pretrained, _BASE, **kwargs)


@register_model
def agent_swin_b_384(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """88.3 M parameters, 46.2 GMACs, published 84.9 % top-1 at 384 px (fine-tuned from 224 px)."""
    return _create("agent_swin_b_384", pretrained, _BASE | dict(img_size=384, window_size=12), **kwargs)


@register_model
def test_agent_swin(pretrained: bool = False, **kwargs: Any) -> AgentSwin:  # noqa: PT028 - no test function
    """Small enough for tests."""
    model_args = dict(
        img_size=64, embed_dim=16, depths=(1, 2, 2, 2), num_heads=(1, 2, 4, 8), agents=(3, 4, 4, 2),
        agent_depths=(1, 2, 0, 0), window_size=3, mlp_ratio=2.)
    return _create("test_agent_swin", pretrained, model_args, **kwargs)


family = Family(
    small={"test_agent_swin": {}},
    published={
        "agent_swin_t": Published(82.6, 4.5), "agent_swin_s": Published(83.7, 8.7),
        "agent_swin_s_288": Published(84.1, 14.6), "agent_swin_b": Published(84.0, 15.4),
        "agent_swin_b_384": Published(84.9, 46.3),
    },
    goldens={"agent_swin_t": "agent_swin_t", "agent_swin_t_det": "agent_swin_t", "agent_ops": "*"},
    peers=[Peer("agent_swin_t", "swin_tiny_patch4_window7_224")],
    dense_args=dense_args,
    dense_norm=DenseNorm("norm", 1e-5),
    checkpoint_filter_fn=checkpoint_filter_fn,
)
