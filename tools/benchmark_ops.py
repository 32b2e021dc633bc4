"""Times the attention ops and their peers on CPU, each after its result was checked.

For every case (a shape from the published models) and direction (forward, or forward and backward), every backend's
output and gradients are first compared with the naive form; one that is wrong or cannot do the case is not timed, and
the table says why. The runs are then interleaved, one of every backend after the other, so that a slow phase of the
machine meets all. Peak memory is that of tensors allocated during one run, inputs excluded, from the profiler's events.

    python tools/benchmark_ops.py --ops neighborhood --cases 56x56 --threads 2 --out results/ops_cpu.csv

Peers: ``naive`` gathers a window (or the listed regions) for every query, head by head; ``masked_sdpa`` is PyTorch's
dense attention with the op as a mask (made from the bias table in every run); ``dense_sdpa`` leaves the mask away: it
computes something else, is a bound for dense attention and not checked; ``natten`` is that library, forward only on
CPU. The figures mean something only on a machine that does nothing else.
"""
import argparse
import csv
import datetime
import importlib.metadata
import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.ops import BackendError, neighborhood_attention, routed_attention
from visionattn.ops.neighborhood import naive

# name: (batch, height, width, heads, head_dim), kernel_size, dilation, bias
NEIGHBORHOOD = {
    "56x56": ((1, 56, 56, 2, 32), 7, 1, False),
    "56x56_bias": ((1, 56, 56, 2, 32), 7, 1, True),
    "56x56_d8": ((1, 56, 56, 2, 32), 7, 8, False),
    "56x56_d8_bias": ((1, 56, 56, 2, 32), 7, 8, True),
    "b8_56x56": ((8, 56, 56, 2, 32), 7, 1, False),
    "b8_56x56_bias": ((8, 56, 56, 2, 32), 7, 1, True),
    "b8_14x14": ((8, 14, 14, 8, 32), 7, 1, False),
    "b8_14x14_bias": ((8, 14, 14, 8, 32), 7, 1, True),
    "b8_14x14_d2": ((8, 14, 14, 8, 32), 7, 2, False),
    "7x7": ((1, 7, 7, 16, 32), 7, 1, False),
    "b8_7x7_bias": ((8, 7, 7, 16, 32), 7, 1, True),
    "50x67_d3_bias": ((1, 50, 67, 4, 32), 7, 3, True),
    "128x128": ((1, 128, 128, 4, 32), 7, 1, False),
    "256x256": ((1, 256, 256, 4, 32), 7, 1, False),
}
# name: (batch, height, width, heads, head_dim), region_size, topk
ROUTED = {
    "224_stage1": ((8, 56, 56, 2, 32), 8, 1),
    "224_stage2": ((8, 28, 28, 4, 32), 4, 4),
    "224_stage3": ((8, 14, 14, 8, 32), 2, 16),
    "512_stage1": ((2, 128, 128, 2, 32), 16, 1),
    "512_stage2": ((2, 64, 64, 4, 32), 8, 4),
    "512_stage3": ((2, 32, 32, 8, 32), 4, 16),
}
OURS = {"neighborhood": "tiled", "routed": "gathered"}
SCORES_LIMIT = 2**29  # peers that hold all tokens x tokens scores are left out above this many
SECONDS = 5.0  # a backend is not run again once its runs took this long


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's attention on all tokens of ``[batch, height, width, heads, dim]``."""
    shape = q.shape
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(shape)


def neighborhood_case(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Callable]]:
    """The inputs of a case and what computes it, by backend."""
    shape, kernel_size, dilation, with_bias = NEIGHBORHOOD[name]
    batch, height, width, heads, _ = shape
    inputs = {name: torch.randn(shape, dtype=dtype) for name in "qkv"}
    if with_bias:
        inputs["bias"] = torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1)

    def op(backend: str) -> Callable:
        return lambda q, k, v, bias=None: neighborhood_attention(
            q, k, v, kernel_size, dilation, bias=bias, backend=backend)

    runs = {"tiled": op("tiled"), "naive": op("naive"), "natten": op("natten")}
    tokens = height * width
    if batch * heads * tokens**2 > SCORES_LIMIT:
        del runs["natten"]
    if tokens**2 <= SCORES_LIMIT:
        (rows, offset_y, _), (columns, offset_x, _) = (
            naive.axis_windows(length, kernel_size, dilation, 1, False) for length in (height, width))
        key = (rows[:, None, :, None] * width + columns[None, :, None, :]).reshape(tokens, -1)
        if with_bias:
            entry = (offset_y[:, None, :, None], offset_x[None, :, None, :])
            entry = tuple((x + kernel_size - 1).expand(height, width, kernel_size, kernel_size) for x in entry)

            def masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
                mask = torch.full((heads, tokens, tokens), -torch.inf)
                mask = mask.scatter(2, key.expand(heads, -1, -1), bias[:, entry[0], entry[1]].view(heads, tokens, -1))
                return dense(q, k, v, mask.to(q.dtype))
        else:
            mask = torch.zeros(tokens, tokens, dtype=torch.bool).scatter_(1, key, True)

            def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return dense(q, k, v, mask)
        runs["masked_sdpa"] = masked
        runs["dense_sdpa"] = lambda q, k, v, bias=None: dense(q, k, v, None)
    return inputs, runs


