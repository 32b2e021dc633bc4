"""Panels: pictures of where a layer looks from some points of an image."""
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from .looks import Look

__all__ = ["draw_clusters", "draw_look"]

POINTS = ((0.3, 0.3), (0.3, 0.7), (0.7, 0.3), (0.7, 0.7))  # down and to the right
MOST_HEADS = 4  # whose clusters are shown


def draw_look(look: Look, picture: Tensor, path: Path) -> None:
    """Draws where a layer looks from four points, its heads' mean, and what does not depend on a point.

    Args:
        look: With something to show.
        picture: ``[height, width, 3]`` in [0, 1].
        path: Picture file.
    """
    heads, rows, columns = look.weights.shape[:3]
    shown: list[tuple[str, Tensor, tuple[int, int] | None]] = []
    if look.fixed is not None:
        shown.append((look.fixed_name, look.fixed.mean(dim=0), None))
    if rows:
        for down, right in POINTS:
            row, column = min(int(down * rows), rows - 1), min(int(right * columns), columns - 1)
            left, top = look.columns[column].mean(), look.rows[row].mean()
            shown.append((f"from ({left:.0f}, {top:.0f})", look.weights[:, row, column].mean(dim=0), (row, column)))
    sheet = _Sheet(f"{look.title} (mean of {heads} heads)" if heads > 1 else look.title, len(shown), picture)
    for number, (title, weights, point) in enumerate(shown):
        alpha = (weights / weights.max().clamp(min=1e-12)).clamp(min=0) ** 0.75 * 0.8
        colour = torch.tensor([1., 0.55, 0.]).expand(*weights.shape, 3)
        sheet.lay(number, torch.cat([colour, alpha[..., None]], dim=-1), look.side)
        sheet.name(number, title if title == look.fixed_name else f"{title}: {weights.max():.2g} at most")
        if point is not None:
            (top, bottom), (left, right) = look.rows[point[0]].tolist(), look.columns[point[1]].tolist()
            sheet.frame(number, (left, top, right, bottom), "deepskyblue", 2)
            if look.windows is not None:
                for head, edges in enumerate(look.windows[:, point[0], point[1]].tolist()):
                    sheet.frame(number, edges, f"C{head % 10}", 1.2)
    sheet.save(path)


def draw_clusters(owner: Tensor, title: str, picture: Tensor, path: Path) -> None:
    """Draws tokens in the colours of their clusters, of up to four heads; grey ones are in none.

    Args:
        owner: Clusters ``[heads, rows, columns]``; -1 for none.
        title: Over the picture.
        picture: ``[height, width, 3]`` in [0, 1].
        path: Picture file.
    """
    count = min(len(owner), MOST_HEADS)
    sheet = _Sheet(f"{title}; grey: in none", count, picture)
    for number in range(count):
        colours = colormaps["gist_rainbow"](owner[number].numpy() / max(int(owner.max()), 1), alpha=0.5)
        colours[owner[number].numpy() < 0] = 0
        sheet.lay(number, torch.from_numpy(colours), picture.shape[0] / len(colours))
        sheet.name(number, f"head {number + 1}")
    sheet.save(path)


class _Sheet:
    """A grey picture several times in a row, on one pair of axes: many take far longer to draw."""

    def __init__(self, title: str, count: int, picture: Tensor):
        self.height, self.width = picture.shape[:2]
        self.step = self.width * 1.04
        across, side, above = 2.4 * count, 2.4 * self.height / self.width, 0.6  # inches
        self.figure = Figure(figsize=(across, side + above))
        self.axes = self.figure.add_axes((0, 0, 1, side / (side + above)))
        self.axes.set_axis_off()
        for number in range(count):
            self.axes.imshow(picture.mean(dim=-1), cmap="gray", vmin=0, vmax=1, extent=self._extent(
                number, self.height, self.width))
        self.axes.set_xlim(0, self.step * count)
        self.axes.set_ylim(self.height, 0)
        self.axes.set_aspect("auto")
        self.figure.suptitle(title, fontsize=10, y=1 - 0.1 / (side + above), va="top")

    def lay(self, number: int, colours: Tensor, side: float) -> None:
        """Lays cells ``[rows, columns, 4]`` of so many pixels over the picture."""
        extent = self._extent(number, colours.shape[0] * side, colours.shape[1] * side)
        drawn = self.axes.imshow(colours, extent=extent, interpolation="nearest", aspect="auto")
        drawn.set_clip_path(Rectangle((number * self.step, 0), self.width, self.height, transform=self.axes.transData))

    def frame(self, number: int, edges: Sequence[float], colour: str, width: float) -> None:
        """Draws left, top, right and bottom edges in pixels."""
        left, top, right, bottom = edges
        drawn = self.axes.add_patch(Rectangle(
            (number * self.step + left, top), right - left, bottom - top, fill=False, edgecolor=colour,
            linewidth=width))
        drawn.set_clip_path(Rectangle((number * self.step, 0), self.width, self.height, transform=self.axes.transData))

    def name(self, number: int, text: str) -> None:
        """Writes over the picture."""
        self.axes.text(number * self.step + self.width / 2, -0.02 * self.height, text, fontsize=9, ha="center")

    def save(self, path: Path) -> None:
        """Writes the file; its folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path, dpi=100)

    def _extent(self, number: int, height: float, width: float) -> tuple[float, float, float, float]:
        return number * self.step, number * self.step + width, height, 0
