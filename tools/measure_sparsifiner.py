"""Times Sparsifiner's attention with a quarter of the keys beside attention to all of them, over numbers of tokens.

    python tools/measure_sparsifiner.py                                      # a processor minute
    python tools/measure_sparsifiner.py --page docs/models/sparsifiner.md    # the table in the page, no more

A layer of DeiT-Ti (192 channels, 3 heads) for one image without a class token, forward, float32, one thread, with all
that is to be done: projections, the predictor, the choice of keys. Keys are chosen for every query, or for 64 queries
together; both are attended to in two ways, ``gathered`` (copies of the keys) and ``masked`` (all keys under a mask, as
in the authors' code), which must agree before anything is timed. Time is the processor's, best of the turns, which the
ways take one after the other.
"""
import argparse
import itertools
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rows import read_rows, write_between, write_rows

from visionattn.bench.machine import cpu_name, figure, version
from visionattn.layers import SparsifiedAttention
from visionattn.ops import use_backend

__all__ = ["main", "measure", "write_table"]

SIDES = (14, 28, 32, 64)  # of maps, in tokens
SHARED = 64
FORMS: dict[str, tuple[int, str | None]] = {  # queries of a list, 0 for all keys; backend
    "all keys": (0, None), "own lists, gathered": (1, "gathered"), "own lists, masked": (1, "masked"),
    f"lists of {SHARED} queries, gathered": (SHARED, "gathered"),
    f"lists of {SHARED} queries, masked": (SHARED, "masked")}
START, END = "<!-- measured sparsifiner -->", "<!-- end of measured sparsifiner -->"


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES, help="of the maps, in tokens")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/sparsifiner_cpu.csv"), help="CSV file, written anew")
    parser.add_argument("--page", type=Path, help="write the rows that there are as a table into this page, and stop")
    args = parser.parse_args(argv)
    if args.page:
        write_table(args.out, args.page)
        return 0
    torch.set_num_threads(1)
    write_rows(args.out, [row for side in args.sides for row in measure(side, args.turns)])
    return 0


@torch.inference_mode()
def measure(side: int, turns: int) -> list[dict[str, Any]]:
    """A row of each form on maps of ``side`` x ``side`` tokens.

    Raises:
        RuntimeError: Two ways to compute the same do not agree.
    """
    x = torch.randn(1, side, side, 192, generator=torch.Generator().manual_seed(0))
    layers, results = {}, {}
    for form, (size, backend) in FORMS.items():
        torch.manual_seed(0)
        layers[form] = SparsifiedAttention(192, 3, (side, side), 0.25 if size else 1., size or 1).eval()
        results[form] = _run(layers[form], x, backend)
        twin = next((other for other, (queries, _) in FORMS.items() if queries == size and other in results), form)
        error = ((results[form] - results[twin]).norm() / results[twin].norm()).item()
        if not error < 1e-5:
            raise RuntimeError(f"{side} x {side} tokens: {form} and {twin} differ, by {error:.1e}")
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for _, (form, layer) in itertools.product(range(turns), layers.items()):
        _run(layer, x, FORMS[form][1])
        start = time.process_time()
        _run(layer, x, FORMS[form][1])
        seconds[form].append(time.process_time() - start)
    best = {form: 1e3 * min(values) for form, values in seconds.items()}
    rows = [{"tokens": side ** 2, "form": form, "ms": figure(ms), "over_all_keys": figure(ms / best["all keys"]),
             "machine": cpu_name(), "torch": version("torch")} for form, ms in best.items()]
    for row in rows:
        print("{tokens:>6} {form:32}{ms:>8} ms {over_all_keys:>6}".format(**row), flush=True)
    return rows


def _run(layer: SparsifiedAttention, x: torch.Tensor, backend: str | None) -> torch.Tensor:
    with use_backend(backend) if backend else nullcontext():
        return layer(x)


def write_table(source: Path, page: Path) -> None:
    """Replaces what is between the marks of ``page`` by a table of ``source``: time, and over that of all keys."""
    rows = read_rows(source)
    lines = ["| tokens | " + " | ".join(FORMS) + " |", "|---" * (1 + len(FORMS)) + "|"]
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        found = {row["form"]: row for row in rows if row["tokens"] == tokens}
        cells = [f"{row['ms']} ms ({row['over_all_keys']})" for row in (found[form] for form in FORMS)]
        lines.append(f"| {int(tokens):,} | {' | '.join(cells)} |")
    write_between(page, START, END, lines)


if __name__ == "__main__":
    sys.exit(main())
