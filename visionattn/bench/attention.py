"""Times attention in the four patterns of use, over lengths, each after its result was checked."""
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops as operations
from ..ops import Case, dispatch
from ..ops.case import CAUSAL, CROSS
from .attention_peers import PEERS, attention_peer
from .efficiency import measured_efficiency
from .machine import Machine, dtype_name, figure, synchronize
from .timing import DIRECTIONS, compute_once, peak_memory, verify

__all__ = ["ATTENTIONS", "FULL", "FULL_MATRIX", "SIDES", "benchmark_attention", "prefix_difference"]

FULL, FULL_MATRIX = "full", "full_matrix"
# The sides of the maps, whose tokens are the lengths: windows of 8 divide them all.
SIDES = (8, 16, 24, 32, 48, 64, 96, 128)
ATTENTIONS = [*PEERS, "natten", *(name.removesuffix("_attention") for name in dispatch.operations()
                                  if hasattr(operations, name))]
_CHECKED = 1024  # tokens up to which results are compared with the naive form, which takes much memory
_PREFIXED = 256  # tokens of the prefix test
_LEAST_DIFFERENCE = 1e-4  # of an output, summed, that the paper's prefix test lets pass
_SECONDS = 0.4  # processor time of the runs of one attention at one length, which fewer runs keep to
_FEWEST = 3
_WARM_SECONDS = 0.02  # a run that is shorter has an untimed one before it, as others leave it cold caches
_LONGEST = 60.  # processor time of a run above which it is left out
_MEMORY = 4096.  # MiB of a run above which it is left out on a CPU


class _Attention(NamedTuple):
    """An attention as a function of its floating-point tensors, its simplest form, and what they are called with."""

    run: Callable[..., Any]
    naive: Callable[..., Any]
    case: Case
    inputs: dict[str, Tensor]

    def compute(self, grad: Tensor | None) -> list[Tensor]:
        """The output and, with ``grad``, the gradients of all inputs."""
        return compute_once(self.run, self.inputs, grad)

    def expected(self, grad: Tensor | None) -> list[Tensor]:
        """The same by the simplest form, in float32."""
        return compute_once(self.naive, {name: x.float() for name, x in self.inputs.items()},
                            None if grad is None else grad.float())


def benchmark_attention(
        pattern: str,
        names: Sequence[str] = ATTENTIONS,
        most: int = 16384,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        repeat: int = 100,
        machine: Machine | None = None,
) -> list[dict[str, Any]]:
    """Times attention in a pattern of use, over lengths; the figures need a machine that is idle.

    Noncausal and causal, self and cross attention ("CAB: Comprehensive Attention Benchmarking on Long Sequence
    Modeling", ICML 2023), of one sample, 8 heads of 64 channels. Lengths are the tokens of square maps of 8 to 128
    tokens a side, sequences being as long; in cross attention there are half as many keys as queries. Every op of this
    library and its peers (PyTorch's full attention, FlexAttention, linear attention, NATTEN where it is installed) is
    called as its own room says, or listed with the reason why it cannot do the pattern.

    Before anything is timed, outputs and gradients are compared with the naive form, up to 1024 tokens; for a causal
    pattern, the output at a place must be that of the prefix which ends there, for all places in the second half of 256
    tokens (rows and columns up to the place, for a map): all absolute differences of an output together are at most
    1e-4. Longer calls are those of the same code, and a note says that they were not compared.

    Attentions take turns. A figure is the mean of the middle half of the runs (processor time on one thread of a CPU);
    runs are as many as take 0.4 s of processor time, at least 3. Runs that would take over a minute or over 4 GiB are
    left out. Peak memory is that of tensors allocated during a run, inputs excluded. ``bytes_ms`` and ``flops_ms`` are
    the bounds of ``bench ops``.

    The efficiency length is the number of tokens from which an attention is cheaper than full attention, by a quadratic
    fitted to full attention and a line to the other (:func:`visionattn.bench.efficiency.efficiency_length`): in time
    and in memory against ``full``, whose memory is linear where its kernel is fused, and in memory against
    ``full_matrix``.

    Args:
        pattern: One of :data:`visionattn.ops.case.PATTERNS`.
        names: Some of :data:`ATTENTIONS`; ``full`` is always measured.
        most: Tokens of the longest sequence.
        dtype: Of queries, keys and values.
        device: ``"cpu"`` or ``"cuda"``.
        repeat: Runs at most.
        machine: Measured rates for the bounds; None leaves the bounds empty.

    Returns:
        One row per attention, direction and length, and one for each attention that cannot do the pattern, with the
        columns of the CSV file but the machine's.
    """
    rows: list[dict[str, Any]] = []
    names = [name for name in ATTENTIONS if name in {FULL, *names}]
    for name in names:
        reason = _build(name, pattern, SIDES[0] ** 2, dtype, device)
        if not isinstance(reason, str):
            reason = _check_causal(name, pattern, device)
        if reason:
            rows.append(_row(pattern, name, dtype) | {"note": reason})
    able = [name for name in names if name not in {row["op"] for row in rows}]
    for direction in DIRECTIONS:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in able}
        for tokens in (side ** 2 for side in SIDES if side ** 2 <= most):
            for row in _measure(pattern, tokens, found, direction, dtype, device, repeat, machine):
                found[row["op"]].append(row)
        for name, series in found.items():
            lengths = _efficiency(series, found[FULL], found.get(FULL_MATRIX, [])) if name != FULL else {}
            rows += [row | lengths for row in series]
    return rows


