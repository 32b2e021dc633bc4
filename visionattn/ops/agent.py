"""Agent attention: a few agent tokens gather from all keys, then every query reads from the agents.

Definition: "Agent Attention: On the Integration of Softmax and Linear Attention" (arXiv 2312.08874), section 3. Its
cost is linear in the number of queries and keys. Where the agents come from is the caller's business; the published
models pool them from the queries with :func:`pool_agents`.
"""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Backend, Op, any_problem, exporting

__all__ = ["AgentProblem", "agent_attention", "pool_agents"]


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
        ``[batch, queries, heads, value_dim]`` in the dtype of q, computed in float32 or better.

    Raises:
        ValueError: Arguments that do not fit each other; the message says which and what would fit.
        BackendError: There is no such backend (a ValueError too).
    """
    _check(q, k, v, agents)
    heads, count = q.shape[2], agents.shape[1]
    _check_bias("agent_bias", agent_bias, (heads, count, k.shape[1]), q)
    _check_bias("query_bias", query_bias, (heads, q.shape[1], count), q)
    problem = AgentProblem(
        queries=q.shape[1], keys=k.shape[1], agents=count, heads=heads, head_dim=q.shape[3], value_dim=v.shape[3],
        has_agent_bias=agent_bias is not None, has_query_bias=query_bias is not None, dtype=q.dtype,
        device=q.device.type)
    return _op.choose(problem, backend).run(
        q, k, v, agents, agent_bias, query_bias, q.shape[3] ** -0.5 if scale is None else scale)


def pool_agents(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Means of the cells of a map: adaptive average pooling of ``[batch, height, width, dim]``.

    Cell ``i`` of ``n`` covers the rows from ``floor(i * height / n)`` up to ``ceil((i + 1) * height / n)``, so cells
    overlap where ``n`` does not divide the height; columns alike.

    Args:
        x: The map, e.g. of queries with all heads in ``dim``; may be a strided view.
        grid: Rows and columns of cells.

    Returns:
        ``[batch, rows * columns, dim]``, row by row.
    """
    rows, columns = (_cell_weights(size, cells, x) for size, cells in zip(x.shape[1:3], grid, strict=True))
    # Two small products read a strided map as it is, and can be exported; PyTorch's pooling is slower and cannot.
    x = columns @ x
    return (rows @ x.flatten(2)).unflatten(2, x.shape[2:]).flatten(1, 2)


def _cell_weights(size: int, cells: int, like: Tensor) -> Tensor:
    """``[cells, size]``: what each row or column of a map contributes to the mean of each cell."""
    if type(like) is Tensor and not torch.compiler.is_compiling():
        return _kept_cell_weights(size, cells, like.dtype, like.device)
    return _make_cell_weights(size, cells, like.dtype, like.device)


def _make_cell_weights(size: int, cells: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    position = torch.arange(size, device=device)
    cell = torch.arange(cells, device=device)[:, None]
    inside = (position >= cell * size // cells) & (position < ((cell + 1) * size + cells - 1) // cells)
    weights = inside.to(torch.promote_types(dtype, torch.float32))
    return (weights / weights.sum(dim=1, keepdim=True)).to(dtype)


@functools.lru_cache(maxsize=256)
def _kept_cell_weights(size: int, cells: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _make_cell_weights(size, cells, dtype, device)


# With fewer keys PyTorch's CPU kernel (2.15) takes three times as long as with so many, a vector's width.
_CPU_KEYS = 16


def _run_fused(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        agents: Tensor,
        agent_bias: Tensor | None,
        query_bias: Tensor | None,
        scale: float,
) -> Tensor:
    """The public function with every argument explicit; heads stay where they are, seen through strides."""
    q, k, v, agents = (x.transpose(1, 2) for x in (q, k, v, agents))
    gathered = F.scaled_dot_product_attention(agents, k, v, attn_mask=_for_all(agent_bias, q), scale=scale)
    missing = _CPU_KEYS - agents.shape[2]
    if missing > 0 and q.device.type == "cpu" and not exporting():
        agents, gathered = (F.pad(x, (0, 0, 0, missing)) for x in (agents, gathered))
        query_bias = q.new_zeros(1, 1, _CPU_KEYS - missing) if query_bias is None else query_bias
        query_bias = F.pad(query_bias, (0, missing), value=-torch.inf)
    return F.scaled_dot_product_attention(
        q, agents, gathered, attn_mask=_for_all(query_bias, q), scale=scale).transpose(1, 2)


def _for_all(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """The bias as a mask for every sample, with stride 0 over the batch."""
    return None if bias is None else bias.to(q.dtype).expand(q.shape[0], -1, -1, -1)


def _run_naive(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        agents: Tensor,
        agent_bias: Tensor | None,
        query_bias: Tensor | None,
        scale: float,
) -> Tensor:
    """The same as the definition says: the truth that other backends are compared with."""
    dtype = q.dtype
    q, k, v, agents = (x.transpose(1, 2).to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v, agents))
    gathering = scale * agents @ k.mT
    if agent_bias is not None:
        gathering = gathering + agent_bias
    reading = scale * q @ agents.mT
    if query_bias is not None:
        reading = reading + query_bias
    return (reading.softmax(dim=-1) @ (gathering.softmax(dim=-1) @ v)).transpose(1, 2).to(dtype)


_op = Op("agent_attention", [Backend("fused", any_problem, _run_fused), Backend("naive", any_problem, _run_naive)])


def _check(q: Tensor, k: Tensor, v: Tensor, agents: Tensor) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, agents {list(agents.shape)}"
    if not q.ndim == k.ndim == v.ndim == agents.ndim == 4:
        raise ValueError(f"q, k, v and agents must be [batch, tokens, heads, head_dim]: got {shapes}")
    for name, x in (("k", k), ("agents", agents)):
        if x.shape[0] != q.shape[0] or x.shape[2:] != q.shape[2:]:
            raise ValueError(f"{name} must have q's batch, heads and head_dim: got {shapes}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's batch, tokens and heads: got {shapes}")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q, k, v and agents must be floating point, got {q.dtype}")
    for name, x in (("k", k), ("v", v), ("agents", agents)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}")


def _check_bias(name: str, bias: Tensor | None, shape: tuple[int, ...], q: Tensor) -> None:
    if bias is None:
        return
    if bias.shape != shape:
        axes = "[heads, agents, keys]" if name == "agent_bias" else "[heads, queries, agents]"
        raise ValueError(f"{name} must be {axes} = {list(shape)}, got {list(bias.shape)}")
    if not bias.dtype.is_floating_point or bias.device != q.device:
        raise ValueError(f"{name} must be floating point on {q.device}, got {bias.dtype} on {bias.device}")
