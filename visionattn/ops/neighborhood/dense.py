"""PyTorch's dense attention on a CPU, ``[batch, heads, tokens, dim]``, with the gradient of a bias that it lacks."""
import torch
from torch import Tensor

from ..kept import workspace
from .plan import CHUNK_BYTES

__all__ = ["dense", "dense_backward"]

# The kernels of PyTorch's dense attention: its public function does not return what the backward needs.
_aten = torch.ops.aten


def dense(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The attention, and the log-sum-exp of the scores ``[batch, heads, tokens]``."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=_dense_mask(table), scale=scale)


def dense_backward(
        tensors: list[Tensor], lse: Tensor, table: Tensor | None, scale: float, table_grad: bool,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and, if asked for, of the table, which PyTorch's kernel does not have.

    ``tensors`` are the incoming gradient, q, k, v and the output.
    """
    grad, q, k, v, _ = tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    if table is None or not table_grad:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, lse, 0.0, False, attn_mask=_dense_mask(table), scale=scale)
    batch, heads, tokens, _ = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device="cpu") for x in (q, k, v))
    dtable = torch.empty_like(table) if batch else torch.zeros_like(table)
    size = heads * tokens * tokens
    step = max(min(CHUNK_BYTES // (size * q.element_size()), batch), 1)
    memory = workspace(2 * step * size, q.dtype)
    for images in (slice(i, min(i + step, batch)) for i in range(0, batch, step)):
        count = (images.stop - images.start) * heads
        p, ds = memory[:2 * count * tokens * tokens].view(2, count, tokens, tokens)
        queries, keys, values, dout = (x[images].reshape(count, tokens, -1) for x in (q * scale, k, v, grad))
        scores = torch.bmm(queries, keys.mT, out=p).view(-1, heads, tokens, tokens).add_(table[:, 0, 0])
        torch.softmax(scores, dim=-1, out=scores)
        torch.bmm(p.mT, dout, out=dv[images].view_as(values))
        torch._softmax_backward_data(torch.bmm(dout, values.mT, out=ds), p, -1, p.dtype, grad_input=ds)
        dscores = ds.view(-1, heads, tokens, tokens)
        if images.start == 0:
            torch.sum(dscores, 0, out=dtable[:, 0, 0])
        else:
            dtable[:, 0, 0] += dscores.sum(0)
        torch.bmm(ds.mT, queries, out=dk[images].view_as(keys))
        torch.bmm(ds, keys, out=dq[images].view_as(queries)).mul_(scale)
    return dq, dk, dv, dtable


def _dense_mask(table: Tensor | None) -> Tensor | None:
    return None if table is None else table[:, 0, 0].unsqueeze(0)

