"""How an op finds the backend that runs a call, and what all calls have in common.

An op (``neighborhood_attention``, ``routed_attention``, ...) is a list of backends in order of preference. A backend
says in one function, ``supports``, whether it can do a problem and why not; the same answer chooses a backend
automatically, explains the choice (:func:`explain`) and words the error when a backend was asked for by name.

A backend is asked for in one of three ways, the first that is given wins: the call's ``backend=``; a surrounding
:func:`use_backend`; the environment variable ``VISIONATTN_BACKEND`` (names with commas between), read at import.

What holds for every op and every backend is settled here, in :meth:`Op.run`:

* Precision. Under autocast the inputs are cast to its dtype (float64 stays), as PyTorch does for its own attention;
  the backend then runs with autocast off and computes in float32 or better, and rounds once, to the dtype of q.
* Derivatives. Backends made of operators of ours have first derivatives in reverse mode; second ones are those of the
  standard form (:func:`differentiated`). Where only standard operators will do (:func:`standard_only`), for exported
  and traced graphs, transforms of ``torch.func`` and forward mode, a problem says so and backends choose accordingly.
* Empty batches. They give an empty result and gradients of zero without asking a backend.
* Probabilities. Where somebody records them (:mod:`visionattn.ops.recording`), they are what the op gives for values
  that are unit vectors, as every op is linear in its values.
"""
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .case import Case
from .recording import current_recorder, unit_values

__all__ = [
    "Backend", "BackendError", "Op", "any_problem", "cases", "cast_for_autocast", "chosen", "concrete",
    "differentiated", "empty_result", "explain", "exporting", "in_forward_mode", "larger", "no_autocast", "numbers",
    "operations", "pattern_case", "smaller", "standard_only", "transforming", "untraced", "use_backend",
    "wants_gradients",
]


class BackendError(ValueError):
    """The backend that was asked for does not exist or cannot do this problem."""


def any_problem(problem: Any) -> tuple[bool, str]:
    """The ``supports`` of a backend that can do every valid problem."""
    return True, ""


class Backend(NamedTuple):
    """One implementation of an op.

    Attributes:
        name: How users ask for it.
        supports: Takes the op's problem (shapes, dtypes, options; never values) and returns ``(True, "")`` or
            ``(False, reason)``.
        run: Computes the op. All backends of an op take the same arguments.
        automatic: Whether the backend may be chosen for a problem that it supports without being asked for.
        aliases: Other names that users may ask for it by.
    """

    name: str
    supports: Callable[[Any], tuple[bool, str]]
    run: Callable[..., Any]
    automatic: Callable[[Any], bool] = lambda problem: True
    aliases: tuple[str, ...] = ()


def _for_probabilities(problem: Any, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Any, tuple[Any, ...]]:
    """A call of an op without other values than v."""
    return problem, (q, k, *unit_values(v), *others)


