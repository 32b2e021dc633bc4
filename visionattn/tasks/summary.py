"""The run folder in short: ``summary.json``, ``curves.png`` and a ``README.txt`` that says what each file is."""
import csv
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch

from .. import __version__
from ..data.report import DataReport
from .charts import Curve, draw_curves
from .guarding import LossGuard
from .story import EpochLines, device_name

__all__ = ["add_test", "draw_run", "read_curves", "summarise", "write_readme"]

_FILES = {  # of a run folder, in the order of the README; patterns are below it
    "summary.json": "the run in short: model, data, best epoch, test metrics, durations, versions",
    "config.yaml": "the whole configuration, defaults included; visionattn test and predict take it",
    "checkpoints/best.ckpt": "the epoch with the best validation metric",
    "adapter.safetensors": "the adapter and the head of that epoch, without the backbone",
    "checkpoints/last.ckpt": "where the training is: visionattn fit --config config.yaml --resume auto goes on",
    "checkpoints/previous.ckpt": "the last.ckpt before, should that be damaged",
    "curves.png": "loss, validation metric and learning rate over the epochs; the best epoch is dashed",
    "metrics.csv": "the same as numbers, and all other losses and metrics; epochs are counted from 0 there",
    "incremental.csv": "accuracy after each step of classes, over all classes so far",
    "incremental.png": "the same as curves",
    "test_metrics.json": "what the last test measured",
    "classification": "of several tasks: this one's model, as the last test had it, and results; a run of its own",
    "detection": "the same of detection",
    "segmentation": "the same of segmentation",
    "classes.csv": "the last test class by class: counts, precision, recall, and AP or IoU",
    "confusion.png": "the last test: which class was taken for which",
    "confusion.csv": "the same as numbers; a row is the truth, a column what was predicted",
    "mistakes.png": "the last test's worst mistakes",
    "calibration.png": "the last test: how often predictions are right, by confidence; with and without temperature",
    "left_out*.csv": "files and records that were left out or mended, with the reasons",
    "predictions.csv": "the last prediction: classes and their probabilities",
    "predictions.json": "the last prediction: boxes, scores and masks, as COCO has results",
    "predictions_coco.json": "the last prediction: a COCO file of the images and what is sure enough in them",
    "predictions": "the last prediction: label maps",
    "pictures": "the last prediction: what was found, over the images",
    "crops": "the last prediction: what was found, cut out of the images",
    "*.onnx": "the exported model",
    "routes.png": "where the model looks",
    "sheet.png": "some predictions on one sheet",
    "hparams.yaml": "the model's arguments, as Lightning notes them",
    "tensorboard": "the curves for TensorBoard",
}
_TITLE = "What is in this folder, a run of visionattn:"


def summarise(
        run: Path, trainer: pl.Trainer, model: pl.LightningModule, data: Any, lines: EpochLines) -> None:
    """Writes ``summary.json`` of a training.

    Args:
        run: The run folder.
        trainer: What trained.
        model: What was trained.
        data: Its data module.
        lines: What counted the epochs.
    """
    args: Mapping[str, Any] = getattr(model, "hparams", {})
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    guards = [callback for callback in trainer.callbacks if isinstance(callback, LossGuard)]  # type: ignore[attr-defined]
    summary: dict[str, Any] = {
        "task": type(model).__name__,
        "model": args.get("backbone") or type(model).__name__,
        **{key: args[key] for key in ("detector", "head", "adapter") if args.get(key)},
        "parameters": sum(size for size, _ in sizes),
        "trained_parameters": sum(size for size, trained in sizes if trained),
        "num_classes": args.get("num_classes"),
        "data": {"module": type(data).__name__, "images": _image_counts(trainer, data)},
        "metric": getattr(model, "monitor", None),
        "best": _rounded(lines.best),
        "best_epoch": lines.best_epoch,
        "epochs": lines.epochs,
        "steps": trainer.global_step,
        "stopped_early": True if trainer.should_stop else None,
        "skipped_steps": next((guard.skipped for guard in guards if guard.skip), None),
        "seconds": round(lines.seconds, 1),
        "images_per_second": round(lines.images / lines.training_seconds, 1) if lines.training_seconds else None,
        "device": device_name(trainer.strategy.root_device),
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "versions": {"visionattn": __version__, "torch": torch.__version__, "timm": timm.__version__,
                     "lightning": pl.__version__, "python": platform.python_version()},
    }
    summary = {key: value for key, value in summary.items() if value is not None}
    _write(run, summary)


def add_test(run: Path, seconds: float, checkpoint: str | None) -> None:
    """Adds ``test_metrics.json`` to the ``summary.json`` of a run, if there are both."""
    try:
        summary = json.loads((run / "summary.json").read_text())
        metrics = json.loads((run / "test_metrics.json").read_text())
    except (OSError, ValueError):
        return
    single = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
    _write(run, summary | {"test": single, "test_seconds": round(seconds, 1), "tested": checkpoint})


def read_curves(run: Path) -> dict[str, Curve]:
    """The columns of ``metrics.csv`` by epochs, from 1 on; of an epoch that was repeated the last.

    Columns are named as the task logs them, ``train/loss`` for instance; steps within epochs are left out.

    Raises:
        OSError: There is no such file.
    """
    curves: dict[str, dict[float, float]] = {}
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if not row.get("epoch"):
                continue
            for key, text in row.items():
                if text and key not in ("epoch", "step", None) and not key.endswith("_step"):
                    value = float(text)
                    if math.isfinite(value):
                        curves.setdefault(key.removesuffix("_epoch"), {})[float(row["epoch"]) + 1] = value
    return {key: sorted(curve.items()) for key, curve in curves.items()}


def draw_run(run: Path, metric: str | None, best_epoch: int | None) -> None:
    """Draws ``curves.png`` from ``metrics.csv``, if there is one.

    Args:
        run: The run folder.
        metric: The validation metric that is drawn.
        best_epoch: The epoch to mark.
    """
    try:
        curves = read_curves(run)
    except OSError:
        return
    panels = {"loss": {"training": curves.get("train/loss", []), "validation": curves.get("val/loss", [])},
              "learning rate": {"learning rate": curves.get("lr", [])}}
    if metric and metric != "val/loss":
        panels = {"loss": panels["loss"], metric: {"validation": curves.get(metric, [])}} | panels
    draw_curves(run / "curves.png", panels, {metric: best_epoch} if metric and best_epoch else None)


def write_readme(run: Path) -> None:
    """Writes ``README.txt``, a line for each file of the run that is there; a user's own is left alone."""
    path = run / "README.txt"
    foreign = path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(_TITLE)
    if foreign or not (run / "config.yaml").is_file():
        return
    there = {str(file.relative_to(run)): about for pattern, about in _FILES.items()
             for file in sorted(run.glob(pattern))}
    width = max(map(len, there), default=0)
    path.write_text("\n".join([_TITLE, "", *(f"{name:<{width}}  {about}" for name, about in there.items())]) + "\n",
                    encoding="utf-8")


def _image_counts(trainer: pl.Trainer, data: Any) -> dict[str, int]:
    report = getattr(data, "report", None)
    if isinstance(report, DataReport) and report.splits:
        return {split: part.images for split, part in report.splits.items()}
    loaders: dict[str, Any] = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders}
    counts = {}
    for split, loader in loaders.items():
        try:
            counts[split] = len(loader.dataset)
        except (AttributeError, TypeError):  # several loaders, or data without an end
            continue
    return counts


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _write(run: Path, summary: dict[str, Any]) -> None:
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
