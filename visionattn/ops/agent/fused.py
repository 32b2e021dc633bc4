"""Agent attention as two calls of PyTorch's attention."""
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import exporting
from ..sdpa import sdpa

__all__ = ["run"]

# With fewer keys PyTorch's CPU kernel (2.15) takes three times as long as with so many, a vector's width.
_CPU_KEYS = 16


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
    dtype, device = q.dtype, q.device.type
    # On a CPU, half precision is rounded once, at the end; the kernels of accelerators want it as it is.
    compute = torch.promote_types(dtype, torch.float32) if device == "cpu" else dtype
    q, k, v, agents = (x.to(compute).transpose(1, 2) for x in (q, k, v, agents))
    gathered = sdpa(agents, k, v, _for_all(agent_bias, q), scale)
    missing = _CPU_KEYS - agents.shape[2]
    if missing > 0 and device == "cpu" and not exporting():
        agents, gathered = (F.pad(x, (0, 0, 0, missing)) for x in (agents, gathered))
        query_bias = q.new_zeros(1, 1, _CPU_KEYS - missing) if query_bias is None else query_bias
        query_bias = F.pad(query_bias, (0, missing), value=-torch.inf)
    return sdpa(q, agents, gathered, _for_all(query_bias, q), scale).transpose(1, 2).to(dtype)


def _for_all(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """The bias as a mask for every sample, with stride 0 over the batch."""
    return None if bias is None else bias.to(q.dtype).expand(q.shape[0], -1, -1, -1)
