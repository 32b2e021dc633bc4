"""Agent-CSwin: the CSwin transformer with agent attention over the whole map in its first two stages.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention" (ECCV 2024, arXiv 2312.08874). Official
code and weights: https://github.com/LeapLabTHU/Agent-Attention (without a licence file).
"""
import re
from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.full import attend
from ..layers.scripting import unscripted
from ._agent import AgentBackbone, agent_cfg, our_tables
from ._blocks import ConvEmbedding
from ._builder import build_model
from ._family import Family, Peer, Published
from ._tables import Grid

__all__ = ["AgentCSwin"]


@register_notrace_module
class StripeAttention(nn.Module):
    """Attention within stripes of a map ``[B, H, W, dim]`` of any size, plus a depthwise convolution of the values.

    The first half of the channels attends within vertical stripes, the second within horizontal ones; there are as
    many stripes as it takes for none to be wider than ``stripe_width``, and they are as equal as can be. Or all
    channels attend over the whole map. The convolution (3x3) does not see beyond a stripe.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``; even where there are stripes.
        stripe_width: Width of the stripes at most; None for attention over the whole map.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    by_head = ("qkv", "dwc")  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            stripe_width: int | None,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.stripe_width = stripe_width
        self.inseparable = "" if stripe_width is None else "half of its heads must be of vertical stripes"
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        return self.proj_drop(self.proj(self._attend(self.qkv(x), self.dwc.weight, self.dwc.bias)))

    @unscripted
    def _attend(self, qkv: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP045
        assert bias is not None
        if self.stripe_width is None:
            return _attend_within(qkv.unflatten(-1, (3, -1)), weight, bias, self.head_dim)
        return torch.cat([
            _attend_stripes(half, axis, self.stripe_width, *conv, self.head_dim)
            for half, axis, conv in zip(
                qkv.unflatten(-1, (3, 2, -1)).unbind(-2), (2, 1), zip(_halves(weight), _halves(bias), strict=True),
                strict=True)
        ], dim=-1)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of a parameter; exported slices of one are constants, other than what ``chunk`` gives."""
    return x[:len(x) // 2], x[len(x) // 2:]


def _attend_stripes(qkv: Tensor, axis: int, max_width: int, weight: Tensor, bias: Tensor, head_dim: int) -> Tensor:
    """Cuts a map in stripes across ``axis`` (1 or 2) and attends within each."""
    size = qkv.shape[axis]
    count = -(-size // max_width)
    width = -(-size // count)
    if size == width * count:  # all at once
        stripes = qkv.unflatten(axis, (count, width)).movedim(axis, 1).flatten(0, 1)
        out = _attend_within(stripes, weight, bias, head_dim)
        return out.unflatten(0, (-1, count)).movedim(1, axis).flatten(axis, axis + 1)
    return torch.cat([
        _attend_within(stripe, weight, bias, head_dim) for stripe in qkv.split(width, dim=axis)], dim=axis)


def _attend_within(qkv: Tensor, weight: Tensor, bias: Tensor, head_dim: int) -> Tensor:
    """Attention over a whole map of queries, keys and values ``[B, H, W, 3, dim]``, plus the convolved values."""
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
    x = attend(q, k, v).transpose(1, 2).flatten(2)
    local = F.conv2d(qkv[..., 2, :].permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
    return x.unflatten(1, qkv.shape[1:3]) + local.permute(0, 2, 3, 1)


class AgentCSwin(AgentBackbone):
    """Agent-CSwin for images of any size.

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
            within stripes, those of the last stage over the whole map.
        stripe_width: Width of the stripes.
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
            embed_dim: int = 64,
            depths: Sequence[int] = (2, 4, 18, 1),
            num_heads: Sequence[int] = (2, 4, 8, 16),
            agents: Sequence[int] = (3, 4, 7, 7),
            agent_grids: Sequence[Grid] | None = None,
            agent_depths: Sequence[int] = (2, 4, 0, 0),
            stripe_width: int = 7,
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
        self.patch_embed = ConvEmbedding(in_chans, embed_dim, 7, stride=4, padding=2, from_map=False, **dd)

        def stripe_attention(stage: int, block: int) -> nn.Module:
            width = None if stage == len(depths) - 1 else stripe_width
            return StripeAttention(dims[stage], num_heads[stage], width, proj_drop=proj_drop_rate, **dd)

        self.build_stages(
            img_size, dims, depths, num_heads, agents, agent_grids, agent_depths, [mlp_ratio] * len(depths),
            downsample=lambda i: ConvEmbedding(dims[i - 1], dims[i], 3, stride=2, padding=1, **dd),
            other_attention=stripe_attention, drop_path_rate=drop_path_rate, proj_drop_rate=proj_drop_rate, **dd)
        self.min_sizes = [3] * len(dims)  # of the first convolution, after its padding
        self.finish(dims[-1], num_classes, global_pool, drop_rate, **dd)

    @torch.jit.ignore
    def map_sizes(self, img_size: Grid) -> list[Grid]:
        """Height and width of each stage's map for images of ``img_size``."""
        first = [(size - 3) // 4 + 1 for size in img_size]
        return [(-(-first[0] // n), -(-first[1] // n)) for n in (1, 2, 4, 8)]


def dense_args(variant: str, task: str) -> dict[str, Any]:
    """Nothing: the authors have no code of this family for ``"detection"`` or ``"segmentation"``."""
    return {}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' entries to ours (ours stay), and fits tables to the model's image size.

    The authors hang the downsampler at the end of a stage, we put it at the start of the next.
    """
    rules = [
        (r"^stage1_conv_embed\.0\.", "patch_embed.proj."),
        (r"^stage1_conv_embed\.2\.", "patch_embed.norm."),
        (r"^merge([1-3])\.conv\.", r"stages.\1.downsample.proj."),
        (r"^merge([1-3])\.norm\.", r"stages.\1.downsample.norm."),
        (r"^stage([1-4])\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
        (r"\.(\d+)\.(qkv|proj)\.", r".\1.attn.\2."),
        (r"\.attns\.0\.(..)_bias$", r".attn.\1_bias"),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ]
    renamed: dict[str, Tensor] = {}
    for key, x in state_dict.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)  # type: ignore[call-overload]
        renamed[key] = x
    for key in [key for key in renamed if ".attns.1.get_v." in key]:  # the vertical stripes' convolution goes first
        first = key.replace(".attns.1.", ".attns.0.")
        renamed[first] = torch.cat([renamed[first], renamed.pop(key)])
    renamed = {key.replace(".attns.0.get_v.", ".attn.dwc."): x for key, x in renamed.items()}
    return our_tables(renamed, model)


default_cfgs = generate_default_cfgs({
    "agent_cswin_t.in1k": agent_cfg("8c562a74441e46d5902b"),
    "agent_cswin_s.in1k": agent_cfg("30eb8af675bc4b7a8747"),
    "agent_cswin_b.in1k": agent_cfg("c8035b0839b2410c8c9f"),
    "agent_cswin_b_384.in1k": agent_cfg("1239be0df44b47719432", size=384),
    "test_agent_cswin.untrained": agent_cfg(size=64),
})

_DEEP = dict(depths=(3, 6, 29, 2), agent_depths=(3, 6, 0, 0))
_BASE = _DEEP | dict(embed_dim=96, num_heads=(4, 8, 16, 32))


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> AgentCSwin:
    return build_model(
        AgentCSwin, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **defaults | kwargs)


@register_model
def agent_cswin_t(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """20.5 M parameters, 4.3 GMACs, published 83.1 % top-1 at 224 px."""
    return _create("agent_cswin_t", pretrained, {}, **kwargs)


@register_model
def agent_cswin_s(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """32.8 M parameters, 6.7 GMACs, published 83.9 % top-1 at 224 px."""
    return _create("agent_cswin_s", pretrained, _DEEP, **kwargs)


@register_model
def agent_cswin_b(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """73.2 M parameters, 14.9 GMACs, published 84.7 % top-1 at 224 px."""
    return _create("agent_cswin_b", pretrained, _BASE, **kwargs)


@register_model
def agent_cswin_b_384(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """73.3 M parameters, 46.2 GMACs, published 85.8 % top-1 at 384 px (fine-tuned from 224 px)."""
    return _create("agent_cswin_b_384", pretrained, _BASE | dict(img_size=384, stripe_width=12), **kwargs)


@register_model
def test_agent_cswin(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:  # noqa: PT028 - no test function
    """Small enough for tests."""
    model_args = dict(
        img_size=64, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(2, 4, 4, 8), agents=(3, 4, 4, 2),
        agent_depths=(1, 1, 0, 0), stripe_width=2, mlp_ratio=2.)
    return _create("test_agent_cswin", pretrained, model_args, **kwargs)


family = Family(
    small={"test_agent_cswin": {}},
    published={
        "agent_cswin_t": Published(83.1, 4.3), "agent_cswin_s": Published(83.9, 6.8),
        "agent_cswin_b": Published(84.7, 14.9), "agent_cswin_b_384": Published(85.8, 46.3),
    },
    goldens={"agent_cswin_t": "agent_cswin_t", "agent_ops": "*"},
    peers=[Peer("agent_cswin_t", "swin_tiny_patch4_window7_224")],
    dense_args=dense_args,
    checkpoint_filter_fn=checkpoint_filter_fn,
)
