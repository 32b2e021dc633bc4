"""Adapters in the tasks: how a task's model gets one, and the file of it that a run leaves."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .. import adapters
from ..runtime.say import say

__all__ = ["ADAPTER_FILE", "adapt", "check_adapter", "save_adapter"]

ADAPTER_FILE = "adapter.safetensors"  # in a run folder


def check_adapter(args: Mapping[str, Any], frozen: str) -> None:
    """Raises a ValueError for arguments that do not go with an adapter; ``frozen`` is the one that freezes layers."""
    if args["adapter_args"] and not args["adapter"]:
        raise ValueError("adapter_args were given without adapter, the name of one: "
                         f"{', '.join(adapters.names())}")
    if args["adapter"] and args[frozen]:
        raise ValueError(f"adapter {args['adapter']} freezes the whole backbone: leave {frozen} out")


def adapt(model: nn.Module, args: Mapping[str, Any]) -> None:
    """Gives the model of a task the adapter that its arguments name, if they do.

    Raises:
        ValueError: There is no such adapter or option, or no place for it in the model.
    """
    if args.get("adapter"):
        adapters.attach(model, args["adapter"], **args.get("adapter_args") or {})


def save_adapter(model: nn.Module, run: Path) -> None:
    """Writes the adapter of a run's model, and its head, into the run folder, and says how many bytes they are."""
    path = run / ADAPTER_FILE
    size = adapters.save(model, path)
    say(f"The adapter and its head, without the backbone: {path} ({size:,} bytes)")
