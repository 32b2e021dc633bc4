"""What a call of combiner attention is to a backend, and examples of it."""
from typing import NamedTuple

import torch

from ..case import CAUSAL, CROSS, PATTERN_WIDTH, Case, square
from .naive import entries

__all__ = ["CASES", "CombinerProblem", "pattern_case"]


class CombinerProblem(NamedTuple):
    """What a backend has to know to say whether it can do a call."""

    size: tuple[int, int]
    heads: int
    head_dim: int
    value_dim: int
    pattern: str
    window_size: tuple[int, int] | None
    causal: bool
    pool: str
    count_bias: bool
    has_summary_q: bool
    has_summary_k: bool
    has_summary_v: bool
    dtype: torch.dtype
    device: str
    requires_grad: bool = False
    standard_only: bool = False


def _pairs(pattern: str, size: tuple[int, int], window_size: tuple[int, int] | None, causal: bool) -> int:
    """Pairs of a query and a key of one head; as :func:`naive.entries` counts them, where that takes no time."""
    rows, columns = size
    tokens = rows * columns
    if tokens < 1000 or (causal and pattern != "window"):
        return entries(pattern, size, window_size, causal)
    if causal and window_size:
        windows, rest = divmod(columns, window_size[1])
        lengths = [window_size[1]] * windows + [rest]
        # Spans, own tokens up to the query, summaries of earlier windows.
        return tokens + sum(n * (n + 1) // 2 + n * earlier for earlier, n in enumerate(lengths))
    if pattern == "window":
        assert window_size is not None
        grid = [[min(side, length - start) for start in range(0, length, side)]
                for length, side in zip(size, window_size, strict=True)]
        return tokens + sum((y * x) ** 2 for y in grid[0] for x in grid[1]) + tokens * len(grid[0]) * len(grid[1])
    return tokens * (2 * columns + rows) if pattern == "axial" else tokens * 3 * (rows + columns)


def _case(
        shape: tuple[int, int, int, int, int],
        pattern: str = "window",
        window_size: tuple[int, int] | None = None,
        causal: bool = False,
        pool: str | None = None,
        value_dim: int | None = None,
        count_bias: bool = False,
        summaries: tuple[str, ...] = (),
        groups: tuple[str, ...] = ("families",),
) -> Case:
    """A case of queries ``[batch, rows, columns, heads, head_dim]``; ``summaries`` are arguments that are given."""
    batch, *size, heads, head_dim = shape
    value_dim = value_dim or head_dim
    problem = CombinerProblem(
        size=(size[0], size[1]), heads=heads, head_dim=head_dim, value_dim=value_dim, pattern=pattern,
        window_size=window_size, causal=causal or pattern == "logn",
        pool=pool or ("sum" if pattern == "mixture" else "max"), count_bias=count_bias,
        **{f"has_{name}": name in summaries for name in ("summary_q", "summary_k", "summary_v")},
        dtype=torch.float32, device="cpu")
    inputs = {"q": shape, "k": shape, "v": (*shape[:-1], value_dim)}
    inputs |= {name: (*shape[:-1], value_dim) if name == "summary_v" else shape for name in summaries}
    options = {"pattern": pattern, "window_size": window_size, "causal": causal, "pool": pool, "count_bias": count_bias}
    words = [f"{pattern} {'x'.join(map(str, window_size))}" if window_size else pattern]
    words += [word for word, holds in (
        ("causal", causal), (pool or "", pool), ("count bias", count_bias)) if holds]
    pairs = batch * heads * _pairs(pattern, problem.size, window_size, problem.causal)
    return Case(problem, inputs, options, pairs=pairs, gathered=pairs, summary=", ".join(words), groups=groups)


_SMALL, _SCALING = ("small",), ("scaling",)
CASES = {
    "14x14": _case((1, 14, 14, 4, 32), window_size=(4, 4), groups=("families", "scaling")),
    "28x28": _case((1, 28, 28, 4, 32), window_size=(5, 5), groups=("families", "scaling")),
    "56x56": _case((1, 56, 56, 4, 32), window_size=(7, 7), groups=("families", "scaling", "usual")),
    "128x128": _case((1, 128, 128, 4, 32), window_size=(11, 11), groups=_SCALING),
    "axial_14x14": _case((1, 14, 14, 4, 32), "axial", groups=_SCALING),
    "axial_28x28": _case((1, 28, 28, 4, 32), "axial", groups=_SCALING),
    "axial_56x56": _case((1, 56, 56, 4, 32), "axial", groups=("scaling", "usual")),
    "axial_128x128": _case((1, 128, 128, 4, 32), "axial", groups=_SCALING),
    "mixture_14x14": _case((1, 14, 14, 4, 32), "mixture", groups=_SCALING),
    "mixture_28x28": _case((1, 28, 28, 4, 32), "mixture", groups=_SCALING),
    "mixture_56x56": _case((1, 56, 56, 4, 32), "mixture", groups=_SCALING),
    "small": _case((2, 5, 7, 2, 8), window_size=(2, 3), value_dim=4, groups=_SMALL),
    "small_mean": _case((1, 6, 4, 2, 8), window_size=(3, 2), pool="mean", count_bias=True, groups=_SMALL),
    "small_fixed": _case(
        (2, 1, 11, 2, 8), window_size=(1, 4), causal=True, pool="sum", summaries=("summary_q", "summary_k"),
        groups=_SMALL),
    "small_axial": _case((2, 4, 5, 2, 8), "axial", value_dim=4, groups=_SMALL),
    "small_axial_keys": _case(
        (1, 5, 3, 2, 8), "axial", causal=True, summaries=("summary_k", "summary_v"), groups=_SMALL),
    "small_mixture": _case((2, 4, 3, 2, 8), "mixture", value_dim=4, groups=_SMALL),
    "small_mixture_causal": _case((1, 4, 5, 2, 8), "mixture", causal=True, pool="max", groups=_SMALL),
    "small_logn": _case((2, 1, 17, 2, 8), "logn", groups=_SMALL),
}


def pattern_case(pattern: str, tokens: int) -> Case | str:
    """The op in a pattern of attention at a number of tokens, or why it cannot do it."""
    if pattern in CROSS:
        return "windows and spans are of the sequence that the queries are in"
    side = square(tokens)
    if pattern in CAUSAL:  # the paper's fixed pattern: a sequence in windows as long as there are windows
        return _case((1, 1, tokens, *PATTERN_WIDTH), window_size=(1, side), causal=True, groups=())
    window = max(1, round(side ** 0.5))
    return _case((1, side, side, *PATTERN_WIDTH), window_size=(window, window), groups=())
