"""The one place that keeps things between calls: plans' tables, masks, composed biases, workspaces.

What is kept is bounded in bytes over the whole process, goes with its owner, and is never taken for something else: the
values that it was made of are compared in every call, as a version counter does not see every way to change a
parameter (``.data``) and the memory of a freed one is used again. Where values cannot be looked at or must not outlive
the call (fake tensors, ``torch.func``, traces, captures of CUDA graphs, gradients that flow) everything is made anew.
"""
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["held_bytes", "keep", "release_memory", "workspace"]

T = TypeVar("T")

_LIMIT = 128 << 20  # bytes of all that is kept; what was not used for longest goes first
_WORKSPACE_LIMIT = 64 << 20  # bytes of the largest workspace that a thread keeps


class _Entry(NamedTuple):
    sources: tuple[Tensor, ...]  # copies
    value: Any
    size: int  # bytes


class _Workspace:
    """A thread's workspace. (A threading.local is not seen from other threads, which may release it.)"""

    __slots__ = ("__weakref__", "memory")

    def __init__(self):
        self.memory: Tensor | None = None


class _State:
    """What a process keeps; a forked child begins with none, as another thread may have been at work on it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self.size = 0
        self.owners: dict[int, weakref.ref] = {}
        self.dead: deque[int] = deque()  # owners that died while the lock was held
        self.local = threading.local()
        self.workspaces: weakref.WeakSet[_Workspace] = weakref.WeakSet()


_state = _State()


def _start_anew() -> None:
    global _state
    _state = _State()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def keep(
        name: str,
        key: Hashable,
        make: Callable[[], T],
        *,
        sources: Sequence[Tensor] = (),
        owner: object | None = None,
        device: torch.device | str = "cpu",
) -> T:
    """Returns ``make()``, or what it gave before if that is certain to be the same.

    Args:
        name: What kind of thing this is.
        key: All that the value depends on besides the sources.
        make: Computes the value, a tensor, None, or a tuple of such, from the key and the sources only. It runs
            without gradients and outside of inference mode where the value is kept, and holds no lock.
        sources: Tensors that the value is computed from. Nothing is kept of sources that are not on the CPU, where
            comparing them would wait for the device, and none if a gradient is to flow to them.
        owner: Object whose value it is: it dies with it, and is not shared with copies of it.
        device: Of the value. On CUDA it is kept for the current stream.

    Returns:
        The value, not to be written to.
    """
    if not _may_keep(sources):
        return make()
    state, stream = _state, 0
    if device != "cpu" and (device := torch.device(device)).type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return make()
        stream = torch.cuda.current_stream(device).cuda_stream
    full = (name, id(owner) if owner is not None else 0, device, stream, key)
    with state.lock:
        entry = state.entries.get(full)
        if entry is not None:
            state.entries.move_to_end(full)
    if entry is not None and all(map(_same, entry.sources, sources)):
        return entry.value
    with torch.inference_mode(False), torch.no_grad():
        value = make()
        copies = tuple(source.detach().clone() for source in sources)
    tensors = [*copies, *_tensors(value)]
    size = sum(tensor.nbytes for tensor in tensors)
    if size <= _LIMIT and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
        with state.lock:
            _put(state, full, _Entry(copies, value, size), owner)
    return value


def workspace(count: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU, ``[count]``, that the calling thread's next call uses again."""
    size = count * dtype.itemsize
    own: _Workspace | None = getattr(_state.local, "own", None)
    if own is None:
        own = _state.local.own = _Workspace()
        with _state.lock:
            _state.workspaces.add(own)
    memory = own.memory
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size > _WORKSPACE_LIMIT:
            return memory.view(dtype)
        own.memory = memory
    return memory[:size].view(dtype)


def release_memory() -> None:
    """Gives back everything that ops and layers keep between calls, of all threads; it is made anew when needed."""
    state = _state
    with state.lock:
        state.entries.clear()
        state.owners.clear()
        state.size = 0
        for own in list(state.workspaces):
            own.memory = None


def held_bytes() -> int:
    """Bytes that are kept between calls, of all threads."""
    state = _state
    with state.lock:
        _bury(state)
        return state.size + sum(own.memory.nbytes for own in list(state.workspaces) if own.memory is not None)


def _may_keep(sources: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    # Modes like FakeTensorMode, and torch.func's transforms.
    functorch = torch._C._functorch
    if torch._C._len_torch_dispatch_stack() or functorch.peek_interpreter_stack() is not None:
        return False
    gradients = torch.is_grad_enabled()
    for source in sources:  # of every layer in every call: plain loops take half as long as generators
        kind = type(source)
        if (kind is not nn.Parameter and kind is not Tensor) or not source.is_cpu:
            return False
        if (gradients and source.requires_grad) or source._is_zerotensor() \
                or functorch.is_functorch_wrapped_tensor(source):
            return False
    return True


def _same(before: Tensor, source: Tensor) -> bool:
    return before.dtype == source.dtype and torch.equal(before, source)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _put(state: _State, full: tuple, entry: _Entry, owner: object | None) -> None:
    """Adds an entry and makes room for it; the lock is held."""
    _bury(state)
    _drop(state, full)
    if owner is not None and id(owner) not in state.owners:
        number = id(owner)

        def died(_: Any) -> None:
            state.dead.append(number)
            if state.lock.acquire(blocking=False):  # the owner may die anywhere, in the middle of this module too
                try:
                    _bury(state)
                finally:
                    state.lock.release()

        state.owners[number] = weakref.ref(owner, died)
    state.entries[full] = entry
    state.size += entry.size
    while state.size > _LIMIT:
        _drop(state, next(iter(state.entries)))


def _drop(state: _State, full: tuple) -> None:
    entry = state.entries.pop(full, None)
    if entry is not None:
        state.size -= entry.size


def _bury(state: _State) -> None:
    """Drops what dead owners left."""
    while state.dead:
        number = state.dead.popleft()
        state.owners.pop(number, None)
        for full in [full for full in state.entries if full[1] == number]:
            _drop(state, full)
