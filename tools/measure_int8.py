"""Measures what 8 bits cost and bring: error, accuracy, size and latency of quantised files, and the layers left float.

    python tools/measure_int8.py --runs runs/digits_biformer/checkpoints/best.ckpt --openvino \
        --out results/int8.csv --profile results/int8_profile.csv

Runs are of the digits (recipes ``digits_*.yaml``, with any backbone and image size). Of a model by name the backbone is
fresh and stays so; a linear head is trained on its features of the digits. The digits of the validation calibrate,
those of the test are classified before and after. Latency is processor time on one thread, so that it is that of an
idle machine on a busy one too: the median of turns with the float file's in ONNX Runtime. Of files that take more than
0.8 of it or more than 0.35 of its size, or are less accurate by more than a point, ``--profile`` says which kinds of
operators their time goes to, and the float file's.
"""
import argparse
import csv
import importlib.metadata
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

import visionattn  # noqa: F401 registers the models
from visionattn.data import DigitsData
from visionattn.data.digits import MEAN, STD
from visionattn.export import Calibration, QuantizeReport, export_onnx, quantize_onnx
from visionattn.export.quantize import save_openvino
from visionattn.models._family import family_of
from visionattn.tasks.rebuild import create_model

__all__ = ["main", "measure"]

Runner = Callable[[np.ndarray], np.ndarray]


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--runs", nargs="*", metavar="CHECKPOINT", default=[], help="of runs on the digits")
    parser.add_argument("--models", nargs="*", metavar="NAME:SIZE", default=[], help="backbones and their image size")
    parser.add_argument("--openvino", action="store_true", help="by nncf for OpenVINO as well")
    parser.add_argument("--profile", type=Path, help="CSV file of the operators' times where an aim is missed")
    parser.add_argument("--out", type=Path, help="CSV file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    profiles: list[dict[str, Any]] = []
    for source in (*args.runs, *args.models):
        with tempfile.TemporaryDirectory() as folder:
            measured, profile = measure(source, Path(folder), args.openvino)
            profiles += profile
            for row in measured:
                print("{model:24}{size:>5} px {method:18} error {error:.3f}, accuracy {accuracy_before:.4f} to "
                      "{accuracy_after:.4f}, size {size_ratio:.2f}, latency {latency_ratio:.2f} at batch 1, "
                      "{latency_ratio_8:.2f} at 8".format(**row), flush=True)
                rows.append(row)
    for path, table in ((args.out, rows), (args.profile, profiles)):
        if path and table:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(table[0]))
                writer.writeheader()
                writer.writerows(table)
    return 0


