"""Checkpoints are written whole or not at all, and a full disk is named."""
import errno
import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

__all__ = ["WholeFiles", "is_full"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk, of the user's quota, of what a file may hold


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
            unfinished.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error


def is_full(error: OSError) -> bool:
    """Whether it says that there is no room to write."""
    return error.errno in _FULL
