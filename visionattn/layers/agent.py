"""The attention module of the Agent Attention models, and the tables that its biases are made of.

"Agent Attention: On the Integration of Softmax and Linear Attention" (arXiv 2312.08874), section 4.
"""
import math
from typing import Any, Optional, Tuple, cast  # noqa: UP035 - TorchScript reads Optional and Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ..ops import agent_attention, pool_agents
from ..ops.dispatch import exporting, numbers, transforming
from ..ops.kept import keep
from ..ops.sdpa import probabilities
from .scripting import unscripted

__all__ = ["AgentAttention", "BiasTables", "compose_bias", "resize"]

_MAP_SIZE = 7  # of the coarse table, whatever the size of the map
_KEPT_ENTRIES = 200_000  # of a bias at most: enough for all published models at 224 pixels


class BiasTables(nn.Module):
    """What one bias between agents and the tokens of a map is composed of (see :func:`compose_bias`).

    Parameters, all of them per head and agent: ``map [num_heads, agents, 7, 7]``, ``rows [num_heads, agents, height,
    1]``, ``columns [num_heads, agents, 1, width]``, and ``prefix [num_heads, agents, num_prefix_tokens]`` if the map
    has class tokens before it.

    Args:
        num_heads: Number of heads.
        agents: Rows and columns of the grid of agents that the tables are for.
        size: Height and width of the map that they are for.
        num_prefix_tokens: Number of class tokens.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            num_heads: int,
            agents: tuple[int, int],
            size: tuple[int, int],
            num_prefix_tokens: int = 0,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        count = agents[0] * agents[1]
        self.map = nn.Parameter(torch.empty(num_heads, count, _MAP_SIZE, _MAP_SIZE, **dd))
        self.rows = nn.Parameter(torch.empty(num_heads, count, size[0], 1, **dd))
        self.columns = nn.Parameter(torch.empty(num_heads, count, 1, size[1], **dd))
        self.prefix = None
        if num_prefix_tokens:
            self.prefix = nn.Parameter(torch.empty(num_heads, count, num_prefix_tokens, **dd))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the tables anew."""
        for table in self.parameters():
            trunc_normal_(table, std=.02)

    @torch.jit.ignore
    def set_input_size(self, size: tuple[int, int]) -> None:
        """Makes the tables those of a map of another size; the biases of maps of any size stay what they are."""
        with torch.no_grad():
            self.rows = nn.Parameter(resize(self.rows, (size[0], 1)), requires_grad=self.rows.requires_grad)
            self.columns = nn.Parameter(resize(self.columns, (1, size[1])), requires_grad=self.columns.requires_grad)