def measure(source: str, folder: Path, openvino: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Quantises one model; returns a row for each method, and the operators' times of those that miss an aim."""
    if source.endswith(".ckpt"):
        model: Any = create_model(None, source)
        name, trained = model.run["backbone"], "all of it"
        size = model.run["_image_settings"]["image_size"]
    else:
        name, _, pixels = source.partition(":")
        size, trained = int(pixels), "the head"
        model = _with_trained_head(name, size)
    data = DigitsData(image_size=size)
    data.setup("test")
    for split in ("val", "test"):
        _save(data, split, folder / split)
    path = export_onnx(model, folder / "float.onnx", (size, size)).path
    images = Calibration(path, folder / "val")
    known: Any = data.labels.numpy()[data.test]
    tests = [data.images[i].expand(1, 3, size, size).numpy() for i in data.test]
    plain = _onnx_runner(path)
    family = family_of(name)
    common = {"family": "" if family is None else type(model).__module__.rpartition(".")[2], "model": name,
              "trained": trained, "size": size, "accuracy_before": _accuracy(plain, tests, known)}
    methods: dict[str, Callable[[], tuple[QuantizeReport, Runner, float]]] = {
        "onnxruntime QDQ": lambda: _by_onnxruntime(path, images)}
    if openvino:
        methods["nncf for OpenVINO"] = lambda: _by_openvino(path, images)
    rows, profiles = [], {}
    for method, quantize in methods.items():
        start = time.process_time()
        report, runner, ratio = quantize()
        one, eight = (_ratio(plain, runner, np.concatenate(tests[:batch])) for batch in (1, 8))
        rows.append(common | {
            "method": method, "layers": report.layers, "float_layers": " ".join(report.float_layers),
            "error": round(report.error, 4), "accuracy_after": _accuracy(runner, tests, known),
            "size_mib": round(path.stat().st_size / 2 ** 20, 2), "size_ratio": round(ratio, 3),
            "latency_ms": round(one[0], 2), "latency_ratio": round(one[1], 2), "latency_ms_8": round(eight[0], 2),
            "latency_ratio_8": round(eight[1], 2), "seconds": round(time.process_time() - start),
        } | {library: importlib.metadata.version(library) for library in ("onnxruntime", "nncf", "openvino")})
        if _misses(rows[-1]):
            profiles["float in ONNX Runtime"] = _profile(path, tests[0])
            profiles[method] = (_profile(path.with_name("int8.onnx"), tests[0]) if method == "onnxruntime QDQ"
                                else _openvino_profile(path.with_suffix(".xml"), tests[0]))
    return rows, [{"model": name, "size": size, "form": form, "operator": kind, "ms": round(milliseconds, 4)}
                  for form, spent in profiles.items() for kind, milliseconds in spent.most_common()]


def _misses(row: dict[str, Any]) -> bool:
    """Whether a quantised file is not what one hopes for: fast, small and as accurate."""
    return (max(row["latency_ratio"], row["latency_ratio_8"]) > 0.8 or row["size_ratio"] > 0.35
            or row["accuracy_before"] - row["accuracy_after"] > 0.01)


def _with_trained_head(name: str, size: int) -> nn.Module:
    """A fresh backbone with a linear head that classifies the digits by its features."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=10).eval()
    data = DigitsData(image_size=size)
    data.setup("fit")
    with torch.inference_mode():
        features = torch.cat([
            model.forward_head(model.forward_features(data.images[part].expand(-1, 3, -1, -1)), pre_logits=True)
            for part in torch.tensor(data.train).split(32)])
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-6
    fitted = LogisticRegression(C=0.01, max_iter=2000).fit(
        ((features - mean) / std).numpy(), data.labels[data.train].numpy())
    weight = torch.from_numpy(fitted.coef_).float() / std
    head = model.get_classifier()
    head = getattr(head, "linear", head)  # of EfficientViT's norm and linear layer
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(torch.from_numpy(fitted.intercept_).float() - weight @ mean)
    model.run = {"backbone": name, "class_names": data.class_names, "_mean": [MEAN] * 3, "_std": [STD] * 3}
    model.run["_image_settings"] = dict(image_size=size, interpolation="bicubic", crop_pct=1.0)
    return model


def _save(data: DigitsData, split: str, folder: Path) -> None:
    """The scans of a split as files, in a folder for each class."""
    for i in getattr(data, split):
        file = folder / str(int(data.labels[i])) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        values = ((data.images[i, 0] * STD + MEAN) * 255).round().clamp(0, 255).byte().numpy()
        Image.fromarray(values).convert("RGB").save(file)


def _by_onnxruntime(path: Path, images: Calibration) -> tuple[QuantizeReport, Runner, float]:
    out = path.with_name("int8.onnx")
    report = quantize_onnx(path, out, images)
    return report, _onnx_runner(out), report.size_ratio


def _by_openvino(path: Path, images: Calibration) -> tuple[QuantizeReport, Runner, float]:
    out = path.with_suffix(".xml")
    report = save_openvino(path, out, images)
    request = _openvino_request(out)
    return report, lambda batch: np.array(request.infer([batch])[0]), report.size_ratio


def _openvino_request(path: Path, profile: bool = False) -> Any:
    import openvino

    options = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32",
               "PERF_COUNT": profile}
    return openvino.Core().compile_model(path, "CPU", options).create_infer_request()


def _onnx_runner(path: Path, profile: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, profile
    options.profile_file_prefix = str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    if profile:
        return session
    return lambda batch: session.run(None, {"images": batch})[0]


def _accuracy(runner: Runner, images: list[np.ndarray], known: np.ndarray) -> float:
    return float((np.concatenate([runner(image) for image in images]).argmax(axis=1) == known).mean())


def _ratio(plain: Runner, runner: Runner, batch: np.ndarray, turns: int = 21) -> tuple[float, float]:
    """Milliseconds of the first, and the median share of them that the second takes, in turns."""
    times = np.array([[_seconds(one, batch) for one in (plain, runner)] for _ in range(turns)])
    return float(np.median(times[:, 0])) * 1e3, float(np.median(times[:, 1] / times[:, 0]))


def _seconds(runner: Runner, batch: np.ndarray, block: float = 0.02) -> float:
    """Of processor time, the mean of as many runs as fill a block."""
    runner(batch)
    start, runs, spent = time.process_time(), 0, 0.
    while spent < block:
        runner(batch)
        runs, spent = runs + 1, time.process_time() - start
    return spent / runs


def _profile(path: Path, image: np.ndarray, turns: int = 21) -> Counter[str]:
    """Milliseconds of each kind of operator in ONNX Runtime."""
    session = _onnx_runner(path, profile=True)
    for _ in range(turns):
        session.run(None, {"images": image})
    trace = Path(session.end_profiling())
    events = [event for event in json.loads(trace.read_text())
              if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    trace.unlink()
    return _by_kind((event["name"], event["args"]["op_name"], event["dur"] / 1e3) for event in events)


def _openvino_profile(path: Path, image: np.ndarray, turns: int = 21) -> Counter[str]:
    """Milliseconds of each kind of operator in OpenVINO."""
    request = _openvino_request(path, profile=True)
    items: list[tuple[str, str, float]] = []
    for _ in range(turns):
        request.infer([image])
        items += [(item.node_name, item.node_type, item.real_time.total_seconds() * 1e3)
                  for item in request.profiling_info]
    return _by_kind(items)


def _by_kind(items: Iterable[tuple[str, str, float]]) -> Counter[str]:
    """The sums over kinds of operators of the median times of each operator, from name, kind and time of every run."""
    times: dict[tuple[str, str], list[float]] = {}
    for name, kind, spent in items:
        times.setdefault((name, kind), []).append(spent)
    sums: Counter[str] = Counter()
    for (_, kind), spent in times.items():
        sums[kind] += float(np.median(spent))
    return +sums


if __name__ == "__main__":
    sys.exit(main())
