"""Agent attention: a few agent tokens gather from all keys, then every query reads from the agents.

Definition: "Agent Attention: On the Integration of Softmax and Linear Attention" (arXiv 2312.08874), section 3. Its
cost is linear in the number of queries and keys. Where the agents come from is the caller's business; the published
models pool them from the queries with :func:`pool_agents`.
"""
from torch import Tensor

from ..checks import check_alike, check_sizes, checked_once, shapes
from ..dispatch import Backend, Op, any_problem, cast_for_autocast, empty_result, standard_only, wants_gradients
from . import fused, naive
from .cases import CASES, AgentProblem, pattern_case
from .pooling import pool_agents

__all__ = ["AgentProblem", "agent_attention", "pool_agents"]


_op = Op(
    "agent_attention", [Backend("fused", any_problem, fused.run), Backend("naive", any_problem, naive.run)], CASES,
    pattern_case=pattern_case)


def agent_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        agents: Tensor,
        agent_bias: Tensor | None = None,
        query_bias: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
) -> Tensor:
    """``softmax(scale q agents^T + query_bias) softmax(scale agents k^T + agent_bias) v``, head by head.

    Args:
        q: Queries ``[batch, queries, heads, head_dim]``.
        k: Keys ``[batch, keys, heads, head_dim]``.
        v: Values ``[batch, keys, heads, value_dim]``.
        agents: Agent tokens ``[batch, agents, heads, head_dim]``: queries to the keys and keys to the queries.
        agent_bias: ``[heads, agents, keys]``, for all samples; never copied for each of them.
        query_bias: ``[heads, queries, agents]``, likewise.
        scale: Factor on both products; None means ``head_dim ** -0.5``.
        backend: ``"fused"`` (two calls of ``scaled_dot_product_attention``) or ``"naive"``; None chooses (see
            :mod:`visionattn.ops.dispatch`).

    Returns:
        ``[batch, queries, heads, value_dim]`` in the dtype of q, or autocast's where that is on (computed in float32 or
        better).

    Raises:
        ValueError: Arguments that do not fit each other; the message says which and what would fit.
        BackendError: There is no such backend (a ValueError too).
    """
    q, k, v, agents = cast_for_autocast(q, k, v, agents)
    tensors = (q, k, v, agents, agent_bias, query_bias)
    problem = _problem(*tensors, wants_gradients(q, k, v), standard_only(*tensors))
    if isinstance(batch := q.shape[0], int) and batch == 0:
        return empty_result((*q.shape[:-1], v.shape[-1]), tensors)
    return _op.run(problem, backend, *tensors, problem.head_dim ** -0.5 if scale is None else scale)


@checked_once
def _problem(
        q: Tensor, k: Tensor, v: Tensor, agents: Tensor, agent_bias: Tensor | None, query_bias: Tensor | None,
        requires_grad: bool, standard: bool,
) -> AgentProblem:
    _check(q, k, v, agents)
    heads, count = q.shape[2], agents.shape[1]
    _check_bias("agent_bias", agent_bias, (heads, count, k.shape[1]), q)
    _check_bias("query_bias", query_bias, (heads, q.shape[1], count), q)
    return AgentProblem(
        queries=q.shape[1], keys=k.shape[1], agents=count, heads=heads, head_dim=q.shape[3], value_dim=v.shape[3],
        has_agent_bias=agent_bias is not None, has_query_bias=query_bias is not None, dtype=q.dtype,
        device=q.device.type, requires_grad=requires_grad, standard_only=standard)


def _check(q: Tensor, k: Tensor, v: Tensor, agents: Tensor) -> None:
    if not q.ndim == k.ndim == v.ndim == agents.ndim == 4:
        raise ValueError(f"q, k, v and agents must be [batch, tokens, heads, head_dim]: got "
                         f"{shapes(q=q, k=k, v=v, agents=agents)}")
    for name, x in (("k", k), ("agents", agents)):
        if x.shape[0] != q.shape[0] or x.shape[2:] != q.shape[2:]:
            raise ValueError(f"{name} must have q's batch, heads and head_dim: got "
                             f"{shapes(q=q, k=k, v=v, agents=agents)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's batch, tokens and heads: got {shapes(q=q, k=k, v=v, agents=agents)}")
    check_sizes(q=q, k=k, v=v, agents=agents)
    check_alike(q, k=k, v=v, agents=agents)


def _check_bias(name: str, bias: Tensor | None, shape: tuple[int, ...], q: Tensor) -> None:
    if bias is None:
        return
    if bias.shape != shape:
        axes = "[heads, agents, keys]" if name == "agent_bias" else "[heads, queries, agents]"
        raise ValueError(f"{name} must be {axes} = {list(shape)}, got {list(bias.shape)}")
    if not bias.dtype.is_floating_point or bias.device != q.device:
        raise ValueError(f"{name} must be floating point on {q.device}, got {bias.dtype} on {bias.device}")