class Op:
    """An op by name with its backends, most preferred first, and examples of its calls by name.

    Args:
        name: How users ask for it.
        backends: They take queries, keys and values first.
        cases: Example calls.
        for_probabilities: Takes the problem and the arguments of a call to those of the call whose result is the
            attention's probabilities: with unit vectors as values (but for ``value_dim``, which is settled here).
        pattern_case: Takes one of :data:`visionattn.ops.case.PATTERNS` and a number of tokens (a square) to the call
            that ``visionattn bench attention`` makes, or to the reason why the op cannot do the pattern.
    """

    def __init__(
            self,
            name: str,
            backends: list[Backend],
            cases: Mapping[str, Case] | None = None,
            for_probabilities: Callable[..., tuple[Any, tuple[Any, ...]]] = _for_probabilities,
            pattern_case: Callable[[str, int], Case | str] = lambda pattern, tokens: "its room does not say how",
    ):
        self.name = name
        self.cases = dict(cases or {})
        self.for_probabilities = for_probabilities
        self.pattern_case = pattern_case
        self.backends = {backend.name: backend for backend in backends}
        self._names = {alias: backend for backend in backends for alias in (backend.name, *backend.aliases)}
        _OPS[name] = self

    def run(self, problem: Any, backend: str | None, *args: Any) -> Any:
        """Runs ``problem`` on the backend that :meth:`choose` returns, with autocast off.

        ``problem.device`` is the type of the device that the tensors of ``args`` are on.
        """
        recorder = current_recorder()
        if recorder is not None:
            recorder.offer(lambda: self._probabilities(problem, args), lambda: self._count(problem, args))
            with recorder.paused():
                return self.run(problem, backend, *args)
        run, device = self.choose(problem, backend).run, problem.device
        if device == "meta" or not torch.is_autocast_enabled(device):  # a context takes as long as a small operator
            return run(*args)
        with torch.autocast(device, enabled=False):
            return run(*args)

    def _probabilities(self, problem: Any, args: tuple[Any, ...]) -> Tensor:
        """Of a call, ``[batch, heads, queries, keys]``; queries and keys are numbered row by row."""
        problem, args = self.for_probabilities(problem, *args)
        found = self.run(problem._replace(value_dim=args[2].shape[-1]), None, *args)
        weights = found[0] if isinstance(found, tuple) else found
        return weights.flatten(1, -3).transpose(1, 2)

    def _count(self, problem: Any, args: tuple[Any, ...]) -> int:
        """How many numbers the probabilities of a call are."""
        shapes = (x.to("meta") if isinstance(x, Tensor) else x for x in args)
        keys: int = self.for_probabilities(problem, *shapes)[1][2].shape[-1]
        return args[0].shape[:-1].numel() * keys

    def choose(self, problem: Any, backend: str | None = None) -> Backend:
        """Returns the backend that runs ``problem``.

        Args:
            problem: What the backends' ``supports`` takes.
            backend: Name of the only backend to consider; None for automatic choice (or :func:`use_backend`'s).

        Raises:
            BackendError: No such backend, or it cannot do the problem.
        """
        names = _requested.get() or _defaults if _scopes else _defaults
        wanted = backend or (next((name for name in names if name in self._names), None) if names else None)
        if wanted is None:
            for candidate in self.backends.values():
                if candidate.automatic(problem) and candidate.supports(problem)[0]:
                    return candidate
            reasons = "; ".join(f"{name}: {reason}" for name, _, reason in self.explain(problem))
            raise BackendError(f"no backend of {self.name} can do this: {reasons}")
        if wanted not in self._names:
            raise BackendError(f"{self.name} has no backend {wanted!r}; it has {', '.join(self.backends)}")
        ok, reason = self._names[wanted].supports(problem)
        if not ok:
            raise BackendError(f"backend {wanted!r} of {self.name} cannot do this: {reason}")
        return self._names[wanted]

    def explain(self, problem: Any) -> list[tuple[str, bool, str]]:
        """Returns ``(backend, can it, why not)`` for every backend, most preferred first."""
        return [(name, *backend.supports(problem)) for name, backend in self.backends.items()]


_OPS: dict[str, Op] = {}
_requested: ContextVar[tuple[str, ...]] = ContextVar("visionattn_backends", default=())
_defaults: tuple[str, ...] = ()  # those of VISIONATTN_BACKEND
_scopes: list[tuple[str, ...]] = []  # of use_backend(), in all threads: where there is none, torch.compile meets no
# context variable, which that of PyTorch 2.9 cannot read


def operations() -> list[str]:
    """The names of all ops."""
    return list(_OPS)


def cases(op: str) -> dict[str, Case]:
    """Returns the example calls of the op called ``op`` by their names; each has the problem that it is."""
    return dict(_find(op).cases)


def pattern_case(op: str, pattern: str, tokens: int) -> Case | str:
    """Returns the call of the op called ``op`` in a pattern of attention, or the reason why it cannot do it.

    Args:
        op: ``"neighborhood_attention"``, ...
        pattern: One of :data:`visionattn.ops.case.PATTERNS`.
        tokens: Queries, a square number.
    """
    return _find(op).pattern_case(pattern, tokens)


def explain(op: str, problem: Any) -> list[tuple[str, bool, str]]:
    """Returns ``(backend, can it, why not)`` for every backend of the op called ``op``, most preferred first.

    Args:
        op: ``"neighborhood_attention"``, ...
        problem: What is asked about, say ``NeighborhoodProblem(...)``, or that of one of the op's :func:`cases` with
            what is different: ``cases(op)["56x56"].problem._replace(device="cuda")``.
    """
    return _find(op).explain(problem)


def chosen(op: str, problem: Any) -> str:
    """Returns the name of the backend that the op called ``op`` runs if the call asks for none."""
    return _find(op).choose(problem).name


