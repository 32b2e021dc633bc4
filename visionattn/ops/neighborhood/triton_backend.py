"""Neighborhood attention by the project's Triton kernels, imported when they first run."""
from torch import Tensor

from .. import triton_support

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
    from .triton_kernels import attention

    out, lse = attention(q, k, v, bias, kernel_size, dilation, stride, is_causal, scale)
    return out, lse if return_lse else None
