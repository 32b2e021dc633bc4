"""Combiner attention by batched products of rows, columns and windows, of standard operators on any device."""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..dispatch import numbers
from ..recording import current_recorder
from ..sdpa import sdpa_of_few_keys

__all__ = ["row_attention", "run"]


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
    """The public function with every argument explicit; inside, heads come after the batch."""
    dtype, compute = q.dtype, torch.promote_types(q.dtype, torch.float32)

    def by_head(x: Tensor) -> Tensor:
        return x.to(compute).permute(0, 3, 1, 2, 4)

    q, k, v = by_head(q) * scale, by_head(k), by_head(v)
    summary_q = q if summary_q is None else by_head(summary_q) * scale
    summary_k = k if summary_k is None else by_head(summary_k)
    if pattern == "window":
        assert window_size is not None
        out = _windows(q, k, v, summary_q, summary_k, window_size, causal, pool, count_bias)
    elif pattern == "axial":
        out = _axial(q, k, v, summary_k, None if summary_v is None else by_head(summary_v), causal)
    elif pattern == "mixture":
        out = _mixture(q, k, v, causal, pool)
    else:
        out = _logn(q, k, v)
    return out.permute(0, 2, 3, 1, 4).to(dtype)


def row_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of every token of a map to its row: the values of axial summaries.

    Args:
        q: Queries ``[batch, rows, columns, heads, head_dim]``.
        k: Keys of the same shape.
        v: Values ``[batch, rows, columns, heads, value_dim]``.
        scale: Factor on queries; None means ``head_dim ** -0.5``.

    Returns:
        ``[batch, rows, columns, heads, value_dim]``, in float32 or better. Nobody records its probabilities.
    """
    recorder = current_recorder()
    if recorder is not None:
        with recorder.paused():
            return row_attention(q, k, v, scale)
    compute = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(compute).transpose(2, 3) for x in (q, k, v))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    return ((q @ k.transpose(-2, -1)).softmax(dim=-1) @ v).transpose(2, 3)


# Maps are [batch, heads, rows, columns, dim] from here on.


def _windows(
        q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor, summary_k: Tensor, size: tuple[int, int], causal: bool,
        pool: str, count_bias: bool,
) -> Tensor:
    (height, width), device = numbers(q.shape[2:4]), q.device
    grid = (height + size[0] - 1) // size[0], (width + size[1] - 1) // size[1]
    pad = grid[0] * size[0] - height, grid[1] * size[1] - width
    whole = all(statically_known_true(n == 0) for n in pad)

    def cut(x: Tensor) -> Tensor:
        """A map as windows of tokens, ``[batch, heads, windows, tokens, dim]``."""
        x = x if whole else F.pad(x, (0, 0, 0, pad[1], 0, pad[0]))
        x = x.unflatten(3, (grid[1], size[1])).unflatten(2, (grid[0], size[0]))
        return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)

    rows, columns = (
        (length - side * torch.arange(count, device=device))[:, None] > torch.arange(side, device=device)
        for length, side, count in zip((height, width), size, grid, strict=True))
    exists = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(0, 1).flatten(1, 2)  # [windows, tokens]
    count = exists.sum(dim=1)

    def pooled(x: Tensor) -> Tensor:
        """A vector of each window, ``[batch, heads, windows, dim]``."""
        x = cut(x)
        if pool == "max":
            return (x if whole else x.masked_fill(~exists[..., None], -torch.inf)).amax(dim=3)
        return x.sum(dim=3) if pool == "sum" else x.sum(dim=3) / count[:, None]

    q, k, v = cut(q), cut(k), cut(v)
    windows, tokens = grid[0] * grid[1], size[0] * size[1]
    inner = pooled(summary_q)[..., None, :] @ k.transpose(-2, -1)
    if not whole:
        inner = inner.masked_fill(~exists[:, None], -torch.inf)
    summary_v = (inner.softmax(dim=-1) @ v).squeeze(-2)
    # The keys of a window, then the summaries: a copy for each window takes less than the scores of all queries would.
    k, v = (torch.cat([own, shared[:, :, None].expand(-1, -1, windows, -1, -1)], dim=3).flatten(0, 1)
            for own, shared in ((k, pooled(summary_k)), (v, summary_v)))
    mask = None
    if count_bias or causal or not whole:
        own = torch.zeros(windows, 1, tokens, dtype=q.dtype, device=device).masked_fill(~exists[:, None], -torch.inf)
        bias = count.to(q.dtype).log() if count_bias else torch.zeros_like(count, dtype=q.dtype)
        mask = torch.cat([own, bias.expand(windows, 1, windows)], dim=-1)
        if causal:
            place, window = torch.arange(tokens, device=device), torch.arange(windows, device=device)
            later = (place > place[:, None]).expand(windows, -1, -1)
            later = torch.cat([later, (window >= window[:, None])[:, None].expand(-1, tokens, -1)], dim=-1)
            mask = torch.where(later, -torch.inf, mask)
        mask = mask.expand(windows, tokens, -1)
    out = sdpa_of_few_keys(q.flatten(0, 1), k, v, mask, scale=1.).unflatten(0, q.shape[:2])
    out = out.unflatten(3, size).unflatten(2, grid).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return out[:, :, :height, :width]


def _axial(q: Tensor, k: Tensor, v: Tensor, summary_k: Tensor, summary_v: Tensor | None, causal: bool) -> Tensor:
    row = q @ k.transpose(-2, -1)
    if summary_v is None:
        summary_v = row.softmax(dim=-1) @ v
    column = _columns(q, summary_k)
    if causal:
        row = row.masked_fill(_later(row.shape[-1], q.device), -torch.inf)
        column = column.masked_fill(_later(column.shape[-1], q.device, 0)[:, None], -torch.inf)
    return _joint(row, column, [v], [summary_v])


def _mixture(q: Tensor, k: Tensor, v: Tensor, causal: bool, pool: str) -> Tensor:
    rows, columns = numbers(q.shape[2:4])
    up_k, up_v = (x.transpose(2, 3) for x in _spans([x.transpose(2, 3) for x in (q, k, v)], pool))
    left_k, left_v = _spans([q, k, v], pool)
    right_k, right_v = (x.flip(3) for x in _spans([x.flip(3) for x in (q, k, v)], pool))
    if not causal:
        turned = [x.flip(2).transpose(2, 3) for x in (q, k, v)]
        down_k, down_v = (x.transpose(2, 3).flip(2) for x in _spans(turned, pool))
        row = torch.cat([q @ x.transpose(-2, -1) for x in (k, up_k, down_k)], dim=-1)
        column = torch.cat([_columns(q, x) for x in (k, left_k, right_k)], dim=-1)
        return _joint(row, column, [v, up_v, down_v], [v, left_v, right_v])
    device = q.device
    r, c = torch.arange(rows, device=device), torch.arange(columns, device=device)
    later, not_above = _later(columns, device), _later(rows, device, 0)[:, None]
    direct = (q @ k.transpose(-2, -1)).masked_fill(later, -torch.inf)
    up = (q @ up_k.transpose(-2, -1)).masked_fill((r == 0)[:, None, None] | (c == c[:, None]), -torch.inf)
    above, left, right = (_columns(q, x).masked_fill(not_above, -torch.inf) for x in (k, left_k, right_k))
    left = left.masked_fill((c == 0)[:, None], -torch.inf)
    right = right.masked_fill((c == columns - 1)[:, None], -torch.inf)
    return _joint(torch.cat([direct, up], dim=-1), torch.cat([above, left, right], dim=-1), [v, up_v],
                  [v, left_v, right_v])


def _logn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x[:, :, 0] for x in (q, k, v))
    tokens, = numbers(q.shape[2:3])
    place, level = torch.arange(tokens, device=q.device), 1
    scores, values = [(q * k).sum(dim=-1)], [v]
    while level < tokens:
        blocks = tokens // level
        of_q, of_k, of_v = (x[:, :, :blocks * level].unflatten(2, (blocks, level)) for x in (q, k, v))
        block_k = of_k.amax(dim=3)
        inner = of_q.amax(dim=3)[..., None, :] @ of_k.transpose(-2, -1)
        block_v = (inner.softmax(dim=-1) @ of_v).squeeze(-2)
        before = (place // level - 1).clamp(min=0)  # the block that ends where the query's begins
        found = (q * block_k[:, :, before]).sum(dim=-1)
        scores.append(found.masked_fill(place & level == 0, -torch.inf))
        values.append(block_v[:, :, before])
        level *= 2
    weights = torch.stack(scores, dim=-1).softmax(dim=-1)
    out = (weights[..., None, :] @ torch.stack(values, dim=-2)).squeeze(-2)
    return out[:, :, None]


def _spans(maps: list[Tensor], pool: str) -> tuple[Tensor, Tensor]:
    """Keys and values of the summaries of what comes before each token in its row, of queries, keys and values."""
    q, k, v = maps
    length, = numbers(q.shape[3:4])
    scores = _before(q, pool) @ k.transpose(-2, -1)
    # The first token has none before it: its query is 0, which makes the mean of the whole row.
    first = (torch.arange(length, device=q.device) == 0)[:, None]
    scores = scores.masked_fill(_later(length, q.device, 0) & ~first, -torch.inf)
    return _before(k, pool), scores.softmax(dim=-1) @ v


def _before(x: Tensor, pool: str) -> Tensor:
    """The sum, or the maximum, of what comes before each token in its row; 0 for the first."""
    if pool == "sum":
        return x.cumsum(dim=3) - x
    return torch.cat([torch.zeros_like(x[:, :, :, :1]), x[:, :, :, :-1].cummax(dim=3).values], dim=3)


def _later(length: int, device: torch.device, more: int = 1) -> Tensor:
    """Which keys of a line come later than each query by ``more`` or more, ``[queries, keys]``."""
    place = torch.arange(length, device=device)
    return place >= place[:, None] + more


def _columns(q: Tensor, k: Tensor) -> Tensor:
    """Scores of every query and the keys of its column, ``[batch, heads, rows, columns, rows]``."""
    return (q.transpose(2, 3) @ k.permute(0, 1, 3, 4, 2)).transpose(2, 3)


def _joint(row: Tensor, column: Tensor, row_values: list[Tensor], column_values: list[Tensor]) -> Tensor:
    """One softmax over scores of entries of rows and of columns, and the average of their values."""
    rows, columns = numbers(row.shape[2:4])
    weights = torch.cat([row, column], dim=-1).softmax(dim=-1)
    parts = weights.split([columns] * len(row_values) + [rows] * len(column_values), dim=-1)
    out = parts[0] @ row_values[0]
    for weight, value in zip(parts[1:], row_values[1:], strict=False):
        out = out + weight @ value
    for weight, value in zip(parts[len(row_values):], column_values, strict=True):
        out = out + (weight.transpose(2, 3) @ value.transpose(2, 3)).transpose(2, 3)
    return out
