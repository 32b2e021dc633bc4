"""Windows of a map: cut out, put back, where their keys are, what is added to their scores."""
import torch
from torch import Tensor

from ..dispatch import numbers
from ..kept import keep

__all__ = ["cut", "join", "pair_bias", "places"]


def cut(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """A map ``[batch, height, width, heads, dim]`` as ``[batch, heads, windows, tokens, dim]``.

    ``grid`` is the number of rows and columns of windows.
    """
    batch, heads, dim = x.shape[0], x.shape[3], x.shape[4]
    x = x.reshape(batch, grid[0], window[0], grid[1], window[1], heads, dim)
    return x.permute(0, 5, 1, 3, 2, 4, 6).reshape(batch, heads, grid[0] * grid[1], window[0] * window[1], dim)


def join(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """The inverse of :func:`cut`."""
    batch, heads, dim = x.shape[0], x.shape[1], x.shape[4]
    x = x.reshape(batch, heads, *grid, *window, dim).permute(0, 2, 4, 3, 5, 1, 6)
    return x.reshape(batch, grid[0] * window[0], grid[1] * window[1], heads, dim)


def places(offset: Tensor, stretch: Tensor, window: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Column and row of every key, in tokens from the map's first: two of ``[batch, heads, windows, tokens]``."""
    rows, columns = numbers(offset.shape[1:3])
    found = []
    for axis, (count, length) in enumerate(((columns, window[1]), (rows, window[0]))):
        centre = torch.arange(count, device=offset.device, dtype=dtype) * length + (length - 1) / 2
        local = torch.arange(length, device=offset.device, dtype=dtype) - (length - 1) / 2
        centre = centre[:, None] if axis == 0 else centre[:, None, None]  # beside rows, columns and heads
        start, factor = offset[..., axis].to(dtype) + centre, stretch[..., axis].to(dtype) + 1
        found.append((start[..., None] + factor[..., None] * local).permute(0, 3, 1, 2, 4).flatten(2, 3))
    x, y = found
    tokens = (-1, -1, -1, *window)
    return x[..., None, :].expand(tokens).flatten(3), y[..., None].expand(tokens).flatten(3)


def pair_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Bias of every query and key of a window, ``[heads, tokens, tokens]``, of a table of their distances."""
    index = keep("varied window pairs", window, lambda: _pairs(window, table.device), device=table.device)
    return table.flatten(1)[:, index]


def _pairs(window: tuple[int, int], device: torch.device) -> Tensor:
    rows, columns = (torch.arange(length, device=device) for length in window)
    down = rows[:, None] - rows + window[0] - 1
    right = columns[:, None] - columns + window[1] - 1
    index = down[:, None, :, None] * (2 * window[1] - 1) + right[None, :, None, :]
    return index.flatten(2).flatten(0, 1)
