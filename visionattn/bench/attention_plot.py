"""The picture of ``visionattn bench attention``."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .attention import FULL, FULL_MATRIX
from .efficiency import LEAST_R2, measured_efficiency
from .timing import DIRECTIONS

__all__ = ["plot_attention"]


def plot_attention(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draws time and memory of the forward pass over the tokens, with the fits (dashed) and where they cross (rings).

    Lines that fit badly are left away.

    Args:
        rows: What :func:`visionattn.bench.attention.benchmark_attention` returned, with the columns of the machine.
        path: Of the picture to write.

    Returns:
        The path.
    """
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    names = list(dict.fromkeys(row["op"] for row in rows if row["ms"]))
    figure = Figure(figsize=(1.5 + 4.5 * len(patterns), 8.5), layout="constrained")
    axes = figure.subplots(2, len(patterns), squeeze=False, sharex=True, sharey="row")
    handles: dict[str, Any] = {}
    for column, pattern in enumerate(patterns):
        for axis, (measure, unit) in zip(axes[:, column], (
                ("ms", "time [ms]"), ("peak_mib", "peak memory [MiB]")), strict=True):
            drawn = [row for row in rows if row[measure] and row["direction"] == DIRECTIONS[0]]
            series = {name: {int(row["tokens"]): float(row[measure]) for row in drawn
                             if (row["pattern"], row["op"]) == (pattern, name)} for name in names}
            for number, (name, points) in enumerate(series.items()):
                if points:
                    handles[name], = axis.loglog(
                        list(points), list(points.values()), color=f"C{number % 10}", label=name,
                        marker="os^"[number // 10], markersize=4, linewidth=2.5 if name in (FULL, FULL_MATRIX) else 1)
            _draw_fits(axis, series, measure)
            values, lengths = [float(row[measure]) for row in drawn], sorted({int(row["tokens"]) for row in drawn})
            axis.set(ylabel=unit if column == 0 else "", ylim=(min(values) / 1.5, max(values) * 1.5),
                     **{"title": f"{pattern.replace('_', ' ')} attention"} if measure == "ms" else {"xlabel": "tokens"})
            axis.set_xticks(lengths, map(str, lengths), rotation=45, fontsize="small")
            axis.set_xticks([], minor=True)
            axis.grid(True, which="both", alpha=0.2)
    figure.legend(handles.values(), handles, loc="outside right center", fontsize="small")
    row = rows[0]
    figure.suptitle(
        f"Forward, {row['dtype']}, 8 heads of 64; {row['machine']}, {row['threads']} threads, torch {row['torch']}, "
        f"{row['date']}. Dashed: fits of full attention and of the others; rings: from where these pay",
        fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def _draw_fits(axis: Any, series: Mapping[str, Mapping[int, float]], measure: str) -> None:
    """The fits of time beside full attention, of memory beside that with a matrix."""
    full = series.get(FULL if measure == "ms" else FULL_MATRIX, {})
    for number, (name, points) in enumerate(series.items()):
        fit = None if name in (FULL, FULL_MATRIX) else measured_efficiency(full, points, int(measure == "ms"))
        if fit is None:
            continue
        tokens = np.geomspace(min(full), max(full), 60)
        curves = [(fit.quadratic, "black")]
        if min(fit.r2_full, fit.r2_efficient) >= LEAST_R2:
            curves.append((fit.linear, f"C{number % 10}"))
        for coefficients, colour in curves:
            line = np.polyval(coefficients, tokens)
            axis.plot(tokens, np.where(line > 0, line, np.nan), "--", color=colour, linewidth=0.6, alpha=0.6)
        if min(full) <= fit.length <= max(full):
            height = np.exp(np.interp(np.log(fit.length), np.log(list(full)), np.log(list(full.values()))))
            axis.plot(fit.length, height, "o", markersize=9, fillstyle="none", color=f"C{number % 10}")
