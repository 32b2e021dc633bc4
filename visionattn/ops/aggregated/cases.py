"""What a call of aggregated attention is to a backend, and examples of it."""
from typing import NamedTuple

import torch
from torch import Tensor

from ..case import CAUSAL, CROSS, PATTERN_WIDTH, Case, square
from .naive import pairs

__all__ = ["CASES", "AggregatedProblem", "pattern_case"]


class AggregatedProblem(NamedTuple):
    """What a backend has to know to say whether it can do a call."""

    size: tuple[int, int]
    heads: int
    head_dim: int
    value_dim: int
    kernel_size: int
    pooled: int
    has_local_bias: bool
    has_pooled_bias: bool
    has_local_weights: bool
    has_active: bool
    dtype: torch.dtype
    device: str
    requires_grad: bool = False
    standard_only: bool = False


def _case(
        shape: tuple[int, int, int, int, int],
        pooled: int = 49,
        kernel_size: int = 3,
        value_dim: int | None = None,
        plain: bool = False,
        active: bool = False,
        groups: tuple[str, ...] = ("families",),
) -> Case:
    """A case of queries ``[batch, height, width, heads, head_dim]``; a plain one has neither biases nor weights.

    ``active`` is half of the queries of all heads but the first, of which all are.
    """
    batch, height, width, heads, head_dim = shape
    value_dim, places = value_dim or head_dim, kernel_size ** 2
    problem = AggregatedProblem(
        size=(height, width), heads=heads, head_dim=head_dim, value_dim=value_dim, kernel_size=kernel_size,
        pooled=pooled, has_local_bias=not plain, has_pooled_bias=not plain, has_local_weights=not plain,
        has_active=active,
        dtype=torch.float32, device="cpu")
    inputs: dict[str, tuple[int, ...]] = {
        "q": shape, "k": shape, "v": (*shape[:-1], value_dim), "pooled_k": (batch, pooled, heads, head_dim),
        "pooled_v": (batch, pooled, heads, value_dim)}
    parameters: dict[str, tuple[int, ...]] = {}
    if not plain:
        inputs["local_weights"] = (*shape[:-1], places)
        parameters = {"local_bias": (heads, places), "pooled_bias": (heads, height * width, pooled)}
    def tables(generator: torch.Generator) -> dict[str, Tensor]:
        wanted = torch.rand(shape[:-1], generator=generator) < 0.5
        wanted[..., 0] = True
        return {"active": wanted}

    words = [f"K {kernel_size}", f"{pooled} pooled", *([] if plain else ["biases, weights"])]
    words += ["half active"] if active else []
    return Case(problem, inputs, {"kernel_size": kernel_size}, parameters, tables if active else None,
                pairs=pairs(shape, (batch, pooled), kernel_size),
                summary=", ".join(words), groups=groups)


_SMALL = ("small",)
CASES = {
    "56x56": _case((1, 56, 56, 2, 24), groups=("families", "usual")),
    "28x28": _case((1, 28, 28, 4, 24), groups=("families", "kernels")),
    "14x14": _case((1, 14, 14, 8, 24), groups=("families", "usual")),
    "b8_56x56": _case((8, 56, 56, 2, 24)),
    "b8_14x14": _case((8, 14, 14, 8, 24)),
    "512_stage1": _case((1, 128, 128, 2, 24), pooled=256),
    "14x14_half": _case((1, 14, 14, 16, 24), active=True),
    "32x32_half": _case((1, 32, 32, 16, 24), pooled=256, active=True),
    "32x32_h4": _case((1, 32, 32, 4, 24), groups=("scaling",)),
    "64x64_h4": _case((1, 64, 64, 4, 24), groups=("scaling",)),
    "128x128": _case((1, 128, 128, 4, 24), groups=("scaling",)),
    "small": _case((2, 7, 9, 2, 8), pooled=6, groups=_SMALL),
    "small_plain": _case((1, 6, 5, 2, 8), pooled=4, value_dim=4, plain=True, groups=_SMALL),
    "small_active": _case((2, 6, 8, 3, 8), pooled=60, active=True, groups=_SMALL),
    "small_window": _case((2, 9, 6, 1, 8), pooled=5, kernel_size=5, groups=_SMALL),
    "small_window_is_larger": _case((1, 2, 3, 2, 8), pooled=1, kernel_size=7, groups=_SMALL),
}


def pattern_case(pattern: str, tokens: int) -> Case | str:
    """The op in a pattern of attention at a number of tokens, or why it cannot do it."""
    if pattern in CROSS:
        return "a window of keys lies around the query's own place in the map"
    if pattern in CAUSAL:
        return "a window is centred on its query, so that later keys are in it, and pooled keys are of the whole map"
    return _case((1, square(tokens), square(tokens), *PATTERN_WIDTH), plain=True, groups=())
