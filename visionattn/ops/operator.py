"""Operators of ours: in graphs one node each, in plain eager calls the Python functions that they are.

PyTorch's dispatcher takes tens of microseconds for an operator that is written in Python, and its autograd hundreds:
more than the attention of a small map. Nothing but graphs, modes, subclasses and transforms needs either, so a call of
plain tensors that none of these sees goes past them.
"""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["Operator", "operator"]


class Operator:
    """A function and the operator that PyTorch knows it as; see :func:`operator`.

    Attributes:
        body: The function.
    """

    def __init__(self, name: str, body: Callable[..., Any]):
        self.body = body
        self._definition = torch.library.custom_op(name, body, mutates_args=())
        self._function: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any) -> Any:
        """Runs the function, or the operator where somebody would miss it."""
        if torch.compiler.is_compiling() or _is_watched():
            return self._definition(*args)
        recorded = False
        for x in args:  # one plain loop: a generator takes longer than all of it
            kind = type(x)
            if kind is Tensor or kind is nn.Parameter:
                if x.is_meta:
                    return self._definition(*args)
                recorded = recorded or x.requires_grad
            elif isinstance(x, Tensor):
                return self._definition(*args)
        if recorded and torch.is_grad_enabled():
            return self._definition(*args) if self._function is None else self._function.apply(*args)
        return self.body(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """As that of ``torch.library.custom_op``."""
        return self._definition.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As that of ``torch.library.custom_op``, of which the function of plain calls is made too."""
        self._definition.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self.body(*args)
            setup_context(ctx, args, output)
            return output

        self._function = type(
            self.body.__name__, (torch.autograd.Function,),
            {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an operator called ``name`` (``"visionattn::..."``) of a function of positional arguments, as
    ``torch.library.custom_op`` does, whose type annotations say its schema.

    The function computes new tensors, and no gradients: it may be called while autograd records, but not for tensors
    that require gradients. Autograd knows the operator by what :meth:`register_autograd` was given.
    """
    return lambda body: Operator(name, body)


def _is_watched() -> bool:
    """Whether anybody but autograd sees what is called: a mode, a transform, a trace, forward-mode differentiation."""
    return (torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._is_tracing() or forward_ad._current_level >= 0)
