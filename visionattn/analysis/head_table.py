"""What is known of each head of a model, as a table: a CSV file, text, and pictures."""
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["MEASURES", "HeadRow", "draw_clusters_of_heads", "draw_heads", "layers_of", "table_text", "write_table"]


class HeadRow(NamedTuple):
    """What is known of a head; NaN is not known.

    Attributes:
        layer: Name of its layer.
        head: Number of the head, from 0.
        gradient: Importance by gradient.
        loss_without: Loss of the model without the head.
        accuracy_without: Accuracy of the model without the head.
        distance: Mean attention distance, in pixels of the image.
        entropy: Of its attention, in nats.
        class_share: Share of attention that class tokens and the like get.
        self_share: Share of attention that the query itself gets.
        cluster: Group of heads that look alike; None of none.
        why: Why something is not known.
    """

    layer: str
    head: int
    gradient: float = math.nan
    loss_without: float = math.nan
    accuracy_without: float = math.nan
    distance: float = math.nan
    entropy: float = math.nan
    class_share: float = math.nan
    self_share: float = math.nan
    cluster: int | None = None
    why: str = ""


MEASURES = {
    "gradient": "Importance by gradient",
    "loss_without": "Loss without the head",
    "accuracy_without": "Accuracy without the head",
    "distance": "Attention distance, pixels",
    "entropy": "Entropy, nats",
    "class_share": "Share on class tokens",
    "self_share": "Share on the query itself",
    "cluster": "Cluster",
}


def layers_of(rows: Sequence[HeadRow]) -> dict[str, list[HeadRow]]:
    """The rows by layer, in their order."""
    layers: dict[str, list[HeadRow]] = {}
    for row in rows:
        layers.setdefault(row.layer, []).append(row)
    return layers


def write_table(rows: Sequence[HeadRow], path: Path) -> None:
    """Writes a CSV file with a row a head; what is not known is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HeadRow._fields)
        writer.writerows([_text(value, ".6g") for value in row] for row in rows)


def table_text(rows: Sequence[HeadRow]) -> str:
    """The table as text, without the reasons, which stand below it once each."""
    width = max(len("layer"), *(len(row.layer) for row in rows))
    lines = [f"{'layer':{width}} head  gradient  loss w/o   acc w/o  distance   entropy     class      self  cluster"]
    for row in rows:
        numbers = "".join(f"{_text(value, '.4g') or '-':>10}" for value in row[2:9])
        lines.append(f"{row.layer:{width}} {row.head:4}{numbers}{_text(row.cluster, '') or '-':>9}")
    for why in dict.fromkeys(row.why for row in rows if row.why):
        lines.append(f"- {why}")
    return "\n".join(lines)


def _text(value: str | float | None, form: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return format(value, form) if isinstance(value, float) else str(value)


def draw_heads(rows: Sequence[HeadRow], path: Path, title: str) -> None:
    """Draws every measure as a grid of layers and heads; what is not known stays white."""
    layers = layers_of(rows)
    heads = max(len(of_layer) for of_layer in layers.values())
    wide, high = max(2.6, 0.24 * heads + 1.2), 0.2 * len(layers) + 1
    figure = Figure(figsize=(4 * wide + 1, 2 * high + 0.9))
    figure.suptitle(title, fontsize=11)
    figure.subplots_adjust(
        left=0.5 / figure.get_figwidth(), right=1 - 0.3 / figure.get_figwidth(), wspace=0.35, hspace=0.7 / high,
        bottom=0.5 / figure.get_figheight(), top=1 - 0.6 / figure.get_figheight())
    for place, (measure, name) in enumerate(MEASURES.items()):
        grid = np.full((len(layers), heads), np.nan)
        for line, of_layer in enumerate(layers.values()):
            values = [getattr(row, measure) for row in of_layer]
            grid[line, :len(values)] = [np.nan if value is None else value for value in values]
        axes = figure.add_subplot(2, 4, place + 1)
        axes.set_title(name, fontsize=8)
        colours = "tab10" if measure == "cluster" else "viridis"
        drawn = axes.imshow(grid, cmap=colours, aspect="auto", interpolation="nearest")
        if measure == "cluster":
            drawn.set_clim(-0.5, 9.5)
        if np.isfinite(grid).any() and measure != "cluster":
            figure.colorbar(drawn, ax=axes).ax.tick_params(labelsize=6)
        elif not np.isfinite(grid).any():
            axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", fontsize=8)
        axes.set_xticks(range(0, heads, max(1, heads // 6)))
        axes.set_yticks(range(0, len(layers), max(1, len(layers) // 6)))
        axes.tick_params(labelsize=6)
        axes.set_xlabel("head", fontsize=7)
        axes.set_ylabel("layer", fontsize=7)
    figure.savefig(path, dpi=120)


def draw_clusters_of_heads(means: Tensor, rows: Sequence[HeadRow], path: Path) -> None:
    """Draws the mean pattern ``[clusters, side, side]`` of each cluster, the query in its middle."""
    across = min(len(means), 4)
    down = -(-len(means) // across)
    figure = Figure(figsize=(max(2 * across, 4), 2.5 * down + 0.4), layout="constrained")
    figure.suptitle("mean attention by offset; the query is in the middle", fontsize=9)
    for cluster, mean in enumerate(means):
        axes = figure.add_subplot(down, across, cluster + 1)
        axes.imshow(mean.sqrt(), cmap="viridis")  # so that the faint can be seen
        count = sum(row.cluster == cluster for row in rows)
        axes.set_title(
            f"cluster {cluster}: {count} head{'s' * (count != 1)}\n{mean.min():.3g} to {mean.max():.3g}", fontsize=8)
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
