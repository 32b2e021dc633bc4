"""How an op finds the backend that runs a call.

An op (``neighborhood_attention``, ``routed_attention``, ...) is a list of backends in order of preference. A backend
says in one function, ``supports``, whether it can do a problem and why not; the same answer chooses a backend
automatically, explains the choice (:func:`explain`) and words the error when a backend was asked for by name.

A backend is asked for in one of three ways, the first that is given wins: the call's ``backend=``; a surrounding
:func:`use_backend`; the environment variable ``VISIONATTN_BACKEND`` (names with commas between), read at import.
"""
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Backend", "BackendError", "Op", "any_problem", "cast_for_autocast", "chosen", "explain", "exporting",
    "transforming", "use_backend",
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
    """

    name: str
    supports: Callable[[Any], tuple[bool, str]]
    run: Callable[..., Any]
    automatic: Callable[[Any], bool] = lambda problem: True


class Op:
    """An op by name with its backends, most preferred first."""

    def __init__(self, name: str, backends: list[Backend]):
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        _OPS[name] = self

    def choose(self, problem: Any, backend: str | None = None) -> Backend:
        """Returns the backend that runs ``problem``.

        Args:
            problem: What the backends' ``supports`` takes.
            backend: Name of the only backend to consider; None for automatic choice (or :func:`use_backend`'s).

        Raises:
            BackendError: No such backend, or it cannot do the problem.
        """
        wanted = backend or next((name for name in _requested if name in self.backends), None)
        if wanted is None:
            for candidate in self.backends.values():
                if candidate.automatic(problem) and candidate.supports(problem)[0]:
                    return candidate
            reasons = "; ".join(f"{name}: {reason}" for name, _, reason in self.explain(problem))
            raise BackendError(f"no backend of {self.name} can do this: {reasons}")
        if wanted not in self.backends:
            raise BackendError(f"{self.name} has no backend {wanted!r}; it has {', '.join(self.backends)}")
        ok, reason = self.backends[wanted].supports(problem)
        if not ok:
            raise BackendError(f"backend {wanted!r} of {self.name} cannot do this: {reason}")
        return self.backends[wanted]

    def explain(self, problem: Any) -> list[tuple[str, bool, str]]:
        """Returns ``(backend, can it, why not)`` for every backend, most preferred first."""
        return [(name, *backend.supports(problem)) for name, backend in self.backends.items()]


_OPS: dict[str, Op] = {}
_requested: tuple[str, ...] = ()


def explain(op: str, problem: Any) -> list[tuple[str, bool, str]]:
    """Returns ``(backend, can it, why not)`` for every backend of the op called ``op``, most preferred first."""
    return _find(op).explain(problem)


def chosen(op: str, problem: Any) -> str:
    """Returns the name of the backend that the op called ``op`` runs if the call asks for none."""
    return _find(op).choose(problem).name


def _find(op: str) -> Op:
    if op not in _OPS:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(_OPS)}")
    return _OPS[op]


def exporting() -> bool:
    """Whether an op is being written into an exported graph, which is to hold standard operators only.

    (PyTorch 2.11 says that it exports whenever Dynamo traces, for torch.compile too.)
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def transforming() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is at work; they see through standard operators only."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts the inputs of an op to autocast's dtype where autocast is on, as PyTorch does for its own attention."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Within the context, every op that has one of the backends ``names`` runs it (the first named wins).

    Ops that have none of them choose automatically. Holds for the whole process, not for one thread.

    Raises:
        BackendError: No op has a backend of that name.
    """
    global _requested
    _check_names(names)
    before, _requested = _requested, names
    try:
        yield
    finally:
        _requested = before


def read_environment() -> None:
    """Takes the backends that ``VISIONATTN_BACKEND`` names as the default of the process."""
    global _requested
    names = tuple(name.strip() for name in os.environ.get("VISIONATTN_BACKEND", "").split(",") if name.strip())
    _check_names(names)
    _requested = names


def _check_names(names: tuple[str, ...]) -> None:
    known = {name for op in _OPS.values() for name in op.backends}
    for name in names:
        if name not in known:
            raise BackendError(f"no op has a backend {name!r}; known: {', '.join(sorted(known))}")
