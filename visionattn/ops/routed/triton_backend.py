"""Routed attention by the project's Triton kernels as torch operators; Triton is imported when they first run."""
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import triton_support
from ..dispatch import differentiated
from . import naive

__all__ = ["run", "supports"]


def supports(problem) -> tuple[bool, str]:
    """Whether the kernels can do the problem, and why not."""
    if problem.has_route_weights:
        return False, "the triton kernels take no route weights"
    return triton_support.supports(problem)


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        region_size: tuple[int, int],
        key_region_size: tuple[int, int],
        scale: float,
        route_weights: None,
) -> Tensor:
    """The public function with every argument explicit."""
    q, k, v = (triton_support.token_strided(x) for x in (q, k, v))
    return _forward(q, k, v, routes.int().contiguous(), list(region_size), list(key_region_size), scale)[0]


@torch.library.custom_op("visionattn::routed_triton", mutates_args=())
def _forward(
        q: Tensor, k: Tensor, v: Tensor, routes: Tensor, region_size: list[int], key_region_size: list[int],
        scale: float,
) -> tuple[Tensor, Tensor]:
    from .triton_kernels import forward

    return forward(q, k, v, routes, region_size, key_region_size, scale)


@_forward.register_fake
def _(q, k, v, routes, region_size, key_region_size, scale):
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("visionattn::routed_triton_backward", mutates_args=())
def _backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor,
        region_size: list[int], key_region_size: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_kernels import backward

    return backward(grad, q, k, v, routes, out, lse, region_size, key_region_size, scale)


@_backward.register_fake
def _(grad, q, k, v, routes, out, lse, region_size, key_region_size, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, routes, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, routes, *output)


def _autograd(ctx, grad, _):
    # The log-sum-exp is saved for the backward pass only; nothing outside this file sees it.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
        q, k, v, routes, *_ = ctx.saved_tensors
        region_size, key_region_size, scale = ctx.options

        def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return naive.run(q, k, v, routes, tuple(region_size), tuple(key_region_size), scale, None)

        return *differentiated(standard, (q, k, v), grad, ctx.needs_input_grad[:3]), None, None, None, None
    return *_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options), None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.visionattn.routed_triton)
def _forward_flops(q, k, v, routes, region_size, key_region_size, *args, **kwargs) -> int:
    return naive.flops(q, v, routes, key_region_size)


@register_flop_formula(torch.ops.visionattn.routed_triton_backward)
def _backward_flops(grad, q, k, v, routes, out, lse, region_size, key_region_size, *args, **kwargs) -> int:
    return naive.backward_flops(q, v, routes, key_region_size)
