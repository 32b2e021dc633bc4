"""What a run goes on with: the newest of its checkpoints that can be read, and whether anything is left to do."""
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..runtime.say import say

__all__ = ["Resumable", "is_complete", "newest_checkpoint", "progress"]


class Resumable(NamedTuple):
    """A checkpoint that training can go on with.

    Attributes:
        path: The file.
        steps: Optimiser steps that were made.
        epochs: Epochs that were finished.
        batches: Batches of the epoch that was not.
    """

    path: Path
    steps: int
    epochs: int
    batches: int

    def place(self) -> str:
        """Where in the training it is, in words."""
        within = f" and {self.batches} batches" if self.batches else ""
        return f"after {self.epochs} epochs{within}, {self.steps} steps"


def newest_checkpoint(run: Path) -> Resumable | None:
    """The checkpoint of a run with the most steps that can be read and holds the state of the training.

    Says in one line which newer ones are damaged and passed over. They stay.

    Returns:
        None if the run has no checkpoint.

    Raises:
        ValueError: It has some, and none will do.
    """
    files = sorted(file for pattern in ("checkpoints/*.ckpt", "hpc_ckpt_*.ckpt") for file in run.glob(pattern)
                   if file.is_file())
    found, damaged = [], []
    for file in files:
        try:
            found.append(progress(file))
        except ValueError:
            damaged.append(file)
    # Of several with as many steps the last is the one that an epoch's end was written to, after the best.
    found.sort(key=lambda one: (one.steps, one.epochs, one.batches, one.path.name == "last.ckpt"), reverse=True)
    for one in found:
        if not _is_whole(one.path):
            damaged.append(one.path)
            continue
        if damaged:
            say(f"{_names(damaged)} cannot be read or gone on with: {one.path} is taken ({one.place()}).")
        return one
    if not files:
        return None
    raise ValueError(f"no checkpoint of {run} can be gone on with: {_names(files)} are damaged or hold weights alone. "
                     "They were left as they are; begin in another folder by --trainer.default_root_dir")


def progress(path: Path) -> Resumable:
    """How far the training of a checkpoint was; reads no weights.

    Raises:
        ValueError: The file is damaged, or holds no state of a training.
    """
    content: Any
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        loop = content["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]["current"]
        if not content["optimizer_states"]:
            raise ValueError("no optimiser")
        within = batches["ready"] if epochs["processed"] < epochs["ready"] else 0
        return Resumable(path, content["global_step"], epochs["processed"], within)
    except Exception as error:  # whatever a damaged file makes a reader raise
        raise ValueError(f"{path} is damaged or not the checkpoint of a training ({type(error).__name__})") from None


def is_complete(run: Path, found: Resumable, epochs: int | None, steps: int, tests: bool) -> bool:
    """Whether nothing is left to do in a run: its training has ended, and its end was tested.

    Args:
        run: The run folder.
        found: Its newest checkpoint.
        epochs: Number of epochs that are wanted; None or -1 for no such end.
        steps: Number of steps that are wanted; -1 for no such end.
        tests: Whether the run ends with a test.
    """
    try:
        summary = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return False
    ended = (epochs not in (None, -1) and found.epochs >= int(epochs or 0)) or 0 < steps <= found.steps
    ended = ended or bool(summary.get("stopped_early"))
    return ended and summary.get("steps") == found.steps and ("test" in summary or not tests)


def _is_whole(path: Path) -> bool:
    """Whether all bytes are those that were written: PyTorch would take a tensor of zeros that a lost block left."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _names(files: list[Path]) -> str:
    return ", ".join(map(str, files))
