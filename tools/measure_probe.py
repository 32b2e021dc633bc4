"""Measures ``visionattn probe``: what each head costs a step, and what the kept features save.

    python tools/measure_probe.py heads --out results/probe_heads.csv
    python tools/measure_probe.py cache --out results/probe_cache.csv

``heads`` times a training step (forward, backward) of each head on 196 tokens of 384 and 768 channels: processor time,
best of turns that the heads take one after the other. ``cache`` makes JPEG files of 224 pixels and runs the command
twice, each time as a process of its own, on a backbone without trained weights; how long its features took is read
from what it says.
"""
import argparse
import itertools
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import timm
import torch
from PIL import Image
from rows import write_rows

from visionattn.heads.probing import PooledHead, Pooling

__all__ = ["main"]

TOKENS, BATCH, CLASSES = 196, 64, 1000


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("what", choices=("heads", "cache"))
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000], help=(
        "of cache: numbers, a tenth of each to validate and a tenth to test"))
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="of cache")
    parser.add_argument("--turns", type=int, default=10, help="of heads")
    parser.add_argument("--out", type=Path, required=True, help="CSV file, written anew")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.what == "heads":
        rows = measure_heads(args.turns)
    else:
        rows = [row for count in sorted(args.images) for row in measure_cache(args.model, count)]
    write_rows(args.out, rows)
    for row in rows:
        print(row)
    return 0


def measure_heads(turns: int) -> list[dict[str, Any]]:
    """Milliseconds of a training step of each head, and how many times faster it is than multi-head attention."""
    rows = []
    for dim in (384, 768):
        tokens = torch.randn(BATCH, TOKENS + 1, dim, generator=torch.Generator().manual_seed(0))
        heads = {kind: PooledHead(kind, dim, CLASSES, num_prefix_tokens=1) for kind in get_args(Pooling)}
        seconds: dict[str, list[float]] = {kind: [] for kind in heads}
        for turn, (kind, head) in itertools.product(range(turns + 1), heads.items()):
            start = time.process_time()
            head(tokens).square().mean().backward()
            if turn:  # the first warms up
                seconds[kind].append(time.process_time() - start)
        slowest = min(seconds["attention"])
        rows += [{
            "head": kind, "dim": dim, "tokens": TOKENS, "batch": BATCH,
            "pooling_weights": sum(p.numel() for p in head.pool.parameters()),
            "step_ms": f"{1e3 * min(seconds[kind]):.3g}",
            "times_faster_than_attention": f"{slowest / min(seconds[kind]):.2f}",
        } for kind, head in heads.items()]
    return rows


def measure_cache(model: str, count: int) -> list[dict[str, Any]]:
    """Seconds and peak MiB of two runs of the command on the same images: the second finds the first's features."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        _make_images(Path(folder, "photos"), count)
        torch.manual_seed(0)
        torch.save(timm.create_model(model).state_dict(), Path(folder, "weights.pth"))
        for run in ("first", "second"):
            start = time.perf_counter()
            said = subprocess.run(
                [sys.executable, "-m", "visionattn", "probe", "--model", model, "--data", "photos", "--checkpoint",
                 "weights.pth", "--heads", "mean", "knn", "--epochs", "10", "--cache", "cache", "--out", run],
                cwd=folder, check=True, capture_output=True, text=True)
            found = re.findall(r"in ([\d.]+) s\.", said.stdout + said.stderr)
            assert len(found) == 3, said.stdout + said.stderr
            # In KiB, the largest of all processes so far: of the first run, and of the most images, as they ascend.
            rows.append({
                "run": run, "model": model, "images": count, "seconds": f"{time.perf_counter() - start:.1f}",
                "features_seconds": f"{sum(map(float, found)):.1f}",
                "peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
                "kept_mib": sum(file.stat().st_size for file in Path(folder, "cache").rglob("*.npy")) // 2**20,
            })
    return rows


def _make_images(root: Path, count: int) -> None:
    """Noise, enlarged, in five classes that differ in their color; a tenth each in ``val`` and ``test``."""
    rng = np.random.default_rng(0)
    for number in range(count):
        split = {0: "val", 1: "test"}.get(number % 10, "train")
        label = number // 10 % 5
        pixels = rng.integers(0, 200, (14, 14, 3), dtype=np.uint8)
        pixels[..., label % 3] += 11 * (label + 1)
        path = root / split / f"class_{label}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR).save(path, quality=90)


if __name__ == "__main__":
    sys.exit(main())
