"""What a call of varied-size window attention is to a backend, and examples of it."""
from typing import NamedTuple

import torch

from ..case import CAUSAL, CROSS, PATTERN_WIDTH, Case, square

__all__ = ["CASES", "VariedWindowProblem", "pattern_case"]


class VariedWindowProblem(NamedTuple):
    """What a backend has to know to say whether it can do a call."""

    size: tuple[int, int]
    window_size: tuple[int, int]
    heads: int
    head_dim: int
    value_dim: int
    has_bias: bool
    dtype: torch.dtype
    device: str
    requires_grad: bool = False
    standard_only: bool = False


def _case(
        shape: tuple[int, int, int, int, int],
        window: tuple[int, int] = (7, 7),
        value_dim: int | None = None,
        bias: bool = True,
        groups: tuple[str, ...] = ("families",),
) -> Case:
    """A case of queries ``[batch, height, width, heads, head_dim]``; places are float32 in every call, like biases."""
    batch, height, width, heads, head_dim = shape
    value_dim = value_dim or head_dim
    problem = VariedWindowProblem(
        size=(height, width), window_size=window, heads=heads, head_dim=head_dim, value_dim=value_dim, has_bias=bias,
        dtype=torch.float32, device="cpu")
    windows = (batch, height // window[0], width // window[1], heads, 2)
    parameters: dict[str, tuple[int, ...]] = {"offset": windows, "stretch": windows}
    if bias:
        parameters["bias"] = (heads, 2 * window[0] - 1, 2 * window[1] - 1)
    tokens = batch * height * width * heads
    return Case(
        problem, {"q": shape, "k": shape, "v": (*shape[:-1], value_dim)}, {"window_size": window}, parameters,
        pairs=tokens * window[0] * window[1], gathered=tokens,
        summary=f"windows of {window[0]}x{window[1]}" + (", bias" if bias else ""), groups=groups)


_SMALL = ("small",)
CASES = {
    "56x56": _case((1, 56, 56, 3, 32), groups=("families", "usual")),
    "28x28": _case((1, 28, 28, 6, 32), bias=False, groups=("usual",)),
    "28x28_bias": _case((1, 28, 28, 6, 32)),
    "14x14": _case((1, 14, 14, 12, 32)),
    "7x7": _case((1, 7, 7, 24, 32)),
    "b8_56x56": _case((8, 56, 56, 3, 32)),
    "b8_14x14": _case((8, 14, 14, 12, 32)),
    "small": _case((2, 6, 8, 2, 8), window=(3, 4), value_dim=4, bias=False, groups=_SMALL),
    "small_bias": _case((2, 8, 4, 2, 8), window=(4, 4), groups=_SMALL),
    "small_one_window": _case((1, 5, 5, 3, 8), window=(5, 5), groups=_SMALL),
}


def pattern_case(pattern: str, tokens: int) -> Case | str:
    """The op in a pattern of attention at a number of tokens, or why it cannot do it."""
    if pattern in CROSS:
        return "a window's keys are sampled from the map that its queries are in"
    if pattern in CAUSAL:
        return "keys of a window are sampled anywhere, and all queries of it see all of them"
    return _case((1, square(tokens), square(tokens), *PATTERN_WIDTH), window=(8, 8), bias=False, groups=())
