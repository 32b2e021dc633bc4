"""What a call of sparsified attention is to a backend, and examples of it."""
from typing import NamedTuple

import torch
from torch import Tensor

from ..case import CAUSAL, CROSS, PATTERN_WIDTH, Case

__all__ = ["CASES", "SparsifiedProblem", "pattern_case"]


class SparsifiedProblem(NamedTuple):
    """What a backend has to know to say whether it can do a call."""

    queries: int
    keys: int
    groups: int
    chosen: int
    heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    requires_grad: bool = False
    standard_only: bool = False


def _case(
        shape: tuple[int, int, int, int],
        chosen: int,
        size: int = 1,
        value_dim: int | None = None,
        keys: int | None = None,
        groups: tuple[str, ...] = ("families",),
) -> Case:
    """A case of queries ``[batch, queries, heads, head_dim]``, of which ``size`` share a list."""
    batch, queries, heads, head_dim = shape
    keys, value_dim, lists = keys or queries, value_dim or head_dim, queries // size
    problem = SparsifiedProblem(
        queries=queries, keys=keys, groups=lists, chosen=chosen, heads=heads, head_dim=head_dim, value_dim=value_dim,
        dtype=torch.float32, device="cpu")

    def tables(generator: torch.Generator) -> dict[str, Tensor]:
        # Runs of keys from a random start: as random as lists need to be, without the sorting of large tables.
        starts = torch.randint(keys, (batch, heads, lists, 1), generator=generator)
        return {"index": (starts + torch.arange(chosen) * _STEP) % keys}

    return Case(
        problem, {"q": shape, "k": (batch, keys, heads, head_dim), "v": (batch, keys, heads, value_dim)}, tables=tables,
        pairs=batch * heads * queries * chosen, gathered=batch * heads * lists * chosen,
        summary=f"{chosen} keys, lists of {size} queries", groups=groups)


_STEP = 9973  # a prime, which no number of keys here is a multiple of: lists have no repeats

_SMALL = ("small",)
CASES = {
    "deit_tiny": _case((1, 196, 3, 64), chosen=50),
    "deit_small": _case((1, 196, 6, 64), chosen=50),
    "deit_small_shared": _case((1, 196, 6, 64), chosen=50, size=14),
    # A quarter of the keys: a list for 64 queries, and for every one.
    "quarter_14x14": _case((1, 196, 2, 64), chosen=49, size=28, groups=("scaling",)),
    "quarter_32x32": _case((1, 1024, 2, 64), chosen=256, size=64, groups=("scaling",)),
    "quarter_64x64": _case((1, 4096, 2, 64), chosen=1024, size=64, groups=("scaling",)),
    "own_lists_32x32": _case((1, 1024, 2, 64), chosen=256, groups=("scaling",)),
    # As many keys, whatever the map.
    "fixed_14x14": _case((1, 196, 2, 64), chosen=64, size=28, groups=("scaling", "usual")),
    "fixed_32x32": _case((1, 1024, 2, 64), chosen=64, size=64, groups=("scaling", "usual")),
    "fixed_64x64": _case((1, 4096, 2, 64), chosen=64, size=64, groups=("scaling",)),
    "fixed_128x128": _case((1, 16384, 1, 64), chosen=64, size=64, groups=("scaling",)),
    "small": _case((2, 21, 2, 8), chosen=5, value_dim=4, groups=_SMALL),
    "small_shared": _case((2, 24, 3, 8), chosen=7, size=6, keys=19, groups=_SMALL),
}


def pattern_case(pattern: str, tokens: int) -> Case | str:
    """The op in a pattern of attention at a number of tokens, or why it cannot do it."""
    if pattern in CAUSAL:
        return "64 queries share a list of keys, that of the first being that of the last"
    keys = tokens // 2 if pattern in CROSS else tokens
    return _case((1, tokens, *PATTERN_WIDTH), chosen=min(64, keys), size=64, keys=keys, groups=())
