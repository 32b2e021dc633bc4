"""What a call of neighborhood attention is to a backend, and examples of it."""
import math
from typing import NamedTuple

import torch

from ..case import CAUSAL, CROSS, PATTERN_WIDTH, Case, square

__all__ = ["CASES", "NeighborhoodProblem", "pattern_case"]


class NeighborhoodProblem(NamedTuple):
    """What a backend has to know to say whether it can do a call."""

    spatial: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    is_causal: tuple[bool, ...]
    has_bias: bool
    additional: int
    return_lse: bool
    dtype: torch.dtype
    device: str
    requires_grad: bool
    standard_only: bool = False


def _case(
        shape: tuple[int, ...],
        kernel_size: int | tuple[int, ...] = 7,
        dilation: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] = 1,
        is_causal: bool | tuple[bool, ...] = False,
        bias: bool = False,
        kv_heads: int | None = None,
        value_dim: int | None = None,
        additional: int = 0,
        return_lse: bool = False,
        groups: tuple[str, ...] = ("families",),
) -> Case:
    """A case of queries ``[batch, *spatial, heads, head_dim]``; an option is one value, or one per axis."""
    batch, *spatial, heads, head_dim = shape
    kv_heads, value_dim = kv_heads or heads, value_dim or head_dim
    kernels, dilations, strides = (
        value if isinstance(value, tuple) else (value,) * len(spatial) for value in (kernel_size, dilation, stride))
    causal = is_causal if isinstance(is_causal, tuple) else (is_causal,) * len(spatial)
    problem = NeighborhoodProblem(
        spatial=tuple(spatial), heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim,
        kernel_size=kernels, dilation=dilations, stride=strides, is_causal=causal, has_bias=bias,
        additional=additional, return_lse=return_lse, dtype=torch.float32, device="cpu", requires_grad=False)
    inputs: dict[str, tuple[int, ...]] = {
        "q": shape, "k": (batch, *spatial, kv_heads, head_dim), "v": (batch, *spatial, kv_heads, value_dim)}
    if additional:
        inputs["additional_keys"] = (batch, additional, kv_heads, head_dim)
        inputs["additional_values"] = (batch, additional, kv_heads, value_dim)
    options = {"kernel_size": kernels, "dilation": dilations, "stride": strides, "is_causal": causal}
    pairs = math.prod(shape[:-1]) * (math.prod(kernels) + additional)

    def axes(values: tuple) -> str:
        return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))

    words = [f"K {axes(kernels)}"]
    words += [f"{name} {axes(values)}" for name, values in (("dilation", dilations), ("stride", strides))
              if max(values) > 1]
    words += [word for word, holds in (
        ("causal", any(causal)), ("bias", bias), (f"{kv_heads} key heads", kv_heads != heads),
        (f"{additional} more keys", additional), ("log-sum-exp", return_lse)) if holds]
    return Case(
        problem, inputs, options | ({"return_lse": True} if return_lse else {}),
        {"bias": (heads, *(2 * kernel - 1 for kernel in kernels))} if bias else {}, pairs=pairs, gathered=pairs,
        summary=", ".join(words), groups=groups)


_SMALL = ("small",)
CASES = {
    "56x56": _case((1, 56, 56, 2, 32), groups=("families", "usual")),
    "56x56_bias": _case((1, 56, 56, 2, 32), bias=True, groups=("families", "usual")),
    "56x56_d8": _case((1, 56, 56, 2, 32), dilation=8, groups=("families", "kernels")),
    "56x56_d8_bias": _case((1, 56, 56, 2, 32), dilation=8, bias=True),
    "28x28_bias": _case((1, 28, 28, 4, 32), bias=True, groups=("families", "kernels")),
    "28x28_d4_bias": _case((1, 28, 28, 4, 32), dilation=4, bias=True),
    "14x14_bias": _case((1, 14, 14, 8, 32), bias=True),
    "7x7": _case((1, 7, 7, 16, 32)),
    "b8_56x56": _case((8, 56, 56, 2, 32)),
    "b8_56x56_bias": _case((8, 56, 56, 2, 32), bias=True),
    "b8_14x14": _case((8, 14, 14, 8, 32)),
    "b8_14x14_bias": _case((8, 14, 14, 8, 32), bias=True),
    "b8_14x14_d2": _case((8, 14, 14, 8, 32), dilation=2),
    "b8_7x7_bias": _case((8, 7, 7, 16, 32), bias=True),
    "b32_28x28_bias": _case((32, 28, 28, 4, 32), bias=True),
    "50x67_d3_bias": _case((1, 50, 67, 4, 32), dilation=3, bias=True),
    "32x32_h4": _case((1, 32, 32, 4, 32), groups=("scaling",)),
    "64x64_h4": _case((1, 64, 64, 4, 32), groups=("scaling",)),
    "128x128": _case((1, 128, 128, 4, 32), groups=("scaling",)),
    "256x256": _case((1, 256, 256, 4, 32), groups=("scaling",)),
    "64x64_k24": _case((1, 64, 64, 4, 32), kernel_size=24, groups=("strided",)),
    "64x64_k24_s4": _case((1, 64, 64, 4, 32), kernel_size=24, stride=4, groups=("strided",)),
    "64x64_k24_s8": _case((1, 64, 64, 4, 32), kernel_size=24, stride=8, groups=("strided",)),
    "b8_56x56_h8_bias": _case((8, 56, 56, 8, 32), bias=True, groups=("gpu",)),
    "b8_56x56_h8_k13_bias": _case((8, 56, 56, 8, 32), kernel_size=13, bias=True, groups=("gpu",)),
    "b2_256x256_h8_bias": _case((2, 256, 256, 8, 64), bias=True, groups=("gpu",)),
    "b2_256x256_h8_k13_bias": _case((2, 256, 256, 8, 64), kernel_size=13, bias=True, groups=("gpu",)),
    "28x28_d64_k13_bias": _case((1, 28, 28, 4, 64), kernel_size=13, bias=True, groups=("kernels",)),
    "small_line": _case((2, 23, 2, 8), kernel_size=5, dilation=3, groups=_SMALL),
    "small_map": _case((1, 9, 11, 2, 8), kernel_size=(3, 4), dilation=(3, 2), value_dim=4, groups=_SMALL),
    "small_bias": _case((2, 10, 9, 2, 8), kernel_size=5, bias=True, groups=_SMALL),
    "small_strided": _case((1, 9, 11, 2, 8), kernel_size=4, stride=3, groups=_SMALL),
    "small_causal": _case((1, 12, 7, 2, 8), kernel_size=(5, 3), is_causal=(True, False), groups=_SMALL),
    "small_volume": _case((1, 4, 5, 6, 2, 8), kernel_size=3, bias=True, groups=_SMALL),
    "small_more_keys": _case((2, 8, 9, 4, 8), kernel_size=3, kv_heads=2, additional=3, return_lse=True, groups=_SMALL),
    "small_window_is_map": _case((2, 7, 7, 2, 8), bias=True, groups=_SMALL),
}


def pattern_case(pattern: str, tokens: int) -> Case | str:
    """The op in a pattern of attention at a number of tokens, or why it cannot do it."""
    if pattern in CROSS:
        return "a window of keys lies around the query's own place in the map"
    # On a causal axis, a query sees no key after it: what precedes (y, x) are the rows to y and the columns to x.
    return _case((1, square(tokens), square(tokens), *PATTERN_WIDTH), is_causal=pattern in CAUSAL, groups=())
