"""A run writes files whole or not at all, names a full disk, and takes the last of equally good epochs for the best."""
import csv
import errno
import io
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from torch import Tensor

__all__ = ["LatestBest", "RunLogger", "WholeConfig", "WholeFiles", "is_full"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk, of the user's quota, of what a file may hold


class LatestBest(ModelCheckpoint):
    """Keeps the last of equally good epochs: on few validation images many are equal, and later ones learned more."""

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether ``current``, the monitored value, is the best so far or as good as that."""
        equal = current is not None and self.best_model_score is not None and bool(current == self.best_model_score)
        return equal or super().check_monitor_top_k(trainer, current)


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside the one that it replaces and then renames it; keeps the ``last.ckpt`` before.

    Lightning's writes into the system's temporary folder and moves the file, which is a copy where that is another
    disk: one that is full or killed then leaves half a checkpoint in place of the last good one.

    Args:
        damaged: A ``last.ckpt`` that is not to be kept as the one before.
    """

    def __init__(self, damaged: Path | None = None):
        self.damaged = damaged

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes ``checkpoint`` to ``path``; what ``last.ckpt`` was is ``previous.ckpt`` then.

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
        unfinished, before = path.with_name(f"{path.name}.part"), path.with_name("previous.ckpt.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())  # renamed first, it would be empty after a power failure
            keeps = path.name == "last.ckpt" and path.is_file() and path != self.damaged
            if keeps:
                _link(path, before)
            unfinished.replace(path)
            if keeps:
                before.replace(path.with_name("previous.ckpt"))
            elif path == self.damaged:
                self.damaged = None
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:  # also of an interrupt
            unfinished.unlink(missing_ok=True)


class WholeConfig(LightningArgumentParser):
    """Replaces a ``config.yaml`` at once: a run that goes on writes the file that it may have been started from."""

    def save(self, cfg: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        """Writes the configuration to ``path``, as jsonargparse does."""
        if "://" in str(path):
            super().save(cfg, path, *args, **kwargs)
            return
        unfinished = Path(f"{path}.part")
        super().save(cfg, str(unfinished), *args, **kwargs)
        unfinished.replace(path)


class RunLogger(CSVLogger):
    """``metrics.csv`` of a run, in which a resumed one goes on, where Lightning's would begin it anew.

    Args:
        run: The run folder.
        resumed: Whether the run goes on.
    """

    def __init__(self, run: Path, resumed: bool):
        super().__init__(run, name="", version="")
        self._resumed = resumed

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the file."""
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir, self._resumed)
        return self._experiment


class _Rows(ExperimentWriter):
    def __init__(self, log_dir: str, resumed: bool):
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if not resumed:
            path.unlink(missing_ok=True)
        elif path.exists():
            text = path.read_text(encoding="utf-8")
            if not text.endswith("\n"):  # killed in the middle of a row, whose last number may lack digits
                _replace_text(path, text[:text.rfind("\n") + 1])
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _check_log_dir_exists(self) -> None:
        """Lightning's removes the file."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        _replace_text(path, text.getvalue())


def is_full(error: OSError) -> bool:
    """Whether it says that there is no room to write."""
    return error.errno in _FULL


def _link(path: Path, name: Path) -> None:
    """Gives a file a second name, for which nothing is written."""
    name.unlink(missing_ok=True)
    try:
        name.hardlink_to(path)
    except OSError:  # a file system that has no second names: the file is without its first for a moment
        path.replace(name)


def _replace_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text, encoding="utf-8", newline="")
    unfinished.replace(path)
