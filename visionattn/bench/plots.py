"""The pictures of ``visionattn bench ops --plot`` and of ``visionattn bench export``."""
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..ops import cases
from .timing import DIRECTIONS

__all__ = ["plot_export", "plot_scaling"]


def plot_scaling(rows: list[dict[str, Any]], path: Path) -> Path:
    """Draws time and memory of the scaling cases against the tokens of the map, with the slope from 64 x 64 up.

    Args:
        rows: What :func:`visionattn.bench.benchmark` returned, with the columns of the machine.
        path: Of the picture to write.

    Returns:
        The path.

    Raises:
        ValueError: None of the scaling cases was measured.
    """
    examples = cases("neighborhood_attention")
    rows = [row for row in rows if row["op"] == "neighborhood" and row["median_ms"]
            and "scaling" in examples[row["case"]].groups]
    if not rows:
        raise ValueError("--plot draws the scaling cases, but none of them was measured: add --cases scaling")
    directions = [direction for direction in DIRECTIONS if any(row["direction"] == direction for row in rows)]
    figure = Figure(figsize=(10, 4 * len(directions)), layout="constrained")
    axes = figure.subplots(len(directions), 2, squeeze=False)
    for axis, (direction, (column, unit)) in zip(axes.flat, itertools.product(
            directions, (("median_ms", "time [ms]"), ("peak_mib", "peak memory [MiB]"))), strict=True):
        for number, backend in enumerate(dict.fromkeys(row["backend"] for row in rows)):
            points = [(math.prod(examples[row["case"]].problem.spatial), float(row[column])) for row in rows
                      if (row["direction"], row["backend"]) == (direction, backend) and float(row[column]) > 0]
            large = [point for point in points if point[0] >= 64 * 64]
            slope = f", slope {_slope(large):.2f}" if len(large) > 1 else ""
            if points:
                axis.loglog(*zip(*points, strict=True), marker="o", color=f"C{number}", label=f"{backend}{slope}")
        axis.set(xlabel="tokens of the map", ylabel=unit, title=direction)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize="small")
    row, case = rows[0], examples[rows[0]["case"]]
    figure.suptitle(
        f"Neighborhood attention, {case.summary}, {case.problem.heads} heads of {case.problem.head_dim}, "
        f"{row['dtype']}; {row['machine']}, {row['threads']} threads, torch {row['torch']}, {row['date']}",
        fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def plot_export(rows: list[dict[str, Any]], path: Path) -> Path:
    """Draws the latency and the throughput of every model's forms, a line for each model.

    Args:
        rows: What :func:`visionattn.bench.exported.benchmark_export` returned, with the columns of the machine.
        path: Of the picture to write.

    Returns:
        The path.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(11, 1.6 + 0.28 * len(models)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (column, title) in zip(axes, (
            ("latency_ms", "one image [ms]"), ("images_per_s", "images a second, in batches of 8")), strict=True):
        for number, form in enumerate(dict.fromkeys(row["form"] for row in rows)):
            points = [(float(row[column]), models.index(row["model"])) for row in rows
                      if row["form"] == form and row[column]]
            if points:
                axis.semilogx(*zip(*points, strict=True), "o", color=f"C{number}", label=form, alpha=0.8)
        axis.set(xlabel=title)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_yticks(range(len(models)), models, fontsize="small")
    axes[0].invert_yaxis()
    axes[0].legend(fontsize="small")
    row = rows[0]
    figure.suptitle(
        f"Models in PyTorch and exported; {row['machine']}, {row['threads']} threads, torch {row['torch']}, "
        f"onnxruntime {row['onnxruntime']}, openvino {row['openvino']}, {row['date']}", fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def _slope(points: list[tuple[int, float]]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = zip(*((math.log(a), math.log(b)) for a, b in points), strict=True)
    return statistics.linear_regression(x, y).slope
