"""Checkpoints are written whole or not at all, a full disk is named, and of equally good epochs the last is best."""
import errno
import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

__all__ = ["LatestBest", "WholeFiles", "is_full"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk, of the user's quota, of what a file may hold


class LatestBest(ModelCheckpoint):
    """Keeps the last of equally good epochs: on few validation images many are equal, and later ones learned more."""

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether ``current``, the monitored value, is the best so far or as good as that."""
        equal = current is not None and self.best_model_score is not None and bool(current == self.best_model_score)
        return equal or super().check_monitor_top_k(trainer, current)


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside the one that it replaces and then renames it.

    Lightning's writes into the system's temporary folder and moves the file, which is a copy where that is another
    disk: one that is full or killed then leaves half a checkpoint in place of the last good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes ``checkpoint`` to ``path``.

        Raises:
            OSError: It cannot be written, of ``path``. What was there before is there still.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        # In memory first: of a file that cannot be written torch.save tells no reason.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        unfinished = path.with_name(f"{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                file.write(buffer.getbuffer())
            unfinished.replace(path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:  # also of an interrupt
            unfinished.unlink(missing_ok=True)


def is_full(error: OSError) -> bool:
    """Whether it says that there is no room to write."""
    return error.errno in _FULL
