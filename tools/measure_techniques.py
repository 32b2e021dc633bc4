"""Trains a small vision transformer on the digits with each technique that learns from attention, seed by seed.

    python tools/measure_techniques.py --out results/techniques.csv

A row a technique: accuracy on the 300 test images after the last epoch, mean and the lowest and highest of the seeds,
and the processor time of training beside that of the plain recipe. The 1,197 training images are not augmented: what
regularises is the technique, in half of the batches (the diversification loss in all). Seeds are run one after the
other, and in each all techniques, so that what else the machine does meets all of them.
"""
import argparse
import csv
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from visionattn.data import DigitsData
from visionattn.tasks import ClassificationTask

TECHNIQUES = {
    "plain": {},
    "MaskMix": dict(mixing="maskmix"),
    "MaskMix, attention labels": dict(mixing="maskmix", attention_labels=True),
    "SMMix": dict(mixing="smmix"),
    "attention diversification": dict(attention_diversification=1.0),
}
MODEL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)  # 4 x 4 tokens of 2 x 2 pixels of a scan


def measure(technique: str, seed: int, epochs: int, batches: float) -> tuple[float, float]:
    """Test accuracy and processor seconds of training."""
    pl.seed_everything(seed, verbose=False)
    task = ClassificationTask(
        "vit_tiny_patch16_224", num_classes=10, model_args=MODEL, lr=3e-3, warmup_epochs=2, **TECHNIQUES[technique])
    data = DigitsData(image_size=32)
    data.setup("fit")
    images = data.images.expand(-1, 3, -1, -1)
    train, test = (TensorDataset(images[part], data.labels[part]) for part in (data.train, data.test))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=folder,
            enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, limit_val_batches=0,
            limit_train_batches=batches)
        start = time.process_time()
        trainer.fit(task, DataLoader(train, batch_size=32, shuffle=True))
        seconds = time.process_time() - start
        (metrics,) = trainer.test(task, DataLoader(test, batch_size=300), verbose=False)
    return metrics["test/accuracy"], seconds


def main(arguments: list[str]) -> None:
    """Runs all and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/techniques.csv"))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batches", type=float, default=1.0, help="share of the batches of an epoch, to try the tool")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="lightning|torch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {technique: [] for technique in TECHNIQUES}
    for seed in options.seeds:
        for technique, runs in found.items():
            runs.append(measure(technique, seed, options.epochs, options.batches))
            print(f"seed {seed}, {technique}: {runs[-1][0]:.2%}, {runs[-1][1]:.0f} s", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["technique", "epochs", "seeds", "accuracy", "lowest", "highest", "time"])
        for technique, runs in found.items():
            accuracies = [100 * accuracy for accuracy, _ in runs]
            ratio = statistics.median(
                seconds / plain for (_, seconds), (_, plain) in zip(runs, found["plain"], strict=True))
            writer.writerow([
                technique, options.epochs, len(runs), f"{statistics.mean(accuracies):.2f}", f"{min(accuracies):.2f}",
                f"{max(accuracies):.2f}", f"{ratio:.2f}"])


if __name__ == "__main__":
    main(sys.argv[1:])
