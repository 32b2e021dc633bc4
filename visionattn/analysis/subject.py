"""The model that ``explain`` and ``analyze`` look into, as their command lines name it."""
import argparse
from typing import Any

from torch import nn

from ..predictor import Predictor

__all__ = ["add_model", "label_of", "model_of"]


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say which model it is, and where it runs."""
    parser.add_argument("model", metavar="MODEL", help="folder or .ckpt of a run, or name of a model, timm's or ours")
    parser.add_argument("--checkpoint", metavar="FILE", help="of a model's name: its weights")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")


def model_of(name: str, predictor: Predictor) -> nn.Module:
    """The module that a predictor runs.

    Args:
        name: Of the model, as it is shown.
        predictor: Of a run or a model's name.

    Raises:
        ValueError: The predictor runs an exported file.
    """
    engine: Any = predictor.engine
    task = getattr(engine, "task", None)
    model: nn.Module | None = getattr(engine, "model", None) if task is None else task.model
    if model is None:
        raise ValueError(f"{name} is an exported file, in which nothing can be looked at: give the run or the model")
    return model


def label_of(name: str, predictor: Predictor, target: str) -> int:
    """The place of a class among those of a model, from 0 on.

    Args:
        name: Of the model, as it is shown.
        predictor: Of it.
        target: Name of the class.

    Raises:
        ValueError: There is no such class, or several are called so.
    """
    names = predictor.names
    if names.count(target) == 1:
        return names.index(target)
    if target in names:
        raise ValueError(f"{name} has {names.count(target)} classes that are called {target}")
    shown = f"its classes are {', '.join(names[:10])}{' ...' * (len(names) > 10)}" if names else "it has no classes"
    raise ValueError(f"{name} has no class {target}: {shown}")
