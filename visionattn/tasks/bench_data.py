"""``visionattn bench data``: what a run's loader gives, what its model takes, and which of the two waits."""
import time
from typing import Any

import lightning.pytorch as pl
import torch

from .story import device_name

__all__ = ["DataClock", "arguments", "verdict"]

BATCHES = 20  # that are timed
FIRST = 3  # that are not: loader processes start, kernels are chosen


class DataClock(pl.Callback):
    """Times the loader by itself before the training, then training steps, and says what it found.

    Attributes:
        loaded: Images a second that the loader gives to a process that does nothing else.
        needed: Images a second that training takes where they are there.
    """

    loaded = needed = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws batches as training does, but trains on none."""
        images, started = 0, time.perf_counter()
        for number, batch in enumerate(trainer.datamodule.train_dataloader()):  # type: ignore[attr-defined]
            if number == BATCHES + FIRST:
                break
            if number < FIRST:
                images, started = 0, time.perf_counter()
            else:
                images += len(batch[0])
                self.loaded = images / (time.perf_counter() - started)
        self._images, self._seconds = 0, 0.0

    def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock: the batch is there."""
        self._wait(pl_module)
        self._started = time.perf_counter()

    def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stops it."""
        self._wait(pl_module)
        if batch_idx >= FIRST:
            self._images += len(batch[0])
            self._seconds += time.perf_counter() - self._started

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says what was found."""
        self.needed = self._images / self._seconds if self._images else 0.0
        workers = getattr(trainer.datamodule, "num_workers", None)  # type: ignore[attr-defined]
        print(verdict(self.loaded, self.needed, workers, device_name(pl_module.device)), flush=True)

    @staticmethod
    def _wait(pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)


def verdict(loaded: float, needed: float, workers: int | None, device: str) -> str:
    """Both rates in images a second, which of the two waits, and what can be done about it.

    Args:
        loaded: What the loader gives; 0 for too few batches to tell.
        needed: What the model takes.
        workers: Loader processes; 0 load in the training process, None if it is not known.
        device: What trains.
    """
    if not (loaded and needed):
        raise ValueError(f"an epoch must have more than {FIRST} batches to be timed: take a smaller "
                         "data.init_args.batch_size")
    count = "an unknown number of" if workers is None else workers
    lines = [f"The loader gives {loaded:,.1f} images/s ({count} loader processes).",
             f"The model takes {needed:,.1f} images/s ({device})."]
    if workers == 0:
        together = 1 / (1 / loaded + 1 / needed)
        lines.append(f"They take turns, so that a run sees about {together:,.1f}: set data.init_args.num_workers to 1 "
                     "or more where that is much less than the model takes.")
    elif loaded < needed:
        lines.append(f"The model waits, {1 - loaded / needed:.0%} of its time: raise data.init_args.num_workers (up to "
                     "the cores of this machine), store smaller images, or leave out costly augmentation.")
    else:
        lines.append(f"The loader waits: its processes are idle {1 - needed / loaded:.0%} of their time.")
    return "\n".join(lines)


def arguments(argv: list[str], folder: str) -> list[str]:
    """The ``fit`` that is timed: of the options given, with a short epoch; what it writes goes to ``folder``."""
    config = ["--config", argv[0], *argv[1:]] if argv and not argv[0].startswith("-") else argv
    return ["fit", *config, "--trainer.max_epochs=1", f"--trainer.limit_train_batches={BATCHES + FIRST}",
            "--trainer.limit_val_batches=0", "--trainer.limit_test_batches=0", "--trainer.num_sanity_val_steps=0",
            "--trainer.enable_checkpointing=false", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={folder}",
            "--trainer.callbacks+=visionattn.tasks.bench_data.DataClock"]
