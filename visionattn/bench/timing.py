"""Times an op and its peers on one of the op's cases, each after its result was checked."""
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import BackendError, NeighborhoodProblem, dispatch
from ..ops.kept import release_memory
from ..simulate import simulate
from .machine import Machine, dtype_name, figure, synchronize
from .peers import UNCHECKED, peers

__all__ = ["DIRECTIONS", "benchmark", "compute_once", "peak_memory", "verify"]

DIRECTIONS = ("forward", "forward+backward")
_UNCHECKED = "computes something else, not checked"
_NATTEN_LIMIT = 2**29  # pairs of all tokens above which natten, which takes seconds there, is not timed on a CPU
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
        machine: Machine | None = None,
) -> list[dict[str, Any]]:
    """Times the ops and their peers, each after its result was checked; the figures need a machine that is idle.

    Every backend's output and gradients are first compared with the naive form; one that is wrong or cannot do the case
    is not timed, and the table says why. The backends take turns, so that a slow phase of the machine meets all. A turn
    is an untimed run and then 20 ms of runs, at least one, of which the mean counts: peers that allocate hundreds of
    MiB would otherwise leave the next one cold caches and page faults, which cost a run of 1 ms more than itself. The
    figure is the median over the turns. On one thread of a CPU it is processor time, which other processes disturb
    least.

    Peak memory is that of tensors allocated during one run, inputs excluded. ``bytes_ms`` is the time that moving the
    least bytes takes (q, k, v and output once, in the backward pass eight tensors more) at the bandwidth that this
    machine was measured to have, ``flops_ms`` that of the useful products (4 * head_dim per query-key pair, 10 in the
    backward pass) at its measured peak of matrix products. ``simulated_speedup`` is that of ``bench simulate`` with the
    best tiles, to be read beside ``speedup_over_dense``.

    Backends: those of the op; all but ``naive`` and ``natten`` are our fast ones. ``naive`` gathers a window, or the
    listed regions, for every query (head by head if keys and values would take more than 2 GiB).
    ``masked_sdpa`` is PyTorch's dense attention with the op as a mask (made from the bias table in every run).
    ``dense_sdpa`` lets every query see every key and leaves all else away: it computes something else and is not
    checked. ``flex`` is FlexAttention with a block mask made beforehand, eager and (``--compiled``) compiled; it has no
    backward pass on CPU, nor has ``natten`` there.

    Args:
        op: Name of the op without ``_attention``: ``"neighborhood"``, ``"routed"``, ``"flow"``, ...
        case: Name of one of the op's cases, :func:`visionattn.ops.cases`.
        backward: Whether to time forward and backward, or forward only.
        dtype: Of q, k and v; tables of biases are float32.
        device: ``"cpu"`` or ``"cuda"``.
        repeat: Turns of every backend, fewer if they take more than 5 s.
        compiled: Whether to time compiled FlexAttention.
        machine: Measured rates for the bounds; None leaves the bounds empty.

    Returns:
        One row per backend, with the columns of the CSV file but the machine's.
    """
    name = f"{op}_attention"
    example = ops.cases(name)[case]
    problem = example.problem._replace(dtype=dtype, device=device, requires_grad=backward)
    inputs, tables = example.tensors(dtype, device)
    runs = _backends(name, problem, {**tables, **example.options}, len(inputs["q"]))
    runs |= peers(problem, inputs, tables, compiled)
    q, v = inputs["q"], inputs["v"]
    out_shape, dim = (*q.shape[:-1], v.shape[-1]), q.shape[-1]
    grad = None
    if backward:
        grad = torch.randn(out_shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    by_head = example.gathered * 2 * dim * 4 > _GATHER_LIMIT and inputs.keys() <= {"q", "k", "v", "bias"} \
        and inputs["k"].shape[-2] == q.shape[-2]

    def compute(backend: str, dtype: torch.dtype = dtype) -> list[Tensor]:
        wanted = {x: tensor if x in example.parameters else tensor.to(dtype) for x, tensor in inputs.items()}
        if backend in UNCHECKED:
            wanted = {x: wanted[x] for x in "qkv"}
        upstream = None if grad is None else grad.to(dtype)
        return (_compute_by_head if backend == "naive" and by_head else compute_once)(runs[backend], wanted, upstream)

    expected = compute("naive", torch.float32)
    notes = {
        backend: _UNCHECKED if backend in UNCHECKED else verify(functools.partial(compute, backend), expected, dtype)
        for backend in runs
    }
    if by_head and not notes["naive"]:
        notes["naive"] = "head by head"
    del expected
    timed = [backend for backend, note in notes.items() if note in ("", "head by head", _UNCHECKED)]
    seconds = _take_turns({backend: functools.partial(compute, backend) for backend in timed}, repeat, device)
    median = {backend: 1e3 * statistics.median(values) for backend, values in seconds.items()}
    ours = median.get(dispatch.chosen(name, problem), math.nan)
    moved = (3 if backward else 1) * q.element_size() * (q.numel() + inputs["k"].numel() + v.numel()
                                                         + math.prod(out_shape))
    bounds = machine.bounds(moved, (14 if backward else 4) * dim * example.pairs) if machine else {}
    simulated = None
    if isinstance(problem, NeighborhoodProblem):
        simulated = simulate(problem.spatial, problem.kernel_size, problem.dilation, problem.stride,
                             problem.is_causal).speedup
    return [
        {
            "op": op, "case": case, "direction": DIRECTIONS[backward], "backend": backend,
            "median_ms": figure(median.get(backend)), "best_ms": figure(1e3 * min(seconds.get(backend, [math.nan]))),
            "ratio_to_ours": figure(median.get(backend, math.nan) / ours),
            "peak_mib": figure(peak_memory(functools.partial(compute, backend), device) if backend in timed else None),
            "bytes_ms": figure(bounds.get("bytes_ms")), "flops_ms": figure(bounds.get("flops_ms")),
            "speedup_over_dense": figure(median.get("dense_sdpa", math.nan) / median.get(backend, math.nan)),
            "simulated_speedup": figure(simulated), "runs": len(seconds.get(backend, [])), "note": notes[backend],
            "shape": "x".join(map(str, q.shape)), "window": example.summary, "dtype": dtype_name(dtype),
        }
        for backend in runs
    ]


def _backends(op: str, problem: Any, bound: Mapping[str, Any], batch: int) -> dict[str, Callable[..., Any]]:
    """The op on each of its backends that is worth timing, as functions of its floating-point tensors."""
    names = [name for name, _, _ in ops.explain(op, problem)]
    if problem.device == "cpu":
        slow = {"triton"}  # at most emulated there
        if isinstance(problem, NeighborhoodProblem) \
                and batch * problem.heads * math.prod(problem.spatial)**2 > _NATTEN_LIMIT:
            slow.add("natten")
        names = [name for name in names if name not in slow]
    return {name: functools.partial(getattr(ops, op), **bound, backend=name) for name in names}


def _take_turns(works: Mapping[str, Callable[[], Any]], repeat: int, device: str) -> dict[str, list[float]]:
    """Seconds of each work in each of its turns."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _, (name, work) in itertools.product(range(repeat), works.items()):
        if sum(max(x, _BLOCK_SECONDS) for x in seconds[name]) < _SECONDS:
            work()
            synchronize(device)
            start, runs, elapsed = clock(), 0, 0.0
            while elapsed < _BLOCK_SECONDS:
                work()
                synchronize(device)
                runs += 1
                elapsed = clock() - start
            seconds[name].append(elapsed / runs)
    return seconds


def compute_once(run: Callable, inputs: Mapping[str, Tensor], grad: Tensor | None) -> list[Tensor]:
    """The output and, with ``grad``, the gradients of all inputs."""
    if grad is None:
        with torch.no_grad():
            return _outputs(run(**inputs))
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = _outputs(run(**leaves))
    return [*(x.detach() for x in out), *torch.autograd.grad(out[0], list(leaves.values()), grad)]


def _outputs(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def _compute_by_head(run: Callable, inputs: Mapping[str, Tensor], grad: Tensor | None) -> list[Tensor]:
    """The same one head after the other, for what takes much memory."""
    parts = [
        compute_once(
            run, {name: x[h:h + 1] if name == "bias" else x[..., h:h + 1, :] for name, x in inputs.items()},
            None if grad is None else grad[..., h:h + 1, :])
        for h in range(inputs["q"].shape[-2])
    ]
    joined = zip(["out", *inputs], zip(*parts, strict=True), strict=False)
    return [torch.cat(part, dim=0 if name == "bias" else -2) for name, part in joined]


def verify(work: Callable[[], list[Tensor]], expected: list[Tensor], dtype: torch.dtype) -> str:
    """Runs once; returns why the result may not be timed, or an empty string."""
    try:
        actual = work()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        reason = str(error).split(": ", 1)[-1] if isinstance(error, BackendError) else str(error).strip()
        return reason.splitlines()[0][:200] if reason else type(error).__name__
    worst = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(actual, expected, strict=True))
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    return "" if worst < limit else f"wrong result: relative error {worst:.1e}"


def peak_memory(work: Callable[[], Any], device: str) -> float:
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