def prefix_difference(run: Callable[..., Tensor], inputs: Mapping[str, Tensor], cross: bool = False) -> float:
    """How much outputs depend on what comes after them: the most of all absolute differences of an output, summed.

    The output at a place is compared with that of the prefix which ends there, for the second half of every axis. A
    prefix of a map is its rows and columns up to the place.

    Args:
        run: Takes the inputs, as keywords, to an output of q's batch and places.
        inputs: ``q``, ``k`` and ``v``, ``[batch, *spatial, heads, dim]``.
        cross: Only queries are cut: a query may see all keys.
    """
    spatial = inputs["q"].shape[1:-2]
    cut = {"q"} if cross else {"q", "k", "v"}
    worst = 0.
    with torch.no_grad():
        whole = run(**inputs)
        for place in itertools.product(*(range(length // 2, length) for length in spatial)):
            prefix: Any = (slice(None), *(slice(position + 1) for position in place))
            part = run(**{name: x[prefix] if name in cut else x for name, x in inputs.items()})
            last: Any = (slice(None), *(-1 for _ in place))
            here: Any = (slice(None), *place)
            difference = (part[last] - whole[here]).abs().flatten(1).sum(dim=1).max().item()
            worst = max(worst, difference)
    return worst


def _build(name: str, pattern: str, tokens: int, dtype: torch.dtype, device: str) -> _Attention | str:
    """An attention at a length, or why there is none."""
    if name in PEERS:
        run, naive, case = attention_peer(name, pattern, tokens, device)
        return _Attention(run, naive, case, case.tensors(dtype, device)[0])
    op = "neighborhood_attention" if name == "natten" else f"{name}_attention"
    found = dispatch.pattern_case(op, pattern, tokens)
    if isinstance(found, str):
        return found
    if name == "natten":
        problem = found.problem._replace(dtype=dtype, device=device)
        reason = next(why for backend, _, why in dispatch.explain(op, problem) if backend == "natten")
        if reason:
            return reason
    inputs, tables = found.tensors(dtype, device)
    bound = functools.partial(getattr(operations, op), **tables, **found.options)
    run = functools.partial(bound, backend="natten") if name == "natten" else bound
    return _Attention(run, functools.partial(bound, backend="naive"), found, inputs)


def _check_causal(name: str, pattern: str, device: str) -> str:
    """Why an attention is not causal in a pattern that is, or an empty string."""
    if pattern not in CAUSAL:
        return ""
    attention = _build(name, pattern, _PREFIXED, torch.float64 if device == "cpu" else torch.float32, device)
    if isinstance(attention, str):  # not in double precision
        attention = _build(name, pattern, _PREFIXED, torch.float32, device)
    assert not isinstance(attention, str)
    try:
        difference = prefix_difference(attention.run, attention.inputs, pattern in CROSS)
    except (ValueError, RuntimeError) as error:
        return f"the prefix test stopped: {str(error).strip().splitlines()[0][:200]}"
    return "" if difference <= _LEAST_DIFFERENCE else \
        f"not causal: an output differs by {difference:.1e} from that of its prefix"


def _measure(
        pattern: str,
        tokens: int,
        earlier: Mapping[str, list[dict[str, Any]]],
        direction: str,
        dtype: torch.dtype,
        device: str,
        repeat: int,
        machine: Machine | None,
) -> Iterator[dict[str, Any]]:
    """The rows of one length; ``earlier`` are those of the shorter ones."""
    backward = direction == DIRECTIONS[1]
    rows, works, seconds = {}, {}, {}
    for name, before in earlier.items():
        rows[name] = row = _row(pattern, name, dtype) | {"direction": direction, "tokens": tokens}
        row["note"] = _too_large(before, tokens, device)
        attention = None if row["note"] else _build(name, pattern, tokens, dtype, device)
        if attention is None or isinstance(attention, str):
            continue
        try:
            out = attention.compute(None)[0]
            grad = None
            if backward:
                grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
            work = functools.partial(attention.compute, grad)
            row |= _costs(attention, out.numel(), backward, machine)
            del out
            if tokens <= _CHECKED and (reason := verify(work, attention.expected(grad), dtype)):
                row["note"] = reason
                continue
            start = time.process_time()
            work()
            synchronize(device)
        except (ValueError, RuntimeError) as error:
            row["note"] = str(error).strip().splitlines()[0][:200]
            continue
        works[name], seconds[name] = work, time.process_time() - start
        row["note"] = "" if tokens <= _CHECKED else f"compared up to {_CHECKED} tokens"
    turns = {name: max(_FEWEST, min(repeat, int(_SECONDS / max(spent, 1e-9)))) for name, spent in seconds.items()}
    for name, runs in _take_turns(works, turns, seconds, device).items():
        rows[name] |= {"ms": figure(1e3 * _middle_half(runs)), "runs": len(runs),
                       "peak_mib": figure(peak_memory(works[name], device)),
                       "processor_s": figure(seconds[name])}
    yield from rows.values()


def _too_large(before: Sequence[Mapping[str, Any]], tokens: int, device: str) -> str:
    """Why a length is left out, by the growth over the last two."""
    if before and not before[-1]["ms"]:
        return str(before[-1]["note"])
    limit = _MEMORY if device == "cpu" else torch.cuda.mem_get_info()[1] / 2 / 2 ** 20
    seconds, mib = (_extrapolated(before, column, tokens) for column in ("processor_s", "peak_mib"))
    if seconds > _LONGEST:
        return f"left out: a run would take about {seconds:.0f} s"
    return f"left out: a run would take about {mib / 1024:.0f} GiB" if mib > limit else ""


def _extrapolated(before: Sequence[Mapping[str, Any]], column: str, tokens: int) -> float:
    if len(before) < 2:
        return 0.
    (n1, y1), (n2, y2) = ((row["tokens"], max(float(row[column]), 1e-9)) for row in before[-2:])
    power = min(max(math.log(y2 / y1) / math.log(n2 / n1), 1.), 2.)
    return y2 * (tokens / n2) ** power


def _take_turns(
        works: Mapping[str, Callable[[], Any]], turns: Mapping[str, int], seconds: Mapping[str, float], device: str,
) -> dict[str, list[float]]:
    """Seconds of each work in each of its turns, which are spread evenly over those of the others."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in works}
    most = max(turns.values(), default=0)
    for turn, (name, work) in itertools.product(range(most), works.items()):
        if turn * turns[name] // most == (turn - 1) * turns[name] // most:
            continue
        if seconds[name] < _WARM_SECONDS:
            work()
        synchronize(device)
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            found[name].append(begin.elapsed_time(end) / 1e3)
        else:
            start = clock()
            work()
            found[name].append(clock() - start)
    return found


def _middle_half(values: Sequence[float]) -> float:
    """The mean of what lies between the 25th and the 75th percentile."""
    if len(values) < 3:
        return statistics.fmean(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.fmean(x for x in values if low <= x <= high)


def _costs(attention: _Attention, size: int, backward: bool, machine: Machine | None) -> dict[str, Any]:
    """FLOPs and bounds of a call with an output of that size, as :func:`visionattn.bench.benchmark` counts them."""
    q, k, v = (attention.inputs[name] for name in "qkv")
    moved = (3 if backward else 1) * q.element_size() * (q.numel() + k.numel() + v.numel() + size)
    flops = (14 if backward else 4) * q.shape[-1] * attention.case.pairs
    bounds = machine.bounds(moved, flops) if machine else {}
    return {"keys": k[0, ..., 0, 0].numel(), "mflop": figure(flops / 1e6), "bytes_ms": figure(bounds.get("bytes_ms")),
            "flops_ms": figure(bounds.get("flops_ms")), "kind": attention.case.summary}


def _row(pattern: str, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """All columns."""
    columns = ("direction", "tokens", "keys", "ms", "peak_mib", "mflop", "bytes_ms", "flops_ms", "runs", "processor_s",
               "time_length", "time_r2", "memory_length", "memory_r2", "matrix_memory_length", "matrix_memory_r2",
               "kind", "note")
    return {"pattern": pattern, "op": name, **dict.fromkeys(columns, ""), "dtype": dtype_name(dtype)}


def _efficiency(
        series: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]], matrix: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """The efficiency lengths of a series; empty where there are too few lengths."""
    found: dict[str, str] = {}
    for name, column, reference, skip_first in (
            ("time", "ms", full, 1), ("memory", "peak_mib", full, 0), ("matrix_memory", "peak_mib", matrix, 0)):
        theirs, ours = ({row["tokens"]: float(row[column]) for row in rows if row[column]}
                        for rows in (reference, series))
        fit = None if theirs == ours else measured_efficiency(theirs, ours, skip_first)
        if fit is not None:
            found |= {f"{name}_length": fit.summary, f"{name}_r2": f"{fit.r2_full:.3f}, {fit.r2_efficient:.3f}"}
    return found
