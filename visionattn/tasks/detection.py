"""Object detection and instance masks: any backbone under torchvision's detectors, measured by COCO's AP."""
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchmetrics import SumMetric
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes

from ..dense import DenseBackbone
from ..heads.detector import build_detector
from ..layers.auxiliary import auxiliary_losses
from ..runtime.engine import Meaning
from ..runtime.pictures import patches
from ..runtime.pixels import picture_of
from .adapting import adapt, check_adapter
from .base import Task, check_arguments
from .findings import Findings, Sums, class_rows
from .freezing import Freezing, check_unfreezing
from .matching import MATCHED, match_objects
from .optim import cosine_with_warmup, steps_with_warmup

__all__ = ["DetectionTask"]

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class DetectionTask(Task):
    """Trains and tests a detector of torchvision over a backbone with a feature pyramid.

    Batches are lists of images ``[C, H, W]`` in [0, 1], of any sizes, and of targets: dicts of ``boxes`` (x1, y1, x2,
    y2 in the image's pixels), ``labels`` (from 1 on), ``masks`` (``[N, H, W]``, for Mask R-CNN), ``iscrowd``,
    ``area``, ``image_id``, ``orig_size`` (height and width of the file) and ``file_name``. Images are resized and
    normalised here. Crowds are not trained on; in evaluation, detections in them count neither way.

    Logs each loss as ``train/<loss>`` and their sum as ``train/loss``, and COCO's average precisions, of boxes and for
    Mask R-CNN of masks: ``val/`` and ``test/`` ``box_map`` (mean over the IoU thresholds 0.5 to 0.95), ``box_map_50``,
    ``box_map_75``, ``mask_map``, ... Testing writes them and more into ``test_metrics.json``; prediction writes
    ``predictions.json`` in COCO's format for results and ``pictures/<file name>.png``, boxes and masks in pixels of
    the file. All go into the trainer's ``default_root_dir``.

    Args:
        backbone: Name of a model of timm's registry, ours included.
        num_classes: Number of classes, without background; the command line takes it from the data.
        class_names: Their names; the command line takes them from the data.
        detector: ``fcos``, ``retinanet``, ``faster_rcnn`` or ``mask_rcnn``.
        pretrained: Start from the published classification weights.
        checkpoint_path: Start from the backbone's weights of this file (see :class:`visionattn.dense.DenseBackbone`).
        model_args: More arguments of ``timm.create_model``.
        in_chans: Channels of the images; the command line takes it from the data. Other images than those of three
            channels are normalised by a mean and a standard deviation of 0.5.
        frozen_stages: Stages, from the stem on, that are not trained.
        unfreeze_epochs: Number of epochs in which the frozen stages are freed, the last of them first; None for never.
        frozen_norms: Keep the statistics of the backbone's batch norms.
        grad_checkpointing: Compute inner values of the backbone a second time in the backward pass instead of keeping
            them, for less memory and more time: ``attention``, those of attention alone; true, all of each block's.
        drop_path_rate: Stochastic depth; None leaves the model's own. A model that has none goes without.
        strides: Of the pyramid's levels; None for 8 to 128 (FCOS, RetinaNet) or 4 to 64 (R-CNN). Stages of the
            backbone that are coarser than the last are left out.
        fpn_channels: Width of the pyramid and of the heads, a multiple of 64 for FCOS.
        anchor_scale: Side of the anchors in strides of their level; None for 1 (FCOS), 4 (RetinaNet) or 8 (R-CNN).
        min_size: Shorter side that images are resized to; from a list, training draws and evaluation takes the last.
        max_size: Longest side that images may have then.
        detector_args: More arguments of torchvision's detector.
        class_metrics: Test metrics have the average precision of each class.
        picture_score: Least score of what ``predict`` draws; its JSON has all detections.
        optimizer: Any of timm's by its name (``timm.optim.list_optimizers()``): ``adamw``, ``lamb``, ``muon``, ...
        optimizer_args: More arguments of the optimiser, such as ``{momentum: 0.95}``.
        lr: Peak learning rate, for the batch size as it is, unless ``lr_batch`` says of which it is.
        lr_batch: Images a step that ``lr``, ``warmup_lr`` and ``min_lr`` are for: they are scaled by the total batch
            (batch size times devices times accumulated batches) over it; None for no scaling.
        weight_decay: Of weights; biases, norms and bias tables have none.
        betas: Of the optimiser; None for its own.
        layer_decay: Factor on the learning rate from each layer of the backbone to the one before it.
        schedule: ``step``: a tenth of the rate from each of the milestones on; ``cosine`` over the whole run.
        milestones: Epochs; fractions count.
        warmup_steps: Optimiser steps of linear warm-up, a third of the run at most.
        warmup_lr: Learning rate that the warm-up starts from; None for ``lr`` divided by its steps.
        min_lr: Learning rate that the cosine ends at.
        ema_decay: Decay per step of the moving average of the weights, which is then what is validated and tested.
        clip_agc: Clip each gradient by this share of the norm of its weights (adaptive gradient clipping, arXiv
            2102.06171); None leaves clipping to the trainer.
        channels_last: Keep weights and maps with their channels last in memory, which GPUs' convolutions like.
        compile: Train through ``torch.compile`` (the backbone and its pyramid).
        adapter: Name of an adapter (:mod:`visionattn.adapters`): the backbone is frozen, adapter and head are trained.
        adapter_args: Its options.
    """

    monitor = "val/box_map"  # what the best checkpoint is best in
    monitor_mode = "max"
    category_ids: Sequence[int] | None = None  # numbers of the classes in files, where no data say them
    sizes_vary = True

    def __init__(
            self,
            backbone: str = "biformer_small",
            num_classes: int = 80,
            class_names: list[str] | None = None,
            detector: Literal["fcos", "retinanet", "faster_rcnn", "mask_rcnn"] = "mask_rcnn",
            pretrained: bool = False,
            checkpoint_path: str | None = None,
            model_args: dict[str, Any] | None = None,
            in_chans: int = 3,
            frozen_stages: int = 0,
            unfreeze_epochs: int | None = None,
            frozen_norms: bool = False,
            grad_checkpointing: bool | str = False,
            drop_path_rate: float | None = None,
            strides: list[int] | None = None,
            fpn_channels: int = 256,
            anchor_scale: float | None = None,
            min_size: int | list[int] = 800,
            max_size: int = 1333,
            detector_args: dict[str, Any] | None = None,
            class_metrics: bool = False,
            picture_score: float = 0.5,
            optimizer: str = "adamw",
            optimizer_args: dict[str, Any] | None = None,
            lr: float = 1e-4,
            lr_batch: int | None = None,
            weight_decay: float = 0.05,
            betas: tuple[float, float] | None = None,
            layer_decay: float | None = None,
            schedule: Literal["step", "cosine"] = "step",
            milestones: list[float] = [8, 11],  # noqa: B006 - the command line shows it as it is; never changed
            warmup_steps: int = 500,
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
        check_arguments(self.args, 1)
        check_unfreezing(unfreeze_epochs, frozen_stages, "frozen_stages at 1 or more")
        check_adapter(self.args, "frozen_stages")
        if schedule not in ("step", "cosine"):
            raise ValueError(f"schedule must be step or cosine, got {schedule!r}")
        args = dict(model_args or {}) | ({} if in_chans == 3 else {"in_chans": in_chans})
        if drop_path_rate is not None:
            args["drop_path_rate"] = drop_path_rate
        body = DenseBackbone(
            backbone, task="detection", pretrained=pretrained, checkpoint_path=checkpoint_path,
            frozen_stages=0 if unfreeze_epochs else frozen_stages, frozen_norms=frozen_norms,
            model_args=args)
        if unfreeze_epochs:
            self.freezing = Freezing(body, body.first_stages(frozen_stages), unfreeze_epochs)
        self.model = build_detector(
            detector, body, num_classes, strides, fpn_channels, anchor_scale, min_size=min_size, max_size=max_size,
            **detector_args or {})
        adapt(self.model, self.args)
        self.val_map, self.test_map = self._average_precision(False), self._average_precision(True)
        self.test_matrix = Sums(num_classes + 1, num_classes + 1)
        self.num_tested = SumMetric()
        self._predictions: list[dict[str, Any]] = []

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detections of each image in pixels of it, best first: ``boxes``, ``labels``, ``scores``, ``masks``."""
        return self.model(images)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser and its schedule, stepped once an optimiser step."""
        args = self.args
        pyramid = self.model.backbone
        heads = [module for name, module in self.model.named_children() if name != "backbone"]
        optimizer = self.optimizer_of(pyramid.body.model, [pyramid.body.norms, pyramid.fpn, *heads])
        steps = self.training_steps()
        warmup = self.warmup_steps(args.warmup_steps, steps)
        if args.schedule == "cosine":
            schedule = cosine_with_warmup(optimizer, steps, warmup, self.of_peak(args.min_lr), self.start_ratio())
        else:
            milestones = [round(milestone * self.epoch_steps()) for milestone in args.milestones]
            schedule = steps_with_warmup(optimizer, milestones, warmup, start_ratio=self.start_ratio())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def compiled(self) -> list[nn.Module]:
        """The backbone and its pyramid: the rest depends on what is found."""
        return [self.model.backbone]

    def training_step(self, batch: Batch) -> Tensor:
        """Sum of the detector's losses of one batch and of those that the backbone adds."""
        images, targets = batch
        self._check_masks(targets)
        losses: dict[str, Tensor] = self.model(images, [_without_crowds(target) for target in targets])
        losses = losses | auxiliary_losses(self.model)
        loss = torch.stack(list(losses.values())).sum()
        self.log_training(loss, {name.removeprefix("loss_"): value for name, value in losses.items()}, len(images))
        return loss

    def validation_step(self, batch: Batch) -> None:
        """Adds one batch to the validation metrics."""
        self._evaluate(self.val_map, *batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics."""
        self._log("val", self.val_map)

    def test_step(self, batch: Batch) -> None:
        """Adds one batch to the test metrics and findings."""
        images, targets = batch
        self.num_tested.update(len(images))
        names = self.names
        for image, target, found, truth in zip(images, targets, *self._evaluate(self.test_map, *batch), strict=True):
            matched = match_objects(found, truth, self.args.picture_score)
            self.test_matrix.update(matched.counts(self.args.num_classes))
            if matched.errors():
                self.mistakes.add(matched.errors(), partial(matched.tile, image, target, names))

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics; writes ``test_metrics.json`` and what was found into the run folder."""
        metrics, precisions = self._log("test", self.test_map)
        names, confusion = self.names, self.test_matrix.compute().cpu().numpy()
        self.test_matrix.reset()
        classes = [row | {f"{kind}_ap": values[label] for kind, values in precisions.items()}
                   for label, row in enumerate(class_rows(names, confusion, "objects"))]
        self.write_findings(Findings(
            [*names, "background"], confusion, f"Test objects by class, at IoU {MATCHED} and score "
            f"{self.args.picture_score} (background: missed on the right, false below)", classes, self.mistakes,
            f"The test images with most mistakes, at IoU {MATCHED} and score {self.args.picture_score}"
            " (green: found, red: missed, orange: false)"))
        self.write_test_metrics(metrics | {
            "num_images": int(self.num_tested.compute()),
            "num_classes": self.args.num_classes,
            "backbone": self.args.backbone,
            "detector": self.args.detector,
        })
        self.num_tested.reset()

    @property
    def meaning(self) -> Meaning:
        """Names of the classes, their numbers in files and the score from which on objects are drawn."""
        ids = getattr(self.data, "category_ids", None) or self.category_ids
        return Meaning("detection", self.names, category_ids=ids or range(1, 1 + self.args.num_classes),
                       picture_score=self.args.picture_score)

    def predict_step(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Draws the detections of one batch and keeps them for the JSON; returns them in pixels of the files."""
        images, targets = batch
        found = self._detect(images, targets)
        for image, target, detections in zip(images, targets, found, strict=True):
            size, name = target["orig_size"].tolist(), target["file_name"]
            if image.shape[-2:] != torch.Size(size):
                image = interpolate(image[None], size=size, mode="bilinear")[0]
            shown: dict[str, Any] = {key: value.numpy() for key, value in detections.items()}
            if "masks" in shown:
                shown["masks"] = patches(shown["masks"])
            self.results.draw(name, picture_of(image.cpu().numpy()), shown)
            self._predictions.append(self.results.records(target["image_id"], name, shown, size))
        return found

    def on_predict_epoch_end(self) -> None:
        """Writes ``predictions.json`` and ``predictions_coco.json`` into the run folder."""
        records, self._predictions = self.of_all_processes(self._predictions), []
        if self.trainer.world_size > 1:
            records.sort(key=lambda record: (isinstance(record["image"]["id"], str), record["image"]["id"]))
        if self.trainer.is_global_zero:
            for record in records:
                self.results.write(record)
            rank_zero_info(self.results.close())

    @property
    def names(self) -> list[str]:
        """Names of the labels, the first of which is 1; their numbers if they have none."""
        return self.args.class_names or [str(label) for label in range(1, self.args.num_classes + 1)]

    def detect(self, images: list[Tensor], threshold: float | None = None) -> list[dict[str, Any]]:
        """Detections of each image on the CPU, in pixels of it, best first; masks as patches, however large it is.

        Args:
            images: ``[C, H, W]`` in [0, 1], of any sizes.
            threshold: Least score; None for the detector's own.
        """
        scorer = getattr(self.model, "roi_heads", self.model)
        paste, least = self.model.transform.postprocess, scorer.score_thresh
        self.model.transform.postprocess = _paste_patches
        scorer.score_thresh = least if threshold is None else threshold
        try:
            found = self(images)
        finally:
            self.model.transform.postprocess, scorer.score_thresh = paste, least
        return [{key: value.cpu() if isinstance(value, Tensor) else value for key, value in one.items()}
                for one in found]

    def _average_precision(self, of_classes: bool) -> MeanAveragePrecision:
        kinds: Any = ("bbox", "segm") if self.args.detector == "mask_rcnn" else ("bbox",)
        metric = _AveragePrecision(iou_type=kinds, extended_summary=of_classes)
        metric.warn_on_many_detections = False
        return metric

    def _check_masks(self, targets: list[dict[str, Any]]) -> None:
        if isinstance(targets, Tensor):
            raise ValueError("detection needs objects, and the data gives label maps: set data.init_args.task to "
                             "detection if the data has that, or take SegmentationTask")
        if self.args.detector == "mask_rcnn" and not all("masks" in target for target in targets):
            raise ValueError("mask_rcnn needs masks, and the data has none: set data.init_args.masks to true, or take "
                             "detector faster_rcnn")

    def _detect(self, images: list[Tensor], targets: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Detections on the CPU in pixels of the files, with masks ``[N, H, W]`` of bools for Mask R-CNN."""
        return [_to_file(image, target, detections)
                for image, target, detections in zip(images, targets, self(images), strict=True)]

    def _evaluate(
            self, metric: MeanAveragePrecision, images: list[Tensor], targets: list[dict[str, Any]],
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Adds one batch to a metric; returns what was detected and the truth, in pixels of the files."""
        self._check_masks(targets)
        truth = [_to_file(image, target, target) for image, target in zip(images, targets, strict=True)]
        found = self._detect(images, targets)
        metric.update(found, truth)
        return found, truth

    def _log(self, split: str, metric: MeanAveragePrecision) -> tuple[dict[str, Any], dict[str, list[float | None]]]:
        """Logs and resets the metrics of ``split``.

        Returns:
            The metrics, None for what has no objects to measure; and of a test the average precision of each class, by
            ``box`` and ``mask``.
        """
        results = metric.compute()
        metric.reset()
        precisions: dict[str, list[float | None]] = {}
        metrics: dict[str, Any] = {}
        kinds = {"box": "bbox_", "mask": "segm_"} if self.args.detector == "mask_rcnn" else {"box": ""}
        for prefix, kind in kinds.items():  # kind: torchmetrics' prefix, which it omits where there is one kind
            for key in ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100"):
                value = round(results[f"{kind}{key}"].item(), 6)
                metrics[f"{prefix}_{key}"] = None if value < 0 else value
            if metric.extended_summary:
                precisions[prefix] = [None] * self.args.num_classes
                for place, label in enumerate(results["classes"].reshape(-1).tolist()):
                    values = results[f"{kind}precision"][:, :, place, 0, -1]  # of objects of any size
                    known = values[values > -1]
                    precisions[prefix][label - 1] = round(known.mean().item(), 6) if len(known) else None
                if self.args.class_metrics:
                    metrics[f"{prefix}_map_per_class"] = {
                        name: value for name, value in zip(self.names, precisions[prefix], strict=True)
                        if value is not None}
        logged = [key for key in metrics if key.endswith(("_map", "_map_50", "_map_75"))]
        self.log_dict({f"{split}/{key}": metrics[key] or 0.0 for key in logged})
        return metrics, precisions


class _AveragePrecision(MeanAveragePrecision):
    """torchmetrics' metric for processes that have seen different numbers of images; they may differ by one."""

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        size = torch.distributed.get_world_size(process_group)
        for name in self._defaults:
            parts: list[Any] = [None] * size
            torch.distributed.all_gather_object(parts, getattr(self, name), process_group)
            # In the order of the images, which were dealt out one by one.
            setattr(self, name, [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)])


def _paste_patches(
        results: list[dict[str, Any]], shapes: list[tuple[int, int]], sizes: list[tuple[int, int]]) -> list[dict]:
    """What torchvision's detectors do last: brings objects from the resized to the given images.

    Masks are pasted one by one and kept as patches: all of a photo at once would take gigabytes.
    """
    for found, shape, size in zip(results, shapes, sizes, strict=True):
        found["boxes"] = resize_boxes(found["boxes"], list(shape), list(size))
        if "masks" in found:
            found["masks"] = [
                patch for mask, box in zip(found["masks"].split(1), found["boxes"].split(1), strict=True)
                for patch in patches((paste_masks_in_image(mask, box, size)[:, 0] > 0.5).cpu().numpy())]
    return results


def _without_crowds(target: dict[str, Any]) -> dict[str, Any]:
    """What a detector is trained on of a target."""
    single = target["iscrowd"] == 0 if "iscrowd" in target else slice(None)
    return {key: target[key][single] for key in ("boxes", "labels", "masks") if key in target}


def _to_file(image: Tensor, target: dict[str, Any], objects: dict[str, Any]) -> dict[str, Any]:
    """``objects`` (boxes, masks) of an image as loaded to pixels of its file, on the CPU."""
    height, width = (int(side) for side in target["orig_size"])
    moved: dict[str, Any] = {
        key: objects[key].detach().cpu() for key in ("labels", "scores", "area", "iscrowd") if key in objects}
    zoom = [width / image.shape[2], height / image.shape[1]]
    moved["boxes"] = objects["boxes"].detach().float().cpu() * torch.tensor(zoom * 2)
    if "masks" in objects:
        masks = objects["masks"].detach()
        masks = masks[:, None] if masks.ndim == 3 else masks
        if zoom != [1.0, 1.0]:
            masks = interpolate(masks.float(), size=(height, width), mode="bilinear")
        moved["masks"] = (masks[:, 0] > 0.5).cpu()
    return moved
