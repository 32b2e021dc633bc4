"""Agent attention as two calls of PyTorch's attention."""
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import exporting, standard_only
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
    dtype, device = q.dtype, q.device.type
    # On a CPU, half precision is rounded once, at the end; the kernels of accelerators want it as it is.
    compute = torch.promote_types(dtype, torch.float32) if device == "cpu" else dtype
    if dtype != compute:
        q, k, v, agents = (x.to(compute) for x in (q, k, v, agents))
    q, k, v, agents = (x.transpose(1, 2) for x in (q, k, v, agents))
    gathered = _attend(agents, k, v, agent_bias, scale)
    return _attend(q, agents, gathered, query_bias, scale).transpose(1, 2).to(dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention with a bias ``[heads, queries, keys]`` for all samples, expanded over the batch with stride 0."""
    missing = 0 if exporting() else _CPU_KEYS - k.shape[2]
    if missing > 0 and q.device.type == "cpu" and not standard_only(q, k, v):
        k, v = (F.pad(x, (0, 0, 0, missing)) for x in (k, v))
        bias = q.new_zeros(1, 1, _CPU_KEYS - missing) if bias is None else bias
        bias = F.pad(bias, (0, missing), value=-torch.inf)
    if bias is not None:
        bias = bias.to(q.dtype).expand(q.shape[0], -1, -1, -1)
    return sdpa(q, k, v, bias, scale)
