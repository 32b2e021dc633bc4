"""``visionattn compare``: runs side by side, in a table and in a picture of their curves."""
import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .data.report import aligned
from .tasks.charts import Curve, draw_curves
from .tasks.story import duration
from .tasks.summary import read_curves

__all__ = ["Run", "compare", "main", "read_run"]

SHOWN = 60  # characters of a value in the table
METRICS = ("val/map", "val/box_map", "val/miou", "val/accuracy")  # of our tasks, for runs that have no summary yet
# What says where a run is and how it shows itself, not what it is.
APART = ("trainer.default_root_dir", "trainer.logger", "trainer.callbacks", "trainer.enable_", "trainer.log_every",
         "ckpt_path", "data.init_args.num_workers")


class Run(NamedTuple):
    """What a run folder tells.

    Attributes:
        folder: The folder.
        config: Its configuration, flat: values by their keys with dots.
        summary: ``summary.json``; what is known without it of a run that has not ended.
        curves: The columns of ``metrics.csv`` over the epochs.
    """

    folder: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    curves: Mapping[str, Curve]


def main(argv: list[str]) -> None:
    """Runs ``visionattn compare``."""
    parser = argparse.ArgumentParser(
        prog="visionattn compare", description="Shows runs side by side: a table of metrics, models, durations and the "
        "settings that differ, and a picture of the curves.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--picture", type=Path, default=Path("comparison.png"), metavar="FILE", help=(
        "where the picture goes (default: comparison.png)"))
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there, too: a run a row")
    args = parser.parse_args(argv)
    runs = [read_run(Path(folder)) for folder in dict.fromkeys(args.runs)]
    rows = compare(runs)
    print("\n".join(aligned([[_cell(key), *map(_cell, values)] for key, values in rows.items()])))
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(zip(*([key, *values] for key, values in rows.items()), strict=True))
        print(f"The table is in {args.csv}")
    if draw_curves(args.picture, _panels(runs)):
        print(f"The curves are in {args.picture}")


def read_run(folder: Path) -> Run:
    """Reads a run folder, also that of a run that goes on.

    Raises:
        ValueError: It is none; the message is one line.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the folders of runs, such as runs/imagefolder_finetune")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "trainer" not in config:
            raise ValueError
    except (OSError, ValueError, yaml.YAMLError):
        raise ValueError(f"{folder} is no run folder: it has no config.yaml that fit has written") from None
    try:
        curves = read_curves(folder)
    except OSError:
        curves = {}
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = _unfinished(config, curves)
    return Run(folder, dict(_flat(config)), summary, curves)


def compare(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The table: of each row the values of the runs, None for what a run does not have.

    First what every run has, then the metrics of its test, then the settings that all have and that differ.
    """
    summaries = [run.summary for run in runs]

    def column(*keys: str) -> list[Any]:
        return [next((summary[key] for key in keys if summary.get(key) is not None), None) for summary in summaries]

    rows: dict[str, list[Any]] = {"run": _names(runs)}
    rows |= {"task": column("task"), "model": column("model"), "parameters": column("parameters"),
             "epochs": column("epochs")}
    for metric in dict.fromkeys(summary.get("metric") for summary in summaries if summary.get("metric")):
        mine = [summary if summary.get("metric") == metric else {} for summary in summaries]
        rows[f"best {metric}"] = [summary.get("best") for summary in mine]
        rows["in epoch"] = [summary.get("best_epoch") for summary in summaries]
    tests = [summary.get("test", {}) for summary in summaries]
    for key in dict.fromkeys(key for test in tests for key, value in test.items() if isinstance(value, float)):
        rows[f"test {key}"] = [test.get(key) for test in tests]
    rows["training time"] = [None if seconds is None else duration(seconds) for seconds in column("seconds")]
    rows |= {"images/s": column("images_per_second"), "device": column("device")}
    for key in runs[0].config:
        if not key.startswith(APART) and all(key in run.config for run in runs):
            values = [run.config[key] for run in runs]
            if any(value != values[0] for value in values):
                rows[key] = values
    return {key: values for key, values in rows.items() if any(value is not None for value in values)}


def _unfinished(config: Mapping[str, Any], curves: Mapping[str, Curve]) -> dict[str, Any]:
    """What is known of a run that has no summary."""
    model = config.get("model") or {}
    summary = {"task": str(model.get("class_path", "")).rpartition(".")[2],
               "model": (model.get("init_args") or {}).get("backbone"),
               "epochs": int(max((curve[-1][0] for curve in curves.values()), default=0))}
    metric = next((metric for metric in METRICS if metric in curves), None)
    if metric:
        epoch, best = max(curves[metric], key=lambda point: point[1])
        summary |= {"metric": metric, "best": round(best, 6), "best_epoch": int(epoch)}
    return summary


def _panels(runs: Sequence[Run]) -> dict[str, dict[str, Curve]]:
    names = _names(runs)
    metrics = dict.fromkeys(run.summary.get("metric") for run in runs)
    titles = {"training loss": "train/loss", "validation loss": "val/loss",
              **{metric: metric for metric in metrics if metric}, "learning rate": "lr"}
    return {title: {name: run.curves.get(key, []) for name, run in zip(names, runs, strict=True)}
            for title, key in titles.items()}


def _names(runs: Sequence[Run]) -> list[str]:
    """Names of the folders; where two are the same, the paths."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _flat(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """The settings of a configuration by their keys with dots; what an argument holds is left together."""
    if isinstance(value, dict) and value and ".init_args." not in key:
        return [pair for name, part in value.items() for pair in _flat(part, f"{key}.{name}" if key else str(name))]
    return [(key, value)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN - 3]}..."
