"""A process that runs one form of a model, for :mod:`.exported`: so that its peak memory is that of this form alone.

It is started by its path and imports no more than the form needs, PyTorch for models in PyTorch only. It
answers in lines of JSON: first how its logits differ from those that it was given, then, for every batch size that is
read from standard input, the seconds of a run, and for ``memory`` the most bytes that it has had in memory.
"""
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__: list[str] = []

_BLOCK_SECONDS = 0.1  # of runs whose mean is a turn's time

_Run = Callable[[np.ndarray], np.ndarray]


def main(form: str, source: str, folder: str, count: str) -> None:
    """Runs ``form`` of ``source``, a registered name or a file, on the images in ``folder``, on ``count`` threads."""
    threads = int(count)
    try:
        run = _FORMS[form](source, threads)
        images = {int(path.stem): np.load(path) for path in sorted(Path(folder, "images").glob("*.npy"))}
        worst = 0.0
        for batch, x in images.items():
            expected = np.load(Path(folder, "logits", f"{batch}.npy"))
            worst = max(worst, float(np.abs(run(x) - expected).max() / np.abs(expected).max()))
        _say(difference=worst)
    except Exception as error:
        return _say(error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    for line in map(str.strip, sys.stdin):
        if line == "memory":
            _say(memory=_peak_memory())
        else:
            _say(seconds=_time(run, images[int(line)], time.process_time if threads == 1 else time.perf_counter))


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def _time(run: _Run, images: np.ndarray, clock: Callable[[], float]) -> float:
    """Seconds of a run; of one thread by the processor's clock, so that other work on the machine does not count."""
    run(images)
    start, runs, elapsed = clock(), 0, 0.0
    while elapsed < _BLOCK_SECONDS:
        run(images)
        runs += 1
        elapsed = clock() - start
    return elapsed / runs


def _peak_memory() -> int:
    """Of this process; what ``resource`` tells begins with that of the process which started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _eager(name: str, threads: int, compiled: bool = False, autocast: bool = False) -> _Run:
    import timm
    import torch

    import visionattn.models  # noqa: F401  (registers them in timm)

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model: Any = timm.create_model(name).eval()
    model = torch.compile(model, dynamic=False) if compiled else model

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(torch.from_numpy(images)).float().numpy()

    return run


def _autocast(name: str, threads: int) -> _Run:
    return _eager(name, threads, autocast=True)


def _compiled(name: str, threads: int) -> _Run:
    return _eager(name, threads, compiled=True)


def _onnxruntime(file: str, threads: int) -> _Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _openvino(file: str, threads: int) -> _Run:
    import openvino

    # Left to itself it computes in bfloat16 where the processor can.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()
    return lambda images: request.infer({0: images})[0]


_FORMS = {"eager": _eager, "autocast": _autocast, "compiled": _compiled, "onnxruntime": _onnxruntime,
          "openvino": _openvino, "onnxruntime_int8": _onnxruntime, "openvino_int8": _openvino}

if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    main(*sys.argv[1:])
