"""Combiner attention as its definition says: for every query a list of tokens and of summaries.

This form is the truth that other backends are compared with. :func:`lists` is the definition of the patterns.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import numbers, untraced

__all__ = ["Summary", "entries", "lists", "run"]


class Summary(NamedTuple):
    """A summary: its query and key are pooled from some tokens, its value is the attention of that query to others."""

    pooled: list[int]  # none: query and key are 0
    seen: list[int]


def lists(
        pattern: str, size: tuple[int, int], window_size: tuple[int, int] | None, causal: bool,
) -> tuple[list[Summary], list[tuple[list[int], list[int]]]]:
    """All summaries, and for every query (row by row) the tokens and the summaries that it sees."""
    rows, columns = size
    grid = [[r * columns + c for c in range(columns)] for r in range(rows)]
    tokens = [(r, c) for r in range(rows) for c in range(columns)]
    summaries: list[Summary] = []
    seen: list[tuple[list[int], list[int]]] = []
    if pattern == "window":
        assert window_size is not None
        wide = -(-columns // window_size[1])
        owner = [r // window_size[0] * wide + c // window_size[1] for r, c in tokens]
        windows: list[list[int]] = [[] for _ in range(owner[-1] + 1)]
        for token, window in enumerate(owner):
            windows[window].append(token)
        summaries = [Summary(window, window) for window in windows]
        for token, window in enumerate(owner):
            if causal:
                seen.append(([other for other in windows[window] if other <= token], list(range(window))))
            else:
                seen.append((windows[window], list(range(len(windows)))))
    elif pattern == "axial":
        summaries = [Summary([grid[r][c]], grid[r]) for r, c in tokens]
        for r, c in tokens:
            if causal:
                seen.append((grid[r][:c + 1], [grid[other][c] for other in range(r)]))
            else:
                seen.append((grid[r], [grid[other][c] for other in range(rows)]))
    elif pattern == "mixture":
        lines = [[row[c] for row in grid] for c in range(columns)]  # the columns
        spans = {
            "up": lambda r, c: (lines[c][:r], lines[c]), "down": lambda r, c: (lines[c][r + 1:], lines[c]),
            "left": lambda r, c: (grid[r][:c], grid[r]), "right": lambda r, c: (grid[r][c + 1:], grid[r])}
        number = {}
        for name, span in spans.items():
            for r, c in tokens:
                number[name, r, c] = len(summaries)
                pooled, line = span(r, c)
                summaries.append(Summary(pooled, pooled or line))
        for r, c in tokens:
            if causal:
                found = [number["up", r, other] for other in range(columns) if other != c] if r else []
                found += [number["left", other, c] for other in range(r)] if c else []
                found += [number["right", other, c] for other in range(r)] if c < columns - 1 else []
                seen.append((lines[c][:r] + grid[r][:c + 1], found))
            else:
                found = [number[name, r, other] for name in ("up", "down") for other in range(columns)]
                found += [number[name, other, c] for name in ("left", "right") for other in range(rows)]
                seen.append((grid[r] + lines[c], found))
    else:
        level, first = 1, {}
        while level < columns:
            first[level] = len(summaries)
            blocks = [list(range(start, start + level)) for start in range(0, columns - level + 1, level)]
            summaries += [Summary(block, block) for block in blocks]
            level *= 2
        for token in range(columns):
            bits = [level for level in first if token & level]
            seen.append(([token], [first[level] + token // level - 1 for level in bits]))
    return summaries, seen


def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: str,
        window_size: tuple[int, int] | None,
        causal: bool,
        pool: str,
        count_bias: bool,
        scale: float,
        summary_q: Tensor | None = None,
        summary_k: Tensor | None = None,
        summary_v: Tensor | None = None,
) -> Tensor:
    """The public function with every argument explicit."""
    shape, dtype, compute = v.shape, q.dtype, torch.promote_types(q.dtype, torch.float32)
    rows, columns = numbers(shape[1:3])
    summaries, seen = lists(pattern, (rows, columns), window_size, causal)
    pooled_q, pooled_k = (x.flatten(1, 2).to(compute) for x in (
        q if summary_q is None else summary_q, k if summary_k is None else summary_k))
    q, k, v = (x.flatten(1, 2).to(compute) for x in (q, k, v))
    q, pooled_q = q * scale, pooled_q * scale

    spans = _table([summary.pooled for summary in summaries], q.device)
    own_q, own_k = _pooled(pooled_q, *spans, pool), _pooled(pooled_k, *spans, pool)
    if summary_v is None:
        own_v = _attend(own_q, k, v, *_table([summary.seen for summary in summaries], q.device))
    else:
        own_v = summary_v.flatten(1, 2).to(compute)
    tokens = rows * columns
    table = _table([direct + [tokens + other for other in others] for direct, others in seen], q.device)
    counts = torch.ones(tokens + len(summaries), dtype=compute, device=q.device)
    if count_bias:
        counts[tokens:] = spans[1].sum(dim=1)
    out = _attend(q, torch.cat([k, own_k], dim=1), torch.cat([v, own_v], dim=1), *table, counts.log())
    return out.reshape(shape).to(dtype)


def entries(pattern: str, size: tuple[int, int], window_size: tuple[int, int] | None, causal: bool) -> int:
    """Number of pairs of a query and a key, those within summaries included."""
    summaries, seen = lists(pattern, size, window_size, causal)
    return sum(len(summary.seen) for summary in summaries) + sum(len(a) + len(b) for a, b in seen)


def _table(found: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists as a table ``[lists, longest]``, and which of its entries exist."""
    longest = max([1, *(len(one) for one in found)])
    with untraced():  # constants
        index = torch.tensor([one + [0] * (longest - len(one)) for one in found], dtype=torch.long, device=device)
        length = torch.tensor([len(one) for one in found], device=device)
        return index.view(-1, longest), torch.arange(longest, device=device) < length[:, None]


def _pooled(x: Tensor, index: Tensor, exists: Tensor, pool: str) -> Tensor:
    """Of tokens ``[batch, tokens, heads, dim]`` those of each list, pooled; 0 for an empty one."""
    exists = exists[:, :, None, None]
    x = x[:, index]
    if pool == "max":
        x = x.masked_fill(~exists, -torch.inf).amax(dim=2)
        return x.masked_fill(~exists.any(dim=1), 0)
    total = x.masked_fill(~exists, 0).sum(dim=2)
    return total if pool == "sum" else total / exists.sum(dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor, exists: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of queries ``[batch, queries, heads, dim]``, each to its list of keys."""
    scores = torch.einsum("bnhd,bnehd->bnhe", q, k[:, index])
    if bias is not None:
        scores = scores + bias[index][:, None]
    weights = scores.masked_fill(~exists[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bnhe,bnehd->bnhd", weights, v[:, index])
