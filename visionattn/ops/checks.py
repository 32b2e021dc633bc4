"""Checks of arguments that several ops share."""
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .dispatch import untraced

__all__ = ["check_alike", "check_sizes", "checked_once", "known_range", "shapes"]

T = TypeVar("T")

_PROBLEMS = 1024  # that a check knows, at most


def checked_once(check: Callable[..., T]) -> Callable[..., T]:
    """A function of positional arguments that is to look at shapes, dtypes and devices of tensors, never at values.

    Its result for arguments alike is the same and is kept, but where sizes may be symbols or tensors: in graphs and
    traces, and for subclasses of tensors. What it raises is raised in every call. Nothing that is kept holds a tensor:
    it is no memory that :func:`visionattn.ops.release_memory` would have to give back.
    """
    known: dict[tuple, T] = {}

    @functools.wraps(check)
    def checked(*args: Any) -> T:
        if torch.compiler.is_compiling():
            return check(*args)
        key = None if torch._C._is_tracing() else _key(args)
        if key is None:
            with untraced():
                return check(*args)
        found = known.get(key)
        if found is None:
            found = check(*args)
            if len(known) >= _PROBLEMS:
                known.clear()
            known[key] = found
        return found

    return checked


def _key(args: tuple[Any, ...]) -> tuple | None:
    """What a check may depend on; None where that cannot be said. Equal numbers of other types are other keys."""
    key: list[Any] = []
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is nn.Parameter:
            key += x.shape, x.dtype, x.is_cpu or x.device  # a device takes as long to compare as all else
        elif x is None or kind is bool:
            key.append(x)
        elif kind in _SCALARS:
            key += kind, x
        elif (kind is tuple or kind is list) and _SCALARS.issuperset(inner := tuple(map(type, x))):
            key += kind, tuple(x), inner
        else:
            return None
    return tuple(key)


_SCALARS = frozenset((int, bool, float, str, type(None)))


def shapes(**tensors: Tensor) -> str:
    """Names and shapes of tensors, for the message of an error."""
    return ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())


def check_sizes(**tensors: Tensor) -> None:
    """Raises a ValueError if a tensor is empty along another axis than its first, the batch."""
    for name, x in tensors.items():
        if 0 in x.shape[1:]:
            raise ValueError(f"only the batch may be empty, but {name} is {list(x.shape)}")


def check_alike(q: Tensor, **others: Tensor) -> None:
    """Raises a ValueError if q is not floating point, or another tensor has not its dtype and device."""
    if not q.dtype.is_floating_point:
        *first, last = others
        raise ValueError(f"{', '.join(['q', *first])} and {last} must be floating point, got {q.dtype}")
    for name, x in others.items():
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}")


def known_range(index: Tensor) -> tuple[int, int] | None:
    """The smallest and the largest entry of a table; None where it has no values to look at, or none at hand.

    There are none in fake tensors and graphs (compiled, exported, traced), and of an accelerator's tensors one would
    have to wait for the device. The tables of all samples of ``torch.vmap`` are looked at together.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or not index.is_cpu:
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(index):
        index = torch._C._functorch.get_unwrapped(index)
    # A subclass, or a mode that sees operators, may have no values (FakeTensor, FakeTensorMode) or record the question.
    if type(index) is not Tensor or torch._C._len_torch_dispatch_stack() or index.numel() == 0:
        return None
    low, high = index.aminmax()
    return low.item(), high.item()  # type: ignore[return-value]
