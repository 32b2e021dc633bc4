"""What the tasks share: seeds that survive a resume, averaged weights, and checkpoints that stand alone."""
import json
import math
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer

from ..adapters import adapters_of
from ..data.loading import seed_random
from ..dense import backbone_of
from ..layers import checkpoint_attention
from ..runtime.engine import Meaning
from ..runtime.say import say
from ..runtime.writers import open_results
from .averaging import MovingAverage
from .findings import Findings, Mistakes
from .freezing import Freezing
from .midepoch import resumes_within_epoch
from .optim import check_optimizer, cosine_with_warmup, make_optimizer, poly_with_warmup
from .run_folder import Moved, relocated
from .sharding import FullySharded

__all__ = ["Task", "check_arguments"]


class Task(pl.LightningModule):
    """A LightningModule whose hyper-parameters ``args`` hold those of the optimiser and ``ema_decay`` among others."""

    model: Any  # what is trained and what checkpoints are of
    args: Any  # what the constructor was given, by name
    results: Any  # of a prediction, while it goes on
    freezing: Freezing | None = None  # what does not train, or not yet
    sizes_vary = False  # whether a training has images of more than one size
    part: str | None = None  # in a training of several tasks: the name of this one

    @property
    def data(self) -> Any:
        """The data module; of a training of several tasks this one's; None where there is none."""
        data: Any = getattr(self._trainer, "datamodule", None)
        return data if self.part is None or data is None else data.parts[self.part]

    @property
    def run_folder(self) -> Path:
        """Where results are written."""
        return Path(self.trainer.default_root_dir, self.part or "")

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Logs as Lightning does; ``val/loss`` of one of several tasks is ``val/<task>/loss``."""
        if self.part is None:
            super().log(name, *args, **kwargs)
            return
        split, _, what = name.partition("/")
        whole: Any = self.trainer.lightning_module
        whole.log(f"{split}/{self.part}/{what}", *args, add_dataloader_idx=False,
                  **{key: value for key, value in kwargs.items() if key != "add_dataloader_idx"})

    def configure_callbacks(self) -> list[pl.Callback]:
        """The moving average of the weights, while fitting."""
        if self.args.ema_decay is None or self.trainer.state.fn != "fit":
            return []
        return [MovingAverage(self.args.ema_decay)]

    def configure_model(self) -> None:
        """Cuts the weights into pieces where the strategy is ``fsdp2``."""
        strategy = getattr(self._trainer, "strategy", None)
        if isinstance(strategy, FullySharded):
            strategy.shard(self)
        elif isinstance(strategy, FSDPStrategy):
            raise ValueError("the strategy fsdp knows neither our averages nor our checkpoints: take fsdp2")

    def setup(self, stage: str) -> None:
        """Before a fit: makes the model train as it is asked for: its memory, order of channels, compiled."""
        if stage != "fit":
            return
        if self.args.get("adapter") and not (
                self.args.pretrained or self.args.checkpoint_path or self.trainer.ckpt_path):
            say("Warning: the backbone under the adapter has random weights: set pretrained or checkpoint_path.")
        if self.args.clip_agc is not None and self.trainer.gradient_clip_val is not None:
            raise ValueError("model.init_args.clip_agc and trainer.gradient_clip_val were both given; choose one")
        self._set_checkpointing(True)
        if self.args.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if self.args.compile:
            # PyTorch's inductor, on a CPU, cannot order a convolution's map whose size varies.
            fails = self.sizes_vary and self.trainer.strategy.root_device.type == "cpu"
            for part in self.compiled():
                part.compile(options={"layout_optimization": False} if fails else None)

    def teardown(self, stage: str) -> None:
        """After a fit: a model that computes nothing twice, as it is exported or scripted."""
        if stage == "fit":
            self._set_checkpointing(False)

    def compiled(self) -> list[nn.Module]:
        """What a training step calls of the model and can be compiled."""
        return [self.model]

    def _set_checkpointing(self, enable: bool) -> None:
        """Begins or ends to compute what ``grad_checkpointing`` says a second time."""
        if self.args.grad_checkpointing == "attention":
            checkpoint_attention(backbone_of(self.model), enable)
        elif self.args.grad_checkpointing:
            try:
                backbone_of(self.model).set_grad_checkpointing(enable)
            except (AttributeError, AssertionError):
                raise ValueError(
                    f"{self.args.backbone} does not support grad_checkpointing true: take attention or leave it out"
                ) from None

    def configure_gradient_clipping(
            self, optimizer: Optimizer, gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None) -> None:
        """Clips as the trainer says or, with ``clip_agc``, by the norm of the weights; a classifier's head is not."""
        if self.args.get("clip_agc") is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        head = self.model.get_classifier() if hasattr(self.model, "get_classifier") else None
        exempt = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
        adaptive_clip_grad(
            [parameter for parameter in self.model.parameters() if id(parameter) not in exempt], self.args.clip_agc)

    def on_train_epoch_start(self) -> None:
        """Frees the layers whose turn it is; tells adapters which epoch begins."""
        for adapter in adapters_of(self.model).values():
            adapter.begin_epoch(self.current_epoch)
        if self.freezing:
            self.train()  # also what is freed now
            before = self.freezing.number(self.current_epoch - 1) if self.current_epoch else None
            layers, frozen = len(self.freezing.layers), self.freezing.number(self.current_epoch)
            if frozen != before:
                say(f"Epoch {self.current_epoch + 1}: {frozen} of {layers} layers are frozen.")

    def on_train_start(self) -> None:
        """Within an epoch that is gone on with: frees its layers and tells adapters."""
        if resumes_within_epoch(self.trainer):
            Task.on_train_epoch_start(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds by the run's seed and the step, as in a run that was never interrupted."""
        if "PL_GLOBAL_SEED" in os.environ:  # set by seed_everything
            seed_random([int(os.environ["PL_GLOBAL_SEED"]), self.current_epoch, self.global_rank, batch_idx],
                        devices=self.device.type != "cpu")

    def train(self, mode: bool = True) -> "Task":
        """Sets the mode of what is not frozen."""
        super().train(mode)
        if mode and self.freezing:
            self.freezing.set_modes(self.current_epoch if self._trainer is not None else 0)
        return self

    def log_training(self, loss: Tensor, parts: Mapping[str, Tensor], images: int) -> None:
        """Logs the loss of a batch of so many images as ``train/loss``, and its ``parts`` by their names."""
        common: dict[str, Any] = dict(on_step=True, on_epoch=True, batch_size=images, sync_dist=True)
        self.log("train/loss", loss, prog_bar=True, **common)
        self.log_dict({f"train/{name}": part for name, part in parts.items()}, **common)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Takes the gradients of layers that do not train yet away, so that the step leaves them as they are."""
        if self.freezing:
            for parameter in self.freezing.frozen(self.current_epoch):
                parameter.grad = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes a checkpoint stand alone: rebuilding from it needs neither a download nor the file it started from."""
        checkpoint["hyper_parameters"] |= {"pretrained": False, "checkpoint_path": None}
        data = self.data
        for key in ("image_settings", "category_ids"):  # so that prediction needs no data
            if getattr(data, key, None) is not None:
                checkpoint["hyper_parameters"][f"_{key}"] = getattr(data, key)
        normalisation = getattr(data, "normalisation", None)
        if normalisation is not None:  # what an exported file says of its images
            checkpoint["hyper_parameters"]["_mean"], checkpoint["hyper_parameters"]["_std"] = map(list, normalisation)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes a run that was moved where it is: callbacks know its best checkpoint by the path that it had."""
        savers = getattr(self._trainer, "checkpoint_callbacks", [])
        for saver in savers:
            state = checkpoint.get("callbacks", {}).get(saver.state_key)
            if isinstance(saver, ModelCheckpoint) and state and state.get("dirpath") != saver.dirpath:
                moved = Moved(str(state["dirpath"]), Path(str(saver.dirpath)))
                checkpoint["callbacks"][saver.state_key] = relocated(state, moved)

    @property
    @abstractmethod
    def meaning(self) -> Meaning:
        """What the model's answers mean."""

    def open_results(
            self, folder: Path, threshold: float | None = None, crops: bool = False, first: bool = True) -> Any:
        """Begins the results of a prediction (:func:`visionattn.runtime.writers.open_results`)."""
        return open_results(self.meaning, folder, threshold, crops, first)

    def on_test_start(self) -> None:
        """Begins to look for the worst mistakes."""
        self.mistakes, self._tested = Mistakes(), 0

    def test_files(self, count: int) -> list[str]:
        """Names of the next ``count`` images of the test; empty where the data set has no ``file_name(index)``."""
        trainer: Any = self.trainer
        loader = trainer.test_dataloaders
        if self.part is not None:
            loader = loader[list(trainer.datamodule.parts).index(self.part)]
        dataset: Any = getattr(loader, "dataset", None)
        places = range(self._tested, self._tested + count)  # of this process, to which every n-th image is dealt
        self._tested += count
        if not hasattr(dataset, "file_name"):
            return [""] * count
        return [str(dataset.file_name(place * self.trainer.world_size + self.global_rank)) for place in places]

    def on_predict_start(self) -> None:
        """Removes the results of an earlier prediction from the run folder: they may be of other images."""
        self.results = self.open_results(self.run_folder, first=self.trainer.is_global_zero)
        self.trainer.strategy.barrier()

    @property
    def names(self) -> list[str]:
        """Names of the classes; their numbers if they have none."""
        return self.args.class_names or [str(label) for label in range(self.args.num_classes)]

    def optimizer_of(self, model: nn.Module, heads: Iterable[nn.Module] = ()) -> Optimizer:
        """What trains ``model`` and ``heads``, at the learning rate for the total batch."""
        args = self.args
        return make_optimizer(args.optimizer, model, args.lr * self._batch_ratio(), args.weight_decay, args.betas,
                              args.layer_decay, heads, args.optimizer_args)

    def _batch_ratio(self) -> float:
        """The factor on ``lr`` of a total batch that is not ``lr_batch``."""
        if self.args.lr_batch is None:
            return 1.0
        trainer: Any = self.trainer
        trainer.fit_loop.setup_data()  # so that the loader is there
        size = getattr(trainer.train_dataloader, "batch_size", None) or getattr(trainer.datamodule, "batch_size", None)
        if size is None:
            raise ValueError("lr_batch needs the batch size, and the training data does not say it: leave lr_batch out")
        total = size * trainer.world_size * trainer.accumulate_grad_batches
        lr = self.args.lr * total / self.args.lr_batch
        say(f"The learning rate is {lr:g}: {self.args.lr:g} is for {self.args.lr_batch} images a step, and here they "
            f"are {total} ({size} a batch, {trainer.world_size} processes, {trainer.accumulate_grad_batches} batches "
            "a step).")
        return total / self.args.lr_batch

    def of_peak(self, lr: float | None) -> float:
        """A learning rate as a share of ``lr``, with which it is scaled."""
        return (lr or 0.0) / self.args.lr if self.args.lr else 0.0

    def start_ratio(self) -> float | None:
        """The share of ``lr`` that the warm-up starts at; None for that of a step."""
        return None if self.args.warmup_lr is None else self.of_peak(self.args.warmup_lr)

    def epoch_steps(self) -> int:
        """Optimiser steps of an epoch."""
        self.trainer.fit_loop.setup_data()  # so that num_training_batches is known
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    def scheduled_by_epochs(self, heads: Iterable[nn.Module] = ()) -> OptimizerLRScheduler:
        """The optimiser of a classifier (and ``heads``) and its schedule, stepped once an optimiser step."""
        args, optimizer = self.args, self.optimizer_of(self.model, heads)
        steps, epoch = self.training_steps(), self.epoch_steps()
        make: Any = poly_with_warmup if args.schedule == "linear" else cosine_with_warmup
        schedule = make(
            optimizer, steps - min(round(args.cooldown_epochs * epoch), steps // 3),
            self.warmup_steps(args.warmup_epochs * epoch, steps), self.of_peak(args.min_lr),
            start_ratio=self.start_ratio())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_steps(self) -> int:
        """Optimiser steps of the whole run, for a schedule that ends with it."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        return int(steps)

    def warmup_steps(self, wanted: float, steps: int) -> int:
        """Steps of warm-up in a run of ``steps``: those that are ``wanted``, and a third of the run at most."""
        count = min(round(wanted), steps // 3)
        if count < round(wanted):
            rank_zero_info(f"The warm-up takes {count} steps in place of {round(wanted)}: the run has {steps}.")
        return count

    def of_all_processes(self, records: list[Any]) -> list[Any]:
        """The records of every process, in the order of the processes."""
        if self.trainer.world_size == 1:
            return records
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, records)
        return [record for part in gathered for record in part]

    def write_test_metrics(self, metrics: dict[str, Any]) -> None:
        """Writes ``test_metrics.json`` into the run folder."""
        self.measured = metrics
        if self.trainer.is_global_zero:
            path = self.run_folder / "test_metrics.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(metrics, indent=2) + "\n")

    def write_findings(self, findings: Findings) -> None:
        """Writes the files that show what a test found, with the worst mistakes of all processes."""
        worst = Mistakes.worst(self.of_all_processes(findings.mistakes.take() if findings.mistakes else []))
        if self.trainer.is_global_zero:
            findings.write(self.run_folder, worst)


def check_arguments(args: Any, least: int = 0) -> None:
    """Raises a ValueError for arguments that no task can take, ``args``, of one that has ``least`` classes or none."""
    if least and args.num_classes < least:
        raise ValueError(f"num_classes must be at least {least}, got {args.num_classes}")
    if least and args.class_names is not None and len(args.class_names) != args.num_classes:
        raise ValueError(f"{len(args.class_names)} class names were given for {args.num_classes} classes")
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        raise ValueError(f"ema_decay must lie between 0 and 1, got {args.ema_decay}")
    check_optimizer(args.optimizer, args.betas)
    if args.grad_checkpointing not in (False, True, "attention"):
        raise ValueError(f"grad_checkpointing must be true, false or attention, got {args.grad_checkpointing!r}")
    for name in ("lr_batch", "clip_agc"):
        if args.get(name) is not None and args[name] <= 0:
            raise ValueError(f"{name} must be positive, got {args[name]}")
    if args.get("warmup_lr") is not None and not 0 <= args.warmup_lr <= args.lr:
        raise ValueError(f"warmup_lr must lie between 0 and lr ({args.lr:g}), got {args.warmup_lr:g}")
