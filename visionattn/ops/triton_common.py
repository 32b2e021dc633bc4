"""Pieces that the Triton kernels of all ops share: rows of channels, and the steps of flash attention on one block.

Scores are kept in base 2 (multiplied by log2 e), because the GPU's exponential is exp2; log-sum-exps in memory are
natural logarithms.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "LOG2E", "block_size", "constants", "layout", "load_rows", "score_gradient", "scores", "softmax_finish",
    "softmax_step", "store_rows",
]

LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2.0))


def layout(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head."""
    return x.stride(0), x.stride(-3), x.stride(-2)


def constants(q: Tensor, v: Tensor) -> dict[str, object]:
    """Compile-time constants that follow from the channels: widths, padded widths, keys per step, precision.

    Products of float32 are three of TF32, near float32's exactness, unless PyTorch is told what to do: "ieee" ones
    are not done by tensor cores, and their operands do not fit into registers.
    """
    told = torch.backends.cuda.matmul.fp32_precision
    precision = "ieee" if q.dtype != torch.float32 else told if told in ("ieee", "tf32") else "tf32x3"
    return dict(
        DQ=q.shape[-1], DV=v.shape[-1], BD=max(16, triton.next_power_of_2(q.shape[-1])),
        BV=max(16, triton.next_power_of_2(v.shape[-1])), BN=block_size(q, v), PRECISION=precision,
        num_warps=4, num_stages=2)


def block_size(q: Tensor, v: Tensor) -> int:
    """Keys (or queries) per step of a kernel's walk: as many as registers hold."""
    wide = max(q.shape[-1], v.shape[-1])
    if q.dtype == torch.float32:
        return 32 if wide <= 32 else 16
    return 64 if wide <= 64 else 32


@triton.jit
def load_rows(x, token, ok, stride, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Channels ``[tokens, BLOCK]`` of one head; zero where ``ok`` is false and beyond ``DIM`` channels."""
    d = tl.arange(0, BLOCK)
    return tl.load(x + token[:, None] * stride + d[None, :], mask=ok[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(x, token, ok, stride, value, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Stores what :func:`load_rows` would load."""
    d = tl.arange(0, BLOCK)
    tl.store(x + token[:, None] * stride + d[None, :], value.to(x.dtype.element_ty),
             mask=ok[:, None] & (d < DIM)[None, :])


@triton.jit
def scores(x, y, scale, PRECISION: tl.constexpr):
    """Scores in base 2 of the rows of x and y."""
    return tl.dot(x, tl.trans(y), input_precision=PRECISION) * (scale * LOG2E)


@triton.jit
def softmax_step(s, v_rows, largest, total, acc, PRECISION: tl.constexpr):
    """Takes one block of keys into the running softmax; ``largest`` starts finite, so masked blocks give no NaN."""
    new_largest = tl.maximum(largest, tl.max(s, axis=1))
    shrink = tl.exp2(largest - new_largest)
    p = tl.exp2(s - new_largest[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v_rows.dtype), v_rows, acc * shrink[:, None], input_precision=PRECISION)
    return new_largest, total, acc


@triton.jit
def softmax_finish(largest, total, acc):
    """Output rows and natural log-sum-exp of a finished running softmax."""
    return acc / total[:, None], (largest + tl.log2(total)) * _LN2


@triton.jit
def score_gradient(p, grad_rows, v_rows, delta, PRECISION: tl.constexpr):
    """Gradient of the scores ``[queries, keys]`` from that of the output."""
    return p * (tl.dot(grad_rows, tl.trans(v_rows), input_precision=PRECISION) - delta[:, None])
