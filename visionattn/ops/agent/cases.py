"""What a call of agent attention is to a backend, and examples of it."""
from typing import NamedTuple

import torch

from ..case import CAUSAL, CROSS, PATTERN_WIDTH, Case

__all__ = ["CASES", "AgentProblem", "pattern_case"]


class AgentProblem(NamedTuple):
    """What a backend has to know to say whether it can do a call."""

    queries: int
    keys: int
    agents: int
    heads: int
    head_dim: int
    value_dim: int
    has_agent_bias: bool
    has_query_bias: bool
    dtype: torch.dtype
    device: str
    requires_grad: bool = False
    standard_only: bool = False


def _case(
        shape: tuple[int, int, int, int],
        agents: int,
        keys: int | None = None,
        value_dim: int | None = None,
        agent_bias: bool = False,
        query_bias: bool = False,
        groups: tuple[str, ...] = ("families",),
) -> Case:
    """A case of queries ``[batch, queries, heads, head_dim]``."""
    batch, queries, heads, head_dim = shape
    keys, value_dim = keys or queries, value_dim or head_dim
    problem = AgentProblem(
        queries=queries, keys=keys, agents=agents, heads=heads, head_dim=head_dim, value_dim=value_dim,
        has_agent_bias=agent_bias, has_query_bias=query_bias, dtype=torch.float32, device="cpu")
    inputs: dict[str, tuple[int, ...]] = {
        "q": shape, "k": (batch, keys, heads, head_dim), "v": (batch, keys, heads, value_dim),
        "agents": (batch, agents, heads, head_dim)}
    parameters: dict[str, tuple[int, ...]] = {}
    if agent_bias:
        parameters["agent_bias"] = (heads, agents, keys)
    if query_bias:
        parameters["query_bias"] = (heads, queries, agents)
    words = [f"{agents} agents", *(["biases"] if parameters else [])]
    return Case(
        problem, inputs, parameters=parameters, pairs=batch * heads * agents * (queries + keys),
        summary=", ".join(words), groups=groups)


_SMALL = ("small",)
CASES = {
    "deit": _case((1, 197, 3, 64), agents=49, agent_bias=True, query_bias=True),
    "swin_stage1": _case((1, 3136, 3, 32), agents=9, agent_bias=True, query_bias=True),
    "swin_stage2": _case((1, 784, 6, 32), agents=16, agent_bias=True, query_bias=True),
    "swin_stage3": _case((1, 196, 12, 32), agents=49, agent_bias=True, query_bias=True),
    "b8_swin_stage1": _case((8, 3136, 3, 32), agents=9, agent_bias=True, query_bias=True),
    "b8_swin_stage3": _case((8, 196, 12, 32), agents=49, agent_bias=True, query_bias=True),
    "56x56": _case((1, 3136, 2, 32), agents=49, groups=("usual",)),
    "biased": _case((1, 3136, 2, 32), agents=49, agent_bias=True, query_bias=True, groups=("usual",)),
    "small": _case((2, 21, 2, 8), agents=5, value_dim=4, groups=_SMALL),
    "small_biased": _case((2, 19, 2, 8), agents=17, agent_bias=True, query_bias=True, groups=_SMALL),
    "small_few_keys": _case((1, 33, 3, 8), agents=4, keys=7, query_bias=True, groups=_SMALL),
}


def pattern_case(pattern: str, tokens: int) -> Case | str:
    """The op in a pattern of attention at a number of tokens, or why it cannot do it."""
    if pattern in CAUSAL:
        return "agents are pooled from all queries, later ones among them"
    return _case((1, tokens, *PATTERN_WIDTH), agents=49, keys=tokens // 2 if pattern in CROSS else None, groups=())
