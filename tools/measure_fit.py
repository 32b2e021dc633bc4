"""Times `visionattn fit` beside a bare PyTorch loop of the same model, loader and batch: images a second of training.

    python tools/measure_fit.py --out results/fit_cpu.csv

Two kinds of data, each in one run: the scanned digits, which are in memory, and JPEG files of 500 x 375 pixels that are
made for it, seen at 224. After every epoch of fit, without its validation, comes one of the bare loop, so that a slow
phase of the machine meets both; the first of each warms up and does not count. The bare loop has label smoothing,
clipping, AdamW and a schedule, as the run has, and nothing else.
"""
import argparse
import copy
import csv
import datetime
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from visionattn.bench.machine import cpu_name
from visionattn.bench.training import write_photographs
from visionattn.cli import main as visionattn

__all__ = ["Beside", "main", "measure"]

CASES = {
    "digits": ("digits_dinat", ["--data.init_args.image_size", "32"]),
    "jpeg": ("imagefolder_finetune", [
        "--model.init_args.backbone", "efficientvit_cga_m0", "--model.init_args.pretrained", "false",
        "--model.init_args.layer_decay", "null", "--model.init_args.mixup", "0", "--model.init_args.cutmix", "0",
        "--data.init_args.image_size", "224"]),
}
TIMES = "times.json"


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--epochs", type=int, default=6, help="of each, the one that warms up included")
    parser.add_argument("--images", type=int, default=256, help="JPEG files that are made")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1, help="loader processes of the JPEG files")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/fit_cpu.csv"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = None
        for case in args.cases:
            row = measure(case, args.epochs, args.images, args.batch, args.workers) | {"threads": args.threads}
            writer = writer or csv.DictWriter(file, fieldnames=list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            print("{case}: {fit} images/s by fit, {bare} by the bare loop: {fit_over_bare}".format(**row), flush=True)
    return 0


def measure(case: str, epochs: int, images: int, batch: int, workers: int) -> dict[str, Any]:
    """The row of one kind of data; rates are medians over the epochs, the ratio the median of the epochs' ratios."""
    recipe, options = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        if case == "jpeg":
            write_photographs(Path(folder, "photos"), images)
            options = [*options, "--data.init_args.root", str(Path(folder, "photos")),
                       "--data.init_args.num_workers", str(workers)]
        code = visionattn([
            "fit", "--config", recipe, *options, "--model.init_args.ema_decay", "null",
            "--data.init_args.batch_size", str(batch), "--trainer.max_epochs", str(epochs),
            "--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0",
            "--trainer.limit_test_batches", "0", "--trainer.accelerator", "cpu", "--trainer.callbacks",
            f"{Path(__file__).stem}.Beside", "--trainer.default_root_dir", str(Path(folder, "run"))])
        if code:
            raise RuntimeError(f"fit ended with {code}")
        times = json.loads(Path(folder, "run", TIMES).read_text())
    fit, bare = ([count / seconds for count, seconds in times[name][1:]] for name in ("fit", "bare"))
    return {
        "case": case, "recipe": recipe, "batch": batch, "fit": round(statistics.median(fit), 1),
        "bare": round(statistics.median(bare), 1),
        "fit_over_bare": round(statistics.median(x / y for x, y in zip(fit, bare, strict=True)), 3),
        "epochs": len(fit), "workers": workers if case == "jpeg" else 0, "machine": cpu_name(),
        **{library: importlib.metadata.version(library) for library in ("torch", "timm", "lightning", "visionattn")},
        "date": datetime.date.today().isoformat()}


class Beside(pl.Callback):
    """Runs an epoch of the bare loop after every epoch of fit and writes how long both took."""

    def __init__(self) -> None:
        self.fit: list[tuple[int, float]] = []
        self.bare: list[tuple[int, float]] = []
        self.loop: _Bare | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock and counts."""
        self.images, self.start = 0, time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:
        """Counts the images."""
        self.images += len(batch[0])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock and lets the bare loop run."""
        self.fit.append((self.images, time.perf_counter() - self.start))
        self.loop = self.loop or _Bare(trainer, pl_module)
        start = time.perf_counter()
        self.bare.append((self.loop.epoch(), time.perf_counter() - start))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the seconds."""
        Path(trainer.default_root_dir, TIMES).write_text(json.dumps({"fit": self.fit, "bare": self.bare}))


class _Bare:
    """A training loop of a copy of the task's model, with the run's loader."""

    def __init__(self, trainer: pl.Trainer, task: Any):
        args = task.args
        self.clip, self.smoothing = trainer.gradient_clip_val, args.label_smoothing
        self.model = copy.deepcopy(task.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
        steps = int(trainer.estimated_stepping_batches)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.loader = data.train_dataloader()

    def epoch(self) -> int:
        """Trains once over the data and returns the number of images."""
        self.model.train()
        count = 0
        with torch.enable_grad():
            for images, labels in self.loader:
                loss = cross_entropy(self.model(images), labels, label_smoothing=self.smoothing)
                self.optimizer.zero_grad()
                loss.backward()
                if self.clip:
                    clip_grad_norm_(self.model.parameters(), self.clip)
                self.optimizer.step()
                self.schedule.step()
                count += len(images)
        return count


if __name__ == "__main__":
    sys.exit(main())
