"""Agent attention as two calls of PyTorch's attention."""
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import standard_only
from ..sdpa import sdpa

__all__ = ["run"]

# With fewer keys, a vector's width, PyTorch's CPU kernel (2.15) takes three times as long, and loses NaN.
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
    dtype, on_cpu = q.dtype, q.device.type == "cpu"
    if on_cpu and dtype in (torch.bfloat16, torch.float16):
        # Half precision is rounded once, at the end; the kernels of accelerators want it as it is.
        q, k, v, agents = q.float(), k.float(), v.float(), agents.float()
    q, k, v, agents = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), agents.transpose(1, 2)
    pads = on_cpu and not standard_only(q, k, v, agents)
    gathered = _attend(agents, k, v, agent_bias, scale, pads)
    out = _attend(q, agents, gathered, query_bias, scale, pads).transpose(1, 2)
    return out if out.dtype == dtype else out.to(dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, pads: bool) -> Tensor:
    """Attention with a bias ``[heads, queries, keys]`` for all samples, expanded over the batch with stride 0."""
    if pads and (missing := _CPU_KEYS - k.shape[2]) > 0:
        k, v = (F.pad(x, (0, 0, 0, missing)) for x in (k, v))
        bias = q.new_zeros(1, 1, _CPU_KEYS - missing) if bias is None else bias
        bias = F.pad(bias, (0, missing), value=-torch.inf)
    if bias is not None:
        bias = (bias if bias.dtype == q.dtype else bias.to(q.dtype)).expand(q.shape[0], -1, -1, -1)
    return sdpa(q, k, v, bias, scale)
