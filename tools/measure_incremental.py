"""Class-incremental training of the digits, five steps of two classes, beside joint training and plain fine-tuning.

    python tools/measure_incremental.py --out results/incremental.csv
    python tools/measure_incremental.py --out results/incremental.csv --page docs/incremental.md  # the table alone

A backbone has to be pretrained, and on nothing that is a digit: a small BiFormer first learns to tell printed letters
apart (:func:`write_letters`: matplotlib's fonts, changed at random, at the 8 x 8 pixels of the digits' scans, without
the letters that look like digits). Then it goes through the recipe ``incremental`` with its baselines: accuracy is that
of the 300 test images, of which those of the classes so far count. A seed draws the new weights and all orders; the
backbone is the same. Rows that the file has are left as they are, and so is the pretraining's run folder.
"""
import argparse
import math
import statistics
import string
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from rows import append_rows, read_rows, when_and_with, write_between

from visionattn.cli import main as visionattn

__all__ = ["main", "measure", "pretrained", "write_letters", "write_table"]

SEEDS = (0, 1, 2)
COPIES = 6  # of a letter of a font
LETTERS = [letter for letter in string.ascii_letters if letter not in "IOloSsZzBbqg"]  # less what looks like a digit
FONTS = "DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf", "cm[brst]*10.ttf"
METHODS = {"incremental": "step by step, adapters", "finetune": "step by step, all weights",
           "joint": "all classes at once, all weights"}
START, END = "<!-- measured steps -->", "<!-- end of measured steps -->"


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=10, help="of each step")
    parser.add_argument("--letters", type=Path, default=Path("runs/letters"), help="run folder of the pretraining")
    parser.add_argument("--letters-epochs", type=int, default=5, help="of the pretraining")
    parser.add_argument("--out", type=Path, default=Path("results/incremental.csv"), help="CSV file; rows are appended")
    parser.add_argument("--page", type=Path, help="write the rows that there are as a table into this page, and stop")
    args = parser.parse_args(argv)
    if args.page:
        write_table(args.out, args.page)
        return 0
    torch.set_num_threads(1)
    known = {row["seed"] for row in read_rows(args.out)} if args.out.exists() else set()
    for seed in args.seeds:
        if str(seed) in known:
            continue
        append_rows(args.out, measure(seed, pretrained(args.letters, args.letters_epochs), args.epochs))
    return 0


def pretrained(run: Path, epochs: int) -> Path:
    """The checkpoint of the backbone that tells letters apart; trained, in the folder ``run``, if it is not there.

    Raises:
        RuntimeError: The training fails.
    """
    checkpoint = run / "checkpoints/best.ckpt"
    if not (run / "test_metrics.json").is_file():
        with tempfile.TemporaryDirectory() as letters:
            write_letters(Path(letters))
            _fit("imagefolder_finetune", run, 0, epochs, {
                "data.root": letters, "data.image_size": 32, "data.batch_size": 64, "data.num_workers": 0,
                "data.hflip": 0, "data.scale": "[0.7, 1.0]", "data.auto_augment": "null", "data.random_erasing": 0,
                "data.crop_pct": 1.0, "data.mean": "[0.305, 0.305, 0.305]", "data.std": "[0.376, 0.376, 0.376]",
                "model.backbone": "test_biformer", "model.lr": 2e-3, "model.warmup_epochs": 1,
                "model.layer_decay": "null", "model.cutmix": 0, "model.mixup": 0, "model.drop_path_rate": 0,
                "model.ema_decay": 0.99})
    return checkpoint