def _find(op: str) -> Op:
    if op not in _OPS:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(_OPS)}")
    return _OPS[op]


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Within the context, every op that has one of the backends ``names`` runs it (the first named wins).

    Ops that have none of them choose automatically. Holds for the thread or the task that entered the context.

    Raises:
        BackendError: No op has a backend of that name.
    """
    _check_names(names)
    token = _requested.set(names)
    _scopes.append(names)
    try:
        yield
    finally:
        _scopes.remove(names)
        _requested.reset(token)


def read_environment() -> None:
    """Takes the backends that ``VISIONATTN_BACKEND`` names as the default of the process."""
    global _defaults
    names = tuple(name.strip() for name in os.environ.get("VISIONATTN_BACKEND", "").split(",") if name.strip())
    _check_names(names)
    _defaults = names


def _check_names(names: tuple[str, ...]) -> None:
    known = {name for op in _OPS.values() for name in op._names}
    for name in names:
        if name not in known:
            raise BackendError(f"no op has a backend {name!r}; known: {', '.join(sorted(known))}")


# What kind of call this is.


def exporting() -> bool:
    """Whether an op is being written into a graph that is to hold standard operators only: an export or a trace.

    (PyTorch 2.11 says that it exports whenever Dynamo traces, for torch.compile too; a strict export is Dynamo's work.)
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.compiler._is_exporting_flag  # set by torch.export only
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def transforming() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is at work; they see through standard operators only."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def in_forward_mode(*tensors: Tensor | None) -> bool:
    """Whether a tensor carries a tangent of forward-mode differentiation."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors."""
    if torch.is_grad_enabled():
        for x in tensors:  # a generator takes longer than all of it
            if x is not None and x.requires_grad:
                return True
    return False


def standard_only(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors must consist of PyTorch's own operators."""
    if torch.compiler.is_compiling():
        return exporting()
    # Every call of every op comes here, so that no function is called that can be done without.
    return (torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None
            or (forward_ad._current_level >= 0 and in_forward_mode(*tensors)))


def concrete(*tensors: Tensor, devices: bool = False) -> bool:
    """Whether values of tensors can be looked at: of real ones on the CPU, that are not being traced or transformed.

    With ``devices`` also of those on accelerators, which are waited for.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or transforming():
        return False
    return all((x.device.type == "cpu" or (devices and not x.is_meta)) and type(x) is Tensor and x.numel() > 0
               for x in tensors)


def untraced() -> contextlib.AbstractContextManager:
    """Keeps ``torch.jit.trace`` from what is done within, where sizes are numbers and may be compared."""
    return _untraced() if torch.jit.is_tracing() else contextlib.nullcontext()


@contextmanager
def _untraced() -> Iterator[None]:
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def numbers(sizes: Sequence[Any]) -> tuple[Any, ...]:
    """Sizes of a tensor as numbers, also where ``torch.jit.trace`` has tensors for them: the trace is for these."""
    if not torch.jit.is_tracing():
        return tuple(sizes)
    with untraced():  # a trace would warn that it is for these sizes
        return tuple(int(size) if isinstance(size, Tensor) else size for size in sizes)


def larger(a: Any, b: Any) -> Any:
    """The larger of two sizes; symbolic ones (export) are not compared, as that would hold for the example's only."""
    a, b = numbers((a, b))
    return torch.sym_max(a, b) if _symbolic() else max(a, b)


def smaller(a: Any, b: Any) -> Any:
    """The smaller of two sizes, likewise."""
    a, b = numbers((a, b))
    return torch.sym_min(a, b) if _symbolic() else min(a, b)


def _symbolic() -> bool:
    """Whether sizes may be symbols."""
    if _FEW_SYMBOLS and torch.compiler.is_dynamo_compiling():
        return False
    return exporting() and not torch.jit.is_tracing()


# Dynamo has no sym_max of two numbers, and cannot tell these from symbols.
_FEW_SYMBOLS = torch.__version__ < (2, 10)  # type: ignore[operator]


# What all calls have in common.


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts the inputs of an op to autocast's dtype where autocast is on, as PyTorch does for its own attention."""
    first = tensors[0]
    # A tensor's device takes PyTorch longer to name than everything here.
    device = "cpu" if not torch.compiler.is_compiling() and first.is_cpu else first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in tensors)


def no_autocast(device: str) -> contextlib.AbstractContextManager:
    """Keeps autocast from what is computed within; a context is entered only where that changes anything."""
    return torch.autocast(device, enabled=False) if _autocast(device) else contextlib.nullcontext()


def _autocast(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def empty_result(shape: Sequence[int], tensors: Sequence[Tensor | None]) -> Tensor:
    """The result, of a shape without elements and in the dtype of the first tensor, that gives them zero gradients."""
    first = tensors[0]
    assert first is not None
    zero = sum((x.sum() * 0 for x in tensors if x is not None and x.is_floating_point()), first.new_zeros(()))
    return zero.to(first.dtype).expand(tuple(shape)).clone()


def differentiated(
        standard: Callable[..., Tensor | tuple[Tensor, ...]], tensors: Sequence[Tensor | None],
        grad: Tensor | tuple[Tensor, ...], needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, in the backward pass of an operator that is no standard one.

    Args:
        standard: The same function of ``tensors``, made of operators that PyTorch can differentiate any number of
            times.
        tensors: Its arguments, as they were saved.
        grad: Gradient of its result, or of each of its results.
        needed: Which of the arguments want a gradient.
    """
    device = (grad if isinstance(grad, Tensor) else grad[0]).device.type
    with torch.enable_grad(), no_autocast(device):
        # Views: one argument may be another, or be computed from it, and each is to have a gradient of its own.
        tensors = [x if x is None else x.view_as(x) for x in tensors]
        out = standard(*tensors)
        wanted = [x for x, need in zip(tensors, needed, strict=True) if need and x is not None]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if need and x is not None else None for x, need in zip(tensors, needed, strict=True)]
