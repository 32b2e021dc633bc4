"""Compares the token mixers of Mixer ViT: accuracy on the digits, time and memory over numbers of tokens.

    python tools/measure_mixers.py                                    # a processor minute or two a mixer
    python tools/measure_mixers.py --page docs/models/mixer_vit.md    # the table in the page, no more

Accuracy is that of ``test_mixer_vit`` by the recipe of tools/measure_digits.py, one seed. Time (of the processor, best
of the turns, which the mixers take one after the other) and memory are those of a single layer of 192 channels in 3
heads, forward, one image. They are written first; what the file has already is left as it is.
"""
import argparse
import itertools
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure_digits import measure
from rows import read_rows, write_between, write_rows

from visionattn.bench.timing import peak_memory
from visionattn.models.mixer_vit import MIXERS

__all__ = ["main", "write_table"]

SIDES = (14, 28, 56)  # of maps, in tokens
OPTIONS: dict[str, dict[str, Any]] = {  # for maps of 8 x 8 digits' patches, where the layers' own are for larger ones
    "agent": {"agents": 4}, "neighborhood": {"kernel_size": 3}, "routed": {"n_win": 4}}
START, END = "<!-- measured mixers -->", "<!-- end of measured mixers -->"


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS), metavar="NAME")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES, help="of the timed maps, in tokens")
    parser.add_argument("--out", type=Path, default=Path("results/mixers.csv"), help="CSV file; rows are added")
    parser.add_argument("--page", type=Path, help="write the rows that there are as a table into this page, and stop")
    args = parser.parse_args(argv)
    if args.page:
        write_table(args.out, args.page)
        return 0
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    if args.out.exists():
        rows |= {row["mixer"]: row for row in read_rows(args.out)}
    wanted = [mixer for mixer in args.mixers if not rows.get(mixer, {}).get("accuracy")]
    for mixer, costs in measure_costs([mixer for mixer in wanted if mixer not in rows], args.sides).items():
        rows[mixer] = {"mixer": mixer, **costs}
    write_rows(args.out, list(rows.values()))
    for mixer in wanted:
        options = {"mixer": mixer, "mixer_args": OPTIONS.get(mixer, {})}
        rows[mixer] |= measure("test_mixer_vit", 0, args.epochs, 64, options)
        write_rows(args.out, list(rows.values()))
        print("{mixer:14} {accuracy:.4f} after {minutes} minutes".format(**rows[mixer]), flush=True)
    return 0


@torch.inference_mode()
def measure_costs(mixers: list[str], sides: tuple[int, ...], turns: int = 5) -> dict[str, dict[str, Any]]:
    """Milliseconds and peak MiB of each mixer's layer by the number of tokens."""
    costs: dict[str, dict[str, Any]] = {mixer: {} for mixer in mixers}
    for side in sides:
        x = torch.randn(1, side, side, 192, generator=torch.Generator().manual_seed(0))
        layers = {mixer: MIXERS[mixer](192, 3, (side, side)).eval() for mixer in mixers}
        seconds: dict[str, list[float]] = {mixer: [] for mixer in mixers}
        for _, (mixer, layer) in itertools.product(range(turns), layers.items()):
            layer(x)
            start = time.process_time()
            layer(x)
            seconds[mixer].append(time.process_time() - start)
        for mixer, layer in layers.items():
            costs[mixer] |= {f"ms_{side ** 2}": f"{1e3 * min(seconds[mixer]):.3g}",
                             f"mib_{side ** 2}": f"{peak_memory(partial(layer, x), 'cpu'):.3g}"}
    return costs


def write_table(source: Path, page: Path) -> None:
    """Replaces what is between the marks of ``page`` by a table of the rows of ``source``."""
    rows = read_rows(source)
    counts = [key.removeprefix("ms_") for key in rows[0] if key.startswith("ms_")]
    lines = ["| mixer | accuracy, % | " + " | ".join(f"{int(n):,} tokens: ms, MiB" for n in counts) + " |",
             "|---" * (2 + len(counts)) + "|"]
    for row in rows:
        cells = [row["mixer"], f"{100 * float(row['accuracy']):.1f}" if row.get("accuracy") else "not measured"]
        cells += [f"{row[f'ms_{n}']}, {row[f'mib_{n}']}" for n in counts]
        lines.append(f"| {' | '.join(cells)} |")
    write_between(page, START, END, lines)


if __name__ == "__main__":
    sys.exit(main())
