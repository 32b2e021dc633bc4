"""What a training says while it runs: a line at its start, one an epoch and one at its end, beside the progress bar."""
import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor
from tqdm import tqdm

from .midepoch import resumes_within_epoch

__all__ = ["EpochLines", "OneBar", "device_name", "duration", "figures"]


class EpochLines(pl.Callback):
    """Prints a line an epoch: loss, metric, best so far, learning rate, images a second, time left.

    The metric is the module's ``monitor``, where it has one. ``lr`` is logged once an epoch: the rate of the parameter
    group that has the highest, in the last step of the epoch. Epochs are counted from 1.

    Attributes:
        best: Best value of the metric; None as long as there is none.
        best_epoch: Its epoch.
        epochs: Number of finished epochs, those before a resume included.
        seconds: What they took, validation included.
        images: Number of images that were trained on, in all processes.
        training_seconds: What that took without validation.
    """

    _in_epoch = False

    def __init__(self) -> None:
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.epochs, self.images, self.seconds, self.training_seconds = 0, 0, 0.0, 0.0
        self._begun: dict[str, Any] = {}  # what an epoch had before a resume

    def state_dict(self) -> dict[str, Any]:
        """All attributes, so that a resumed run goes on counting, within an epoch too."""
        names = "best", "best_epoch", "epochs", "images", "seconds", "training_seconds"
        begun = {name: getattr(self, name) for name in ("_seen", "_validating", "_rate") if self._in_epoch}
        begun |= {"_seconds": time.monotonic() - self._epoch_started} if self._in_epoch else {}
        return {name: getattr(self, name) for name in names} | {"_begun": begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave."""
        vars(self).update(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says what is trained, and on what."""
        self._here = 0  # epochs in this process, by whose mean the time left is told
        self._started = time.monotonic()
        if resumes_within_epoch(trainer):
            self.on_train_epoch_start(trainer, pl_module)
            self._epoch_started -= self._begun.pop("_seconds", 0.0)
            vars(self).update(self._begun)
        self._begun = {}
        sizes = [(weight.numel(), weight.requires_grad) for weight in pl_module.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, wanted in sizes if wanted)
        args = getattr(pl_module, "hparams", {})
        name = args.get("backbone") or type(pl_module).__name__
        share = "all trained" if trained == total else f"{trained:,} of them trained"
        devices = f"{trainer.world_size} x " * (trainer.world_size > 1)
        last = _last_epoch(trainer)
        goal = f"{last} epoch{'s' * (last > 1)}" if last else "without an end"
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready if resumes_within_epoch(trainer) else 0
        resumed = f", from epoch {trainer.current_epoch + 1}{f', batch {done + 1}' * (done > 0)} on"
        resumed *= trainer.current_epoch + done > 0
        _say(trainer, f"Training {name} ({total:,} parameters, {share}) on {devices}{device_name(pl_module.device)}: "
                      f"{goal} of {trainer.num_training_batches} batches{resumed}")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clocks of the epoch."""
        self._epoch_started = time.monotonic()
        self._seen, self._validating, self._validated, self._rate = 0, 0.0, False, math.nan
        self._in_epoch = True

    def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts the images and notes the rate that they are trained with."""
        self._seen += _length(batch)
        self._rate = max((group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups),
                         default=math.nan)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock of training."""
        self._validation_started = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on with the clock of training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validating += time.monotonic() - self._validation_started
            self._validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the line."""
        self._in_epoch = False
        pl_module.log("lr", self._rate, sync_dist=True)
        metrics = trainer.callback_metrics  # computed by all processes together
        now = time.monotonic()
        trained = now - self._epoch_started - self._validating
        images = self._seen * trainer.world_size
        self._here += 1
        self.epochs = trainer.current_epoch + 1
        self.seconds += now - self._epoch_started
        self.images += images
        self.training_seconds += trained
        parts = [f"loss {float(metrics['train/loss']):.4g}"] if "train/loss" in metrics else []
        monitor = getattr(pl_module, "monitor", None)
        if self._validated and monitor in metrics:
            value = float(metrics[monitor])
            if self._improves(value, getattr(pl_module, "monitor_mode", "min")):
                self.best, self.best_epoch = value, self.epochs
            known = "no best yet" if self.best is None else "the best so far" if self.best_epoch == self.epochs else (
                f"best {self.best:.4f} in epoch {self.best_epoch}")
            parts.append(f"{monitor} {value:.4f} ({known})")
            if "val/loss" in metrics and monitor != "val/loss":
                parts.append(f"val/loss {float(metrics['val/loss']):.4g}")
        parts.append(f"lr {self._rate:.2g}")
        if images and trained:
            parts.append(f"{images / trained:,.0f} images/s")
        last = _last_epoch(trainer)
        if last:
            left = max(last - self.epochs, 0) * (now - self._started) / self._here
            parts.append(f"{duration(left)} left")
        width = len(str(last or ""))
        _say(trainer, f"epoch {self.epochs:>{width}}{f'/{last}' if last else ''}: {', '.join(parts)}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says how long it took and what was best."""
        monitor = getattr(pl_module, "monitor", None)
        best = "" if self.best is None else f": best {monitor} {self.best:.4f} in epoch {self.best_epoch}"
        if self._here:
            _say(trainer, f"Trained {self.epochs} epoch{'s' * (self.epochs > 1)} in {duration(self.seconds)}{best}")

    def _improves(self, value: float, mode: str) -> bool:
        if math.isnan(value):
            return False
        return self.best is None or (value >= self.best if mode == "max" else value <= self.best)


class OneBar(TQDMProgressBar):
    """Lightning's bar of an epoch with the loss of the last step; the validation is in the epoch's line."""

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begins the bar of an epoch that is gone on with."""
        super().on_train_start(trainer, *args)
        if resumes_within_epoch(trainer):
            self.on_train_epoch_start(trainer, *args)

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Counts epochs from 1, as the lines do."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}")

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What stands beside the bar."""
        return {key.removeprefix("train/").removesuffix("_step"): value
                for key, value in super().get_metrics(trainer, pl_module).items()
                if key != "v_num" and not key.endswith("_epoch")}


def figures(metrics: dict[str, Any]) -> str:
    """Metrics of one split on a line, without its name."""
    return ", ".join(f"{key.partition('/')[2]} {float(value):.4g}" for key, value in metrics.items())


def duration(seconds: float) -> str:
    """``0:07``, ``12:34`` or ``1:23:45``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def device_name(device: torch.device) -> str:
    """Name of a graphics card, or ``CPU``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _say(trainer: pl.Trainer, text: str) -> None:
    """Prints a line in the first process, over the progress bar if there is one."""
    if trainer.is_global_zero:
        tqdm.write(text)
        sys.stdout.flush()


def _last_epoch(trainer: pl.Trainer) -> int | None:
    """Number of epochs that the run is planned for; None if there is no end or it cannot be told."""
    planned = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        planned.append(trainer.max_epochs)
    if trainer.max_steps > 0 and math.isfinite(trainer.num_training_batches):
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        planned.append(math.ceil(trainer.max_steps / steps))
    return min(planned, default=None)


def _length(batch: Any) -> int:
    """Number of images in a batch of our tasks; 0 if it is of another kind."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    return len(first) if isinstance(first, (Tensor, list, tuple)) else 0
