"""Aggregated attention by the project's Triton kernels as torch operators; Triton is imported when they first run."""
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import triton_support
from ..dispatch import differentiated
from . import naive

__all__ = ["run", "supports"]


def supports(problem) -> tuple[bool, str]:
    """Whether the kernels can do the problem, and why not."""
    if problem.has_active:
        return False, "the triton kernels compute all queries"
    return triton_support.supports(problem)


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
        active: None = None,
) -> Tensor:
    """The public function with every argument explicit."""
    q, k, v = (triton_support.token_strided(x) for x in (q, k, v))
    pooled_k, pooled_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (pooled_k, pooled_v))
    local_bias, pooled_bias, local_weights = (
        None if x is None else x.contiguous() for x in (local_bias, pooled_bias, local_weights))
    return _forward(q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, kernel_size)[0]


@torch.library.custom_op("visionattn::aggregated_triton", mutates_args=())
def _forward(
        q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, local_bias: Tensor | None,
        pooled_bias: Tensor | None, local_weights: Tensor | None, kernel_size: int,
) -> tuple[Tensor, Tensor]:
    from .triton_kernels import forward

    return forward(q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, kernel_size)


@_forward.register_fake
def _(q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, kernel_size):
    return q.new_empty(v.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("visionattn::aggregated_triton_backward", mutates_args=())
def _backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, local_bias: Tensor | None,
        pooled_bias: Tensor | None, local_weights: Tensor | None, lse: Tensor, kernel_size: int,
) -> list[Tensor]:
    from .triton_kernels import backward

    return backward(
        grad, q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, lse, kernel_size)


@_backward.register_fake
def _(grad, q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, lse, kernel_size):
    return [grad.new_empty(0) if x is None else x.new_empty(x.shape)
            for x in (q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights)]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kernel_size = inputs
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx, grad, _):
    # The log-sum-exp is saved for the backward pass only; nothing outside this file sees it.
    *tensors, lse = ctx.saved_tensors
    needed = ctx.needs_input_grad[:8]

    def standard(q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, *tables: Any) -> Tensor:
        return naive.run(q, k, v, pooled_k, pooled_v, ctx.kernel_size, *tables)

    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
        return *differentiated(standard, tensors, grad, needed), None
    grads = _backward(grad.contiguous(), *tensors, lse, ctx.kernel_size)
    return *(x if need else None for x, need in zip(grads, needed, strict=True)), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.visionattn.aggregated_triton)
def _forward_flops(q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, kernel_size, **kwargs) -> int:
    return naive.flops(q, v, pooled_k, kernel_size)


@register_flop_formula(torch.ops.visionattn.aggregated_triton_backward)
def _backward_flops(
        grad, q, k, v, pooled_k, pooled_v, local_bias, pooled_bias, local_weights, lse, kernel_size, **kwargs,
) -> int:
    return naive.backward_flops(q, v, pooled_k, kernel_size)
