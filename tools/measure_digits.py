"""Trains a small model of every family, and timm's peers of that size, on the digits: one recipe, three seeds.

    python tools/measure_digits.py --out results/digits.csv
    python tools/measure_digits.py --out results/digits.csv --models test_dinat test_vit

    python tools/measure_digits.py --out results/digits.csv --page docs/training.md  # the table in the page, no more

The recipe is ``digits_dinat`` with another backbone, batches of 32 and a warm-up of five epochs, which models of tokens
alone need: 1,197 scans train, 300 validate, accuracy is that of the best epoch on 300 others. A seed draws the weights,
the order of the images and all that changes them. Rows that the file has are left as they are.
"""
import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from rows import append_rows, read_rows, when_and_with, write_between

from visionattn.cli import main as visionattn
from visionattn.models import families
from visionattn.weights import sized_args

__all__ = ["MODELS", "main", "measure", "write_table"]

SEEDS = (0, 1, 2)
PEERS = ("test_vit", "test_convnext", "test_resnet", "test_efficientnet")  # timm's, of as many parameters
MODELS: dict[str, dict[str, Any]] = {
    name: dict(options) for record in families().values() for name, options in [next(iter(record.small.items()))]
} | {name: {} for name in PEERS}
# Their own sizes of patches and neighborhoods are for 224 pixels: here the maps would be mostly padding.
MODELS["dinat_s_tiny"]["dilations"] = ((1, 2), (1, 1), (1, 1), (1, 1))
MODELS["dinat_iso_small"] |= {"patch_size": 8, "kernel_size": 3}
MODELS["test_sparsifiner"] = {}  # the second phase alone, with chosen keys, from nothing
MODELS["test_modular_vit"] = {}  # with its routers' noise, which tests go without
START, END = "<!-- measured digits -->", "<!-- end of measured digits -->"


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("results/digits.csv"), help="CSV file; rows are appended")
    parser.add_argument("--page", type=Path, help="write the rows that there are as a table into this page, and stop")
    args = parser.parse_args(argv)
    if args.page:
        write_table(args.out, args.page)
        return 0
    torch.set_num_threads(1)
    known = {(row["model"], row["seed"]) for row in read_rows(args.out)} if args.out.exists() else set()
    for seed in args.seeds:
        for name in args.models:
            if (name, str(seed)) in known:
                continue
            row = measure(name, seed, args.epochs, args.image_size)
            append_rows(args.out, [row])
            print("{model:26} seed {seed}: {accuracy:.4f} after {minutes} minutes".format(**row), flush=True)
    return 0


def measure(
        name: str, seed: int, epochs: int, image_size: int, options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The row of one training of a model with these arguments, or with those of :data:`MODELS`."""
    options = sized_args(name, image_size, MODELS[name] if options is None else options)
    with torch.device("meta"):
        parameters = sum(x.numel() for x in timm.create_model(name, num_classes=10, **options).parameters())
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = visionattn([
                "fit", "--config", "digits_dinat", "--seed_everything", str(seed), "--model.init_args.backbone", name,
                "--model.init_args.model_args", json.dumps(options), "--data.init_args.seed", str(seed),
                "--data.init_args.image_size", str(image_size), "--data.init_args.batch_size", "32",
                "--model.init_args.warmup_epochs", "5", "--trainer.max_epochs", str(epochs),
                "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu",
                "--trainer.default_root_dir", folder])
        if code:
            raise RuntimeError(f"{name}, seed {seed}: {said.getvalue()[-500:]}")
        found = json.loads(Path(folder, "test_metrics.json").read_text())
    return {
        "model": name, "parameters": parameters, "seed": seed, "accuracy": found["accuracy"], "loss": found["loss"],
        "epochs": epochs, "image_size": image_size, "minutes": round((time.process_time() - start) / 60, 2),
        **when_and_with()}


def write_table(source: Path, page: Path) -> None:
    """Replaces what is between the marks of ``page`` by a table of the rows of ``source``."""
    rows = read_rows(source)
    lines = ["| model | parameters | seeds | accuracy, % | least to most |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(row["model"] for row in rows):
        chosen = [row for row in rows if row["model"] == name]
        shares = [100 * float(row["accuracy"]) for row in chosen]
        whose, count = "timm's " if name in PEERS else "", int(chosen[0]["parameters"])
        lines.append(f"| {whose}{name} | {count:,} | {len(chosen)} | {statistics.mean(shares):.1f} | "
                     f"{min(shares):.1f} to {max(shares):.1f} |")
    write_between(page, START, END, lines)


if __name__ == "__main__":
    sys.exit(main())
