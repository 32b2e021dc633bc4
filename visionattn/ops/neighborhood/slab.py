"""Two-dimensional neighborhood attention on CPU, in as few and as large matrix products as possible.

The map is cut into tiles of queries. A tile's keys, the union of its windows, are its rows and columns and a halo of
``kernel_size - stride`` around them. Column halos are copied once: the keys of a column of tiles become a slab
``[rows, halo columns, head_dim]``, and slabs lie one after the other. Row halos cost nothing: the keys of a tile are
then consecutive tokens of its slab, so overlapping strided windows make every tile an entry of one batched matrix
product. What a window holds beyond a query's own neighborhood, or beyond the slab, is masked.

Work is done in chunks of tiles whose scores stay in the cache, in a workspace that a thread keeps from call to call:
on the maps of a backbone, fresh pages and the arithmetic of views would cost as much as the products. What depends on
shapes and strides only, a plan of chunks and copies, is therefore cached too. The residue classes of a dilated axis
are more batch. The backward pass takes the probabilities that the forward pass kept, or computes them again where they
are many.
"""
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import concrete, differentiated
from ..operator import operator
from . import general, naive
from .plan import Plan, columns_of, plans
from .table import add_to_bias, table_of
from .work import Work

__all__ = ["slab_attention"]

_KEPT_BYTES = 16 << 20  # probabilities that a call keeps for its backward, at most


def slab_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        kernel_size: Sequence[int],
        dilation: Sequence[int],
        stride: Sequence[int],
        scale: float,
) -> Tensor:
    """Neighborhood attention on two axes, not causal. Differentiable in q, k, v and bias.

    Args:
        q: Queries ``[batch, height, width, heads, head_dim]``, any strides, on CPU.
        k: Keys, shaped as q.
        v: Values ``[batch, height, width, heads, value_dim]``.
        bias: Relative position bias ``[heads, 2 * kernel_height - 1, 2 * kernel_width - 1]``.
        kernel_size: Window height and width; 1 is allowed here.
        dilation: One per axis.
        stride: Queries that share a window, one per axis.
        scale: Factor on ``q . k``.

    Returns:
        ``[batch, height, width, heads, value_dim]`` in the dtype of q, computed in float32 or better.
    """
    keep = not torch.compiler.is_compiling() and torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, bias))
    return _slab_forward(q, k, v, bias, list(kernel_size), list(dilation), list(stride), scale, keep)[0]


@operator("visionattn::neighborhood_slab")
def _slab_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        kernel_size: list[int],
        dilation: list[int],
        stride: list[int],
        scale: float,
        keep: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and the probabilities of all tiles for the backward; none unless ``keep``, or if they are large."""
    pieces = _plans(q, v, kernel_size, dilation, stride)
    out = q.new_empty(v.shape)
    kept = q.new_empty(_count_kept(pieces) if keep else 0, dtype=pieces[0].dtype)
    for plan, parts in zip(pieces, _parts_of(kept, pieces), strict=True):
        work, table = Work(plan, backward=False), table_of(plan, bias)
        for chunk, part in zip(plan.chunks, parts, strict=True):
            queries, keys = work.load_tiles("q", chunk, q), work.load_keys(chunk, k)
            p = work.probabilities(
                chunk, queries, keys, table, scale, work.scores("scores", chunk) if part is None else part)
            values = work.load_keys(chunk, v)
            work.store_tiles(chunk, torch.bmm(p, values, out=work.tiles("out", chunk, plan.value_dim)), out)
    for index in _not_finite(out):
        rpb = None if bias is None else bias[index[3]]
        out[index] = _standard(q[index], k[index], v[index], rpb, kernel_size, dilation, stride, scale)
    return out, kept


@operator("visionattn::neighborhood_slab_backward")
def _slab_backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        kept: Tensor,
        kernel_size: list[int],
        dilation: list[int],
        stride: list[int],
        scale: float,
        bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and (empty unless ``bias_grad``) bias, all contiguous."""
    pieces = _plans(q, v, kernel_size, dilation, stride)
    compute = pieces[0].dtype
    dbias = q.new_zeros(0 if bias is None or not bias_grad else bias.shape, dtype=compute)
    dq = q.new_empty(q.shape)
    dk, dv = k.new_empty(k.shape, dtype=compute), v.new_empty(v.shape, dtype=compute)
    if not all(plan.is_whole for plan in pieces):
        dk.zero_()
        dv.zero_()
    for plan, parts in zip(pieces, _parts_of(kept, pieces), strict=True):
        _run_backward(plan, grad, q, k, v, table_of(plan, bias), parts, scale, bias_grad, (dq, dk, dv, dbias))
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias if bias is None else dbias.to(bias.dtype)


