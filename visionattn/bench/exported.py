"""``visionattn bench export``: models in PyTorch and exported, side by side: time, memory, size on disk.

Every form of a model runs in a process of its own (:mod:`.export_worker`), is compared with eager PyTorch before it is
timed, and takes turns with the others, so that a slow phase of the machine meets all.
"""
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import visionattn

from ..export import export_onnx
from ..export.check import Check, relative, undecided
from ..export.quantize import quantize_onnx, save_openvino
from ..models import families
from .machine import cpu_name, figure, version

__all__ = ["BATCHES", "EXPORT_FORMS", "benchmark_export", "default_models", "describe_export"]

EXPORT_FORMS = ("eager", "autocast", "compiled", "onnxruntime", "openvino", "onnxruntime_int8", "openvino_int8")
_ROUGH = {"autocast", "onnxruntime_int8", "openvino_int8"}
BATCHES = (1, 8)  # whose latency and whose throughput is measured
_PEERS = ("swin_tiny_patch4_window7_224", "efficientvit_m5")  # timm's
_TOLERANCE = 1e-3  # of logits, as a share of the largest: a route may hang on rounding
_ROUGH_TOLERANCE = 0.3  # in bfloat16, and of files whose error in the mean is within the limit of the quantisation
_CALIBRATING = 8  # random images that calibrate, and as many that measure the error
_PACKAGES = {"openvino": ["openvino"], "openvino_int8": ["openvino", "nncf"]}
_WORKER = Path(__file__).with_name("export_worker.py")


def default_models() -> list[str]:
    """A small model of every family, and timm's that they are timed beside."""
    return [record.peers[0].ours for record in families().values() if record.peers] + list(_PEERS)


def describe_export(threads: int) -> dict[str, str | int]:
    """The columns that say where and with what was measured."""
    libraries = ("torch", "timm", "onnxruntime", "openvino")
    return {"machine": cpu_name(), "threads": threads, **{name: version(name) for name in libraries},
            "date": datetime.date.today().isoformat()}


def benchmark_export(
        name: str, forms: Sequence[str] = EXPORT_FORMS, threads: int = 1, repeat: int = 7,
) -> list[dict[str, Any]]:
    """Checks, then times the forms of one model with random weights, of its own image size, on the CPU.

    Args:
        name: As of ``timm.create_model``.
        forms: Of :data:`EXPORT_FORMS`; eager is always among them, autocast is eager in bfloat16.
        threads: Of each form.
        repeat: Turns of every form, each of at least 0.1 s after an untimed run.

    Returns:
        One row per form: milliseconds of one image, images a second in batches of 8, both also as multiples of eager's
        time, most memory of the process and size on disk in MiB, and the largest difference of its logits from
        eager's as a share of the largest. A form that is missing, fails or is wrong has a note in place of figures.
        Forms in 8 bits are calibrated with random images, which says how fast they are; how many of their layers are
        float, and the error in the mean, stand in the note.

    Raises:
        ValueError: There is no such form.
        RuntimeError: The model cannot be exported.
    """
    if unknown := set(forms) - set(EXPORT_FORMS):
        raise ValueError(f"no form is called {', '.join(sorted(unknown))}; there are {', '.join(EXPORT_FORMS)}")
    forms = [form for form in EXPORT_FORMS if form in {"eager", *forms}]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files, notes = _files(name, forms, Path(folder))
        workers = {form: stack.enter_context(_worker(form, files[form], folder, threads)) for form in files}
        differences, right = {}, []
        for form, worker in workers.items():
            answer = _answer(worker)
            differences[form] = answer.get("difference")
            if "error" in answer:
                notes[form] = answer["error"]
            elif not answer["difference"] <= (_ROUGH_TOLERANCE if form in _ROUGH else _TOLERANCE):
                notes[form] = "wrong result"
            else:
                right.append(form)
        seconds: dict[tuple[str, int], list[float]] = {(form, batch): [] for form in right for batch in BATCHES}
        for _ in range(repeat):
            for form, batch in seconds:
                seconds[form, batch].append(_answer(workers[form], str(batch))["seconds"])
        memory = {form: _answer(workers[form], "memory")["memory"] / 2**20 for form in right}
        median = {key: statistics.median(values) for key, values in seconds.items()}
        rows = []
        for form in forms:
            one, many = (median.get((form, batch)) for batch in BATCHES)
            over = [median[form, batch] / median["eager", batch] if form in right and "eager" in right else None
                    for batch in BATCHES]
            rows.append({
                "model": name, "form": form, "latency_ms": figure(one and 1e3 * one),
                "images_per_s": figure(many and BATCHES[1] / many), "latency_over_eager": figure(over[0]),
                "batch_over_eager": figure(over[1]), "peak_mib": figure(memory.get(form)),
                "disk_mib": figure(_size(files[form]) if form in right else None),
                "difference": "" if differences.get(form) is None else f"{differences[form]:.1e}",
                "runs": repeat if form in right else 0, "note": notes.get(form, "")})
    return rows


