"""Measures how long models take to become checked ONNX files, and where that time goes.

    python tools/measure_export.py --models nat_mini dinat_tiny --out results/export_cpu.csv

Time is the processor's, of one thread, which other processes on the machine disturb least. A model of timm's is
exported before and after the others, and each model's time is also given as a multiple of the mean of both.
"""
import argparse
import contextlib
import csv
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch

from visionattn.export import onnx_file
from visionattn.models import families

__all__ = ["main", "measure"]

PEER = "swin_tiny_patch4_window7_224"
STAGES = {  # of an export: what of PyTorch's does them
    "capture": (torch.export, "export"),
    "decompose": (torch.export.ExportedProgram, "run_decompositions"),
    "optimise": (torch.onnx.ONNXProgram, "optimize"),
    "check": (onnx_file, "compare"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--models", nargs="+", metavar="NAME", default=_one_of_each_family())
    parser.add_argument("--dynamic-size", action="store_true", help="leave height and width free")
    parser.add_argument("--out", type=Path, help="CSV file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [measure(PEER) | {"dynamic_size": False}]
    for name in args.models:
        rows.append(measure(name, args.dynamic_size) | {"dynamic_size": args.dynamic_size})
        print("{model:32}{seconds:>8} s, {nodes:>5} nodes".format(**rows[-1]), flush=True)
    rows.append(measure(PEER) | {"dynamic_size": False})
    unit = (rows[0]["seconds"] + rows[-1]["seconds"]) / 2
    versions = {library: importlib.metadata.version(library) for library in ("torch", "onnxscript", "timm")}
    for row in rows:
        row |= {"over_peer": round(row["seconds"] / unit, 2), **versions}
        print("{model:32}{seconds:>8} s {over_peer:>6} x {peer}".format(**row, peer=PEER))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


def measure(name: str, dynamic_size: bool = False) -> dict[str, Any]:
    """Exports a model with fresh weights; returns processor seconds, whole and by stage, and the file's nodes.

    The stage ``other`` is mostly the translation of PyTorch's operators to ONNX's.
    """
    torch.manual_seed(0)
    model = timm.create_model(name)
    seconds = dict.fromkeys(STAGES, 0.0)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for stage, (owner, attribute) in STAGES.items():
            timed = _timed(getattr(owner, attribute), stage, seconds)
            stack.enter_context(mock.patch.object(owner, attribute, timed))
        start = time.process_time()
        report = onnx_file.export_onnx(model, Path(folder, "model.onnx"), dynamic_size=dynamic_size)
        total = time.process_time() - start
    seconds["other"] = total - sum(seconds.values())
    return {"model": name, "seconds": round(total, 1), "nodes": report.nodes} | {
        stage: round(value, 1) for stage, value in seconds.items()}


def _timed(function: Callable[..., Any], stage: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[stage] += time.process_time() - start

    return timed


def _one_of_each_family() -> list[str]:
    return [next(iter(family.published)) for family in families().values() if family.published]


if __name__ == "__main__":
    sys.exit(main())
