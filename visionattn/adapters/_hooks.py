"""How an adapter works inside a model without changing its modules: by hooks, or in place of a module's forward.

What is bound so follows copies and pickles of the model, which have an adapter of their own. Within a model one thread
computes at a time.
"""
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._places import Block, branch_ends

__all__ = ["hook_branch", "hook_call", "plain", "replace_forward", "restore_forward"]

Function = Callable[[Tensor, Tensor], Tensor]


def hook_call(adapter: Any, module: nn.Module, function: Function) -> RemovableHandle:
    """Makes ``module(x, ...)`` give ``function(x, module(x, ...))`` while the adapter is active."""
    return module.register_forward_hook(partial(_call, adapter, function))


def hook_branch(adapter: Any, block: Block, layer: str, function: Function) -> list[RemovableHandle]:
    """Makes a block add ``function(x, branch)`` in place of its ``branch`` about ``layer`` while the adapter is active.

    The tokens ``x`` are what the first of the branch's norm and layer is given; the branch ends with the first
    stochastic depth after the layer.

    Raises:
        ValueError: The block has no such branch.
    """
    parts = dict(block.module.named_children())
    norm = {"attn": "norm1", "mlp": "norm2"}[layer]
    names = list(parts)
    if not {norm, layer} <= parts.keys():
        raise ValueError(f"no adapter can go beside {layer} of {block.name}: the block has not both {norm} and {layer}")
    first = norm if names.index(norm) < names.index(layer) else layer  # Swin v2 has its norms behind
    branch = _Branch(adapter, f"{block.name}.{layer}", function)
    return [
        block.module.register_forward_pre_hook(partial(_begin, branch)),
        parts[first].register_forward_pre_hook(partial(_enter, branch)),
        parts[layer].register_forward_hook(partial(_pass, branch)),
        *(end.register_forward_hook(partial(_leave, branch)) for end in branch_ends(block.module)),
        block.module.register_forward_hook(partial(_finish, branch)),
    ]


def replace_forward(adapter: Any, module: nn.Module, function: Callable[..., Any]) -> None:
    """Makes ``module(...)`` be ``function(module, ...)`` while the adapter is active."""
    own: Any = module.__dict__.get("forward")
    if isinstance(own, _Instead):
        own.functions.append((adapter, function))
    else:
        module.forward = _Instead(module, own, [(adapter, function)])


def restore_forward(adapter: Any, module: nn.Module) -> None:
    """Undoes :func:`replace_forward` of an adapter."""
    instead: Any = module.__dict__["forward"]
    instead.functions = [pair for pair in instead.functions if pair[0] is not adapter]
    if not instead.functions:
        del module.forward
        if instead.own is not None:
            module.forward = instead.own


def plain(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module that an adapter works in place of."""
    instead: Any = module.__dict__.get("forward")
    if not isinstance(instead, _Instead):
        return module.forward
    return instead.own or partial(type(module).forward, module)


class _Branch:
    """One branch of a block on its way: the tokens that entered it, until it is left.

    A plain object, which the hooks of one block share; its tensor lives for the time of one branch.
    """

    def __init__(self, adapter: Any, name: str, function: Function):
        self.adapter, self.name, self.function = adapter, name, function
        self.tokens: Tensor | None = None
        self.inside = False


def _begin(branch: _Branch, module: nn.Module, args: Any) -> None:
    branch.tokens, branch.inside = None, False


def _enter(branch: _Branch, module: nn.Module, args: Any) -> None:
    if branch.adapter.active:
        branch.tokens = args[0]


def _pass(branch: _Branch, module: nn.Module, args: Any, output: Any) -> None:
    branch.inside = branch.tokens is not None


def _leave(branch: _Branch, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    if not branch.inside:
        return None
    tokens, branch.tokens, branch.inside = branch.tokens, None, False
    assert tokens is not None
    return branch.function(tokens, output)


def _finish(branch: _Branch, module: nn.Module, args: Any, output: Any) -> None:
    if branch.tokens is not None:
        branch.tokens, branch.inside = None, False
        raise RuntimeError(f"no adapter can go into {branch.name}: the block has no stochastic depth behind it")


def _call(adapter: Any, function: Function, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    return function(args[0], output) if adapter.active else None


class _Instead:
    """A module's forward while adapters work in place of it: that of the active one, or the module's own."""

    def __init__(self, module: nn.Module, own: Any, functions: list[tuple[Any, Callable[..., Any]]]):
        self.module, self.own, self.functions = module, own, functions

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for adapter, function in self.functions:
            if adapter.active:
                return function(self.module, *args, **kwargs)
        return plain(self.module)(*args, **kwargs)