def _decided(check: Check, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Random images, without those on which eager's own logits jump, as routes do, when they change by a millionth."""
    images = torch.randn(*shape, generator=generator)
    for _ in range(10):
        with torch.inference_mode():
            torn = undecided(check, images, check.answer(images))
        if not torn.any():
            break
        images[torn] = torch.randn(int(torn.sum()), *shape[1:], generator=generator)
    return images


def _files(name: str, forms: Sequence[str], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What each form is run from, and why some cannot be; images and eager's logits are written beside."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    file = folder / "model.onnx"
    export_onnx(model, file)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    check = Check(lambda images: (model(images),), relative, torch.randn, [], _TOLERANCE)
    generator = torch.Generator().manual_seed(1)
    for batch in BATCHES:
        images = _decided(check, [batch, *session.get_inputs()[0].shape[1:]], generator)
        with torch.inference_mode():
            logits = model(images)
        for kind, x in (("images", images), ("logits", logits)):
            (folder / kind).mkdir(exist_ok=True)
            np.save(folder / kind / f"{batch}.npy", x.numpy())
    np.save(folder / "calibration.npy", torch.randn(2 * _CALIBRATING, *images.shape[1:], generator=generator).numpy())
    files, notes = {}, {}
    for form in forms:
        if form in ("eager", "autocast", "compiled"):
            files[form] = name
        elif form == "onnxruntime":
            files[form] = str(file)
        elif missing := [package for package in _PACKAGES.get(form, []) if importlib.util.find_spec(package) is None]:
            notes[form] = f"needs the package {missing[0]}"
        elif form == "openvino":
            files[form] = _openvino_file(file)
        else:
            try:
                files[form], notes[form] = _quantized_file(file, form)
            except RuntimeError as error:
                notes[form] = str(error)
    return files, notes


def _quantized_file(file: Path, form: str) -> tuple[str, str]:
    """A file in 8 bits, and what is to be known about it."""
    quantize, ending = (quantize_onnx, ".onnx") if form == "onnxruntime_int8" else (save_openvino, ".xml")
    out = file.with_name(f"{form}{ending}")
    images = list(np.load(file.with_name("calibration.npy"))[:, None])
    report = quantize(file, out, images)
    return str(out), f"error {report.error:.3f}, {len(report.float_layers)} of {report.layers} layers float"


def _openvino_file(file: Path) -> str:
    import openvino

    out = file.with_suffix(".xml")
    openvino.save_model(openvino.convert_model(file), out, compress_to_fp16=False)
    return str(out)


def _size(source: str) -> float | None:
    """MiB on disk of a file, with what lies beside it of OpenVINO's; of a registered name's weights."""
    path = Path(source)
    if path.suffix not in (".onnx", ".xml"):
        with torch.device("meta"):
            state = timm.create_model(source).state_dict()
        return sum(x.nbytes for x in state.values()) / 2**20
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else []
    return sum(part.stat().st_size for part in (path, *beside)) / 2**20


@contextmanager
def _worker(form: str, source: str, folder: str, threads: int) -> Iterator[subprocess.Popen[str]]:
    root = str(Path(visionattn.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    worker = subprocess.Popen(
        [sys.executable, str(_WORKER), form, source, folder, str(threads)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)})
    try:
        yield worker
    finally:
        assert worker.stdin is not None
        worker.stdin.close()
        try:
            worker.wait(10)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        assert worker.stdout is not None
        worker.stdout.close()


def _answer(worker: subprocess.Popen[str], question: str | None = None) -> dict[str, Any]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    if question is not None:
        worker.stdin.write(question + "\n")
        worker.stdin.flush()
    line = worker.stdout.readline()
    if question is None and not line:
        return {"error": "its process ended"}
    return json.loads(line)
