"""Neighborhood attention by the NATTEN library (https://natten.org), if it is installed.

Behind ``halo`` in the order of preference, so it runs only when it is asked for. On a CPU NATTEN has only its
FlexAttention path: forward only, time and memory quadratic in the tokens.
"""
import importlib.util

import torch
from torch import Tensor

__all__ = ["run", "supports"]


def supports(problem) -> tuple[bool, str]:
    """Whether NATTEN can do the problem, and why not."""
    if importlib.util.find_spec("natten") is None:
        return False, "natten is not installed (pip install natten)"
    if problem.has_bias:
        return False, "natten has no relative position bias since version 0.20"
    if problem.standard_only:
        return False, "an exported graph, torch.func and forward mode take standard operators only"
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, f"natten takes float32, float16 and bfloat16, not {problem.dtype}"
    if problem.device == "cuda":
        return True, ""
    if problem.device != "cpu":
        return False, f"natten runs on cuda and cpu, not on {problem.device}"
    if problem.requires_grad:
        return False, "natten has no backward pass on cpu"
    if problem.value_dim != problem.head_dim:
        return False, (
            f"natten on cpu needs equal head dims, got {problem.head_dim} for keys, {problem.value_dim} for values")
    if problem.head_dim not in (8, 16, 32, 64, 128, 256, 512):
        return False, f"natten on cpu needs a head dim that is a power of two from 8 to 512, got {problem.head_dim}"
    return True, ""


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel_size: tuple[int, ...],
        dilation: tuple[int, ...],
        stride: tuple[int, ...],
        is_causal: tuple[bool, ...],
        bias: None,
        scale: float,
        additional_keys: Tensor | None,
        additional_values: Tensor | None,
        return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The public function with every argument explicit; returns the output and, if asked for, the log-sum-exp."""
    import natten

    op = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[q.ndim - 3]
    result = op(
        q, k, v, kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal, scale=scale,
        additional_keys=additional_keys, additional_values=additional_values, return_lse=return_lse)
    return result if return_lse else (result, None)
