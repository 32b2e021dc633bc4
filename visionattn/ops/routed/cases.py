"""What a call of routed attention is to a backend, and examples of it."""
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..case import CAUSAL, CROSS, PATTERN_WIDTH, Case, square

__all__ = ["CASES", "RoutedProblem", "pattern_case"]


class RoutedProblem(NamedTuple):
    """What a backend has to know to say whether it can do a call."""

    grid: tuple[int, int]
    region_size: tuple[int, int]
    key_region_size: tuple[int, int]
    heads: int
    head_dim: int
    value_dim: int
    topk: int
    shared_routes: bool
    has_route_weights: bool
    dtype: torch.dtype
    device: str
    requires_grad: bool
    standard_only: bool = False


def _case(
        shape: tuple[int, int, int, int, int],
        region_size: int | tuple[int, int],
        topk: int,
        key_region_size: tuple[int, int] | None = None,
        value_dim: int | None = None,
        shared_routes: bool = True,
        weights: bool = False,
        groups: tuple[str, ...] = ("families",),
) -> Case:
    """A case of queries ``[batch, height, width, heads, head_dim]``."""
    batch, height, width, heads, head_dim = shape
    value_dim = value_dim or head_dim
    size = region_size if isinstance(region_size, tuple) else (region_size, region_size)
    grid = (height // size[0], width // size[1])
    key_size = key_region_size or size
    regions = math.prod(grid)
    keys = (batch, grid[0] * key_size[0], grid[1] * key_size[1], heads)
    problem = RoutedProblem(
        grid=grid, region_size=size, key_region_size=key_size, heads=heads, head_dim=head_dim, value_dim=value_dim,
        topk=topk, shared_routes=shared_routes, has_route_weights=weights, dtype=torch.float32, device="cpu",
        requires_grad=False)
    lists = (batch, 1 if shared_routes else heads, regions, topk)
    inputs: dict[str, tuple[int, ...]] = {"q": shape, "k": (*keys, head_dim), "v": (*keys, value_dim)}
    if weights:
        inputs["route_weights"] = lists

    def tables(generator: torch.Generator) -> dict[str, Tensor]:
        return {"routes": torch.rand(*lists[:-1], regions, generator=generator).topk(topk).indices}

    gathered = batch * heads * regions * topk * math.prod(key_size)
    words = [f"region {size[0] if size[0] == size[1] else 'x'.join(map(str, size))}", f"topk {topk}"]
    words += [word for word, holds in (
        ("routes of each head", not shared_routes), ("weights", weights), ("pooled keys", key_size != size)) if holds]
    return Case(
        problem, inputs, {"region_size": size}, tables=tables, pairs=gathered * math.prod(size), gathered=gathered,
        summary=", ".join(words), groups=groups)


_SMALL = ("small",)
CASES = {
    "224_stage1": _case((8, 56, 56, 2, 32), region_size=8, topk=1, groups=("families", "kernels")),
    "224_stage2": _case((8, 28, 28, 4, 32), region_size=4, topk=4),
    "224_stage3": _case((8, 14, 14, 8, 32), region_size=2, topk=16, groups=("families", "kernels")),
    "512_stage1": _case((2, 128, 128, 2, 32), region_size=16, topk=1),
    "512_stage2": _case((2, 64, 64, 4, 32), region_size=8, topk=4),
    "512_stage3": _case((2, 32, 32, 8, 32), region_size=4, topk=16),
    "56x56": _case((1, 56, 56, 2, 32), region_size=8, topk=4, groups=("usual",)),
    "weighted": _case((1, 56, 56, 2, 32), region_size=8, topk=4, weights=True, groups=("usual",)),
    "small": _case((2, 8, 12, 2, 8), region_size=4, topk=2, groups=_SMALL),
    "small_uneven": _case((1, 6, 8, 2, 8), region_size=(3, 2), topk=3, shared_routes=False, groups=_SMALL),
    "small_pooled": _case((2, 8, 8, 2, 8), region_size=4, topk=3, key_region_size=(2, 1), value_dim=4, groups=_SMALL),
    "small_weighted": _case((2, 8, 8, 2, 8), region_size=4, topk=2, weights=True, groups=_SMALL),
    "small_large_map": _case((1, 20, 20, 1, 8), region_size=2, topk=3, groups=_SMALL),
}


def pattern_case(pattern: str, tokens: int) -> Case | str:
    """The op in a pattern of attention at a number of tokens, or why it cannot do it."""
    if pattern in CAUSAL:
        return "a region's routes are of all its queries and list whole regions, later tokens among both"
    side = square(tokens)
    size = 2 if side <= 32 else 4  # about as many regions as the paper's N^(4/3) asks for
    return _case((1, side, side, *PATTERN_WIDTH), region_size=size, topk=4, groups=(),
                 key_region_size=(size, size // 2) if pattern in CROSS else None)
