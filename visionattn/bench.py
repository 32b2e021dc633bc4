"""Measuring and explaining the ops: ``visionattn backends``, ``visionattn bench simulate`` and ``bench ops``.

``backends`` asks every backend of every op what it can run here. ``simulate`` counts the tiles that a block-sparse
kernel must visit and so bounds its speed-up over dense attention. ``ops`` times the ops and their peers, each after its
result was checked.
"""
import argparse
import csv
import datetime
import functools
import importlib.metadata
import inspect
import itertools
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import __version__
from .ops import BackendError, dispatch, neighborhood_attention, routed_attention
from .ops.kept import release_memory
from .ops.neighborhood import NeighborhoodProblem, naive
from .ops.routed import RoutedProblem
from .simulate import simulate

__all__ = ["backend_table", "benchmark", "main"]


def main(argv: list[str]) -> int:
    """Runs ``backends``, ``bench simulate ...`` or ``bench ops ...``."""
    parser = argparse.ArgumentParser(prog="visionattn")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("backends", help="what runs here, and why not")
    bench = commands.add_parser("bench", help="simulate tiles, or time the ops").add_subparsers(
        dest="subject", required=True)

    tiles = bench.add_parser("simulate", description=_summary(simulate), help="the tiles that a window makes visit",
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    tiles.add_argument("--size", nargs="+", type=int, required=True, help="tokens along 1, 2 or 3 axes")
    for name, default in (("--kernel", None), ("--dilation", 1), ("--stride", 1)):
        tiles.add_argument(name, nargs="+", type=int, required=default is None, default=[default],
                           help="one value, or one per axis" + ("" if default is None else " (default: 1)"))
    tiles.add_argument("--causal", nargs="+", type=int, choices=(0, 1), default=[0], help=(
        "1 for causal axes, one value or one per axis (default: 0)"))
    tiles.add_argument("--q-tile", nargs="+", type=int, help="queries of a tile per axis (default: search the best)")
    tiles.add_argument("--kv-tile", nargs="+", type=int, help="keys of a tile per axis (default: search the best)")

    ops = bench.add_parser("ops", description=_summary(benchmark), help="time the ops and their peers",
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    ops.add_argument("--ops", nargs="+", choices=["neighborhood", "routed"], default=["neighborhood", "routed"])
    ops.add_argument("--cases", nargs="+", metavar="CASE", choices=[*GROUPS, *NEIGHBORHOOD, *ROUTED], default=[
        "families", "scaling", "strided"], help=(
        f"groups: {', '.join(GROUPS)} (default: all but gpu); single cases: {', '.join([*NEIGHBORHOOD, *ROUTED])}"))
    ops.add_argument("--directions", nargs="+", choices=_DIRECTIONS, default=list(_DIRECTIONS))
    ops.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    ops.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    ops.add_argument("--compiled", action="store_true", help="also compiled FlexAttention (a minute of compiling each)")
    ops.add_argument("--threads", type=int, default=torch.get_num_threads())
    ops.add_argument("--repeat", type=int, default=15, help="turns of every backend")
    ops.add_argument("--out", type=Path, help="CSV file (default: results/ops_DEVICE.csv)")
    ops.add_argument("--plot", action="store_true", help="draw time and memory of the scaling cases beside the CSV")

    args = parser.parse_args(argv)
    if args.command == "backends":
        print(backend_table())
    elif args.subject == "simulate":
        _print_simulation(args)
    else:
        _print_benchmark(args, ops)
    return 0


def _summary(function: Callable) -> str:
    """The docstring without its sections."""
    return (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]


# --- What runs here ---------------------------------------------------------------------------------------------------


def backend_table() -> str:
    """Says for every op which backends can run a usual problem here, which one is chosen, and why the others cannot."""
    lines = [f"visionattn {__version__}; " + "; ".join(f"{name} {_version(name)}" for name in _LIBRARIES)]
    lines += [f"cpu: {_cpu_name()}, {torch.get_num_threads()} threads"]
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        lines += [f"cuda: {torch.cuda.get_device_name()}, driver {_driver()}"]
    else:
        lines += ["cuda: none"]
    for device, (op, extra, problem) in itertools.product(devices, _PROBLEMS):
        names = [name for name, _, _ in dispatch.explain(op, problem(device, torch.float32, False, False))]
        lines += ["", f"{op} on {device}", _cells("dtype", extra, "pass", *names)]
        reasons: list[str] = []
        for dtype, has_extra, training in itertools.product(
                (torch.float32, torch.bfloat16), (False, True), (False, True)):
            case = problem(device, dtype, has_extra, training)
            answers = []
            try:
                chosen = dispatch.chosen(op, case)
            except BackendError:  # VISIONATTN_BACKEND names one that cannot do this, so a call would fail
                chosen = ""
            for name, ok, reason in dispatch.explain(op, case):
                if not ok and reason not in reasons:
                    reasons.append(reason)
                answers.append("chosen" if name == chosen else "yes" if ok else f"({reasons.index(reason) + 1})")
            kind = (_dtype_name(dtype), "yes" if has_extra else "no", "training" if training else "forward")
            lines.append(_cells(*kind, *answers))
        lines += [f"  ({number}) {reason}" for number, reason in enumerate(reasons, 1)]
    asked = os.environ.get("VISIONATTN_BACKEND")
    lines += ["", "chosen: runs without being asked for by name" + (f" (VISIONATTN_BACKEND={asked})" if asked else ""),
              'yes: runs if asked for by name: backend="...", use_backend("...") or VISIONATTN_BACKEND']
    return "\n".join(lines)


def _cells(*cells: str) -> str:
    return "  " + "".join(f"{cell:<10}" for cell in cells).rstrip()


def _neighborhood_problem(device: str, dtype: torch.dtype, has_bias: bool, requires_grad: bool) -> NeighborhoodProblem:
    return NeighborhoodProblem(
        spatial=(56, 56), heads=2, kv_heads=2, head_dim=32, value_dim=32, kernel_size=(7, 7), dilation=(1, 1),
        stride=(1, 1), is_causal=(False, False), has_bias=has_bias, additional=0, return_lse=False, dtype=dtype,
        device=device, requires_grad=requires_grad)


def _routed_problem(device: str, dtype: torch.dtype, has_weights: bool, requires_grad: bool) -> RoutedProblem:
    return RoutedProblem(
        grid=(7, 7), region_size=(8, 8), key_region_size=(8, 8), heads=2, head_dim=32, value_dim=32, topk=4,
        shared_routes=True, has_route_weights=has_weights, dtype=dtype, device=device, requires_grad=requires_grad)


_PROBLEMS = (
    ("neighborhood_attention", "bias", _neighborhood_problem), ("routed_attention", "weights", _routed_problem))
_DIRECTIONS = ("forward", "forward+backward")
_LIBRARIES = ("torch", "triton", "natten")


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _driver() -> str:
    version = Path("/sys/module/nvidia/version")
    return version.read_text().strip() if version.exists() else "unknown"


def _print_simulation(args: argparse.Namespace) -> None:
    def axes(values: Sequence) -> str:
        return "x".join(map(str, values))

    options: list[Any] = [args.kernel, args.dilation, args.stride, [bool(x) for x in args.causal]]
    kernel, dilation, stride, causal = (x[0] if len(x) == 1 else x for x in options)
    found = simulate(args.size, kernel, dilation, stride, causal, args.q_tile, args.kv_tile)
    rows = [
        ("map", axes(args.size)),
        ("window", f"{axes(args.kernel)}, dilation {axes(args.dilation)}, stride {axes(args.stride)}"
                   + (f", causal {axes(args.causal)}" if any(args.causal) else "")),
        ("query tile, key tile", f"{axes(found.q_tile)}, {axes(found.kv_tile)}"
                                 + ("" if args.q_tile and args.kv_tile else " (best of those searched)")),
        ("key tiles visited", f"{found.visited / found.query_tiles:.2f} per query tile (most {found.most}) of "
                              f"{found.key_tiles}, {100 * found.fraction:.2f} %"),
        ("best possible speed-up", f"{found.speedup:.2f} x over dense attention"),
        ("speed-up in FLOPs", f"{found.flop_speedup:.2f} x"),
        ("efficiency", f"{100 * found.efficiency:.1f} %"),
        ("perfectly block sparse", "yes" if found.perfectly_sparse else "no"),
    ]
    print("\n".join(f"{name:<24}{value}" for name, value in rows))


# --- Timing -----------------------------------------------------------------------------------------------------------


class Neighborhood(NamedTuple):
    """A case of neighborhood attention; ``shape`` is batch, height, width, heads, head_dim."""

    shape: tuple[int, int, int, int, int]
    kernel_size: int = 7
    dilation: int = 1
    stride: int = 1
    bias: bool = False


class Routed(NamedTuple):
    """A case of routed attention; ``shape`` is batch, height, width, heads, head_dim."""

    shape: tuple[int, int, int, int, int]
    region_size: int
    topk: int


NEIGHBORHOOD = {
    "56x56": Neighborhood((1, 56, 56, 2, 32)),
    "56x56_bias": Neighborhood((1, 56, 56, 2, 32), bias=True),
    "56x56_d8": Neighborhood((1, 56, 56, 2, 32), dilation=8),
    "56x56_d8_bias": Neighborhood((1, 56, 56, 2, 32), dilation=8, bias=True),
    "28x28_bias": Neighborhood((1, 28, 28, 4, 32), bias=True),
    "28x28_d4_bias": Neighborhood((1, 28, 28, 4, 32), dilation=4, bias=True),
    "14x14_bias": Neighborhood((1, 14, 14, 8, 32), bias=True),
    "7x7": Neighborhood((1, 7, 7, 16, 32)),
    "b8_56x56": Neighborhood((8, 56, 56, 2, 32)),
    "b8_56x56_bias": Neighborhood((8, 56, 56, 2, 32), bias=True),
    "b8_14x14": Neighborhood((8, 14, 14, 8, 32)),
    "b8_14x14_bias": Neighborhood((8, 14, 14, 8, 32), bias=True),
    "b8_14x14_d2": Neighborhood((8, 14, 14, 8, 32), dilation=2),
    "b8_7x7_bias": Neighborhood((8, 7, 7, 16, 32), bias=True),
    "b32_28x28_bias": Neighborhood((32, 28, 28, 4, 32), bias=True),
    "50x67_d3_bias": Neighborhood((1, 50, 67, 4, 32), dilation=3, bias=True),
    "32x32_h4": Neighborhood((1, 32, 32, 4, 32)),
    "64x64_h4": Neighborhood((1, 64, 64, 4, 32)),
    "128x128": Neighborhood((1, 128, 128, 4, 32)),
    "256x256": Neighborhood((1, 256, 256, 4, 32)),
    "64x64_k24": Neighborhood((1, 64, 64, 4, 32), kernel_size=24),
    "64x64_k24_s4": Neighborhood((1, 64, 64, 4, 32), kernel_size=24, stride=4),
    "64x64_k24_s8": Neighborhood((1, 64, 64, 4, 32), kernel_size=24, stride=8),
    "b8_56x56_h8_bias": Neighborhood((8, 56, 56, 8, 32), bias=True),
    "b8_56x56_h8_k13_bias": Neighborhood((8, 56, 56, 8, 32), kernel_size=13, bias=True),
    "b2_256x256_h8_bias": Neighborhood((2, 256, 256, 8, 64), bias=True),
    "b2_256x256_h8_k13_bias": Neighborhood((2, 256, 256, 8, 64), kernel_size=13, bias=True),
}
ROUTED = {
    "224_stage1": Routed((8, 56, 56, 2, 32), region_size=8, topk=1),
    "224_stage2": Routed((8, 28, 28, 4, 32), region_size=4, topk=4),
    "224_stage3": Routed((8, 14, 14, 8, 32), region_size=2, topk=16),
    "512_stage1": Routed((2, 128, 128, 2, 32), region_size=16, topk=1),
    "512_stage2": Routed((2, 64, 64, 4, 32), region_size=8, topk=4),
    "512_stage3": Routed((2, 32, 32, 8, 32), region_size=4, topk=16),
}
_GROUPS = {
    "scaling": ["32x32_h4", "64x64_h4", "128x128", "256x256"],
    "strided": ["64x64_k24", "64x64_k24_s4", "64x64_k24_s8"],
    "gpu": [name for name in NEIGHBORHOOD if "_h8_" in name],
}
GROUPS = {
    "families": [*(name for name in NEIGHBORHOOD if name not in {x for group in _GROUPS.values() for x in group}),
                 *ROUTED],
    **_GROUPS,
}
_OURS = {"neighborhood": "tiled", "routed": "gathered"}
_UNCHECKED = "computes something else, not checked"
_SCORES_LIMIT = 2**29  # peers that hold scores of all tokens x tokens are left out above this many
_GATHER_LIMIT = 2**31  # bytes of gathered keys and values above which naive runs head by head
_SECONDS = 5.0  # a backend is not timed again once its runs took this long
_BLOCK_SECONDS = 0.02  # a run that is shorter is repeated for so long and the mean taken


def benchmark(
        op: str,
        case: str,
        backward: bool,
        dtype: torch.dtype,
        device: str = "cpu",
        repeat: int = 15,
        compiled: bool = False,
        machine: "Machine | None" = None,
) -> list[dict[str, Any]]:
    """Times the ops and their peers, each after its result was checked; the figures need a machine that is idle.

    Every backend's output and gradients are first compared with the naive form; one that is wrong or cannot do the case
    is not timed, and the table says why. The backends take turns, so that a slow phase of the machine meets all. A turn
    is an untimed run and then 20 ms of runs, at least one, of which the mean counts: peers that allocate hundreds of
    MiB would otherwise leave the next one cold caches and page faults, which cost a run of 1 ms more than itself. The
    figure is the median over the turns.

    Peak memory is that of tensors allocated during one run, inputs excluded. ``bytes_ms`` is the time that moving the
    least bytes takes (q, k, v and output once, in the backward pass eight tensors more) at the bandwidth that this
    machine was measured to have, ``flops_ms`` that of the useful products (4 * head_dim per query-key pair, 10 in the
    backward pass) at its measured peak of matrix products. ``simulated_speedup`` is that of ``bench simulate`` with the
    best tiles, to be read beside ``speedup_over_dense``.

    Backends: ``tiled``, ``gathered`` and ``triton`` are ours. ``naive`` gathers a window, or the listed regions, for
    every query (head by head if keys and values would take more than 2 GiB). ``masked_sdpa`` is PyTorch's dense
    attention with the op as a mask (made from the bias table in every run). ``dense_sdpa`` leaves mask and bias away:
    it computes something else and is not checked. ``flex`` is FlexAttention with a block mask made beforehand, eager
    and (``--compiled``) compiled; it has no backward pass on CPU, nor has ``natten`` there.

    Args:
        op: ``"neighborhood"`` or ``"routed"``.
        case: Name of a case of the op.
        backward: Whether to time forward and backward, or forward only.
        dtype: Of q, k and v; the bias table is float32.
        device: ``"cpu"`` or ``"cuda"``.
        repeat: Turns of every backend, fewer if they take more than 5 s.
        compiled: Whether to time compiled FlexAttention.
        machine: Measured rates for the bounds; None leaves the bounds empty.

    Returns:
        One row per backend, with the columns of the CSV file but the machine's.
    """
    torch.manual_seed(0)
    problem: Any = (NEIGHBORHOOD if op == "neighborhood" else ROUTED)[case]
    with torch.device(device):
        inputs, runs = (_neighborhood_runs if op == "neighborhood" else _routed_runs)(problem, dtype, compiled)
        grad = torch.randn(problem.shape, dtype=dtype) if backward else None
    batch, height, width, heads, dim = problem.shape
    window = problem.kernel_size**2 if op == "neighborhood" else problem.topk * problem.region_size**2
    pairs = batch * height * width * heads * window
    gathered = pairs if op == "neighborhood" else pairs // problem.region_size**2
    by_head = gathered * 2 * dim * 4 > _GATHER_LIMIT

    def compute(name: str, dtype: torch.dtype = dtype) -> list[Tensor]:
        wanted = {x: tensor for x, tensor in inputs.items() if name != "dense_sdpa" or x != "bias"}
        wanted = {x: tensor if x == "bias" else tensor.to(dtype) for x, tensor in wanted.items()}
        upstream = None if grad is None else grad.to(dtype)
        return (_compute_by_head if name == "naive" and by_head else _compute)(runs[name], wanted, upstream)

    expected = compute("naive", torch.float32)
    notes = {
        name: _UNCHECKED if name == "dense_sdpa" else _verify(functools.partial(compute, name), expected, dtype)
        for name in runs
    }
    if by_head and not notes["naive"]:
        notes["naive"] = "head by head"
    del expected
    timed = [name for name, note in notes.items() if note in ("", "head by head", _UNCHECKED)]
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _, name in itertools.product(range(repeat), timed):
        if sum(max(x, _BLOCK_SECONDS) for x in seconds[name]) < _SECONDS:
            compute(name)
            _synchronize(device)
            start, runs_of_block, elapsed = time.perf_counter(), 0, 0.0
            while elapsed < _BLOCK_SECONDS:
                compute(name)
                _synchronize(device)
                runs_of_block += 1
                elapsed = time.perf_counter() - start
            seconds[name].append(elapsed / runs_of_block)
    median = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    ours = median.get("triton" if device == "cuda" else _OURS[op], math.nan)
    size = inputs["q"].numel() * inputs["q"].element_size()
    bounds = machine.bounds((12 if backward else 4) * size, (14 if backward else 4) * dim * pairs) if machine else {}
    simulated = None
    if op == "neighborhood":
        simulated = simulate((height, width), problem.kernel_size, problem.dilation, problem.stride).speedup
    return [
        {
            "op": op, "case": case, "direction": _DIRECTIONS[backward], "backend": name,
            "median_ms": _figure(median.get(name)), "best_ms": _figure(1e3 * min(seconds.get(name, [math.nan]))),
            "ratio_to_ours": _figure(median.get(name, math.nan) / ours),
            "peak_mib": _figure(_peak_memory(functools.partial(compute, name), device) if name in timed else None),
            "bytes_ms": _figure(bounds.get("bytes_ms")), "flops_ms": _figure(bounds.get("flops_ms")),
            "speedup_over_dense": _figure(median.get("dense_sdpa", math.nan) / median.get(name, math.nan)),
            "simulated_speedup": _figure(simulated), "runs": len(seconds.get(name, [])), "note": notes[name],
            "shape": "x".join(map(str, problem.shape)), "window": _describe(problem), "dtype": _dtype_name(dtype),
        }
        for name in runs
    ]


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
            _synchronize(device)
            start = time.perf_counter()
            work()
            _synchronize(device)
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    bandwidth = 2 * source.numel() * 4 / best(lambda: target.copy_(source))
    peak = 2 * 2048**3 / best(lambda: torch.mm(a, b, out=c))
    name = {"machine": _cpu_name(), "driver": ""} if device == "cpu" else {
        "machine": torch.cuda.get_device_name(), "driver": _driver()}
    description: dict[str, str | int] = {
        "device": device, **name, "threads": torch.get_num_threads(), **{x: _version(x) for x in _LIBRARIES},
        "date": datetime.date.today().isoformat(), "gb_per_s": _figure(bandwidth / 1e9),
        "gflop_per_s": _figure(peak / 1e9)}
    return Machine(description, bandwidth, peak)


def _describe(problem: Neighborhood | Routed) -> str:
    if isinstance(problem, Routed):
        return f"region {problem.region_size}, topk {problem.topk}"
    optional = [f"{name} {value}" for name, value in (("dilation", problem.dilation), ("stride", problem.stride))
                if value > 1]
    return ", ".join([f"K {problem.kernel_size}", *optional, *(["bias"] if problem.bias else [])])


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _figure(value: float | None) -> str:
    """Four significant digits; nothing for nothing."""
    return "" if value is None or math.isnan(value) else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


# The computations that are compared, by backend. Inputs are [batch, height, width, heads, dim].


def _dense(q: Tensor, k: Tensor, v: Tensor, attention: Callable[..., Tensor], **options) -> Tensor:
    """Runs an attention of ``[batch, heads, tokens, dim]`` on all tokens of the maps."""
    shape = q.shape
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    return attention(q, k, v, **options).transpose(1, 2).reshape(shape)


def _neighborhood_runs(
        problem: Neighborhood, dtype: torch.dtype, compiled: bool,
) -> tuple[dict[str, Tensor], dict[str, Callable]]:
    shape, kernel_size, dilation, stride, has_bias = problem
    batch, height, width, heads, _ = shape
    inputs = {name: torch.randn(shape, dtype=dtype) for name in "qkv"}
    if has_bias:
        inputs["bias"] = torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1)

    def op(backend: str) -> Callable:
        return lambda q, k, v, bias=None: neighborhood_attention(
            q, k, v, kernel_size, dilation, stride, bias=bias, backend=backend)

    device = inputs["q"].device
    runs = {name: op(name) for name in ("triton", "tiled", "naive", "natten")}
    if device.type == "cpu":
        del runs["triton"]  # at most emulated there
    tokens = height * width
    if batch * heads * tokens**2 > _SCORES_LIMIT:
        if device.type == "cpu":
            del runs["natten"]
    else:
        (rows, offset_y, _), (columns, offset_x, _) = (
            naive.axis_windows(length, kernel_size, dilation, stride, False, device) for length in (height, width))
        key = (rows[:, None, :, None] * width + columns[None, :, None, :]).reshape(tokens, -1)
        if has_bias:
            entry_y, entry_x = (
                (offset + kernel_size - 1).expand(height, width, kernel_size, kernel_size)
                for offset in (offset_y[:, None, :, None], offset_x[None, :, None, :]))

            def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
                mask = torch.full((heads, tokens, tokens), -torch.inf, device=device)
                mask = mask.scatter(2, key.expand(heads, -1, -1), bias[:, entry_y, entry_x].view(heads, tokens, -1))
                return _dense(q, k, v, F.scaled_dot_product_attention, attn_mask=mask.to(q.dtype))

            runs["masked_sdpa"] = biased
        else:
            mask = torch.zeros(tokens, tokens, dtype=torch.bool, device=device).scatter_(1, key, True)
            runs["masked_sdpa"] = lambda q, k, v: _dense(q, k, v, F.scaled_dot_product_attention, attn_mask=mask)
    if tokens**2 <= _SCORES_LIMIT:
        runs["dense_sdpa"] = lambda q, k, v: _dense(q, k, v, F.scaled_dot_product_attention)

    rows_seen, columns_seen = (_seen(length, kernel_size, dilation, stride, device) for length in (height, width))

    def mask_mod(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rows_seen[query // width, key // width] & columns_seen[query % width, key % width]

    def score_mod(bias: Tensor) -> Callable:
        def add(score: Tensor, _b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            y, x = ((difference // dilation + kernel_size - 1).clamp(0, 2 * kernel_size - 2)
                    for difference in (key // width - query // width, key % width - query % width))
            return score + bias[head, y, x]
        return add

    return inputs, runs | _flex_runs(mask_mod, score_mod, None, problem.shape, device, compiled)


def _seen(length: int, kernel_size: int, dilation: int, stride: int, device: torch.device) -> Tensor:
    """Whether a query sees a key, ``[queries, keys]`` of one axis."""
    key, _, _ = naive.axis_windows(length, kernel_size, dilation, stride, False, device)
    return torch.zeros(length, length, dtype=torch.bool, device=device).scatter_(1, key, True)


def _routed_runs(
        problem: Routed, dtype: torch.dtype, compiled: bool,
) -> tuple[dict[str, Tensor], dict[str, Callable]]:
    shape, size, topk = problem
    batch, height, width, _, _ = shape
    inputs = {name: torch.randn(shape, dtype=dtype) for name in "qkv"}
    device = inputs["q"].device
    regions = (height // size) * (width // size)
    routes = torch.rand(batch, 1, regions, regions).topk(topk).indices
    allowed = torch.zeros(batch, regions, regions, dtype=torch.bool).scatter_(2, routes[:, 0], True)
    region = (torch.arange(height)[:, None] // size * (width // size) + torch.arange(width) // size).flatten()

    def op(backend: str) -> Callable:
        return lambda q, k, v: routed_attention(q, k, v, routes, size, backend=backend)

    runs = {name: op(name) for name in ("triton", "gathered", "naive")}
    if device.type == "cpu":
        del runs["triton"]
    if batch * (height * width) ** 2 <= _SCORES_LIMIT:
        mask = allowed[:, None, region][..., region]
        runs["masked_sdpa"] = lambda q, k, v: _dense(q, k, v, F.scaled_dot_product_attention, attn_mask=mask)
    runs["dense_sdpa"] = lambda q, k, v: _dense(q, k, v, F.scaled_dot_product_attention)

    def mask_mod(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return allowed[b, region[query], region[key]]

    return inputs, runs | _flex_runs(mask_mod, None, batch, problem.shape, device, compiled)


def _flex_runs(
        mask_mod: Callable, score_mod: Callable | None, mask_batch: int | None, shape: tuple[int, ...],
        device: torch.device, compiled: bool,
) -> dict[str, Callable]:
    """FlexAttention, eager (which holds all scores) and compiled; the block mask is made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, height, width, heads, _ = shape
    tokens = height * width
    wanted: dict[str, Callable] = {"flex": flex_attention} if batch * heads * tokens**2 <= _SCORES_LIMIT else {}
    if compiled:
        torch.compiler.reset()  # each case compiles for its own shape and masks
        wanted["flex_compiled"] = torch.compile(flex_attention, dynamic=False)
    if not wanted or tokens**2 > _SCORES_LIMIT:  # making the mask takes a byte for each of them
        return {}
    block_mask = create_block_mask(mask_mod, mask_batch, None, tokens, tokens, device=str(device))

    def flex(attention: Callable) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            options = {} if bias is None or score_mod is None else {"score_mod": score_mod(bias)}
            return _dense(q, k, v, attention, block_mask=block_mask, **options)
        return run

    return {name: flex(attention) for name, attention in wanted.items()}


# One run of a backend.


def _compute(run: Callable, inputs: dict[str, Tensor], grad: Tensor | None) -> list[Tensor]:
    """The output and, with ``grad``, the gradients of all inputs."""
    if grad is None:
        with torch.no_grad():
            return [run(**inputs)]
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = run(**leaves)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)]


def _compute_by_head(run: Callable, inputs: dict[str, Tensor], grad: Tensor | None) -> list[Tensor]:
    """The same one head after the other, for what takes much memory."""
    parts = [
        _compute(
            run, {name: x[h:h + 1] if name == "bias" else x[..., h:h + 1, :] for name, x in inputs.items()},
            None if grad is None else grad[..., h:h + 1, :])
        for h in range(inputs["q"].shape[-2])
    ]
    joined = zip(["out", *inputs], zip(*parts, strict=True), strict=False)
    return [torch.cat(part, dim=0 if name == "bias" else -2) for name, part in joined]


def _verify(work: Callable[[], list[Tensor]], expected: list[Tensor], dtype: torch.dtype) -> str:
    """Runs once; returns why the result may not be timed, or an empty string."""
    try:
        actual = work()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        reason = str(error).split(": ", 1)[-1] if isinstance(error, BackendError) else str(error).strip()
        return reason.splitlines()[0][:200] if reason else type(error).__name__
    worst = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(actual, expected, strict=True))
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    return "" if worst < limit else f"wrong result: relative error {worst:.1e}"


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_memory(work: Callable[[], Any], device: str) -> float:
    """MiB of tensors allocated at the same time during ``work()``, at most."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's chatter on stderr
    release_memory()  # so that it is counted
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes), default=0) / 2**20


# The command.


def _print_benchmark(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    cases = list(_chosen_cases(args.ops, args.cases))
    if not cases:
        parser.error("no case of the chosen ops has that name")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    out = args.out or Path("results") / f"ops_{args.device}.csv"
    if args.plot:
        import matplotlib  # noqa: F401  before hours of measuring
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    dtype = getattr(torch, args.dtype)
    machine = measure_machine(args.device, dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with out.open("w", newline="") as file:
        writer = None
        for (op, case), direction in itertools.product(cases, args.directions):
            for row in benchmark(op, case, direction == _DIRECTIONS[1], dtype, args.device, args.repeat, args.compiled,
                                 machine):
                row |= machine.description
                if writer is None:
                    writer = csv.DictWriter(file, fieldnames=list(row))
                    writer.writeheader()
                writer.writerow(row)
                rows.append(row)
                print("{op:13}{case:16}{direction:18}{backend:14}{median_ms:>8} ms {ratio_to_ours:>7} x {peak_mib:>7} "
                      "MiB  bounds {bytes_ms} / {flops_ms} ms  {note}".format(**row), flush=True)
            file.flush()
    if args.plot:
        _plot(rows, out.with_name(f"{out.stem}_scaling.png"))


def _chosen_cases(ops: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    wanted = {case for name in names for case in GROUPS.get(name, [name])}
    for op in ops:
        yield from ((op, case) for case in (NEIGHBORHOOD if op == "neighborhood" else ROUTED) if case in wanted)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws time and memory of the scaling cases against the tokens of the map, with the slope from 64 x 64 up."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["case"] in GROUPS["scaling"] and row["median_ms"]]
    if not rows:
        raise ValueError("--plot draws the scaling cases, but none of them was measured: add --cases scaling")
    directions = [direction for direction in _DIRECTIONS if any(row["direction"] == direction for row in rows)]
    figure = Figure(figsize=(10, 4 * len(directions)), layout="constrained")
    axes = figure.subplots(len(directions), 2, squeeze=False)
    for axis, (direction, (column, unit)) in zip(axes.flat, itertools.product(
            directions, (("median_ms", "time [ms]"), ("peak_mib", "peak memory [MiB]"))), strict=True):
        for number, backend in enumerate(dict.fromkeys(row["backend"] for row in rows)):
            points = [(math.prod(NEIGHBORHOOD[row["case"]].shape[1:3]), float(row[column])) for row in rows
                      if (row["direction"], row["backend"]) == (direction, backend) and float(row[column]) > 0]
            large = [point for point in points if point[0] >= 64 * 64]
            slope = f", slope {_slope(large):.2f}" if len(large) > 1 else ""
            if points:
                axis.loglog(*zip(*points, strict=True), marker="o", color=f"C{number}", label=f"{backend}{slope}")
        axis.set(xlabel="tokens of the map", ylabel=unit, title=direction)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize="small")
    row, problem = rows[0], NEIGHBORHOOD[rows[0]["case"]]
    heads, dim = problem.shape[3:]
    figure.suptitle(
        f"Neighborhood attention, {_describe(problem)}, {heads} heads of {dim}, {row['dtype']}; {row['machine']}, "
        f"{row['threads']} threads, torch {row['torch']}, {row['date']}", fontsize="small")
    figure.savefig(path, dpi=120)
    print(path)


def _slope(points: list[tuple[int, float]]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = zip(*((math.log(a), math.log(b)) for a, b in points), strict=True)
    return statistics.linear_regression(x, y).slope
