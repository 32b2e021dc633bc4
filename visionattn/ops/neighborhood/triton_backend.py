"""Neighborhood attention by the project's Triton kernels as torch operators; Triton is imported when they first run."""
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import triton_support
from ..dispatch import differentiated
from . import general

__all__ = ["run", "supports"]


def supports(problem) -> tuple[bool, str]:
    """Whether the kernels can do the problem, and why not."""
    if problem.additional:
        return False, "the triton kernels take no additional keys"
    if problem.kv_heads != problem.heads:
        return False, "the triton kernels need as many key heads as query heads"
    return triton_support.supports(problem)


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel_size: tuple[int, ...],
        dilation: tuple[int, ...],
        stride: tuple[int, ...],
        is_causal: tuple[bool, ...],
        bias: Tensor | None,
        scale: float,
        additional_keys: None,
        additional_values: None,
        return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The public function with every argument explicit; returns the output and, if asked for, the log-sum-exp."""
    q, k, v = (triton_support.token_strided(x) for x in (q, k, v))
    out, lse = _forward(q, k, v, bias, list(kernel_size), list(dilation), list(stride), list(is_causal), scale)
    return out, lse if return_lse else None


@torch.library.custom_op("visionattn::neighborhood_triton", mutates_args=())
def _forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: list[int], dilation: list[int],
        stride: list[int], is_causal: list[bool], scale: float,
) -> tuple[Tensor, Tensor]:
    from .triton_kernels import forward

    return forward(q, k, v, bias, kernel_size, dilation, stride, is_causal, scale)


@_forward.register_fake
def _(q, k, v, bias, kernel_size, dilation, stride, is_causal, scale):
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("visionattn::neighborhood_triton_backward", mutates_args=())
def _backward(
        grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
        kernel_size: list[int], dilation: list[int], stride: list[int], is_causal: list[bool], scale: float,
        needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .triton_kernels import backward

    return backward(
        grad, grad_lse, q, k, v, bias, out, lse, kernel_size, dilation, stride, is_causal, scale, needs_bias)


@_backward.register_fake
def _(grad, grad_lse, q, k, v, bias, out, lse, kernel_size, dilation, stride, is_causal, scale, needs_bias):
    grad_bias = torch.empty_like(bias, memory_format=torch.contiguous_format) if needs_bias else q.new_empty(0)
    return (*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), grad_bias)


def _setup_context(ctx, inputs, output):
    q, k, v, bias, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, bias, *output)


def _autograd(ctx, grad, grad_lse):
    q, k, v, bias, out, lse = ctx.saved_tensors
    needs_bias = bias is not None and ctx.needs_input_grad[3]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
        kernel_size, dilation, stride, is_causal, scale = ctx.options

        def standard(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
            options = tuple(kernel_size), tuple(dilation), tuple(stride), tuple(is_causal)
            out, lse = general.run(q, k, v, *options, bias, scale, return_lse=True)
            assert lse is not None
            return out, lse

        found = differentiated(standard, (q, k, v, bias), (grad, grad_lse), ctx.needs_input_grad[:4])
        return *found, None, None, None, None, None
    *grads, grad_bias = _backward(
        grad.contiguous(), grad_lse.contiguous(), q, k, v, bias, out, lse, *ctx.options, needs_bias)
    return (*grads, grad_bias if needs_bias else None, None, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.visionattn.neighborhood_triton)
def _forward_flops(q, k, v, bias, kernel_size, dilation, stride, is_causal, *args, **kwargs) -> int:
    from .triton_kernels import pairs

    return 2 * pairs(q, kernel_size, dilation, stride, is_causal) * (q[-1] + v[-1])


@register_flop_formula(torch.ops.visionattn.neighborhood_triton_backward)
def _backward_flops(
        grad, grad_lse, q, k, v, bias, out, lse, kernel_size, dilation, stride, is_causal, *args, **kwargs,
) -> int:
    from .triton_kernels import pairs

    return 2 * pairs(q, kernel_size, dilation, stride, is_causal) * (3 * q[-1] + 2 * v[-1])
