"""Writes how the ops' time grows with the tokens, and from where they beat full attention, as a table into a page.

    visionattn bench ops --ops factorized flow reversed combiner sparsified --cases scaling --directions forward \\
        --threads 1 --repeat 3 --out results/scaling_cpu.csv
    python tools/write_scaling_table.py results/scaling_cpu.csv docs/kernels.md

Times are those of a head, the best of the turns. A slope is that of the least-squares line through the logarithms; the
number of tokens where an op begins to beat full attention lies on the lines between the neighbouring measurements.
"""
import math
import re
import statistics
import sys
from pathlib import Path

from rows import read_rows, write_between

from visionattn.bench.efficiency import beats_from
from visionattn.ops import cases

__all__ = ["slope", "write_scaling_table"]

START, END = "<!-- scaling table -->", "<!-- end of scaling table -->"
DENSE = "dense_sdpa"

Points = dict[int, float]  # milliseconds by tokens


def write_scaling_table(sources: list[Path], page: Path) -> None:
    """Replaces what is between the marks of ``page`` by the table of the scaling cases in CSV files.

    Args:
        sources: Files that ``visionattn bench ops`` wrote.
        page: A Markdown page.

    Raises:
        ValueError: The page lacks the marks.
    """
    rows = [row for source in sources for row in read_rows(source)]
    lines = ["| op, cases | tokens | slope | last step | ms at the most tokens | full, ms | faster from |",
             "|---|---|---|---|---|---|---|"]
    for name, (ours, full) in _series(rows).items():
        least, *_, second, most = sorted(ours)
        start = beats_from(ours, full)
        cells = [
            name, f"{least:,} to {most:,}", f"{slope(ours):.2f}", f"{slope({n: ours[n] for n in (second, most)}):.2f}",
            f"{ours[most]:.3g}", f"{full[most]:.3g}" if most in full else "-",
            "never" if start is None else f"{least:,} or fewer" if start == 0 else f"{_rounded(start):,}"]
        lines.append(f"| {' | '.join(cells)} |")
    machines = dict.fromkeys(f"{row['machine']}, {row['threads']} threads, torch {row['torch']}" for row in rows)
    write_between(page, START, END, [f"{'; '.join(machines)}.", "", *lines])


def slope(points: Points) -> float:
    """The exponent of the power of the tokens that the time grows as."""
    return statistics.linear_regression([math.log(n) for n in points], [math.log(ms) for ms in points.values()]).slope


def _series(rows: list[dict[str, str]]) -> dict[str, tuple[Points, Points]]:
    """Ours and full attention's times of the cases of an op and direction that differ in nothing but the tokens."""
    found: dict[str, tuple[Points, Points]] = {}
    for row in rows:
        if "scaling" not in cases(f"{row['op']}_attention")[row["case"]].groups or not row["best_ms"]:
            continue
        words = [row["op"], re.sub(r"\d+x\d+(_h\d+)?|\d+_tokens", "", row["case"]).strip("_")]
        words += [row["direction"]] if row["direction"] != "forward" else []
        ours, full = found.setdefault(" ".join(word for word in words if word), ({}, {}))
        *sizes, heads, _ = map(int, row["shape"].split("x"))
        if row["backend"] == DENSE:
            full[math.prod(sizes)] = float(row["best_ms"]) / heads
        elif float(row["ratio_to_ours"]) == 1:
            ours.setdefault(math.prod(sizes), float(row["best_ms"]) / heads)
    return {name: times for name, times in found.items() if len(times[0]) > 2}


def _rounded(tokens: float) -> int:
    """To two digits."""
    unit = 10 ** (math.floor(math.log10(tokens)) - 1)
    return round(tokens / unit) * unit


if __name__ == "__main__":
    write_scaling_table([Path(name) for name in sys.argv[1:-1]], Path(sys.argv[-1]))
