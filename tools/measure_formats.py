"""Exports a small model of every family, for every task, to every format, and writes what came of it.

    python tools/measure_formats.py --out results/export.csv
    python tools/measure_formats.py --out results/export.csv --families nat --tasks detection --formats openvino

    python tools/measure_formats.py --out results/export.csv --page docs/export.md  # the table in the page, no more

A row tells whether the file was kept, at which sizes of images it was checked (all with one image and three; a
detector with three images, one by one), its largest difference from eager PyTorch, latency with one image, and size; or
the reason why there is no such file. Rows that the file has are left as they are. Weights are random.
"""
import argparse
import csv
import gc
import importlib.metadata
import inspect
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from rows import write_between

from visionattn import export
from visionattn.dense import DenseBackbone
from visionattn.export import FORMATS, formats, onnx_file
from visionattn.heads import Segmenter
from visionattn.heads.detector import build_detector
from visionattn.models import families

__all__ = ["main", "measure", "write_table"]

START, END = "<!-- measured formats -->", "<!-- end of measured formats -->"

TASKS = ("classification", "segmentation", "detection")
SIDE = 128  # of the images of dense tasks
DENSE = {"dinat_s_tiny": {"dilations": ((1, 4), (1, 2), (1, 2), (1, 1))}}  # for the few blocks of the small model
COLUMNS = ("family", "model", "task", "format", "kept", "image_sizes", "difference", "limit", "ms", "eager_ms", "mib",
           "detections", "redrawn", "reason", "note", "seconds", "torch", "runtime")
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch", "litert": "litert-torch",
            "coreml": "coremltools", "tensorrt": "onnx"}


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--families", nargs="+", choices=sorted(families()), default=sorted(families()), metavar="NAME")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[name for name in FORMATS if name != "aoti"],
                        help="all but aoti if not given, whose compiling takes minutes a model")
    parser.add_argument("--out", type=Path, default=Path("results/export.csv"), help="CSV file; rows are appended")
    parser.add_argument("--page", type=Path, help="write the rows that there are as a table into this page, and stop")
    args = parser.parse_args(argv)
    if args.page:
        write_table(args.out, args.page)
        return 0
    torch.set_num_threads(1)
    gc.disable()  # a fifth of the time of converters with many small objects
    known = set()
    if args.out.exists():
        with args.out.open(newline="") as file:
            known = {(row["family"], row["task"], row["format"]) for row in csv.DictReader(file)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        if not known:
            writer.writeheader()
        for task in args.tasks:
            for family in args.families:
                wanted = [name for name in args.formats if (family, task, name) not in known]
                for row in measure(family, task, wanted) if wanted else ():
                    writer.writerow(row)
                    file.flush()
                    gc.collect()
                    print("{family:18}{task:16}{format:12}{image_sizes:>12} {difference:>8} {reason}".format(**row),
                          flush=True)
    return 0


def measure(family: str, task: str, wanted: list[str]) -> Any:
    """Yields a row for each of the ``wanted`` formats of a family's smallest model."""
    name, options = next(iter(families()[family].small.items()))
    torch.manual_seed(0)
    model = _model(name, options, task)
    converted = _once(onnx_file.onnx_model)  # the ONNX model is the same for three formats
    with mock.patch.object(onnx_file, "onnx_model", converted), mock.patch.object(formats, "onnx_model", converted):
        for format in wanted:
            start = time.process_time()
            row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {
                "family": family, "model": name, "task": task, "format": format, "kept": False,
                "torch": importlib.metadata.version("torch")}
            package = PACKAGES.get(format)
            if package:
                row["runtime"] = f"{package} {importlib.metadata.version(package)}"
            try:
                report, row["image_sizes"], row["note"] = _exported(model, task, format)
            except (ValueError, RuntimeError) as error:
                row["reason"] = _one_line(error)
            else:
                row |= {"kept": True, "difference": f"{report.difference:.1e}" if report.runtime else "",
                        "limit": report.limit, "mib": f"{report.megabytes:.2f}", "redrawn": report.ties,
                        "detections": "" if report.detections is None else report.detections}
                if report.milliseconds is not None:
                    row |= {"ms": f"{report.milliseconds:.1f}", "eager_ms": f"{report.eager_milliseconds:.1f}"}
                row["note"] = "; ".join(filter(None, [row["note"], report.note.partition(":")[0]]))
            yield row | {"seconds": round(time.process_time() - start, 1)}


def write_table(source: Path, page: Path) -> None:
    """Replaces what is between the marks of ``page`` by a table of the rows of ``source``."""
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in FORMATS if any(row["format"] == name for row in rows)]
    lines = [["family", "task", *names], ["---"] * (2 + len(names))]
    reasons: dict[str, int] = {}
    for family, task in dict.fromkeys((row["family"], row["task"]) for row in rows):
        cells = {row["format"]: row for row in rows if (row["family"], row["task"]) == (family, task)}
        lines.append([family, task, *(_cell(cells.get(name), reasons) for name in names)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    write_between(page, START, END, [table, "", notes])


def _cell(row: dict[str, str] | None, reasons: dict[str, int]) -> str:
    """Largest difference, of any size of image where it is free, or the number of the reason."""
    if row is None:
        return "not measured"
    if row["kept"] == "True":
        return f"{row['difference']}{', any size' if row['image_sizes'] == 'free' else ''}"
    reason = row["reason"].replace(f"format {row['format']}", "the format")
    return f"no ({reasons.setdefault(reason, len(reasons) + 1)})"


def _exported(model: Any, task: str, format: str) -> tuple[export.ExportReport, str, str]:
    """The report, the sizes of images, and why these are not free."""
    size = None if task == "classification" else (SIDE, SIDE)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, f"model{FORMATS[format].suffix}")
        reason = ""
        if task != "detection" and format in ("onnx", "openvino", "tensorrt"):
            try:
                return export.export_model(model, out, format, size, dynamic_size=True), "free", ""
            except (ValueError, RuntimeError) as error:
                reason = f"free sizes: {_one_line(error)}"
        return export.export_model(model, out, format, size), "one", reason


def _once(function: Any) -> Any:
    """The function, computed once for equal arguments, whether these are said or are its defaults; errors too."""
    signature, results = inspect.signature(function), dict[Any, Any]()

    def remembered(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        key = tuple(bound.arguments.items())
        if key not in results:
            try:
                results[key] = function(*args, **options), None
            except (ValueError, RuntimeError) as error:
                results[key] = None, error
        result, error = results[key]
        if error:
            raise error
        return result

    return remembered


def _model(name: str, options: Any, task: str) -> torch.nn.Module:
    """A model of random weights; of a detector such that it finds something."""
    if task == "classification":
        return timm.create_model(name, num_classes=10, **options).eval()
    backbone = DenseBackbone(name, task, model_args=dict(options) | DENSE.get(name, {}))
    if task == "segmentation":
        return Segmenter(backbone, 4, channels=32).eval()
    strides = backbone.reductions if len(backbone.reductions) > 1 else None
    detector = build_detector("fcos", backbone, 4, strides, channels=64, min_size=SIDE, max_size=SIDE).eval()
    with torch.no_grad():
        for key, parameter in detector.named_parameters():
            if key.endswith(("cls_logits.weight", "bbox_reg.weight")):
                parameter.mul_(30)
    return detector


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    sys.exit(main())
