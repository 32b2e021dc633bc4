"""Counts what a call of an op costs beside the computation itself: microseconds of processor time on one thread.

    python tools/measure_dispatch.py                                    # a processor minute
    python tools/measure_dispatch.py --ops routed --cases 224_stage3

``call`` is a call of the public function, with ``backward`` also of its gradients; ``bare`` is the code behind it that
computes: the backend, and of a backend that is an operator of ours its Python function, which for gradients stands in
an ``autograd.Function`` that does nothing else. ``beside``, the difference, is checks, choice and PyTorch's ways to
operators. The runs take turns; each figure is the lower decile of them.

``front`` is a call of the function with a backend that computes nothing, over and over: the same checks and choice with
all that they need in the processor's caches, out of which computation drives it.
"""
import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from visionattn import ops
from visionattn.ops import cases, dispatch
from visionattn.ops.operator import Operator

__all__ = ["beside", "front", "main"]


def main(argv: list[str] | None = None) -> int:
    """Runs the tool with command line arguments (the process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    names = [name.removesuffix("_attention") for name in dispatch.operations() if hasattr(ops, name)]
    parser.add_argument("--ops", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="names (default: a small one of each op)")
    parser.add_argument("--seconds", type=float, default=1.0, help="processor time of each figure's runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{'op':14}{'case':20}{'direction':18}{'call':>8}{'bare':>8}{'beside':>8}{'front':>8}")
    for op in args.ops:
        known = cases(f"{op}_attention")
        for case in args.cases or ["small_map" if "small_map" in known else "small"]:
            if case not in known:
                parser.error(f"{op} has no case {case!r}; it has {', '.join(known)}")
            for backward in (False, True):
                call, bare = beside(f"{op}_attention", case, backward, args.seconds)
                direction = "forward+backward" if backward else "forward"
                alone = front(f"{op}_attention", case, backward, args.seconds)
                print(f"{op:14}{case:20}{direction:18}{call:8.0f}{bare:8.0f}{call - bare:8.0f}{alone:8.1f}", flush=True)
    return 0


def beside(op: str, case: str, backward: bool, seconds: float) -> tuple[float, float]:
    """Microseconds of a call of an op's example, and of what computes in it."""
    floating, tables = cases(op)[case].tensors()
    for x in floating.values():
        x.requires_grad_(backward)
    public, options = getattr(ops, op), {**tables, **cases(op)[case].options}
    leaves = list(floating.values()) if backward else []

    def call() -> Any:
        return _first(public(**floating, **options))

    with torch.set_grad_enabled(backward):
        grad = torch.ones_like(call())
        backend = _backend_of(op, call)
        with _recorded() as calls:
            _derive(call(), leaves, grad)
        bare = _standing_alone(calls, floating["q"]) if calls else backend
        seen = _lower_decile([lambda: _derive(call(), leaves, grad), lambda: _derive(bare(), leaves, grad)], seconds)
    return seen[0], seen[1]


def front(op: str, case: str, backward: bool, seconds: float) -> float:
    """Microseconds of what a call of an op's example does before its backend runs."""
    floating, tables = cases(op)[case].tensors()
    for x in floating.values():
        x.requires_grad_(backward)
    public, options = getattr(ops, op), {**tables, **cases(op)[case].options}
    known = dispatch._OPS[op]
    results: list[Any] = []

    def keeping(run: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args: Any) -> Any:
            if not results:
                results.append(run(*args))
            return results[0]
        return kept

    idle = {name: backend._replace(run=keeping(backend.run)) for name, backend in known.backends.items()}
    with torch.set_grad_enabled(backward), mock.patch.dict(known.backends, idle):
        public(**floating, **options)
        return _lower_decile([lambda: public(**floating, **options)], seconds / 4)[0]


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple | list) else out


def _derive(out: Tensor, leaves: list[Tensor], grad: Tensor) -> None:
    if leaves:
        torch.autograd.grad(out, leaves, grad, allow_unused=True)


def _backend_of(op: str, call: Callable[[], Any]) -> Callable[[], Tensor]:
    """The chosen backend with the arguments of a call."""
    known = dispatch._OPS[op]
    seen: list[tuple[Any, tuple[Any, ...]]] = []
    original = known.run

    def noting(problem: Any, backend: str | None, *args: Any) -> Any:
        seen.append((problem, args))
        return original(problem, backend, *args)

    with mock.patch.object(known, "run", noting):
        call()
    problem, args = seen[0]
    run = known.choose(problem).run
    return lambda: _first(run(*args))


@contextmanager
def _recorded() -> Iterator[list[tuple[Callable[..., Any], tuple[Any, ...]]]]:
    """Notes the functions of our operators that run within the context, and their arguments."""
    operators = {
        id(x): x for name, module in list(sys.modules.items()) if name.startswith("visionattn.ops.")
        for x in vars(module).values() if isinstance(x, Operator)}
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    bodies = {key: operator.body for key, operator in operators.items()}

    def noting(body: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            calls.append((body, args))
            return body(*args)
        return noted

    try:
        for key, operator in operators.items():
            operator.body = noting(bodies[key])
        yield calls
    finally:
        for key, operator in operators.items():
            operator.body = bodies[key]


def _standing_alone(calls: list[tuple[Callable[..., Any], tuple[Any, ...]]], q: Tensor) -> Callable[[], Tensor]:
    """The functions of a call, forward and backward, with nothing around them."""
    (forward, args), *later = calls
    args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor) -> Tensor:
            return _first(forward(*args))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            run, given = later[0]
            return _first(run(*given)).view(q.shape)

    return lambda: Bare.apply(q) if torch.is_grad_enabled() else _first(forward(*args))


def _lower_decile(works: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Microseconds of each work; they take turns of ten runs."""
    turns: list[list[float]] = [[] for _ in works]
    while sum(map(sum, turns)) < seconds * len(works):
        for work, times in zip(works, turns, strict=True):
            start = time.process_time()
            for _ in range(10):
                work()
            times.append(time.process_time() - start)
    return [1e6 * sorted(times)[len(times) // 10] / 10 for times in turns]


if __name__ == "__main__":
    sys.exit(main())
