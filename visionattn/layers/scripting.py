"""What ``torch.jit.script`` cannot compile."""
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["unscripted"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def unscripted(function: _Function) -> _Function:
    """Makes ``torch.jit.script`` call a function or method as the Python code that it is.

    Scripted models run so, but are no file: PyTorch's refusal to save them quotes the function's name, which therefore
    says what can be done. (A dot in it would keep them from being scripted.)
    """
    function = torch.jit.ignore(function)
    function.__name__ += ", which TorchScript cannot save: use visionattn export, or trace the model"
    return function
