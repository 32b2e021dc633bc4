"""What a call of factorized attention is to a backend, and examples of it."""
import math
from typing import NamedTuple

import torch

from ..case import CROSS, PATTERN_WIDTH, Case, square

__all__ = ["CASES", "FactorizedProblem", "pattern_case"]


class FactorizedProblem(NamedTuple):
    """What a backend has to know to say whether it can do a call."""

    size: tuple[int, int]
    key_size: tuple[int, int]
    heads: int
    head_dim: int
    value_dim: int
    window: int
    dilations: tuple[int, ...]
    dtype: torch.dtype
    device: str
    requires_grad: bool = False
    standard_only: bool = False


def _case(
        shape: tuple[int, int, int, int, int],
        dilations: tuple[int, ...] = (1, 8),
        window: int = 7,
        key_size: tuple[int, int] | None = None,
        value_dim: int | None = None,
        groups: tuple[str, ...] = ("families",),
) -> Case:
    """A case of queries ``[batch, height, width, heads, head_dim]``."""
    batch, height, width, heads, head_dim = shape
    key_size, value_dim = key_size or (height, width), value_dim or head_dim
    problem = FactorizedProblem(
        size=(height, width), key_size=key_size, heads=heads, head_dim=head_dim, value_dim=value_dim, window=window,
        dilations=dilations, dtype=torch.float32, device="cpu")
    inputs = {"q": shape, "k": (batch, *key_size, heads, head_dim), "v": (batch, *key_size, heads, value_dim)}
    return Case(
        problem, inputs, {"window": window, "dilations": dilations},
        pairs=batch * heads * height * width * window ** 2,
        summary=f"window {window}, dilations {', '.join(map(str, dilations))}"
                + (f", {math.prod(key_size)} keys" if key_size != (height, width) else ""), groups=groups)


_SMALL = ("small",)
CASES = {
    "56x56": _case((1, 56, 56, 2, 14), groups=("families", "usual")),
    "28x28": _case((1, 28, 28, 4, 14), dilations=(1, 4)),
    "14x14": _case((1, 14, 14, 8, 14), dilations=(1, 2), groups=("families", "usual")),
    "b8_56x56": _case((8, 56, 56, 2, 14)),
    "b8_14x14": _case((8, 14, 14, 8, 14), dilations=(1, 2)),
    "merged_before": _case((1, 56, 56, 2, 14), dilations=(1,), key_size=(7, 7)),
    **{f"{side}x{side}_h4": _case((1, side, side, 4, 32), groups=("scaling",)) for side in (14, 28, 56, 128)},
    "small": _case((2, 7, 9, 2, 8), dilations=(1, 2), window=3, value_dim=4, groups=_SMALL),
    "small_few_keys": _case((2, 5, 4, 2, 8), dilations=(3,), window=3, key_size=(2, 1), groups=_SMALL),
    "small_tiles": _case((1, 15, 14, 4, 8), dilations=(1, 2), window=4, groups=_SMALL),
}


def pattern_case(pattern: str, tokens: int) -> Case | str:
    """The op in a pattern of attention at a number of tokens, or why it cannot do it."""
    if pattern == "causal_self":
        return "every key is a mean over tiles of the whole map"
    side = square(tokens)
    return _case((1, side, side, *PATTERN_WIDTH), key_size=(side // 2, side) if pattern in CROSS else None, groups=())
