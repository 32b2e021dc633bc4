"""Classification, detection and segmentation at once: one backbone, data sets that are labelled for one task each."""
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from ..data.multitask import MultiTaskData
from ..data.report import aligned
from ..dense import DenseBackbone, backbone_of
from ..layers import TaskRouter, set_task
from .base import Task, check_arguments
from .classification import ClassificationTask
from .detection import DetectionTask
from .losses import UncertaintyWeighting
from .optim import cosine_with_warmup, optimizer_over, parameter_groups
from .segmentation import SegmentationTask
from .sharding import FullySharded
from .sharing import share_weights

__all__ = ["MultiTask"]

_KINDS: dict[str, type[Task]] = {
    "classification": ClassificationTask, "detection": DetectionTask, "segmentation": SegmentationTask}
# Arguments of the tasks that are about training as a whole, beside those that are MultiTask's own.
_OF_ALL = {"adapter", "adapter_args", "channels_last", "clip_agc", "compile", "cooldown_epochs", "frozen",
           "frozen_norms", "frozen_stages", "lr_batch", "milestones", "poly_power", "schedule", "unfreeze_epochs",
           "warmup_epochs", "warmup_lr"}


class MultiTask(Task):
    """Trains one backbone on a data set for each of two or three tasks, which are labelled for that task alone.

    ``MultiTaskData`` gives batches of one set each. A step on one trains the backbone and the head of its task; other
    heads, and their moments in the optimiser, stay as they are. Each task is the one of its name, a
    :class:`ClassificationTask`, :class:`DetectionTask` or :class:`SegmentationTask` with its head, losses, metrics and
    results. The backbone is the same weights in all of them, in the form that each takes it in: with the windows of its
    authors for detection, for instance, and with statistics of batch norms of its own images. One of experts
    (``modular_vit_tiny``) has routers of each task where ``model_args`` give it the tasks' names, ``{tasks:
    [classification, detection]}``; a step takes those of its own.

    Logs what each task does under its name, ``val/detection/box_map``, and ``train/loss``, the balanced loss;
    ``val/mean`` is the mean of the tasks' main metrics (accuracy or mAP of several labels, box mAP, mean IoU), in which
    the best checkpoint is best. A test says them in a table, writes them into ``test_metrics.json``, and leaves for
    each task a folder of its own, ``<run>/detection``, that is a run of that task alone: its results, its
    ``config.yaml`` and its checkpoint, which everything that takes a run takes.

    Args:
        backbone: Name of a hierarchical model of timm's registry, ours included.
        classification: Arguments of :class:`ClassificationTask` that are about its head and losses, and ``lr``, the
            rate of what that task alone trains; ``{}`` for those that it has, None for no such task.
        detection: The same of :class:`DetectionTask`.
        segmentation: The same of :class:`SegmentationTask`.
        num_classes: Number of classes of each task; the command line takes it from the data, and the following three.
        class_names: Their names.
        in_chans: Channels of the images.
        multi_label: Classification has any number of classes for an image.
        pretrained: Start from the published classification weights.
        checkpoint_path: Start from the backbone's weights of this file.
        model_args: More arguments of ``timm.create_model``.
        drop_path_rate: Stochastic depth; None leaves the model's own.
        balance: How the losses are weighed: ``fixed``, by ``loss_weights``, or ``uncertainty``, by weights that are
            learnt (:class:`visionattn.tasks.losses.UncertaintyWeighting`).
        loss_weights: Of ``fixed``: the factor on each task's loss; None for 1.
        optimizer: Any of timm's by its name.
        optimizer_args: More arguments of the optimiser.
        lr: Peak learning rate of the backbone, and of heads that have none of their own.
        weight_decay: Of weights; biases, norms and bias tables have none.
        betas: Of the optimiser; None for its own.
        layer_decay: Factor on the learning rate from each layer of the backbone to the one before it.
        warmup_steps: Optimiser steps of linear warm-up, a third of the run at most; a cosine follows.
        min_lr: Learning rate that it ends at.
        ema_decay: Decay per step of the moving average of the weights, which is then what is validated and tested.
        grad_checkpointing: As of the tasks.

    Raises:
        ValueError: Model and data have different tasks, an argument is not one of a task, or the backbone has no
            weights that suit all.
    """

    monitor = "val/mean"
    monitor_mode = "max"
    sizes_vary = True

    def __init__(
            self,
            backbone: str,
            classification: dict[str, Any] | None = None,
            detection: dict[str, Any] | None = None,
            segmentation: dict[str, Any] | None = None,
            num_classes: dict[str, int] | None = None,
            class_names: dict[str, list[str] | None] | None = None,
            in_chans: int = 3,
            multi_label: bool = False,
            pretrained: bool = False,
            checkpoint_path: str | None = None,
            model_args: dict[str, Any] | None = None,
            drop_path_rate: float | None = None,
            balance: Literal["fixed", "uncertainty"] = "fixed",
            loss_weights: dict[str, float] | None = None,
            optimizer: str = "adamw",
            optimizer_args: dict[str, Any] | None = None,
            lr: float = 1e-4,
            weight_decay: float = 0.05,
            betas: tuple[float, float] | None = None,
            layer_decay: float | None = None,
            warmup_steps: int = 500,
            min_lr: float = 0.0,
            ema_decay: float | None = None,
            grad_checkpointing: bool | str = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.args = self.hparams
        check_arguments(self.args)
        given = {name: self.args[name] for name in _KINDS if self.args[name] is not None}
        self.task_names = list(given)
        if len(given) < 2:
            raise ValueError(f"several tasks are two of {', '.join(_KINDS)} or more, and the model has "
                             f"{', '.join(given) or 'none'}: give the others their arguments, or {{}}")
        num_classes = num_classes or {}
        if set(num_classes) != set(given):
            raise ValueError(f"the model has the tasks {', '.join(given)}, and the data have "
                             f"{', '.join(num_classes) or 'none'}: give both the same")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive, got {lr}")
        self.loss_weights = _checked_weights(balance, loss_weights, self.task_names)
        self.balance = UncertaintyWeighting(given) if balance == "uncertainty" else None
        common = {name: self.args[name] for name in (
            "backbone", "in_chans", "pretrained", "checkpoint_path", "model_args", "drop_path_rate",
            "grad_checkpointing")}
        for name, args in given.items():
            _check_task_args(name, args)
            labels: dict[str, Any] = {"num_classes": num_classes[name], "class_names": (class_names or {}).get(name)}
            if name == "classification":
                labels["multi_label"] = multi_label
            setattr(self, name, _make(name, common | {"lr": lr} | args | labels))
        first, *others = (backbone_of(task.model) for task in self.tasks().values())
        for name, other in zip(self.task_names[1:], others, strict=True):
            share_weights(first, other, backbone, name)
        self.routed = any(isinstance(module, TaskRouter) for module in first.modules())
        for name in self.task_names:
            self._turn_to(name)

    def tasks(self) -> dict[str, Any]:
        """The tasks by name."""
        return {name: getattr(self, name) for name in self.task_names}

    def forward(self, images: Any, task: str) -> Any:
        """What the model of a task gives for its images."""
        return self._turn_to(task)(images)

    def setup(self, stage: str) -> None:
        """Makes the tasks ready.

        Raises:
            ValueError: The data are not those of several tasks, images are normalised in different ways, or the
                strategy waits for gradients of all heads in every step.
        """
        if not isinstance(getattr(self.trainer, "datamodule", None), MultiTaskData):
            raise ValueError("MultiTask trains on MultiTaskData, a data set for each task")
        strategy: Any = self.trainer.strategy
        if stage == "fit" and isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get(
                "find_unused_parameters"):
            raise ValueError("a step of several tasks trains the head of one: on several devices set trainer.strategy "
                             "to ddp_find_unused_parameters_true")
        self._check_normalisation()
        for task in self.tasks().values():
            task.setup(stage)

    def teardown(self, stage: str) -> None:
        """Ends what :meth:`setup` began."""
        for task in self.tasks().values():
            task.teardown(stage)

    def configure_model(self) -> None:
        """Refuses strategies that cut weights into pieces."""
        strategy = getattr(self._trainer, "strategy", None)
        if isinstance(strategy, (FullySharded, FSDPStrategy)):
            raise ValueError("weights that several tasks share are not cut into pieces: in place of fsdp2 take "
                             "ddp_find_unused_parameters_true")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimiser: the backbone at ``lr``, each task's head at that of the task; the schedule is a cosine."""
        args = self.args
        groups: list[dict[str, Any]] = [] if self.balance is None else [
            {"params": list(self.balance.parameters()), "weight_decay": 0.0}]
        taken = set[int]()
        for task in self.tasks().values():
            model = backbone_of(task.model)
            head = {id(weight) for weight in task.parameters()} - {id(weight) for weight in _backbone_weights(model)}
            for group in parameter_groups(args.optimizer, model, args.weight_decay, args.layer_decay, [task]):
                new = {id(weight): weight for weight in group["params"] if id(weight) not in taken}
                taken |= new.keys()
                scale = group.get("lr_scale", 1.0)
                groups.append(group | {"params": [weight for key, weight in new.items() if key not in head]})
                groups.append(group | {"params": [weight for key, weight in new.items() if key in head],
                                       "lr_scale": scale * task.args.lr / args.lr})
        optimizer = optimizer_over(
            args.optimizer, groups, args.lr, args.weight_decay, args.betas, args.optimizer_args)
        steps = self.training_steps()
        schedule = cosine_with_warmup(
            optimizer, steps, self.warmup_steps(args.warmup_steps, steps), self.of_peak(args.min_lr))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Tells the tasks."""
        for task in self.tasks().values():
            task.on_train_start()

    def on_train_epoch_start(self) -> None:
        """Tells the tasks."""
        for task in self.tasks().values():
            task.on_train_epoch_start()

    def training_step(self, batch: tuple[Any, Any, str]) -> Tensor:
        """Loss of a batch of one task, weighed."""
        images, labels, name = batch
        loss = self._turn_to(name).training_step((images, labels))
        if self.balance is None:
            loss = self.loss_weights[name] * loss
        else:
            loss = self.balance({name: loss})
            self.log(f"train/{name}/scale", self.balance.scales[name], on_step=True, on_epoch=True,
                     batch_size=len(images), sync_dist=True)
        self.log_training(loss, {}, len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Adds a batch to the metrics of its task."""
        self._turn_to(self.task_names[dataloader_idx]).validation_step(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the tasks' metrics, and the mean of their main ones."""
        for task in self.tasks().values():
            task.on_validation_epoch_end()
        found = self.trainer.callback_metrics
        keys = [task.monitor.replace("/", f"/{name}/") for name, task in self.tasks().items()]
        if all(key in found for key in keys):
            self.log("val/mean", torch.stack([found[key].float() for key in keys]).mean(), sync_dist=True)

    def on_test_start(self) -> None:
        """Begins to look for the worst mistakes of each task."""
        for task in self.tasks().values():
            task.on_test_start()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Adds a batch to the metrics and findings of its task."""
        self._turn_to(self.task_names[dataloader_idx]).test_step(batch)

    def on_test_epoch_end(self) -> None:
        """Makes each task's folder a run of its own; says and writes the metrics of all in one table."""
        rows = [["task", "images", "metrics"]]
        metrics: dict[str, Any] = {}
        for name, task in self.tasks().items():
            task.on_test_epoch_end()
            measured = {key: value for key, value in task.measured.items()
                        if value is None or type(value) in (int, float)}
            metrics |= {f"{name}/{key}": value for key, value in measured.items()}
            main = task.monitor.partition("/")[2]
            shown = [main] + [key for key in measured if key not in (main, "num_images", "num_classes")]
            rows.append([name, str(measured["num_images"]), "  ".join(
                f"{key} {'-' if measured[key] is None else format(measured[key], '.4g')}" for key in shown[:4])])
            if self.trainer.is_global_zero:
                self._write_run(name, task)
        metrics["mean"] = _mean(metrics[f"{name}/{task.monitor.partition('/')[2]}"]
                                for name, task in self.tasks().items())
        self.write_test_metrics(metrics)
        rank_zero_info("\n".join(aligned(rows)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the hyper-parameters of each task as its own checkpoint has them."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"]["_tasks"] = {
            name: self._run_of(task) for name, task in self.tasks().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes from there what the tasks have learnt beside weights."""
        super().on_load_checkpoint(checkpoint)
        for name, task in self.tasks().items():
            task.on_load_checkpoint({"hyper_parameters": checkpoint["hyper_parameters"]["_tasks"][name]})

    def _turn_to(self, name: str) -> Any:
        """The task of this name, with its routers if the backbone has such."""
        task = self.tasks()[name]
        if self.routed:
            set_task(task.model, name)
        return task

    def _check_normalisation(self) -> None:
        """Raises a ValueError if the data normalise a classifier's images in another way than the dense tasks do."""
        theirs = getattr(self.data.parts.get("classification"), "normalisation", None)
        dense = [module for module in self.modules() if isinstance(module, DenseBackbone)]
        if theirs is None or not dense:
            return
        ours = dense[0].normalisation
        if any(abs(x - y) > 1e-3 for one, other in zip(theirs, ours, strict=True)
               for x, y in zip(one, other, strict=True)):
            shown = [" and ".join(str([round(float(x), 4) for x in values]) for values in both)
                     for both in (theirs, ours)]
            raise ValueError(f"images of classification are normalised by mean and std {shown[0]}, those of the other "
                             f"tasks by {shown[1]}, and the backbone is one: set mean and std of the classification "
                             "data, or model_args {pretrained_cfg_overlay: {mean: [...], std: [...]}}")

    def _run_of(self, task: Any) -> dict[str, Any]:
        """The hyper-parameters in a task's own checkpoint."""
        content: dict[str, Any] = {"hyper_parameters": self._args_of(task)}
        task.on_save_checkpoint(content)
        return content["hyper_parameters"]

    def _args_of(self, task: Any) -> dict[str, Any]:
        """The arguments that make a task alone."""
        args = dict(task.hparams)
        names = (args.get("model_args") or {}).get("tasks") if self.routed else None
        return args if not isinstance(names, (list, tuple)) else args | {
            "model_args": args["model_args"] | {"task": task.part}}

    def _write_run(self, name: str, task: Any) -> None:
        """Writes a task's checkpoint, which is one of that task alone, and the configuration that tests it."""
        folder = task.run_folder
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        path = folder / "checkpoints" / "best.ckpt"
        unfinished = path.with_name("best.ckpt.part")
        torch.save({
            "state_dict": task.state_dict(), "hyper_parameters": self._run_of(task), "epoch": self.current_epoch,
            "global_step": self.global_step, "pytorch-lightning_version": pl.__version__}, unfinished)
        unfinished.replace(path)
        config = Path(self.trainer.default_root_dir, "config.yaml")
        if not config.is_file():
            return
        text = config.read_text(encoding="utf-8")
        data = (yaml.safe_load(text)["data"].get("init_args") or {}).get(name)
        from_data = ("num_classes", "class_names", "in_chans", "multi_label")
        args = {key: value for key, value in self._args_of(task).items() if key not in from_data}
        first = text.partition("\n")[0] if text.startswith("#") else ""
        (folder / "config.yaml").write_text(f"{first}\n" + yaml.safe_dump({
            "seed_everything": 0,
            "model": {"class_path": type(task).__name__, "init_args": _plain(args)},
            "data": data,
            "trainer": {"logger": None, "default_root_dir": str(folder)},
        }, sort_keys=False), encoding="utf-8")


def _make(name: str, args: dict[str, Any]) -> Task:
    """A task, called by its name; here, as Lightning takes arguments of all constructors that follow one another."""
    task = _KINDS[name](**args)
    task.part = name
    return task


def _backbone_weights(model: Any) -> list[nn.Parameter]:
    """The parameters of a timm model without those of its classifier."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    own = {id(weight) for weight in head.parameters()} if isinstance(head, nn.Module) else set()
    return [weight for weight in model.parameters() if id(weight) not in own]


def _check_task_args(name: str, args: Mapping[str, Any]) -> None:
    """Raises a ValueError for arguments that are not a task's, or are of all of them."""
    of_all = (set(inspect.signature(MultiTask).parameters) | _OF_ALL) - {"lr"}
    known = [key for key in inspect.signature(_KINDS[name]).parameters if key not in of_all]
    for key in args:
        if key in inspect.signature(MultiTask).parameters and key != "lr":
            raise ValueError(f"{key} of {name} is that of all tasks: set model.init_args.{key}, or leave it out where "
                             "the data know it")
        if key not in known:
            raise ValueError(f"{name} has no argument {key} among several tasks; it has {', '.join(known)}")
    if not 0 < args.get("lr", 1.0) < math.inf:
        raise ValueError(f"lr of {name} must be positive, got {args['lr']}")


def _checked_weights(balance: str, weights: dict[str, float] | None, tasks: list[str]) -> dict[str, float]:
    """The factor on each task's loss."""
    if balance not in ("fixed", "uncertainty"):
        raise ValueError(f"balance must be fixed or uncertainty, got {balance!r}")
    if weights is None:
        return dict.fromkeys(tasks, 1.0)
    if balance == "uncertainty":
        raise ValueError("loss_weights are those of balance fixed, and uncertainty learns its own: leave them out")
    if set(weights) != set(tasks) or not all(0 < weight < math.inf for weight in weights.values()):
        raise ValueError(f"loss_weights must be a positive number for each of {', '.join(tasks)}, got {weights}")
    return weights


def _mean(values: Any) -> float | None:
    """The mean of metrics; None if one is missing."""
    found = list(values)
    return None if None in found else round(sum(found) / len(found), 6)


def _plain(value: Any) -> Any:
    """``value`` of lists and dicts as YAML has them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
