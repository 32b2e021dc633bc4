"""Draws the pictures of docs/kernels.md from the definitions in the code.

    python tools/draw_kernel_pictures.py docs/images
"""
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from visionattn.ops.neighborhood import naive

__all__ = ["draw_routes", "draw_windows"]

OTHER, CLASS, KEY, RUN, QUERY = range(5)
COLORS = ["#f3f3f3", "#cfd8e3", "#7fb3e6", "#f6c177", "#d1495b"]


def draw_windows(path: Path) -> None:
    """Windows of one query each on a map of 13 x 13: inside, at a border, dilated, strided and causal."""
    cases = [
        ("kernel 5, inside of the map", (6, 6), dict(kernel_size=5)),
        ("kernel 5, at a border: shifted, not cut", (0, 11), dict(kernel_size=5)),
        ("kernel 3, dilation 3, inside", (7, 6), dict(kernel_size=3, dilation=3)),
        ("kernel 3, dilation 3, at a border:\nshifted inside of its residue class", (1, 12),
         dict(kernel_size=3, dilation=3)),
        ("kernel 7, stride 4: the queries of a run\nshare the window of their leader", (4, 4),
         dict(kernel_size=7, stride=4)),
        ("kernel 5, rows causal: no row after the query,\ncut at the start", (2, 6),
         dict(kernel_size=5, causal=(True, False))),
    ]
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (title, query, options) in zip(figure.subplots(2, 3).flat, cases, strict=True):
        _draw_window(axes, query, **options)
        axes.set_title(title, fontsize=10)
    names = ["other tokens", "residue class of the query", "keys of the query", "keys that are queries of its run",
             "the query, a key too"]
    figure.legend(handles=[Patch(facecolor=color, edgecolor="gray", label=name)
                           for name, color in zip(names, COLORS, strict=True)], loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)


def _draw_window(
        axes: Axes, query: tuple[int, int], kernel_size: int, dilation: int = 1, stride: int = 1,
        causal: tuple[bool, bool] = (False, False), length: int = 13,
) -> None:
    cells = torch.full((length, length), OTHER)
    position = torch.arange(length)
    members = [position % dilation == x % dilation for x in query]
    if dilation > 1:
        cells[members[0][:, None] & members[1][None, :]] = CLASS
    keys = []
    for x, is_causal in zip(query, causal, strict=True):
        key, _, valid = naive.axis_windows(length, kernel_size, dilation, stride, is_causal)
        keys.append(torch.zeros(length, dtype=torch.bool).index_fill_(0, key[x][valid[x]], True))
    cells[keys[0][:, None] & keys[1][None, :]] = KEY
    if stride > 1:
        runs = [position // stride == x // stride for x in query]
        cells[runs[0][:, None] & runs[1][None, :]] = RUN
    cells[query] = QUERY
    _draw_cells(axes, cells)


def draw_routes(path: Path) -> None:
    """The routes of one region, and the transposed list of another, on a map of 16 x 16 tokens in 4 x 4 regions."""
    grid, size, topk, region = 4, 4, 3, 5
    table = torch.rand(grid * grid, grid * grid, generator=torch.Generator().manual_seed(3)).topk(topk).indices
    popular = int(table.flatten().bincount().argmax())
    listed_by = (table == popular).any(dim=1)
    figure = Figure(figsize=(9, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    routed = torch.zeros(grid * grid, dtype=torch.bool).index_fill_(0, table[region], True)
    for axes, tinted, mark, title in (
        (left, routed, region, f"forward: the queries of region {region} attend\nto all tokens of regions"),
        (right, listed_by, popular,
         f"backward: the keys of region {popular} get gradients\nfrom the queries of regions"),
    ):
        tint = torch.where(tinted, KEY, OTHER).view(grid, grid)
        _draw_cells(axes, tint.repeat_interleave(size, 0).repeat_interleave(size, 1))
        for number in range(grid * grid):
            row, column = number // grid * size - 0.5, number % grid * size - 0.5
            axes.add_patch(Rectangle((column, row), size, size, fill=False, linewidth=1.5, edgecolor="dimgray"))
            axes.text(column + size / 2, row + size / 2, str(number), ha="center", va="center", fontsize=12)
        row, column = mark // grid * size - 0.5, mark % grid * size - 0.5
        axes.add_patch(Rectangle((column, row), size, size, fill=False, linewidth=4, edgecolor=COLORS[QUERY]))
        axes.set_title(f"{title} {', '.join(map(str, tinted.nonzero().flatten().tolist()))}", fontsize=10)
    figure.savefig(path, dpi=110)


def _draw_cells(axes: Axes, cells: torch.Tensor) -> None:
    axes.pcolormesh(
        torch.arange(cells.shape[1] + 1) - 0.5, torch.arange(cells.shape[0] + 1) - 0.5, cells,
        cmap=ListedColormap(COLORS), vmin=-0.5, vmax=len(COLORS) - 0.5, edgecolors="white", linewidth=1)
    axes.set(aspect="equal", xticks=[], yticks=[])
    axes.invert_yaxis()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    draw_windows(folder / "windows.png")
    draw_routes(folder / "routes.png")