def measure(seed: int, checkpoint: Path, epochs: int) -> list[dict[str, Any]]:
    """The rows of one seed: the accuracy of each method after each step, from a pretrained backbone.

    Raises:
        RuntimeError: The training fails.
    """
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        _fit("incremental", Path(folder), seed, epochs, {
            "model.checkpoint_path": checkpoint, "model.baselines": "true"})
        table = [row for row in read_rows(Path(folder, "incremental.csv")) if row["step"] != "average"]
    about = {"minutes": round((time.process_time() - start) / 60, 2), **when_and_with()}
    return [{"seed": seed, "method": method, "step": row["step"], "classes": row["classes"], "accuracy": row[method],
             **about} for method in METHODS for row in table]


def write_letters(folder: Path) -> None:
    """Writes printed letters of :data:`LETTERS`, white on black and 8 x 8 pixels, a folder for each.

    Each of a font is there six times, turned, slanted, stretched and thickened at random, the same in every call.

    Raises:
        FileNotFoundError: matplotlib has no such fonts.
    """
    ttf = Path(matplotlib.get_data_path(), "fonts/ttf")
    fonts = sorted(file for pattern in FONTS for file in ttf.glob(pattern) if "Display" not in file.name)
    if not fonts:
        raise FileNotFoundError(f"there are no fonts in {ttf}")
    rng, middle = np.random.default_rng(0), np.array([96, 96])
    for letter in LETTERS:
        place = folder / f"{'capital' if letter.isupper() else 'small'}_{letter.lower()}"
        place.mkdir(parents=True)
        for file in fonts:
            canvas = Image.new("L", (192, 192))
            ImageDraw.Draw(canvas).text((60, 50), letter, fill=255, font=ImageFont.truetype(str(file), 72))
            for copy in range(COPIES):
                turn, slant = rng.uniform(-0.25, 0.25), rng.uniform(-0.3, 0.3)
                matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
                matrix = matrix @ np.array([[1, slant], [0, 1]]) @ np.diag(rng.uniform(0.8, 1.25, 2))
                rows = np.column_stack([matrix, middle - matrix @ middle])
                drawn = canvas.transform(
                    canvas.size, Image.Transform.AFFINE, tuple(rows.flatten()), Image.Resampling.BILINEAR)
                drawn = drawn.filter(ImageFilter.MaxFilter(int(rng.choice([1, 3, 5, 7]))))
                drawn = drawn.crop(drawn.getbbox())
                square = Image.new("L", (max(drawn.size), max(drawn.size)))
                square.paste(drawn, ((square.width - drawn.width) // 2, (square.height - drawn.height) // 2))
                square.resize((8, 8), Image.Resampling.BOX).save(place / f"{file.stem}_{copy}.png")


def write_table(source: Path, page: Path) -> None:
    """Replaces what is between the marks of ``page`` by a table of the rows of ``source``."""
    rows = read_rows(source)
    steps = sorted({(int(row["step"]), int(row["classes"])) for row in rows})
    heads = [f"{classes} classes" for _, classes in steps]
    lines = [f"| | {' | '.join(heads)} | average | least to most at the end |", f"|---{'|---' * (len(heads) + 2)}|"]
    for method, name in METHODS.items():
        shares = {step: [100 * float(row["accuracy"]) for row in rows if row["method"] == method
                         and int(row["step"]) == step] for step, _ in steps}
        means, last = [statistics.mean(part) for part in shares.values()], shares[steps[-1][0]]
        cells = [f"{mean:.1f}" for mean in [*means, statistics.mean(means)]]
        lines.append(f"| {name} | {' | '.join(cells)} | {min(last):.1f} to {max(last):.1f} |")
    write_between(page, START, END, lines)


def _fit(recipe: str, run: Path, seed: int, epochs: int, options: dict[str, Any]) -> None:
    options = options | {
        "seed_everything": seed, "data.seed": seed, "trainer.accelerator": "cpu", "trainer.default_root_dir": run,
        "trainer.enable_progress_bar": "false", "trainer.max_epochs": epochs}
    argv = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    if visionattn(["fit", "--config", recipe, *argv]):
        raise RuntimeError(f"the training by the recipe {recipe} failed")


if __name__ == "__main__":
    sys.exit(main())
