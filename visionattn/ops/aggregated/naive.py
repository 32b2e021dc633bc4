"""Aggregated attention as its definition says, a place of the window after the other.

This form is the truth that every other backend is compared with, and the one for graphs of standard operators.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["backward_flops", "flops", "inside", "pairs", "run"]


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pooled_k: Tensor,
        pooled_v: Tensor,
        kernel_size: int,
        local_bias: Tensor | None,
        pooled_bias: Tensor | None,
        local_weights: Tensor | None,
        active: Tensor | None = None,
) -> Tensor:
    """The public function with every argument explicit."""
    dtype, (height, width) = q.dtype, q.shape[1:3]
    compute = torch.promote_types(dtype, torch.float32)
    places = kernel_size ** 2
    q, k, v, pooled_k, pooled_v = (x.to(compute) for x in (q, k, v, pooled_k, pooled_v))

    local = torch.stack([(q * key).sum(dim=-1) for key in _places(k, kernel_size)], dim=-1)
    if local_bias is not None:
        local = local + local_bias.to(compute)
    valid = inside(height, width, kernel_size, q.device)[:, :, None]
    local = local.masked_fill(~valid, -torch.inf)
    pooled = torch.einsum("byxhd,bphd->byxhp", q, pooled_k)
    if pooled_bias is not None:
        pooled = pooled + pooled_bias.to(compute).unflatten(1, (height, width)).permute(1, 2, 0, 3)

    weights = torch.cat([local, pooled], dim=-1).softmax(dim=-1)
    out = torch.einsum("byxhp,bphd->byxhd", weights[..., places:], pooled_v)
    local = weights[..., :places]
    if local_weights is not None:
        local = local + local_weights.to(compute).masked_fill(~valid, 0)
    for weight, value in zip(local.unbind(dim=-1), _places(v, kernel_size), strict=True):
        out = out + weight[..., None] * value
    if active is not None:
        out = out.masked_fill(~active[..., None], 0)
    return out.to(dtype)


def inside(height: int, width: int, kernel_size: int, device: torch.device) -> Tensor:
    """Whether each place of each query's window is on the map, ``[height, width, kernel_size ** 2]``."""
    offset = torch.arange(kernel_size, device=device) - kernel_size // 2
    row, column = (torch.arange(length, device=device)[:, None] + offset for length in (height, width))
    row, column = (row >= 0) & (row < height), (column >= 0) & (column < width)
    return (row[:, None, :, None] & column[None, :, None, :]).flatten(2)


def _places(x: Tensor, kernel_size: int) -> list[Tensor]:
    """For each place of the windows the map ``[batch, height, width, heads, dim]`` of what every query sees there."""
    height, width = x.shape[1:3]
    reach = kernel_size // 2
    x = F.pad(x, (0, 0, 0, 0, reach, reach, reach, reach))
    return [x[:, i:i + height, j:j + width] for i in range(kernel_size) for j in range(kernel_size)]


def flops(q_shape, v_shape, pooled_shape, kernel_size: int) -> int:
    """Floating point operations of the products forward, by the shapes of q, v and the pooled keys."""
    return 2 * pairs(q_shape, pooled_shape, kernel_size) * (q_shape[-1] + v_shape[-1])


def backward_flops(q_shape, v_shape, pooled_shape, kernel_size: int) -> int:
    """The same of a backward pass that computes the scores again: five products."""
    return 2 * pairs(q_shape, pooled_shape, kernel_size) * (3 * q_shape[-1] + 2 * v_shape[-1])


def pairs(q_shape, pooled_shape, kernel_size: int) -> int:
    """Number of query-key pairs."""
    batch, height, width, heads, _ = q_shape
    # On an axis of n places, the windows lack what hangs over both ends.
    rows, columns = (
        sum(n - abs(offset) for offset in range(-min(kernel_size // 2, n - 1), min(kernel_size // 2, n - 1) + 1))
        for n in (height, width))
    return batch * heads * (rows * columns + height * width * pooled_shape[1])
