"""Less memory in training for more time: inner values that the backward pass computes a second time."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..ops.recording import current_recorder
from .auxiliary import in_backward

__all__ = ["checkpoint_attention", "checkpointed"]

_ATTENTION = "attn"  # what blocks call it, ours and timm's


def checkpoint_attention(model: nn.Module, enable: bool = True) -> None:
    """Makes training compute the inner values of a model's attention a second time instead of keeping them, or not.

    The other half of each block keeps its own, unlike with ``set_grad_checkpointing``, so that less is computed twice.
    Attention is what the blocks of a model call ``attn``: in all families of ours, in timm's ViT, DeiT, Swin, PVT and
    most others. It is computed twice in training mode where gradients are on; not while
    :func:`~visionattn.layers.attention_maps` records, whose maps need what would be computed again. Losses, gradients,
    random numbers, the statistics of batch norms and the names of weights stay what they are, also of copies and under
    ``torch.compile``.

    Args:
        model: Any model; changed in place. ``torch.jit.script`` takes it only after ``enable=False``.
        enable: False undoes it.

    Raises:
        ValueError: None of its modules is called ``attn``.
    """
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == _ATTENTION]
    if enable and not found:
        raise ValueError(f"{type(model).__name__} has no attention to compute a second time: none of its modules is "
                         f"called {_ATTENTION}")
    for module in found:
        own: Any = module.__dict__.get("forward")
        if isinstance(own, _Twice) == enable:
            continue
        if enable:
            module.forward = _Twice(_forward, module, module.forward)
        else:
            del module.forward
            if own.args[1] != module.forward:  # another object's forward, which was the module's before
                module.forward = own.args[1]


def checkpointed(module: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, a part of ``module``, whose inner values the backward pass computes again.

    The second time batch norms do not count the batch again, and nobody records attention.
    """
    return checkpoint(_run, module, function, *args, use_reentrant=False, **kwargs)


class _Twice(partial[Any]):
    """A module's forward in place of its own: copies and pickles of the module have one of theirs."""


def _forward(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not module.training or not torch.is_grad_enabled() or current_recorder() is not None:
        return forward(*args, **kwargs)
    return checkpointed(module, forward, *args, **kwargs)


def _run(module: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not in_backward():
        return function(*args, **kwargs)
    with _second_time(module):
        return function(*args, **kwargs)


@contextmanager
def _second_time(module: nn.Module) -> Iterator[None]:
    recorder = current_recorder()
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training]
    statistics = [dict(norm._buffers) for norm in norms]
    for norm in norms:  # counts into copies: without any it would keep other tensors than the first time
        norm._buffers.update({name: x if x is None else x.clone() for name, x in norm._buffers.items()})
    try:
        with nullcontext() if recorder is None else recorder.paused():
            yield
    finally:
        for norm, kept in zip(norms, statistics, strict=True):
            norm._buffers.update(kept)
