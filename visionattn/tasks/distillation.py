"""Distillation: a classifier that learns from another model's answers, and a backbone from its features alone."""
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, interpolate, kl_div
from torchmetrics import MeanMetric

from ..data.classification import normalisation
from ..layers import auxiliary_losses
from ..runtime.engine import Meaning
from ..weights import check_name, classes_of, read_checkpoint
from .base import Task, check_arguments
from .classification import ClassificationTask, create_classifier
from .rebuild import create_model

__all__ = ["DistillationTask", "FeaturePretrainingTask"]


class DistillationTask(ClassificationTask):
    """A :class:`ClassificationTask` whose loss is in part what a trained model, the teacher, says of the same images.

    Any model of timm teaches, ours included. It sees each batch as it is augmented and mixed, normalised and resized as
    it was trained, in eval mode. Its weights are in no checkpoint: what is kept is a :class:`ClassificationTask`'s
    (and, of the kind ``features``, a projection that only training uses). Logs ``train/distillation``, unweighted.

    Args:
        teacher: Name of the teacher in timm's registry.
        teacher_pretrained: It has the published weights.
        teacher_checkpoint: It has the weights of this file, a run's checkpoint or a state dict.
        kind: ``hard``: cross-entropy with the teacher's most probable class (DeiT, arXiv 2012.12877). ``soft``: the
            Kullback-Leibler divergence from the teacher's probabilities (arXiv 1503.02531). ``features``: one less the
            cosine of the teacher's pooled features and the student's, projected linearly to their width; the classes
            may differ then.
        temperature: Of ``soft``: logits are divided by it, the loss is multiplied by its square.
        weight: Of the teacher's part, of 0 to 1; the labels' part has the rest.
        kwargs: Arguments of :class:`ClassificationTask`.
    """

    def __init__(
            self,
            teacher: str,
            teacher_pretrained: bool = False,
            teacher_checkpoint: str | None = None,
            kind: Literal["hard", "soft", "features"] = "soft",
            temperature: float = 1.0,
            weight: float = 0.5,
            **kwargs: Any,
    ):
        super().__init__(**kwargs)
        _check_teacher(teacher, teacher_pretrained, teacher_checkpoint)
        if kind not in ("hard", "soft", "features"):
            raise ValueError(f"kind must be hard, soft or features, got {kind!r}")
        if not 0 < weight <= 1 or temperature <= 0:
            raise ValueError(f"weight must lie between 0 and 1 and temperature be positive, got {weight} and "
                             f"{temperature}")
        for name in ("attention_labels", "attention_diversification"):
            if self.args[name]:
                raise ValueError(f"{name} cannot be used in distillation: the attention would be the teacher's too")
        if self.args.mixing == "smmix":
            raise ValueError("mixing smmix cannot be used in distillation: its images have an answer to learn from")
        if kind == "features" and self.args.compile:
            raise ValueError("compile goes with the kinds hard and soft: features are taken from within the model")
        if kind != "features" and self.args.multi_label:
            raise ValueError("images of several labels are distilled by kind features alone")
        self._teacher: _Teacher | None = None
        self.projection: nn.Linear | None = None
        self._said, self._features = torch.empty(0), torch.empty(0)  # of the last images: the teacher's and ours

    def configure_callbacks(self) -> list[Any]:
        """The moving average; before it copies what trains, the teacher and the projection are made."""
        if self.trainer.state.fn == "fit" and self._teacher is None:
            args = self.args
            classes = None if args.kind == "features" else args.num_classes
            self._teacher = _Teacher(
                args.teacher, args.teacher_pretrained, args.teacher_checkpoint, classes, args.in_chans)
            if args.kind == "features":
                self.projection = nn.Linear(_width(self.model), self._teacher.width)
        return super().configure_callbacks()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser and its schedule, stepped once an optimiser step."""
        return self.scheduled_by_epochs([] if self.projection is None else [self.projection])

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of ``images [B, C, H, W]``; in training the teacher sees the images too."""
        if self._teacher is None or not self.training:
            return super().forward(images)
        self._said = self._teacher(images, getattr(self.trainer, "datamodule", None))
        if self.projection is None:
            return super().forward(images)
        maps = self.model.forward_features(images)
        self._features = self.projection(self.model.forward_head(maps, pre_logits=True))
        return self.model.forward_head(maps)

    def _training_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        args = self.args
        if args.kind == "features":
            distance = _feature_distance(self._features, self._said)
        elif args.kind == "hard":
            distance = cross_entropy(logits, self._said.argmax(dim=1))
        else:
            ours, theirs = ((x.float() / args.temperature).log_softmax(dim=1) for x in (logits, self._said))
            distance = kl_div(ours, theirs, reduction="batchmean", log_target=True) * args.temperature ** 2
        self.log("train/distillation", distance, on_step=True, on_epoch=True, batch_size=len(logits), sync_dist=True)
        return (1 - args.weight) * super()._training_loss(logits, targets) + args.weight * distance

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves a classifier's checkpoint, which needs no teacher."""
        super().on_save_checkpoint(checkpoint)
        for name in ("teacher", "teacher_pretrained", "teacher_checkpoint", "kind", "temperature", "weight"):
            checkpoint["hyper_parameters"].pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the projection out where nothing is trained."""
        super().on_load_checkpoint(checkpoint)
        _without_projection(self, checkpoint)


class FeaturePretrainingTask(Task):
    """Trains a backbone on images without labels to have the pooled features of a trained model, the teacher.

    The loss is one less the cosine of the teacher's features and the backbone's, projected linearly to their width; it
    is logged as ``train/loss`` and ``val/loss``. Of the batches the images alone are looked at; folders without labels
    are read by ``UnlabelledFolderData``. A checkpoint holds the backbone without a head: the ``checkpoint_path`` that a
    classifier, a detector or a segmenter starts from.

    Args:
        backbone: Name of a model of timm's registry, ours included.
        teacher: Name of the teacher there.
        teacher_pretrained: It has the published weights.
        teacher_checkpoint: It has the weights of this file, a run's checkpoint or a state dict.
        pretrained: Start from the published weights.
        checkpoint_path: Start from the weights of this file.
        model_args: More arguments of ``timm.create_model``.
        in_chans: Channels of the images.
        drop_path_rate: Stochastic depth; None leaves the model's own.
        optimizer: As of :class:`ClassificationTask`, and so are the following.
        optimizer_args: More arguments of the optimiser.
        lr: Peak learning rate.
        lr_batch: Images a step that the rates are for.
        weight_decay: Of weights; biases, norms and bias tables have none.
        betas: Of the optimiser; None for its own.
        layer_decay: Factor on the learning rate from each layer to the one before it.
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: Learning rate that it starts from.
        schedule: ``cosine`` or ``linear``.
        min_lr: Learning rate that it ends at.
        cooldown_epochs: Last epochs, at ``min_lr``.
        ema_decay: Decay per step of the moving average of the weights.
        clip_agc: Adaptive gradient clipping.
        channels_last: Order of maps in memory.
        grad_checkpointing: Compute inner values of the backbone a second time in the backward pass instead of keeping
            them, for less memory and more time: ``attention``, those of attention alone; true, all of each block's.
        compile: Train through ``torch.compile``.
    """

    monitor = "val/loss"
    monitor_mode = "min"

    def __init__(
            self,
            teacher: str,
            backbone: str = "biformer_tiny",
            teacher_pretrained: bool = False,
            teacher_checkpoint: str | None = None,
            pretrained: bool = False,
            checkpoint_path: str | None = None,
            model_args: dict[str, Any] | None = None,
            in_chans: int = 3,
            drop_path_rate: float | None = None,
            optimizer: str = "adamw",
            optimizer_args: dict[str, Any] | None = None,
            lr: float = 1e-3,
            lr_batch: int | None = None,
            weight_decay: float = 0.05,
            betas: tuple[float, float] | None = None,
            layer_decay: float | None = None,
            warmup_epochs: float = 5.0,
            warmup_lr: float | None = None,
            schedule: Literal["cosine", "linear"] = "cosine",
            min_lr: float = 1e-5,
            cooldown_epochs: float = 0.0,
            ema_decay: float | None = None,
            clip_agc: float | None = None,
            channels_last: bool = False,
            grad_checkpointing: bool | str = False,
            compile: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.args = self.hparams
        check_arguments(self.args)
        _check_teacher(teacher, teacher_pretrained, teacher_checkpoint)
        args = dict(model_args or {}, num_classes=0, in_chans=in_chans)
        if drop_path_rate is not None:
            args["drop_path_rate"] = drop_path_rate
        self.model = create_classifier(backbone, pretrained, checkpoint_path, args)
        self._teacher: _Teacher | None = None
        self.projection: nn.Linear | None = None
        self.val_loss = MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features ``[B, channels]`` of ``images [B, C, H, W]``."""
        return self.model(images)

    def configure_callbacks(self) -> list[Any]:
        """The moving average; before it copies what trains, the teacher and the projection are made."""
        if self.trainer.state.fn == "fit" and self._teacher is None:
            args = self.args
            self._teacher = _Teacher(
                args.teacher, args.teacher_pretrained, args.teacher_checkpoint, None, args.in_chans)
            self.projection = nn.Linear(_width(self.model), self._teacher.width)
        return super().configure_callbacks()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser and its schedule, stepped once an optimiser step."""
        return self.scheduled_by_epochs([] if self.projection is None else [self.projection])

    def training_step(self, batch: Any) -> Tensor:
        """Distance of the features of one batch from the teacher's."""
        loss = self._distance(batch[0])
        losses = auxiliary_losses(self.model)
        loss = sum(losses.values(), loss)
        self.log_training(loss, losses, len(batch[0]))
        return loss

    def validation_step(self, batch: Any) -> None:
        """Adds one batch to the validation loss."""
        self.val_loss.update(self._distance(batch[0]), weight=len(batch[0]))
        self.log("val/loss", self.val_loss)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Marks the checkpoint as one without a head."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"]["num_classes"] = 0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the projection out where nothing is trained."""
        super().on_load_checkpoint(checkpoint)
        _without_projection(self, checkpoint)

    @property
    def meaning(self) -> Meaning:
        """There is none: nothing is predicted."""
        raise ValueError("a pretrained backbone has no classes to predict: start a training from it (checkpoint_path)")

    def _distance(self, images: Tensor) -> Tensor:
        if self._teacher is None or self.projection is None:
            raise ValueError("pretraining measures itself in a fit alone, where its teacher is there")
        seen = self._teacher(images, getattr(self.trainer, "datamodule", None))
        return _feature_distance(self.projection(self(images)), seen)


class _Teacher:
    """A frozen model outside of the modules that are trained, averaged, copied and saved.

    It gives logits, or pooled features where it was made without ``num_classes``.
    """

    def __init__(
            self, name: str, pretrained: bool, checkpoint: str | None, num_classes: int | None, in_chans: int):
        model: Any = create_model(name, checkpoint, pretrained, _classes(name, checkpoint))
        run = getattr(model, "run", None) or {}
        if not hasattr(model, "reset_classifier"):
            raise ValueError(f"{checkpoint} is not a classifier's, and cannot teach")
        if run.get("in_chans", 3) != in_chans:
            raise ValueError(f"the teacher {name} takes images of {run.get('in_chans', 3)} channels, and the data has "
                             f"{in_chans}")
        if num_classes is None:
            model.reset_classifier(0)
        elif model.num_classes != num_classes:
            raise ValueError(f"the teacher {name} has {model.num_classes} classes and the data {num_classes}: take a "
                             "teacher of these classes (teacher_checkpoint), or kind features")
        self.model = model.requires_grad_(False).eval()
        cfg, settings = model.pretrained_cfg, run.get("_image_settings", {})
        self.size = settings.get("image_size") or cfg["input_size"][-1]
        self.means = settings.get("mean") or cfg["mean"]
        self.stds = settings.get("std") or cfg["std"]
        self.width = _width(model)

    def __deepcopy__(self, memo: Any) -> "_Teacher":
        return self  # which nothing changes

    @torch.no_grad()
    def __call__(self, images: Tensor, data: Any) -> Tensor:
        """Logits or features of ``images [B, C, H, W]``, normalised as ``data`` says."""
        self.model.to(images.device)
        means, stds = getattr(data, "normalisation", None) or normalisation(None, None, images.shape[1])
        ours, theirs = (
            torch.tensor(values, device=images.device)[:, :, None, None] for values in
            ([means, stds], [list(self.means), list(self.stds)]))
        if not torch.equal(ours, theirs):
            images = (images * ours[1] + ours[0] - theirs[0]) / theirs[1]
        if images.shape[-2:] != (self.size, self.size):
            images = interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.model(images)


def _classes(name: str, checkpoint: str | None) -> int | None:
    """Classes of the head in a state dict; None where a run or timm knows them."""
    state_dict, run = ({}, None) if checkpoint is None else read_checkpoint(checkpoint)
    return None if run is not None else classes_of(name, state_dict)


def _width(model: Any) -> int:
    """Channels of a timm model's pooled features."""
    return getattr(model, "head_hidden_size", None) or model.num_features


def _feature_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    return 1 - cosine_similarity(ours.float(), theirs.float(), dim=1).mean()


def _check_teacher(name: str, pretrained: bool, checkpoint: str | None) -> None:
    check_name(name)
    if pretrained == (checkpoint is not None):
        raise ValueError("a teacher has to be a trained one: set either teacher_pretrained or teacher_checkpoint")


def _without_projection(task: Any, checkpoint: dict[str, Any]) -> None:
    if task.projection is None:
        checkpoint["state_dict"] = {
            key: value for key, value in checkpoint["state_dict"].items() if not key.startswith("projection.")}
