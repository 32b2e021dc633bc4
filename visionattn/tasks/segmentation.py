"""Semantic segmentation: any backbone with UPerNet, Semantic FPN or SegFormer's head, measured by mean IoU."""
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ..dense import DenseBackbone
from ..heads.blocks import resize
from ..heads.segmenter import HeadName, Segmenter, multi_scale, sliding_window
from ..layers.auxiliary import auxiliary_losses
from ..runtime.engine import Meaning
from ..runtime.pictures import voc_colors
from ..runtime.pixels import picture_of
from .adapting import adapt, check_adapter
from .base import Task, check_arguments
from .charts import Tile
from .findings import Findings, class_rows, thumbnail
from .freezing import Freezing, check_unfreezing
from .losses import SegmentationLoss
from .optim import cosine_with_warmup, poly_with_warmup

__all__ = ["SegmentationTask"]


class SegmentationTask(Task):
    """Trains and tests a backbone with a segmentation head.

    Training takes batches ``(images [B, C, H, W] in [0, 1], labels [B, H, W])``; evaluation the same, where the labels
    may be of another size: that of the file, which the logits are then brought to. Prediction takes
    ``(images, names, sizes [B, 2])``, the sizes those of the files. Images are normalised here, as the backbone was
    trained.

    Logs ``train/loss``, and ``val/`` and ``test/`` ``miou`` (mean intersection over union of the classes that occur in
    the labels or the prediction; NaN where that is one alone), ``accuracy`` (of pixels), both fractions, and ``loss``
    (mean over the images). Testing writes ``test_metrics.json``, with the IoU of each class; prediction writes
    ``predictions/<name>.png`` (label maps with a palette) and ``pictures/<name>.png`` (the map over the image), all
    into the trainer's ``default_root_dir``. Batch norm over several devices, clipping and mixed precision are the
    Trainer's.

    Args:
        backbone: Name of a hierarchical model of timm's registry, ours included.
        num_classes: Number of labels, the background's among them; the command line takes it from the data.
        class_names: Their names; the command line takes them from the data.
        pretrained: Start from the published classification weights.
        checkpoint_path: Start from the backbone's weights of this file.
        model_args: More arguments of ``timm.create_model``.
        in_chans: Channels of the images; the command line takes it from the data. Other images than those of three
            channels are normalised by a mean and a standard deviation of 0.5.
        out_indices: Stages that the head sees; None for all.
        frozen_stages: Stages, from the stem on, that are not trained.
        unfreeze_epochs: Number of epochs in which the frozen stages are freed, the last of them first; None for never.
        frozen_norms: Keep the statistics of the backbone's batch norms.
        grad_checkpointing: Compute inner values of the backbone a second time in the backward pass instead of keeping
            them, for less memory and more time: ``attention``, those of attention alone; true, all of each block's.
        drop_path_rate: Stochastic depth; None leaves the model's own. A model that has none goes without.
        head: ``upernet``, ``semantic_fpn``, ``segformer`` or ``taskexpert``.
        head_channels: Width of the head; None for the papers' (512, 128 and 256), and 256 of ``taskexpert``.
        losses: Weight of each loss: ``cross_entropy``, ``dice``, ``ohem``; None for cross-entropy alone.
        class_weights: Weight of each label's pixels in cross-entropy, for labels that are rare; None for equal ones.
        auxiliary_weight: Of the loss of an FCN head on the last but one stage; 0 for no such head. A backbone that
            gives one map goes without.
        ignore_index: Label of pixels that do not count.
        window: Evaluate in overlapping square windows of this side, in pixels; None for whole images.
        window_stride: Step between windows; None for two thirds of their side.
        test_scales: Test and predict with the mean probability over images resized by these factors.
        test_flip: Test and predict with mirrored images too.
        optimizer: Any of timm's by its name (``timm.optim.list_optimizers()``): ``adamw``, ``lamb``, ``muon``, ...
        optimizer_args: More arguments of the optimiser, such as ``{momentum: 0.95}``.
        lr: Peak learning rate, for the batch size as it is, unless ``lr_batch`` says of which it is.
        lr_batch: Images a step that ``lr``, ``warmup_lr`` and ``min_lr`` are for: they are scaled by the total batch
            (batch size times devices times accumulated batches) over it; None for no scaling.
        weight_decay: Of weights; biases, norms and bias tables have none.
        betas: Of the optimiser; None for its own.
        layer_decay: Factor on the learning rate from each layer of the backbone to the one before it.
        schedule: ``poly`` or ``cosine``, over the whole run.
        poly_power: Exponent of ``poly``.
        warmup_steps: Optimiser steps of linear warm-up, a third of the run at most.
        warmup_lr: Learning rate that the warm-up starts from; None for ``lr`` divided by its steps.
        min_lr: Learning rate that the schedule ends at.
        ema_decay: Decay per step of the moving average of the weights, which is then what is validated and tested.
        clip_agc: Clip each gradient by this share of the norm of its weights (adaptive gradient clipping, arXiv
            2102.06171); None leaves clipping to the trainer.
        channels_last: Keep weights and maps with their channels last in memory, which GPUs' convolutions like.
        compile: Train through ``torch.compile`` (the backbone and the head).
        adapter: Name of an adapter (:mod:`visionattn.adapters`): the backbone is frozen, adapter and head are trained.
        adapter_args: Its options.
    """

    monitor = "val/miou"  # what the best checkpoint is best in
    monitor_mode = "max"

    def __init__(
            self,
            backbone: str = "dinat_tiny",
            num_classes: int = 150,
            class_names: list[str] | None = None,
            pretrained: bool = False,
            checkpoint_path: str | None = None,
            model_args: dict[str, Any] | None = None,
            in_chans: int = 3,
            out_indices: list[int] | None = None,
            frozen_stages: int = 0,
            unfreeze_epochs: int | None = None,
            frozen_norms: bool = False,
            grad_checkpointing: bool | str = False,
            drop_path_rate: float | None = None,
            head: HeadName = "upernet",
            head_channels: int | None = None,
            losses: dict[str, float] | None = None,
            class_weights: list[float] | None = None,
            auxiliary_weight: float = 0.4,
            ignore_index: int = 255,
            window: int | None = None,
            window_stride: int | None = None,
            test_scales: list[float] | None = None,
            test_flip: bool = False,
            optimizer: str = "adamw",
            optimizer_args: dict[str, Any] | None = None,
            lr: float = 6e-5,
            lr_batch: int | None = None,
            weight_decay: float = 0.01,
            betas: tuple[float, float] | None = None,
            layer_decay: float | None = None,
            schedule: Literal["poly", "cosine"] = "poly",
            poly_power: float = 1.0,
            warmup_steps: int = 1500,
            warmup_lr: float | None = None,
            min_lr: float = 0.0,
            ema_decay: float | None = None,
            clip_agc: float | None = None,
            channels_last: bool = False,
            compile: bool = False,
            adapter: str | None = None,
            adapter_args: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.args = self.hparams
        check_arguments(self.args, 2)
        check_unfreezing(unfreeze_epochs, frozen_stages, "frozen_stages at 1 or more")
        check_adapter(self.args, "frozen_stages")
        if num_classes > 255:
            raise ValueError(f"label maps have 8 bits and 255 labels at most, got {num_classes} classes")
        if class_weights is not None and len(class_weights) != num_classes:
            raise ValueError(f"{len(class_weights)} class_weights were given for {num_classes} classes")
        if schedule not in ("poly", "cosine"):
            raise ValueError(f"schedule must be poly or cosine, got {schedule!r}")
        if window is None and window_stride is not None:
            raise ValueError("window_stride is of no use without window")
        if window is not None and not 0 < (window_stride or window) <= window:
            raise ValueError(f"window_stride must lie between 1 and window ({window}), got {window_stride}")
        if test_scales is not None and (not test_scales or min(test_scales) <= 0):
            raise ValueError(f"test_scales must be positive factors, got {test_scales}")
        args = dict(model_args or {}) | ({} if in_chans == 3 else {"in_chans": in_chans})
        if drop_path_rate is not None:
            args["drop_path_rate"] = drop_path_rate
        maps = DenseBackbone(
            backbone, task="segmentation", pretrained=pretrained, checkpoint_path=checkpoint_path,
            out_indices=out_indices, frozen_stages=0 if unfreeze_epochs else frozen_stages, frozen_norms=frozen_norms,
            model_args=args)
        if unfreeze_epochs:
            self.freezing = Freezing(maps, maps.first_stages(frozen_stages), unfreeze_epochs)
        auxiliary = auxiliary_weight > 0
        if auxiliary and out_indices is None and len(maps.out_indices) < 2:
            rank_zero_info(f"{backbone} gives a single map: there is no auxiliary head (auxiliary_weight).")
            auxiliary = False
        self.model = Segmenter(maps, num_classes, head, head_channels, auxiliary=auxiliary)
        adapt(self.model, self.args)
        self.loss = SegmentationLoss(losses or {"cross_entropy": 1.0}, ignore_index, class_weights)
        matrix = MulticlassConfusionMatrix(num_classes, ignore_index=ignore_index, validate_args=False)
        self.val_matrix, self.test_matrix = matrix, matrix.clone()
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.num_tested = SumMetric()

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes, H, W]`` of ``images [B, C, H, W]`` in [0, 1], seen whole."""
        return self.model(images)

    def infer(self, images: Tensor, size: Sequence[int], testing: bool = False) -> Tensor:
        """Logits ``[B, classes, *size]`` of ``images``, in windows and, when ``testing``, at many scales if asked for.

        More than one scale gives the logarithms of mean probabilities.
        """
        args = self.args

        def once(images: Tensor) -> Tensor:
            if args.window is None:
                return self.model(images)
            return sliding_window(self.model, images, args.window, args.window_stride or -(-args.window * 2 // 3))

        if not testing:
            return multi_scale(once, images, size)
        return multi_scale(once, images, size, args.test_scales or [1.0], args.test_flip)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser and its schedule, stepped once an optimiser step."""
        args = self.args
        optimizer = self.optimizer_of(self.model.backbone.model, self.heads())
        steps, floor, start = self.training_steps(), self.of_peak(args.min_lr), self.start_ratio()
        warmup = self.warmup_steps(args.warmup_steps, steps)
        if args.schedule == "cosine":
            schedule = cosine_with_warmup(optimizer, steps, warmup, floor, start)
        else:
            schedule = poly_with_warmup(optimizer, steps, warmup, floor, args.poly_power, start)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def heads(self) -> list[nn.Module]:
        """What is trained beside the timm model."""
        model = self.model
        return [head for head in (model.backbone.norms, model.head, model.auxiliary_head) if head is not None]

    def compiled(self) -> list[nn.Module]:
        """The backbone and the heads, which a training step calls one by one."""
        return [part for part in (self.model.backbone, self.model.head, self.model.auxiliary_head) if part is not None]

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of one batch: the head's, the auxiliary head's, and the backbone's own."""
        images, labels = batch
        _check_labels(labels)
        size = labels.shape[-2:]
        logits, *auxiliary = (resize(maps, size) for maps in self.model(images, maps=True))
        losses = {"segmentation": self.loss(logits, labels)}
        if auxiliary:
            losses["auxiliary"] = self.args.auxiliary_weight * self.loss(auxiliary[0], labels)
        losses |= auxiliary_losses(self.model)
        loss = torch.stack(list(losses.values())).sum()
        self.log_training(loss, losses if len(losses) > 1 else {}, len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Adds one batch to the validation metrics."""
        self._evaluate(self.val_matrix, self.val_loss, *batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics."""
        self._log("val", self.val_matrix, self.val_loss)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Adds one batch to the test metrics and findings."""
        images, labels = batch
        guesses = self._evaluate(self.test_matrix, self.test_loss, *batch, testing=True)
        self.num_tested.update(len(images))
        for image, truth, guess, file in zip(images, labels, guesses, self.test_files(len(images)), strict=True):
            counts = multiclass_confusion_matrix(
                guess[None], truth[None], self.args.num_classes, ignore_index=self.args.ignore_index,
                validate_args=False)
            value = _iou(counts.double()).nanmean().item()
            if value < 1:  # of the classes that occur in the image or the prediction
                self.mistakes.add(1 - value, partial(_tile, image, truth, guess, file, value, self.args.ignore_index))

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics; writes ``test_metrics.json`` and what was found into the run folder."""
        counts, metrics = self._log("test", self.test_matrix, self.test_loss)
        iou, confusion = _iou(counts), counts.long().numpy()
        names = self.names
        # A class that occurs neither in the labels nor in the prediction has no IoU.
        per_class = [None if value.isnan() else round(value.item(), 6) for value in iou]
        self.write_test_metrics({
            key: None if math.isnan(value) else round(value, 6) for key, value in metrics.items()} | {
            "iou": dict(zip(names, per_class, strict=True)),
            "num_images": int(self.num_tested.compute()),
            "num_classes": self.args.num_classes,
            "backbone": self.args.backbone,
            "head": self.args.head,
        })
        self.num_tested.reset()
        classes = [row | {"iou": value} for row, value in zip(
            class_rows(names, confusion, "pixels"), per_class, strict=True)]
        self.write_findings(Findings(
            names, confusion, "Test pixels by class", classes, self.mistakes,
            "The test images with the lowest mean IoU: the image, the truth, the prediction"))

    @property
    def meaning(self) -> Meaning:
        """Names of the classes."""
        return Meaning("segmentation", self.names)

    def predict_step(self, batch: tuple[Tensor, list[str], Tensor]) -> list[Path]:
        """Writes the label maps and pictures of one batch and returns the label maps' paths."""
        images, names, sizes = batch
        paths = []
        for image, name, (height, width) in zip(images, names, sizes.tolist(), strict=True):
            labels = self.infer(image[None], (height, width), testing=True)[0].argmax(dim=0)
            picture = picture_of(resize(image[None], (height, width))[0].cpu().numpy())
            paths.append(self.results.draw(name, picture, labels.to("cpu", torch.uint8).numpy()))
        return paths

    def on_predict_epoch_end(self) -> None:
        """Says where the predictions are."""
        rank_zero_info(self.results.close())

    def _evaluate(
            self, matrix: Metric, loss: MeanMetric, images: Tensor, labels: Tensor, testing: bool = False) -> Tensor:
        """Adds one batch to the metrics and returns the predicted labels."""
        _check_labels(labels)
        logits = self.infer(images, labels.shape[-2:], testing)
        guesses = logits.argmax(dim=1)
        matrix.update(guesses, labels)
        for one, truth in zip(logits.split(1), labels.split(1), strict=True):  # so that batches do not matter
            loss.update(self.loss(one, truth))
        return guesses

    def _log(self, split: str, matrix: Metric, loss: MeanMetric) -> tuple[Tensor, dict[str, float]]:
        """Logs and resets the metrics of ``split``; returns the confusion matrix, and what was logged."""
        counts = matrix.compute().cpu().double()
        hits, iou = counts.diagonal(), _iou(counts)
        metrics = {
            # Where there is one class alone, in the labels and the prediction, nothing was told apart.
            "miou": iou.nanmean().item() if iou.isfinite().sum() > 1 else math.nan,
            "accuracy": (hits.sum() / counts.sum()).item(),
            "loss": loss.compute().item(),
        }
        matrix.reset()
        loss.reset()
        self.log_dict({f"{split}/{key}": value for key, value in metrics.items()}, sync_dist=True)
        return counts, metrics


def _iou(counts: Tensor) -> Tensor:
    """Intersection over union of each class by the confusion matrix; NaN for a class that does not occur."""
    hits = counts.diagonal()
    return hits / (counts.sum(0) + counts.sum(1) - hits)


def _tile(image: Tensor, truth: Tensor, guess: Tensor, file: str, iou: float, ignored: int) -> Tile:
    """An image on the sheet of mistakes beside its label maps; pixels that do not count are white."""
    photo = thumbnail(image)
    colors = torch.tensor(voc_colors(), dtype=torch.uint8)
    maps = []
    for labels in (truth, guess):
        small = interpolate(labels[None, None].float(), size=photo.shape[:2], mode="nearest")[0, 0].long().cpu()
        picture = colors[small.clamp(0, len(colors) - 1)]
        picture[small == ignored] = 255
        maps.append(picture.numpy())
    gap = np.full((photo.shape[0], 4, 3), 255, dtype=np.uint8)
    return Tile(np.concatenate([photo, gap, maps[0], gap, maps[1]], axis=1), f"mean IoU {iou:.3f}  {Path(file).name}")


def _check_labels(labels: Any) -> None:
    if not isinstance(labels, Tensor):
        raise ValueError("segmentation needs a label for every pixel, and the data gives objects: set "
                         "data.init_args.task to segmentation if the data has that, or take DetectionTask")
