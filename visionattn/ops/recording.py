"""Attention probabilities for whoever asks: what runs attention offers them to the recorder of its thread, if any.

Who wants the probabilities of a model uses :func:`visionattn.layers.attention_maps`.
"""
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Recorder", "current_recorder", "unit_values"]


class Recorder:
    """Takes the offers that attention of this thread makes, each a function that computes the probabilities.

    They are computed at the end: of an attention whose probabilities nobody wants they never are.

    Args:
        last: Keep the last offer alone.
    """

    def __init__(self, last: bool = False):
        self.last = last
        self._offers: list[tuple[bool, Callable[[], Tensor]]] = []

    def offer(self, compute: Callable[[], Tensor], count: Callable[[], int] | None = None) -> None:
        """Takes a function that gives probabilities ``[batch, heads, queries, keys]``.

        Args:
            compute: The function.
            count: How many numbers that gives, without computing them; None where it is not known.
        """
        if self.last:
            self._offers.clear()
        self._offers.append((torch.is_grad_enabled(), compute))

    def take(self) -> list[Tensor]:
        """The probabilities of all offers kept, in their order; with gradients where these were on at that time."""
        found = []
        for grad, compute in self._offers:
            with torch.set_grad_enabled(grad):
                found.append(compute())
        self._offers.clear()
        return found

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the context, offers of this thread come to this recorder and to no other."""
        with _innermost(self):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the context, offers of this thread come to nobody: what runs is a part of what was offered."""
        with _innermost(None):
            yield


_recorders: dict[int, list[Recorder | None]] = {}  # by thread, the innermost last; empty where nobody records


def current_recorder() -> Recorder | None:
    """The recorder that this thread's attention has to offer its probabilities to."""
    if not _recorders:  # all that is ever seen where a graph is compiled or exported
        return None
    stack = _recorders.get(threading.get_ident())
    return stack[-1] if stack else None


@contextmanager
def _innermost(recorder: Recorder | None) -> Iterator[None]:
    thread = threading.get_ident()
    stack = _recorders.setdefault(thread, [])
    stack.append(recorder)
    try:
        yield
    finally:
        stack.pop()
        if not stack:
            del _recorders[thread]


def unit_values(*values: Tensor) -> list[Tensor]:
    """Values that make an attention, which is linear in them, give its probabilities: of each key a unit vector.

    Args:
        values: Values ``[batch, *keys, heads, dim]`` under one softmax; their keys are numbered row by row, one tensor
            after the other.

    Returns:
        Tensors ``[batch, *keys, heads, number of all keys]``.
    """
    counts = [value.shape[1:-2].numel() for value in values]
    rows = torch.eye(sum(counts), dtype=values[0].dtype, device=values[0].device).split(counts)
    return [
        row.view(1, *value.shape[1:-2], 1, -1).expand(*value.shape[:-1], -1)
        for row, value in zip(rows, values, strict=True)]
