"""Class-incremental training: classes come step by step, and the images of earlier steps are gone (MOS, AAAI 2025).

Paper: "MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning". The parts that it is made of are
:mod:`visionattn.adapters.mos`, :mod:`visionattn.heads.incremental` and :mod:`visionattn.tasks.alignment`.
"""
import csv
import inspect
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from ..heads.incremental import IncrementalClassifier
from ..layers import auxiliary_losses
from ..runtime.say import say
from .alignment import ClassGaussians, align, mean_contrast_loss
from .charts import draw_curves
from .classification import ClassificationTask, create_classifier
from .optim import make_optimizer

__all__ = ["IncrementalTask", "split_classes"]

HEAD_LR = 0.1  # of the adapters'
CONTRAST = 0.1  # weight of its loss
DRAWN = 5  # batches of features of a class, an epoch of the alignment
METHODS = {"incremental": "step by step, with adapters", "finetune": "step by step, all weights",
           "joint": "all classes at once, all weights"}


class IncrementalTask(ClassificationTask):
    """Trains an image classifier on one group of classes after the other, each without the images of those before.

    In every step an adapter is trained beside the frozen backbone, with its head on the step's classes; after every
    optimiser step it is moved towards the mean of the earlier steps' adapters, and stored in the end. Then the head
    alone is trained on features of all classes so far, drawn of their Gaussians. What is trained, tested and predicted
    with is an :class:`visionattn.heads.IncrementalClassifier`.

    ``trainer.max_epochs`` is the epochs of one step. Accuracy over all classes so far, on the test images, is measured
    after each and written as ``incremental.csv``, with the mean over the steps, and ``incremental.png``. ``val/`` is of
    the classes in training among themselves. Runs on one device.

    Args:
        backbone: Name of a model of timm's registry, ours included, whose blocks have ``norm2`` and ``mlp``.
        num_classes: Number of classes; the command line takes it from the data.
        class_names: Their names; the command line takes them from the data.
        pretrained: Start from the published weights.
        checkpoint_path: Start from the weights of this file, a run's checkpoint or a state dict.
        model_args: More arguments of ``timm.create_model``.
        in_chans: Channels of the images.
        steps: Number of steps, which share the classes in their order; or the names of each step's classes.
        bottleneck: Width of the adapters.
        momentum: How far adapters are moved towards the earlier ones at every optimiser step.
        covariance: What is kept of the spread of a class: ``full`` covariances or the ``variance`` of each channel.
        sigma: Factor on the cosines of the prototypes.
        lr: Learning rate of the adapters at the start of a step (SGD); that of the head is a tenth.
        weight_decay: Of both.
        alignment_epochs: Epochs of the head on drawn features.
        alignment_lr: Learning rate of them.
        baselines: Then train the whole model, from the same start, step by step (plain fine-tuning) and on all classes
            at once (joint training), with as many epochs, and put them beside.
        baseline_lr: Learning rate of these at the start (AdamW).

    Attributes:
        accuracies: By method, of each step that is done, the accuracy over all classes so far.

    Raises:
        ValueError: There are more steps than classes, classes in no step or in two, or the backbone has no such blocks.
    """

    monitor: Any = None  # the last checkpoint is the one that has learnt all
    accuracies: dict[str, list[float]]

    def __init__(
            self,
            backbone: str = "vit_base_patch16_224",
            num_classes: int = 1000,
            class_names: list[str] | None = None,
            pretrained: bool = False,
            checkpoint_path: str | None = None,
            model_args: dict[str, Any] | None = None,
            in_chans: int = 3,
            steps: int | list[list[str | int]] = 5,
            bottleneck: int = 16,
            momentum: float = 0.1,
            covariance: Literal["full", "variance"] = "full",
            sigma: float = 1.0,
            lr: float = 0.03,
            weight_decay: float = 5e-4,
            alignment_epochs: int = 30,
            alignment_lr: float = 0.005,
            baselines: bool = False,
            baseline_lr: float = 5e-4,
    ):
        super().__init__(
            backbone=backbone, num_classes=num_classes, class_names=class_names, pretrained=pretrained,
            checkpoint_path=checkpoint_path, model_args=model_args, in_chans=in_chans, lr=lr, weight_decay=weight_decay,
            label_smoothing=0.0)
        if not 0 <= momentum <= 1 or covariance not in ("full", "variance") or sigma <= 0:
            raise ValueError("momentum must lie between 0 and 1, covariance be full or variance, and sigma positive, "
                             f"got {momentum}, {covariance!r} and {sigma}")
        step_of = split_classes(steps, self.names)
        bare: Any = self.model
        bare.reset_classifier(0)
        self.model = IncrementalClassifier(bare, step_of, bottleneck, sigma)
        self.groups = [[label for label, step in enumerate(step_of) if step == number]
                       for number in range(max(step_of) + 1)]
        self.gaussians: ClassGaussians | None = None  # while fitting, and so is the next
        self.baseline: Any = None
        self.accuracies = {}
        self._rounds = [_Round("incremental", step, group) for step, group in enumerate(self.groups)]
        if baselines:
            self._rounds += [_Round("finetune", step, group) for step, group in enumerate(self.groups)]
            self._rounds.append(_Round("joint", len(self.groups) - 1, list(range(num_classes))))
        self._number, self._epochs = 0, 1  # of the round, and epochs of a round

    def setup(self, stage: str) -> None:
        """Before a fit: looks at the classes of the data, and has each epoch show those whose turn it is.

        Raises:
            ValueError: The data have several labels an image or too few images, there are several devices, or
                ``max_epochs`` is not set.
        """
        super().setup(stage)
        if stage != "fit":
            return
        trainer: Any = self.trainer
        data = trainer.datamodule
        if trainer.world_size > 1:
            raise ValueError(f"incremental training runs on one device, and here are {trainer.world_size}: set "
                             "trainer.devices to 1")
        if not hasattr(data, "plain_dataloader") or data.multi_label:
            raise ValueError("incremental training takes the classification data of this package, with one label an "
                             f"image, not {type(data).__name__}{' with several' * getattr(data, 'multi_label', False)}")
        if not (trainer.max_epochs and trainer.max_epochs > 0):
            raise ValueError("say by trainer.max_epochs how many epochs a step of the classes has")
        data.setup("test")
        _check_images(data, self.groups, self.names)
        self._epochs = trainer.max_epochs
        trainer.fit_loop.max_epochs = self._epochs * len(self._rounds)
        trainer.reload_dataloaders_every_n_epochs = 1
        data.classes_now = self._classes_now
        self.gaussians = ClassGaussians(self.args.num_classes, self.model.head.in_features, self.args.covariance)
        if self.args.baselines:
            self.baseline = self._fresh()
        if not (self.args.pretrained or self.args.checkpoint_path or trainer.ckpt_path):
            say("Warning: the frozen backbone has random weights: set pretrained or checkpoint_path.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps where among the steps the training is, and what was measured."""
        super().on_save_checkpoint(checkpoint)
        known, saved = inspect.signature(IncrementalTask).parameters, checkpoint["hyper_parameters"]
        checkpoint["hyper_parameters"] = {
            key: value for key, value in saved.items() if key in known or key.startswith("_")}
        checkpoint["hyper_parameters"] |= {
            "_round": self._number, "_round_epochs": self._epochs, "_accuracies": self.accuracies}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them from there.

        Raises:
            ValueError: It is the checkpoint of another kind of run, or of other steps, or goes on with other numbers of
                epochs.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["hyper_parameters"]
        if saved.get("steps") != self.args.steps:
            raise ValueError(f"the checkpoint is of a run with the steps {saved.get('steps')}, and here they are "
                             f"{self.args.steps}" if "steps" in saved else
                             "the checkpoint is not of a class-incremental run: give it as model.checkpoint_path")
        self._number, self.accuracies = saved["_round"], saved["_accuracies"]
        fitting = self.gaussians is not None
        if fitting and saved["_round_epochs"] != self._epochs:
            raise ValueError(f"this run has {saved['_round_epochs']} epochs a step, and trainer.max_epochs is "
                             f"{self._epochs}: leave it as it was")
        absent = tuple(f"{name}." for name in ("gaussians", "baseline") if getattr(self, name) is None)
        checkpoint["state_dict"] = {
            key: value for key, value in checkpoint["state_dict"].items() if not key.startswith(absent)}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """What trains the round's weights; its rates are set batch by batch."""
        args = self.args
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        optimizer: Optimizer
        if self._round.method == "incremental":
            adapters, head = self.model.step_adapters.trained(), [self.model.head.weight]
            optimizer = torch.optim.SGD(
                [{"params": adapters, "lr": args.lr}, {"params": head, "lr": HEAD_LR * args.lr}],
                momentum=0.9, weight_decay=args.weight_decay)
            trained = [*adapters, *head]
        else:
            self.baseline.requires_grad_(True)
            optimizer = make_optimizer("adamw", self.baseline, args.baseline_lr, 0.05)
            trained = list(self.baseline.parameters())
        for parameter in trained:
            parameter.requires_grad_(True)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def on_train_epoch_start(self) -> None:
        """Begins a round with its first epoch."""
        super().on_train_epoch_start()
        if self.current_epoch % self._epochs:
            return
        self._number = self.current_epoch // self._epochs
        method, step, _ = self._round
        if method == "joint" or (method == "finetune" and step == 0):
            self.baseline = self._fresh().to(self.device)
        self.trainer.strategy.setup_optimizers(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the learning rates: from the round's start to its end along half a cosine."""
        super().on_train_batch_start(batch, batch_idx)
        done = self.current_epoch % self._epochs + batch_idx / self.trainer.num_training_batches
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 + math.cos(math.pi * done / self._epochs)) / 2

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of one batch of images of the round's classes."""
        images, labels = batch
        method, step, group = self._round
        unknown = set(labels.tolist()) - set(group)
        if unknown:
            raise ValueError(f"the data gives images of {', '.join(self.names[label] for label in sorted(unknown))} in "
                             f"step {step + 1}, whose classes are {', '.join(self.names[label] for label in group)}")
        losses: dict[str, Tensor] = {}
        if method == "incremental":
            features = self.model.features(images)
            loss = cross_entropy(_among(self.model.head(features), group), labels)
            assert self.gaussians is not None
            losses["contrast"] = CONTRAST * mean_contrast_loss(features, self.gaussians.mean[self._before(step)])
        else:
            loss = cross_entropy(_among(self.baseline(images), self._so_far(step)), labels)
            losses |= auxiliary_losses(self.baseline)
        loss = sum(losses.values(), loss)
        self.log_training(loss, losses, len(labels))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Makes a step, after which the adapter is moved towards the earlier ones."""
        super().optimizer_step(*args, **kwargs)
        method, step, _ = self._round
        if method == "incremental" and step:
            self.model.step_adapters.pull(step, self.args.momentum)

    def on_train_epoch_end(self) -> None:
        """Ends a round with its last epoch: what is kept of the classes, alignment, accuracy, table and curve."""
        if (self.current_epoch + 1) % self._epochs:
            return
        method, step, group = self._round
        training = self.training
        self.eval()
        if method == "incremental":
            self._keep(step, group)
            measured = [self._accuracy(self.model, step)]
        elif method == "finetune":
            measured = [self._accuracy(self.baseline, step)]
        else:
            measured = [self._accuracy(self.baseline, earlier) for earlier in range(len(self.groups))]
        self.train(training)
        self.accuracies[method] = [*self.accuracies.get(method, []), *measured]
        shown = f"of {len(self._so_far(step))} classes so far"
        say(f"Step {step + 1} of {len(self.groups)}, {METHODS[method]}: accuracy {measured[-1]:.4f} {shown}.")
        self._write_accuracies()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Adds one batch to the validation metrics: in a fit, of the images of the round's classes."""
        if self.trainer.state.fn != "fit":
            super().validation_step(batch)
            return
        group = self._round.group
        chosen = torch.isin(batch[1], torch.tensor(group, device=self.device))
        images, labels = batch[0][chosen], batch[1][chosen]
        if not len(labels):
            return
        if self._round.method == "incremental":
            logits = self.model.head(self.model.features(images))
        else:
            logits = self.baseline(images)
        logits = _among(logits, group)
        self.val_loss.update(cross_entropy(logits, labels), weight=len(labels))
        self.val_metrics.update(logits, labels)
        self.log_dict(self.val_metrics)
        self.log("val/loss", self.val_loss)

    def on_test_start(self) -> None:
        """Says so if not all steps are done."""
        super().on_test_start()
        done, steps = int(self.model.done), len(self.groups)
        if done < steps:
            say(f"{done} of {steps} steps are done: images of the other classes are taken for those.")

    def write_test_metrics(self, metrics: dict[str, Any]) -> None:
        """Adds the means over the steps to ``test_metrics.json``, and the baselines."""
        for method, values in self.accuracies.items():
            if method != "incremental":
                metrics[f"accuracy_{method}"] = round(values[-1], 6)
            metrics[f"average_{method}"] = round(sum(values) / len(values), 6)
        super().write_test_metrics(metrics)

    @property
    def _round(self) -> "_Round":
        return self._rounds[self._number]

    def _classes_now(self) -> list[int]:
        """The classes whose images the epoch trains on; asked before :meth:`on_train_epoch_start`."""
        return self._rounds[min(self.current_epoch // self._epochs, len(self._rounds) - 1)].group

    def _so_far(self, step: int) -> list[int]:
        return sorted(label for group in self.groups[:step + 1] for label in group)

    def _before(self, step: int) -> list[int]:
        return self._so_far(step - 1) if step else []

    def _fresh(self) -> nn.Module:
        """The model as it was at the start, with a head for all classes."""
        args = self.args
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(self._number))
            model = create_classifier(args.backbone, False, None, dict(args.model_args or {}) | {
                "num_classes": args.num_classes, "in_chans": args.in_chans})
        weights = self.model.backbone.state_dict()
        model.load_state_dict({key: weights.get(key, value) for key, value in model.state_dict().items()})
        return model

    @torch.no_grad()
    def _keep(self, step: int, group: Sequence[int]) -> None:
        """Stores the adapter, the Gaussians and the prototypes of a step's classes; aligns the head."""
        model, gaussians = self.model, self.gaussians
        assert gaussians is not None
        model.step_adapters.store(step)
        found: dict[int, list[Tensor]] = {label: [] for label in group}
        sums, counts = torch.zeros_like(model.prototypes), Counter[int]()
        for images, labels in self._batches("train", group):
            first, features = (model.features(images, number).float() for number in (0, step))
            sums.index_add_(0, labels, first)
            counts.update(labels.tolist())
            for label in group:
                found[label].append(features[labels == label])
        for label, parts in found.items():
            gaussians.fit(label, torch.cat(parts))
            model.prototypes[label] = sums[label] / counts[label]
        if step:
            classes = torch.tensor(self._so_far(step), device=self.device)
            with torch.enable_grad():
                align(model.head, gaussians, classes, DRAWN * self.data.batch_size, self.args.alignment_epochs,
                      self.args.alignment_lr, torch.Generator().manual_seed(_seed(step)))
        model.done.fill_(step + 1)

    @torch.no_grad()
    def _accuracy(self, model: Callable[[Tensor], Tensor], step: int) -> float:
        """Share of the test images of the classes so far that a model takes for the right one of these."""
        classes = self._so_far(step)
        right = total = 0
        for images, labels in self._batches("test", classes):
            right += int((_among(model(images), classes).argmax(dim=1) == labels).sum())
            total += len(labels)
        return right / total

    def _batches(self, split: str, classes: Sequence[int]) -> Any:
        for images, labels in self.data.plain_dataloader(split, classes):
            yield images.to(self.device), labels.to(self.device)

    def _write_accuracies(self) -> None:
        """Writes ``incremental.csv`` and ``incremental.png`` into the run folder."""
        trainer: Any = self.trainer
        if trainer.fast_dev_run:
            return
        run, methods = self.run_folder, list(self.accuracies)
        run.mkdir(parents=True, exist_ok=True)
        with (run / "incremental.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "classes", *methods])
            for step in range(len(self.accuracies["incremental"])):
                found = [values[step:step + 1] for values in self.accuracies.values()]
                writer.writerow([step + 1, len(self._so_far(step)), *(f"{one[0]:.6f}" if one else "" for one in found)])
            means = [sum(values) / len(values) for values in self.accuracies.values()]
            writer.writerow(["average", "", *(f"{mean:.6f}" for mean in means)])
        curves = {METHODS[method]: list(enumerate(values, 1)) for method, values in self.accuracies.items()}
        draw_curves(run / "incremental.png", {"accuracy over the classes so far": curves}, over="step")


class _Round(NamedTuple):
    """Epochs in which one thing is trained: with which method, at which step, on images of which classes."""

    method: Literal["incremental", "finetune", "joint"]
    step: int
    group: list[int]


def split_classes(steps: int | Sequence[Sequence[str | int]], names: Sequence[str]) -> list[int]:
    """The step of each class, from 0 on.

    Args:
        steps: Number of steps, which share the classes evenly in their order; or the names of each step's classes.
        names: Of all classes.

    Raises:
        ValueError: There are more steps than classes, a class is not known, or it is in no step or in two.
    """
    count = len(names)
    if isinstance(steps, int):
        if not 1 <= steps <= count:
            raise ValueError(f"steps must be 1 to {count}, the number of classes, got {steps}")
        return [label * steps // count for label in range(count)]
    step_of = dict[str, int]()
    for number, group in enumerate(steps):
        if not group:
            raise ValueError(f"step {number + 1} has no classes")
        for name in map(str, group):
            if name not in names:
                raise ValueError(f"step {number + 1} has the class {name!r}, which the data does not have; it has "
                                 f"{', '.join(names[:20])}{', ...' * (count > 20)}")
            if name in step_of:
                raise ValueError(f"the class {name!r} is in step {step_of[name] + 1} and in step {number + 1}")
            step_of[name] = number
    missing = [name for name in names if name not in step_of]
    if missing:
        raise ValueError(f"the class {missing[0]!r} is in none of the {len(steps)} steps"
                         f"{f' (and {len(missing) - 1} more)' * (len(missing) > 1)}")
    return [step_of[name] for name in names]


def _check_images(data: Any, groups: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Raises a ValueError for a class without training images and a step without test images."""
    sets = {split: data.plain_dataloader(split).dataset for split in ("train", "test")}
    counts = {split: Counter(images.label(place) for place in range(len(images))) for split, images in sets.items()}
    for step, group in enumerate(groups):
        for label in group:
            if not counts["train"][label]:
                raise ValueError(f"the class {names[label]!r} of step {step + 1} has no training images")
        if not sum(counts["test"][label] for label in group):
            raise ValueError(f"step {step + 1} has no test images of its classes "
                             f"({', '.join(names[label] for label in group)}), on which its accuracy would be measured")


def _among(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """``logits [B, classes]`` of which those of other classes are minus infinity."""
    others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    others[list(classes)] = False
    return logits.masked_fill(others, -torch.inf)


def _seed(number: int) -> int:
    """A seed of the run's own and a number."""
    return 1000 * int(os.environ.get("PL_GLOBAL_SEED", 0)) + number