def routed_case(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Callable]]:
    """The inputs of a case and what computes it, by backend."""
    shape, size, topk = ROUTED[name]
    batch, height, width, _, _ = shape
    inputs = {name: torch.randn(shape, dtype=dtype) for name in "qkv"}
    regions = (height // size) * (width // size)
    routes = torch.rand(batch, 1, regions, regions).topk(topk).indices
    allowed = torch.zeros(batch, 1, regions, regions, dtype=torch.bool).scatter_(3, routes, True)
    region = torch.arange(height)[:, None] // size * (width // size) + torch.arange(width) // size
    mask = allowed[:, :, region.flatten()][..., region.flatten()]

    def op(backend: str) -> Callable:
        return lambda q, k, v: routed_attention(q, k, v, routes, size, backend=backend)

    return inputs, {
        "gathered": op("gathered"), "naive": op("naive"),
        "masked_sdpa": lambda q, k, v: dense(q, k, v, mask), "dense_sdpa": lambda q, k, v: dense(q, k, v, None),
    }


def compute(run: Callable, inputs: dict[str, Tensor], grad: Tensor | None) -> list[Tensor]:
    """The output and, with ``grad``, the gradients of all inputs."""
    if grad is None:
        with torch.no_grad():
            return [run(**inputs)]
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = run(**leaves)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)]


def reference(run: Callable, inputs: dict[str, Tensor], grad: Tensor | None, by_head: bool) -> list[Tensor]:
    """The naive form in float32, head by head where that is possible: its gathered keys take much memory."""
    inputs, grad = {name: x.float() for name, x in inputs.items()}, None if grad is None else grad.float()
    if not by_head:
        return compute(run, inputs, grad)
    parts = [
        compute(
            run, {name: x[h:h + 1] if name == "bias" else x[..., h:h + 1, :] for name, x in inputs.items()},
            None if grad is None else grad[..., h:h + 1, :])
        for h in range(inputs["q"].shape[-2])
    ]
    joined = zip(["out", *inputs], zip(*parts, strict=True), strict=False)
    return [torch.cat(part, dim=0 if name == "bias" else -2) for name, part in joined]


def peak_memory(work: Callable) -> float:
    """MiB of tensors allocated at the same time during ``work()``, at most."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes), default=0) / 2**20


def verify(run: Callable, inputs: dict[str, Tensor], grad: Tensor | None, expected: list[Tensor]) -> str:
    """Runs once; returns why the result may not be timed, or an empty string."""
    try:
        actual = compute(run, inputs, grad)
    except BackendError as error:
        return str(error).split(": ", 1)[-1]
    error = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(actual, expected, strict=True))
    limit = 1e-5 if inputs["q"].dtype == torch.float32 else 2e-2
    return "" if error < limit else f"wrong result: relative error {error:.1e}"


def benchmark(op: str, case: str, backward: bool, dtype: torch.dtype, repeat: int) -> list[dict]:
    """One row per backend."""
    torch.manual_seed(0)
    inputs, runs = (neighborhood_case if op == "neighborhood" else routed_case)(case, dtype)
    grad = torch.randn(inputs["v"].shape, dtype=dtype) if backward else None
    expected = reference(runs["naive"], inputs, grad, by_head=op == "neighborhood")
    notes = {
        name: "computes something else, not checked" if name == "dense_sdpa" else verify(run, inputs, grad, expected)
        for name, run in runs.items()
    }
    timed = {name: run for name, run in runs.items() if name == "dense_sdpa" or not notes[name]}
    if "bias" in inputs and backward:
        timed.pop("dense_sdpa", None)  # has no gradient of the bias
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeat):
        for name, run in timed.items():
            if sum(seconds[name]) < SECONDS:
                start = time.perf_counter()
                compute(run, inputs, grad)
                seconds[name].append(time.perf_counter() - start)
    ours = statistics.median(seconds[OURS[op]])
    return [
        {
            "op": op, "case": case, "direction": "forward+backward" if backward else "forward", "backend": name,
            "median_ms": f"{1e3 * statistics.median(seconds[name]):.3f}" if name in timed else "",
            "best_ms": f"{1e3 * min(seconds[name]):.3f}" if name in timed else "",
            "ratio_to_ours": f"{statistics.median(seconds[name]) / ours:.2f}" if name in timed else "",
            "peak_mib": f"{peak_memory(lambda run=run: compute(run, inputs, grad)):.1f}" if name in timed else "",
            "runs": len(seconds.get(name, [])), "note": notes[name],
        }
        for name, run in runs.items()
    ]


def machine() -> dict[str, str | int]:
    """What the figures belong to."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    try:
        natten = importlib.metadata.version("natten")
    except importlib.metadata.PackageNotFoundError:
        natten = "not installed"
    return {
        "cpu": models[0] if models else "unknown", "threads": torch.get_num_threads(), "torch": torch.__version__,
        "natten": natten, "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    """Runs the cases, prints the table and writes it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--cases", nargs="+", metavar="CASE", choices=[*NEIGHBORHOOD, *ROUTED], help=(
        f"of neighborhood: {', '.join(NEIGHBORHOOD)}; of routed: {', '.join(ROUTED)} (default: all)"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=15, help="runs of every backend")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("results/ops_cpu.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")

    cases = [
        (op, case, backward)
        for op in args.ops for case in (NEIGHBORHOOD if op == "neighborhood" else ROUTED) for backward in (False, True)
        if args.cases is None or case in args.cases
    ]
    if not cases:
        parser.error("no case of the chosen ops has that name")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = None
        for op, case, backward in cases:
            for row in benchmark(op, case, backward, getattr(torch, args.dtype), args.repeat):
                row |= {"dtype": args.dtype, **machine()}
                if writer is None:
                    writer = csv.DictWriter(file, fieldnames=list(row))
                    writer.writeheader()
                writer.writerow(row)
                print("{op:13} {case:14} {direction:17} {backend:12} {median_ms:>10} ms (best {best_ms:>9}) "
                      "{ratio_to_ours:>8} x {peak_mib:>8} MiB  {note}".format(**row), flush=True)
            file.flush()


if __name__ == "__main__":
    main()
