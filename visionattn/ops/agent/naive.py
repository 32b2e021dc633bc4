"""Agent attention as its definition says: the truth that other backends are compared with."""
import torch
from torch import Tensor

__all__ = ["run"]


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        agents: Tensor,
        agent_bias: Tensor | None,
        query_bias: Tensor | None,
        scale: float,
) -> Tensor:
    """The public function with every argument explicit."""
    dtype = q.dtype
    q, k, v, agents = (x.transpose(1, 2).to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v, agents))
    gathering = scale * agents @ k.transpose(-2, -1)
    if agent_bias is not None:
        gathering = gathering + agent_bias.to(q.dtype)
    reading = scale * q @ agents.transpose(-2, -1)
    if query_bias is not None:
        reading = reading + query_bias.to(q.dtype)
    return (reading.softmax(dim=-1) @ (gathering.softmax(dim=-1) @ v)).transpose(1, 2).to(dtype)