def _run_backward(
        plan: Plan, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None,
        parts: Sequence[Tensor | None], scale: float, bias_grad: bool, targets: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    dq, dk, dv, dbias = targets
    work = Work(plan, backward=True)
    dtable = None if table is None or not bias_grad else torch.zeros_like(table)
    for chunk, p in zip(plan.chunks, parts, strict=True):
        if p is None:
            queries, keys = work.load_tiles("q", chunk, q), work.load_keys(chunk, k)
            p = work.probabilities(chunk, queries, keys, table, scale, work.scores("scores", chunk))
        dout, values = work.load_tiles("dout", chunk, grad), work.load_keys(chunk, v)
        work.add_keys(chunk, p, dout, 1., dv)
        ds = torch.bmm(dout, values.mT, out=work.scores("dscores", chunk))
        torch._softmax_backward_data(ds, p, -1, plan.dtype, grad_input=ds)
        if dtable is not None:
            work.add_scores("dscores", chunk, dtable)
        # Keys take the place of values: the less memory a chunk has, the more of it stays in the cache.
        queries, keys = work.load_tiles("q", chunk, q), work.load_keys(chunk, k)
        work.add_keys(chunk, ds, queries, scale, dk)
        work.store_tiles(chunk, queries.baddbmm_(ds, keys, beta=0, alpha=scale), dq)
    if dtable is not None:
        add_to_bias(plan, dtable, dbias)


def _plans(q: Tensor, v: Tensor, kernel_size: list[int], dilation: list[int], stride: list[int]) -> list[Plan]:
    compute = torch.promote_types(q.dtype, torch.float32)
    return plans(q.shape, v.shape[-1], compute, tuple(kernel_size), tuple(dilation), tuple(stride))


def _count_kept(pieces: list[Plan]) -> int:
    """Probabilities that a call keeps for its backward if it is asked to."""
    count = sum(plan.pairs for plan in pieces)
    return count if count * pieces[0].dtype.itemsize <= _KEPT_BYTES else 0


def _parts_of(kept: Tensor, pieces: list[Plan]) -> list[Sequence[Tensor | None]]:
    """The probabilities of every plan's chunks, ``[tiles, queries, keys]``, in what is kept; None if nothing is."""
    if not kept.numel():
        return [[None] * len(plan.chunks) for plan in pieces]
    return [
        part.view(-1, plan.queries, plan.keys).split([columns_of(chunk) * plan.y.tiles for chunk in plan.chunks])
        for plan, part in zip(pieces, kept.split([plan.pairs for plan in pieces]), strict=True)]


def _not_finite(*results: Tensor) -> list[tuple]:
    """Indices of the images and heads of maps whose values are not all finite; of one head at a time, as the
    definition, which is to compute them again, takes much memory.

    A value that is not finite reaches all queries of its tiles here, as zero times infinity is no number; by the
    definition it reaches those whose windows hold it.
    """
    if math.isfinite(sum(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).item() for x in results)):
        return []
    finite = torch.stack([x.isfinite().all(4).all(2).all(1) for x in results]).all(0)
    return [(slice(image, image + 1), slice(None), slice(None), slice(head, head + 1))
            for image, head in finite.logical_not_().nonzero().tolist()]


def _standard(q, k, v, bias, kernel_size, dilation, stride, scale) -> Tensor:
    """The same by the definition, for a map that may have an axis of one position."""
    axes = [axis for axis in range(2) if kernel_size[axis] > 1]
    shape = v.shape
    q, k, v = (x if len(axes) == 2 else x.flatten(1, 2) for x in (q, k, v))
    kernel, dil, step = (tuple(values[axis] for axis in axes) for values in (kernel_size, dilation, stride))
    table = bias if bias is None or len(axes) == 2 else bias.flatten(1)
    out, _ = naive.run(q, k, v, kernel, dil, step, (False,) * len(axes), table, scale, None, None, False)
    return out.view(shape)


@_slab_forward.register_fake
def _(q, k, v, bias, kernel_size, dilation, stride, scale, keep):
    count = _count_kept(_plans(q, v, kernel_size, dilation, stride)) if keep else 0
    return q.new_empty(v.shape), q.new_empty(count, dtype=torch.promote_types(q.dtype, torch.float32))


@_slab_backward.register_fake
def _(grad, q, k, v, bias, kept, kernel_size, dilation, stride, scale, bias_grad):
    dtype = torch.promote_types(q.dtype, torch.float32) if bias is None else bias.dtype
    dbias = q.new_empty(bias.shape if bias is not None and bias_grad else 0, dtype=dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _setup_context(ctx, inputs, output):
    q, k, v, bias, *ctx.options, _ = inputs
    ctx.save_for_backward(q, k, v, bias, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
        def standard(q, k, v, bias):
            kernel_size, dilation, stride, scale = ctx.options
            return general.run(
                q, k, v, tuple(kernel_size), tuple(dilation), tuple(stride), (False, False), bias, scale)[0]

        found = differentiated(standard, ctx.saved_tensors[:4], grad, ctx.needs_input_grad[:4])
        return *found, None, None, None, None, None
    bias_grad = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _slab_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options, bias_grad)
    for part in _not_finite(dq, dk, dv) if concrete(grad) else ():
        bias = ctx.saved_tensors[3]
        with torch.enable_grad():
            q, k, v = leaves = [x[part].detach().requires_grad_() for x in ctx.saved_tensors[:3]]
            out = _standard(q, k, v, None if bias is None else bias[part[3]].detach(), *ctx.options)
            exact = torch.autograd.grad(out, leaves, grad[part])
        dq[part], dk[part], dv[part] = exact
    return dq, dk, dv, dbias if bias_grad else None, None, None, None, None, None


_slab_forward.register_autograd(_backward, setup_context=_setup_context)


def _flops(q_shape, v_shape, kernel_size) -> int:
    batch, height, width, heads, head_dim = q_shape
    return 2 * batch * height * width * heads * math.prod(kernel_size) * (head_dim + v_shape[-1])


@register_flop_formula(torch.ops.visionattn.neighborhood_slab)
def _(q_shape, k_shape, v_shape, bias_shape, kernel_size, *args, **kwargs) -> int:
    return _flops(q_shape, v_shape, kernel_size)


@register_flop_formula(torch.ops.visionattn.neighborhood_slab_backward)
def _(grad_shape, q_shape, k_shape, v_shape, bias_shape, kept_shape, kernel_size, *args, **kwargs) -> int:
    # As PyTorch counts its own attention: scores again, even if they are kept, then four products.
    return 5 * _flops(q_shape, v_shape, kernel_size) // 2
