"""Agent attention as two calls of PyTorch's attention."""
import torch
from torch import Tensor

from ..sdpa import sdpa_of_few_keys

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
    """The public function with every argument explicit; heads stay where they are, seen through strides."""
    dtype = q.dtype
    if q.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        # Half precision is rounded once, at the end; the kernels of accelerators want it as it is.
        q, k, v, agents = q.float(), k.float(), v.float(), agents.float()
    q, k, v, agents = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), agents.transpose(1, 2)
    gathered = sdpa_of_few_keys(agents, k, v, agent_bias, scale)
    out = sdpa_of_few_keys(q, agents, gathered, query_bias, scale).transpose(1, 2)
    return out if out.dtype == dtype else out.to(dtype)
