"""Trains three tasks at once by the recipe ``multitask``, and each of them alone on the same number of its images.

    python tools/measure_multitask.py --epochs 10
    python tools/measure_multitask.py --page docs/multitask.md  # the table in the page, no more

An epoch of the recipe goes through each set once, so that a task alone has as many epochs. The learning rate, its
warm-up as a share of the run, its cosine, the decays and the moving average are the recipe's in all runs. A seed draws
the weights and the training images. Metrics are those of the best epoch on the test images. Rows that the file has are
left as they are.
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rows import append_rows, read_rows, when_and_with, write_between

from visionattn.cli import main as visionattn
from visionattn.recipes import find_recipe

__all__ = ["alone", "joint", "main", "measure"]

METRICS = {"classification": "accuracy", "detection": "box_map", "segmentation": "miou"}
CLASSES = {"classification": "ClassificationTask", "detection": "DetectionTask", "segmentation": "SegmentationTask"}
START, END = "<!-- measured multitask -->", "<!-- end of measured multitask -->"


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("results/multitask.csv"), help="CSV file; rows are appended")
    parser.add_argument("--page", type=Path, help="write the rows that there are as a table into this page, and stop")
    args = parser.parse_args(argv)
    if args.page:
        write_table(args.out, args.page)
        return 0
    torch.set_num_threads(1)
    rows = read_rows(args.out) if args.out.exists() else []
    known = {(row["run"], row["seed"], row["epochs"]) for row in rows}
    for seed in args.seeds:
        for name in ("joint", *METRICS):
            if (name, str(seed), str(args.epochs)) in known:
                continue
            found, minutes = measure(joint(seed, args.epochs) if name == "joint" else alone(name, seed, args.epochs))
            for task, metric in METRICS.items():
                if name not in ("joint", task):
                    continue
                row = {
                    "run": name, "seed": seed, "epochs": args.epochs, "task": task, "metric": metric,
                    "value": found.get(f"{task}/{metric}" if name == "joint" else metric), "minutes": minutes,
                    **when_and_with()}
                append_rows(args.out, [row])
                print("{run:14} seed {seed}: {task} {metric} {value} after {minutes} minutes".format(**row), flush=True)
    return 0


def joint(seed: int, epochs: int) -> dict[str, Any]:
    """The recipe with a seed and a length."""
    recipe = yaml.safe_load(find_recipe("multitask").read_text())
    for task in METRICS:
        part = recipe["data"]["init_args"][task]["init_args"]
        part["seed"] = part.get("seed", 0) + 10 * seed
    recipe["data"]["init_args"]["seed"] = seed
    recipe["trainer"]["max_epochs"] = epochs
    return recipe | {"seed_everything": seed}


def alone(task: str, seed: int, epochs: int) -> dict[str, Any]:
    """What the recipe is for one of its tasks."""
    recipe = joint(seed, epochs)
    model = dict(recipe["model"]["init_args"])
    own = {name: model.pop(name) for name in METRICS}[task]
    model.pop("balance")
    data = recipe["data"]["init_args"]
    batches = {name: _images(data[name]) // data[name]["init_args"]["batch_size"] for name in METRICS}
    share = model.pop("warmup_steps") / (sum(batches.values()) * epochs)  # of the run, that is warm-up
    if task == "classification":
        model |= {"warmup_epochs": share * epochs, "min_lr": 0.0}
    else:
        model |= {"warmup_steps": round(share * batches[task] * epochs), "schedule": "cosine"}
    return recipe | {"model": {"class_path": CLASSES[task], "init_args": model | own}, "data": data[task]}


def measure(config: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Test metrics of a training, and the processor's minutes that it took."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config["trainer"] |= {
            "default_root_dir": f"{folder}/run", "accelerator": "cpu", "enable_progress_bar": False,
            "enable_model_summary": False}
        Path(folder, "config.yaml").write_text(yaml.safe_dump(config))
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = visionattn(["fit", "--config", f"{folder}/config.yaml"])
        if code:
            raise RuntimeError(said.getvalue()[-500:])
        found = json.loads(Path(folder, "run", "test_metrics.json").read_text())
    return found, round((time.process_time() - start) / 60, 2)


def write_table(source: Path, page: Path) -> None:
    """Replaces what is between the marks of ``page`` by a table of the rows of ``source``."""
    rows = read_rows(source)
    lines = ["| task | metric | epochs | seed | alone, % | together, % | difference |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if row["run"] != "joint":
            continue
        others = [other for other in rows if other["run"] == row["task"] and all(
            other[key] == row[key] for key in ("seed", "epochs"))]
        if others:
            one, together = 100 * float(others[0]["value"]), 100 * float(row["value"])
            lines.append(f"| {row['task']} | {row['metric']} | {row['epochs']} | {row['seed']} | {one:.1f} | "
                         f"{together:.1f} | {together - one:+.1f} |")
    write_between(page, START, END, lines)


def _images(data: dict[str, Any]) -> int:
    """Training images of one of the recipe's sets."""
    return int(data["init_args"].get("train_scenes", 1197))


if __name__ == "__main__":
    sys.exit(main())