@register_notrace_module
class AgentAttention(nn.Module):
    """Agent attention over a whole map, plus a depthwise 3x3 convolution of the values before the output projection.

    The agents are the means of the queries over the cells of a grid. Class tokens before the map are keys and queries
    as others are, but neither pooled nor convolved. Maps may have any size: the biases are interpolated.

    Args:
        dim: Channels.
        num_heads: Divides ``dim``.
        size: Height and width of the map that the bias tables are for.
        agents: Rows and columns of agents that the bias tables are for.
        agent_grid: Rows and columns of agents to work with; None for those of the tables.
        num_prefix_tokens: Number of class tokens before the map.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    by_head = ("qkv", "dwc", "agent_bias", "query_bias")  # see visionattn.analysis.prune_heads

    def __init__(
            self,
            dim: int,
            num_heads: int,
            size: tuple[int, int],
            agents: tuple[int, int] = (7, 7),
            agent_grid: tuple[int, int] | None = None,
            num_prefix_tokens: int = 0,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim})")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.agents = agents
        self.agent_grid = agent_grid or agents
        self.num_prefix_tokens = num_prefix_tokens
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.agent_bias = BiasTables(num_heads, self.agents, size, num_prefix_tokens, **dd)
        self.query_bias = BiasTables(num_heads, self.agents, size, num_prefix_tokens, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: Optional[Tuple[int, int]] = None) -> Tensor:  # noqa: UP006, UP045
        """A map ``[batch, height, width, dim]`` to the same.

        With ``size``, the map's height and width, x and the result are ``[batch, num_prefix_tokens + height * width,
        dim]``.
        """
        height, width = (x.shape[1], x.shape[2]) if size is None else size
        qkv = self.qkv(x.flatten(1, -2))
        v = qkv[:, self.num_prefix_tokens:, qkv.shape[-1] // 3 * 2:].unflatten(1, [height, width])
        local = self.dwc(v.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        return self.proj_drop(self.proj(self._attend(qkv, local, height, width))).reshape(x.shape)

    @torch.jit.ignore
    def set_input_size(self, size: tuple[int, int] | None, agent_grid: tuple[int, int] | None = None) -> None:
        """Makes the bias tables those of another map size, sets another grid of agents; None changes nothing."""
        if size is not None:
            self.agent_bias.set_input_size(size)
            self.query_bias.set_input_size(size)
        self.agent_grid = agent_grid or self.agent_grid

    @torch.jit.ignore
    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"num_heads={self.num_heads}, agents={self.agents}, agent_grid={self.agent_grid}"

    @unscripted
    def agent_maps(self, x: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """The two softmaxes of ``forward(x, size)``, for those who want to look at them.

        Returns:
            What every agent gathers, ``[batch, num_heads, agents, tokens]``, and what every token reads of the agents,
            ``[batch, num_heads, tokens, agents]``. Agents are numbered row by row.
        """
        size = (x.shape[1], x.shape[2]) if size is None else size
        parts = _parts(self, self.qkv(x.flatten(1, -2)), size)
        (q, k, _, agents), (agent_bias, query_bias) = (part.transpose(1, 2) for part in parts[:4]), parts[4:]
        return probabilities(agents, k, agent_bias), probabilities(q, agents, query_bias)

    @unscripted
    def _attend(self, qkv: Tensor, local: Tensor, height: int, width: int) -> Tensor:
        prefix = self.num_prefix_tokens
        q, k, v, agents, agent_bias, query_bias = _parts(self, qkv, numbers((height, width)))
        x = agent_attention(q, k, v, agents, agent_bias, query_bias).flatten(2)
        if torch.is_grad_enabled() or exporting() or transforming():
            return x + F.pad(local, (0, 0, prefix, 0))
        x[:, prefix:].add_(local)
        return x


# A function of a layer and no method, which the Python code of scripted modules would not find.
def _parts(layer: Any, qkv: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Queries, keys, values and agents ``[batch, tokens, num_heads, head_dim]``, and the two biases."""
    q, k, v = qkv.unflatten(-1, (3, layer.num_heads, -1)).unbind(2)
    means = pool_agents(
        qkv[:, layer.num_prefix_tokens:, :qkv.shape[-1] // 3].unflatten(1, size), layer.agent_grid)
    return (q, k, v, means.unflatten(-1, (layer.num_heads, -1)),
            compose_bias(layer.agent_bias, size, layer.agents, layer.agent_grid, qkv.dtype),
            compose_bias(layer.query_bias, size, layer.agents, layer.agent_grid, qkv.dtype, agents_last=True))


def compose_bias(
        tables: BiasTables,
        size: tuple[int, int],
        agents: tuple[int, int],
        agent_grid: tuple[int, int],
        dtype: torch.dtype,
        agents_last: bool = False,
) -> Tensor:
    """The bias of tables: the coarse map at the size of the map, plus a term of the row and one of the column.

    All is interpolated bilinearly, over the positions and, where the grid of agents is not that of the tables, over
    the agents. In inference on the CPU a bias is composed once (:mod:`visionattn.ops.kept`), unless it has
    more than 200,000 entries.

    Args:
        tables: The tables.
        size: Height and width of the map.
        agents: Grid of agents that the tables are for.
        agent_grid: Grid of agents of the bias.
        dtype: Dtype of the bias; it is computed in float32 or better.
        agents_last: Whether agents are the last axis of the bias.

    Returns:
        ``[num_heads, agents, prefix tokens + height * width]``, or the last two the other way round.
    """
    coarse_map, prefix = tables.map, tables.prefix
    sources = [coarse_map, tables.rows, tables.columns]
    if prefix is not None:
        sources.append(prefix)

    def compose() -> Tensor:
        coarse, rows, columns, *prefix = (
            _resize_agents(table.to(torch.promote_types(table.dtype, torch.float32)), agents, agent_grid)
            for table in sources)
        height, width = size
        rows, columns = resize(rows, (height, 1)), resize(columns, (1, width))
        over_rows, over_columns = (_interpolation(coarse.shape[-1], length, coarse) for length in size)
        if agents_last:
            coarse, rows, columns, *prefix = (table.movedim(1, -1) for table in (coarse, rows, columns, *prefix))
            bias = (over_rows @ (over_columns @ coarse).flatten(2)).unflatten(2, (width, -1))
            bias = (bias + rows + columns).flatten(1, 2)
        else:
            bias = (over_rows @ (coarse @ over_columns.transpose(-2, -1)) + rows + columns).flatten(2)
        return torch.cat([*prefix, bias], dim=1 if agents_last else 2).to(dtype)

    # The more a bias has entries, the less its composition costs beside its use, and the more memory it takes.
    heads, = numbers(coarse_map.shape[:1])
    if torch.compiler.is_compiling() or heads * math.prod(agent_grid) * math.prod(size) > _KEPT_ENTRIES:
        return compose()
    return keep("agent bias", (size, agent_grid, dtype, agents_last), compose, sources=sources, owner=tables)


def resize(x: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Interpolates ``[N, C, height, width]`` to another size, without antialiasing; its own size changes nothing."""
    # A symbolic size (export) must not be compared: the answer would hold for the example's size only.
    if all(isinstance(n, int) for n in size) and numbers(x.shape[2:]) == tuple(size):
        return x
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.interpolate(x.to(dtype), size=cast("list[int]", size), mode=mode).to(x.dtype)


def _resize_agents(table: Tensor, agents: tuple[int, int], agent_grid: tuple[int, int]) -> Tensor:
    """Interpolates the second axis of a table ``[num_heads, agents, ...]`` as a grid."""
    if agents == agent_grid:
        return table
    grid = table.flatten(2).transpose(-2, -1).unflatten(2, agents)
    return resize(grid, agent_grid).flatten(2).transpose(-2, -1).unflatten(2, table.shape[2:])


def _interpolation(old: int, new: int, like: Tensor) -> Tensor:
    """``[new, old]``: linear interpolation of ``old`` values to ``new`` ones as a matrix."""
    identity = torch.eye(old, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None], size=new, mode="linear")[0].transpose(-2, -1)
