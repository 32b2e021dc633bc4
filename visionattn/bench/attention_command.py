"""The command ``visionattn bench attention``, and the table that it prints."""
import argparse
import csv
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..ops.case import PATTERNS
from .attention import ATTENTIONS, SIDES, benchmark_attention
from .attention_plot import plot_attention
from .machine import measure_machine
from .timing import DIRECTIONS

__all__ = ["add_parser", "attention_blocks", "run"]

Cells = list[list[str]]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to those of ``bench``."""
    summary = (inspect.getdoc(benchmark_attention) or "").partition("\n\nArgs:")[0]
    parser: argparse.ArgumentParser = commands.add_parser(
        "attention", description=summary, help="time attention in four patterns of use, over lengths",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS), help="(default: all)")
    parser.add_argument("--ops", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS), help="(default: all)")
    parser.add_argument("--max", type=int, default=SIDES[-1] ** 2, help=(
        f"tokens at most, of {', '.join(str(side ** 2) for side in SIDES)} (default: %(default)s)"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=100, help="runs at most (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=(
        "CSV file (default: results/attention_DEVICE.csv); the picture is written beside it"))
    return parser


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Measures, prints a table for every pattern and direction, writes the CSV file and the picture."""
    if args.max < SIDES[0] ** 2:
        parser.error(f"--max {args.max}: the shortest length is {SIDES[0] ** 2} tokens")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    dtype = getattr(torch, args.dtype)
    machine = measure_machine(args.device, dtype)
    out = args.out or Path("results") / f"attention_{args.device}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with out.open("w", newline="") as file:
        writer = None
        for pattern in args.patterns:
            found = [row | machine.description for row in benchmark_attention(
                pattern, args.ops, args.max, dtype, args.device, args.repeat, machine)]
            writer = writer or csv.DictWriter(file, fieldnames=list(found[0]))
            if not rows:
                writer.writeheader()
            writer.writerows(found)
            file.flush()
            rows += found
            for title, cells, cannot in attention_blocks(found):
                print(f"\n{title}")
                _print(cells)
                print("\n".join(f"{name}: {reason}" for name, reason in cannot.items()), flush=True)
    print(plot_attention(rows, out.with_suffix(".png")))


def attention_blocks(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Cells, dict[str, str]]]:
    """The tables of what was measured, one for a pattern and direction.

    Args:
        rows: Those of the CSV file.

    Returns:
        Of each its title, its cells with those of the head first, and why attentions are not in it.
    """
    blocks = []
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        unable = {row["op"]: row["note"] for row in rows if row["pattern"] == pattern and not row["direction"]}
        for direction in DIRECTIONS:
            series: dict[str, dict[int, Mapping[str, Any]]] = {}
            reasons = dict(unable)
            for row in rows:
                if (row["pattern"], row["direction"]) == (pattern, direction):
                    if row["ms"]:
                        series.setdefault(row["op"], {})[int(row["tokens"])] = row
                    elif row["op"] not in series:
                        reasons[row["op"]] = row["note"]
            lengths = sorted({tokens for found in series.values() for tokens in found})
            head = ["attention", *map(str, lengths), "GFLOP, bound ms at the most", "pays from, time (R^2)",
                    "pays from, memory (R^2)", "beside a matrix (R^2)"]
            cells = [head]
            for name, found in series.items():
                last = found[max(found)]
                bound = max(float(last["bytes_ms"] or 0), float(last["flops_ms"] or 0))
                cells.append([
                    name, *("{ms} ({peak_mib})".format(**found[n]) if n in found else "-" for n in lengths),
                    f"{float(last['mflop']) / 1e3:.3g}, {bound:.3g}",
                    *(f"{last[f'{x}_length']} ({last[f'{x}_r2']})" if last[f"{x}_length"] else "-"
                      for x in ("time", "memory", "matrix_memory"))])
            if series:
                blocks.append((f"{pattern.replace('_', ' ').capitalize()} attention, {direction}", cells, reasons))
    return blocks


def _print(cells: Cells) -> None:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
