"""The machine that figures belong to: what it is called, and how fast it moves and multiplies."""
import datetime
import importlib.metadata
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["LIBRARIES", "Machine", "cpu_name", "driver", "dtype_name", "figure", "measure_machine", "synchronize",
           "version"]

LIBRARIES = ("torch", "triton", "natten")  # whose versions are told beside what is measured


class Machine(NamedTuple):
    """What the figures belong to, and the two rates of the bounds, measured."""

    description: dict[str, str | int]
    bytes_per_second: float
    flops_per_second: float

    def bounds(self, size: int, flops: int) -> dict[str, float]:
        """Milliseconds that moving ``size`` bytes and computing ``flops`` take."""
        return {"bytes_ms": 1e3 * size / self.bytes_per_second, "flops_ms": 1e3 * flops / self.flops_per_second}


def measure_machine(device: str, dtype: torch.dtype) -> Machine:
    """Measures memory bandwidth by copying 256 MiB, and the peak of matrix products on 2048 x 2048, best of five."""
    source, target = torch.ones(2, 2**26, device=device).unbind()
    a, b, c = torch.ones(3, 2048, 2048, device=device, dtype=dtype).unbind()

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(6):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    bandwidth = 2 * source.numel() * 4 / best(lambda: target.copy_(source))
    peak = 2 * 2048**3 / best(lambda: torch.mm(a, b, out=c))
    name = {"machine": cpu_name(), "driver": ""} if device == "cpu" else {
        "machine": torch.cuda.get_device_name(), "driver": driver()}
    description: dict[str, str | int] = {
        "device": device, **name, "threads": torch.get_num_threads(), **{x: version(x) for x in LIBRARIES},
        "date": datetime.date.today().isoformat(), "gb_per_s": figure(bandwidth / 1e9),
        "gflop_per_s": figure(peak / 1e9)}
    return Machine(description, bandwidth, peak)


def synchronize(device: str) -> None:
    """Waits for what the device was asked to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def version(library: str) -> str:
    """The version of a library that may be missing."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """What the processor calls itself, where Linux says so."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def driver() -> str:
    """The version of the driver of NVIDIA's devices."""
    found = Path("/sys/module/nvidia/version")
    return found.read_text().strip() if found.exists() else "unknown"


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def figure(value: float | None) -> str:
    """Four significant digits; nothing for nothing."""
    return "" if value is None or math.isnan(value) else f"{value:.4g}" if value < 1000 else f"{value:.0f}"
