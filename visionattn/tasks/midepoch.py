"""Checkpoints within epochs: every so often and when a run is told to stop, with all that an exact resume needs."""
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ..runtime.say import say

__all__ = ["FitLoop", "MidEpochCheckpoint", "resumes_within_epoch"]


class FitLoop(_FitLoop):
    """Goes on at the end of an epoch whether the training's end is told in epochs or in steps.

    Of the latter Lightning would end the finished epoch again, count it twice, and shuffle the next like the one after,
    and leave a last validation out that was begun.
    """

    def _iteration_based_training(self) -> bool:
        return False

    @property
    def done(self) -> bool:
        """Whether the training has ended, and no validation of a resumed run is to be done first."""
        validated: Any = self.epoch_loop.val_loop.batch_progress.total
        if self.restarting and validated.ready > validated.completed:
            return False
        return super().done


class MidEpochCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` within epochs: every ``minutes``, and at SIGTERM, after which the run ends.

    At SIGTERM (pre-emption) the training stops after the batch that it is at, in the validation too, and one process
    alone also while it waits for data. Several processes decide together after each batch, so that it does not matter
    which of them were told and when; Lightning's handler, which talks to the other processes from within the signal, is
    replaced. Beside what Lightning saves, the checkpoint has the gradients of a step that is not complete and the means
    of the epoch so far.

    Under SLURM, SIGUSR1 (``#SBATCH --signal=USR1@120``) stops the run likewise, and its job is queued again (``scontrol
    requeue``): with ``--resume auto`` it goes on where it was. Lightning would save from within the signal.

    Args:
        minutes: Time from one checkpoint to the next. They are written after an optimiser step.
    """

    def __init__(self, minutes: float = 30.0):
        self.minutes = minutes
        self._told = False  # to stop
        self._requeues = False  # the job, then
        self._interrupted = False  # while waiting for data
        self._validating = False  # the state to be saved is that before the validation
        self._averaged = False  # in validation: the model has the averaged weights, if there are such
        self._means: dict[str, Any] = {}  # of the epoch before a resume
        self._gradients: dict[str, torch.Tensor] = {}

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listens to SIGTERM."""
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listens to SIGTERM; puts gradients and means of the resumed epoch where they were."""
        self._saved = time.monotonic()
        self._listen(trainer)
        for name, parameter in pl_module.named_parameters():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter.device)
        self._gradients = {}
        if trainer.fit_loop.epoch_loop._num_ready_batches_reached():  # no batch follows, after which it would be done
            self._take_means(trainer, pl_module)

    def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Saves if it is time to, or if the run was told to stop; it then ends when the batch is logged."""
        self._take_means(trainer, pl_module)
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert fetcher is not None
        told, due = self._agree(trainer, time.monotonic() - self._saved >= self.minutes * 60)
        if not (told or due) or loop._is_training_done or loop._should_check_val_fx(fetcher):
            return  # else a validation or the end of the epoch comes first, where it is saved too
        if loop._should_accumulate() and not (told and _keeps_gradients(trainer)):
            return
        self._save(trainer)
        if told:
            trainer._signal_connector.received_sigterm = True  # which ends it behind this hook, in all processes

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends a run that was told to stop, after the epoch's own checkpoints."""
        self._saved = time.monotonic()
        if self._agree(trainer)[0]:
            trainer._signal_connector.received_sigterm = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves what is trained, and ends, if the run was told to stop."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
        total.ready = total.started = total.completed  # also where a validation is begun again
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        # The processes may have one batch more or less: they agree after as many as all have.
        self._common = float(sum(batches))
        if trainer.world_size > 1:
            less = torch.tensor(-self._common, device=pl_module.device)
            self._common = -float(trainer.strategy.reduce(less, reduce_op="max"))
        self._stop_in_validation(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Knows that the weights were exchanged."""
        self._averaged = True

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Saves what is trained, and ends, if the run was told to stop."""
        if trainer.state.fn == TrainerFn.FITTING and self._common > 0:
            self._common -= 1
            self._stop_in_validation(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Knows that the weights were exchanged again."""
        self._averaged = False

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In the test that a fit ends with nothing is to be saved: SLURM's job may be queued again at once."""
        process, requeue = os.getpid(), _requeue_signal(trainer)
        if requeue is not None and threading.current_thread() is threading.main_thread():
            signal.signal(
                requeue, lambda *_: _requeue() if trainer.is_global_zero and os.getpid() == process else None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Saves what is trained if the signal came while the process waited for data; queues a job of SLURM's again."""
        if not isinstance(exception, SIGTERMException):
            return
        if self._interrupted and not trainer.sanity_checking:
            if self._averaged:
                self._save_before_validation(trainer, pl_module)
            elif trainer.fit_loop.epoch_loop.batch_progress.current.ready:  # else the epoch before is saved
                self._save(trainer)
        self._interrupted = False
        if self._requeues and trainer.is_global_zero:
            _requeue()

    def on_save_checkpoint(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds gradients and means; a validation that was begun is to be begun again."""
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if trainer.state.fn != TrainerFn.FITTING or epochs.processed == epochs.ready:
            return
        checkpoint["epoch_means"] = _means_of(trainer)
        if trainer.fit_loop._should_accumulate() and _keeps_gradients(trainer):
            checkpoint["gradients"] = {
                name: trainer.strategy.reduce(parameter.grad.clone(), reduce_op="mean")
                for name, parameter in pl_module.named_parameters() if parameter.grad is not None}
        if self._validating:
            # As Lightning counts a validation whose first batch was begun: it then goes back to its start.
            begun, none = {"ready": 1, "started": 1, "processed": 0, "completed": 0}, dict.fromkeys(
                ("ready", "started", "processed", "completed"), 0)
            checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"] = {
                "total": begun, "current": none, "is_last_batch": False}

    def on_load_checkpoint(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes them from there."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._means, self._gradients = checkpoint.get("epoch_means", {}), checkpoint.get("gradients", {})

    def _listen(self, trainer: pl.Trainer) -> None:
        process, requeue = os.getpid(), _requeue_signal(trainer)

        def stop(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # one that loads images, which has just been forked
                return
            self._told = True
            self._requeues |= number == requeue
            if trainer.world_size == 1 and _waits_for_data(frame):
                self._interrupted = True
                raise SIGTERMException

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, requeue):
                if number is not None:
                    signal.signal(number, stop)  # Lightning puts the one before back at the end

    def _agree(self, trainer: pl.Trainer, due: bool = False) -> tuple[bool, bool]:
        """Whether any process was told to stop, and is due; all know then whether the job is to be queued again."""
        if trainer.world_size > 1:
            flags = torch.tensor(
                [self._told, self._requeues, due], dtype=torch.float32, device=trainer.strategy.root_device)
            self._told, self._requeues, due = map(bool, trainer.strategy.reduce(flags, reduce_op="max").tolist())
        return self._told, due

    def _stop_in_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._agree(trainer)[0]:
            return
        if not trainer.sanity_checking:
            self._save_before_validation(trainer, pl_module)
        raise SIGTERMException

    def _save_before_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._averaged:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.on_validation_epoch_end(trainer, pl_module)  # the raw weights again
            self._averaged = False
        self._validating = True
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir, "checkpoints", "last.ckpt"), weights_only=False)
        self._saved = time.monotonic()

    def _take_means(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds what the epoch had before a resume; after a batch, as the first of an epoch sets all to nothing."""
        results = trainer.fit_loop.epoch_loop._results
        for key, saved in self._means.items():
            if key not in results:
                sync = _Sync(fn=trainer.strategy.reduce, _should=saved["sync"], rank_zero_only=saved["rank_zero_only"])
                meta = _Metadata(**saved["meta"])
                meta.sync = sync
                results[key] = _ResultMetric(meta, is_tensor=True).to(pl_module.device)
            metric = results[key]
            metric.value = metric.value + saved["value"].to(metric.value.device)
            metric.cumulated_batch_size = metric.cumulated_batch_size + saved["size"].to(metric.value.device)
            metric._update_count, metric._computed = metric._update_count + 1, None
        self._means = {}


def resumes_within_epoch(trainer: pl.Trainer) -> bool:
    """Whether a training that starts goes on within an epoch, the hooks of whose start Lightning leaves out then."""
    return trainer.fit_loop.restarted_mid_epoch or trainer.fit_loop.restarted_on_epoch_end


def _means_of(trainer: pl.Trainer) -> dict[str, Any]:
    """The sums whose means are logged at the end of the epoch, those of all processes."""
    kept = {}
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        meta = metric.meta
        if metric.is_tensor and meta.on_epoch and meta.is_mean_reduction and metric._update_count:
            kept[key] = {
                "meta": {name: getattr(meta, name) for name in (
                    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx",
                    "dataloader_idx", "metric_attribute")},
                "sync": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only,
                "value": meta.sync(metric.value.clone()), "size": meta.sync(metric.cumulated_batch_size.clone()),
            }
    return kept


def _keeps_gradients(trainer: pl.Trainer) -> bool:
    """Whether every process has all gradients, each its own, which is their mean in the end."""
    return type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy)


def _waits_for_data(frame: FrameType | None) -> bool:
    """Whether the process is between two batches, where nothing is half done."""
    while frame is not None:
        if frame.f_code is _DataFetcher.__next__.__code__:
            return True
        frame = frame.f_back
    return False


def _requeue_signal(trainer: pl.Trainer) -> signal.Signals | None:
    """What SLURM sends to a job that is to be queued again; None elsewhere."""
    environment: Any = trainer._accelerator_connector.cluster_environment
    requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
    return environment.requeue_signal if requeues else None


def _requeue() -> None:
    """Queues the SLURM job of this process again, which ends it; says in one line if that cannot be."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        fault = str(error)
    else:
        # SLURM may end the command together with the job that it is of.
        fault = "" if done.returncode <= 0 else " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    say(f"Warning: SLURM job {job} could not be queued again (scontrol requeue {job}: {fault})." if fault else
        f"SLURM job {job} is queued again.")
