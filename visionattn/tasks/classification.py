"""Image classification, of one class or several: any timm backbone, soft targets, AdamW with a cosine schedule."""
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from ..adapters import active_adapter
from ..heads.probing import Pooling, pool_tokens
from ..layers import attention_maps, auxiliary_losses
from ..runtime.engine import Meaning
from ..runtime.say import say
from ..weights import check_name, check_unadapted, classes_of, fitting, read_checkpoint, timm_model
from .adapting import adapt, check_adapter
from .base import Task, check_arguments
from .calibration import SingleLabelCounts
from .charts import Tile
from .findings import Findings, class_rows, thumbnail
from .freezing import Freezing, below_head, check_unfreezing
from .losses import attention_diversification_loss
from .mixing import MaskMix, SelfMotivatedMix, forward_tokens
from .multilabel import MultilabelScores, average_precisions, best_thresholds, threshold_scores

__all__ = ["ClassificationTask", "create_classifier"]


class ClassificationTask(Task):
    """Trains and tests a timm model as an image classifier.

    Logs ``train/loss`` and the model's auxiliary losses, which it includes, as ``train/<name>``; ``val/`` and ``test/``
    ``accuracy``, with more than five classes ``accuracy_top5`` (both fractions), and ``loss``. Testing writes
    ``test_metrics.json``, prediction ``predictions.csv``, into the trainer's ``default_root_dir``. Accumulated
    gradients, clipping and mixed precision are the Trainer's.

    With ``multi_label`` an image has any number of classes: labels are ``[B, classes]`` of 0 and 1, the loss is binary
    cross-entropy, and ``val/map`` and ``test/map`` (mean of the classes' average precision, of those that occur) and
    ``f1`` take the place of accuracy. The probability from which on a class counts as present is the one with the best
    F1 on the validation images, of each class its own; a checkpoint keeps them (``thresholds``).

    Args:
        backbone: Name of a model of timm's registry, ours included.
        num_classes: Number of classes; the command line takes it from the data.
        class_names: Their names, for predictions; the command line takes them from the data.
        pretrained: Start from the published weights.
        checkpoint_path: Start from the weights of this file: a run's checkpoint or the authors' state dict. A head
            for another number of classes is replaced.
        model_args: More arguments of ``timm.create_model``.
        in_chans: Channels of the images.
        drop_path_rate: Stochastic depth; None leaves the model's own. A model that has none goes without.
        optimizer: Any of timm's by its name (``timm.optim.list_optimizers()``): ``adamw``, ``lamb``, ``muon``, ...
        optimizer_args: More arguments of the optimiser, such as ``{momentum: 0.95}``.
        lr: Peak learning rate, for the batch size as it is, unless ``lr_batch`` says of which it is.
        lr_batch: Images a step that ``lr``, ``warmup_lr`` and ``min_lr`` are for: they are scaled by the total batch
            (batch size times devices times accumulated batches) over it; None for no scaling.
        weight_decay: Of weights; biases, norms and bias tables have none.
        betas: Of the optimiser; None for its own.
        layer_decay: Factor on the learning rate from each layer to the one before it; None for one rate.
        warmup_epochs: Epochs of linear warm-up; fractions count. It takes a third of the run at most.
        warmup_lr: Learning rate that the warm-up starts from; None for ``lr`` divided by its steps.
        schedule: ``cosine`` or ``linear``, from the warm-up's end to the cool-down.
        min_lr: Learning rate that it ends at.
        cooldown_epochs: Last epochs of the run, all of them at ``min_lr``; a third of it at most.
        bce: Train by binary cross-entropy, the mean over images and classes, in place of cross-entropy (DeiT III,
            arXiv 2204.07118): every class that a mixed image is of is wanted as a whole. ``val/loss`` stays what it is.
        label_smoothing: Share of the target spread over all classes; with ``multi_label``, between 0 and 1.
        mixup: Alpha of mixup; 0 is off.
        cutmix: Alpha of cutmix; 0 is off.
        mixup_switch_prob: Probability of cutmix for a batch where both are on.
        mixing: ``maskmix`` (MixPro, arXiv 2304.12043) or ``smmix`` (arXiv 2212.12977), see
            :mod:`visionattn.tasks.mixing`; batches that are not mixed so are mixed as the three above say.
        mixing_prob: Probability of it for a batch.
        mask_patch: Of maskmix: height and width in pixels of the cells that images are mixed by, a multiple of the
            model's patch; None for the one that is nearest to a quarter of the image.
        attention_labels: Of maskmix: weigh the labels by the attention that each image's part gets, the more the better
            the model knows the mixed label (progressive attention labels). Their cross-entropy is not smoothed.
        attention_diversification: Weight of the attention diversification loss (:func:`visionattn.tasks.losses.
            attention_diversification_loss`), which every layer's attention maps are recorded for; 0 is off. The paper
            has 1.
        ema_decay: Decay per step of the moving average of the weights, less in the first steps. The average is what is
            validated and tested; a checkpoint holds it as ``state_dict`` and the raw weights beside it. None keeps no
            average.
        clip_agc: Clip each gradient by this share of the norm of its weights (adaptive gradient clipping, arXiv
            2102.06171), but the classifier's; None leaves clipping to the trainer.
        channels_last: Keep weights and maps with their channels last in memory, which GPUs' convolutions like.
        grad_checkpointing: Compute inner values of the backbone a second time in the backward pass instead of keeping
            them, for less memory and more time: ``attention``, those of attention alone; true, all of each block's.
        compile: Train through ``torch.compile``.
        multi_label: Images have any number of classes; the command line takes it from the data.
        class_weights: What each class weighs in the training loss, or ``balanced``: the inverse of its share of the
            training images. With ``multi_label`` it weighs the images that have the class against those that do not;
            ``balanced`` is then the ratio of their numbers.
        frozen: Train the head alone. What lies below is in eval mode, its batch norms keep their statistics.
        unfreeze_epochs: With ``frozen``: number of epochs in which the layers below are freed, from the head downwards.
        pooling: A head of its own kind in place of the model's: ``ep`` (efficient probing, arXiv 2506.10178),
            ``attention``, ``mean`` or ``token``, see :class:`visionattn.heads.PooledHead`; None for the model's.
        adapter: Name of an adapter (:mod:`visionattn.adapters`): the backbone is frozen, adapter and head are trained.
        adapter_args: Its options.

    Attributes:
        thresholds: Of ``multi_label``: probability of each class from which on it is present.
    """

    monitor = "val/accuracy"  # what the best checkpoint is best in; of multi_label val/map
    monitor_mode = "max"

    def __init__(
            self,
            backbone: str = "biformer_tiny",
            num_classes: int = 1000,
            class_names: list[str] | None = None,
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
            bce: bool = False,
            label_smoothing: float = 0.1,
            mixup: float = 0.0,
            cutmix: float = 0.0,
            mixup_switch_prob: float = 0.5,
            mixing: Literal["maskmix", "smmix"] | None = None,
            mixing_prob: float = 0.5,
            mask_patch: int | None = None,
            attention_labels: bool = False,
            attention_diversification: float = 0.0,
            ema_decay: float | None = None,
            clip_agc: float | None = None,
            channels_last: bool = False,
            grad_checkpointing: bool | str = False,
            compile: bool = False,
            multi_label: bool = False,
            class_weights: list[float] | Literal["balanced"] | None = None,
            frozen: bool = False,
            unfreeze_epochs: int | None = None,
            pooling: Pooling | None = None,
            adapter: str | None = None,
            adapter_args: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.args = self.hparams
        check_arguments(self.args, 2)
        _check_weights(class_weights, num_classes)
        _check_attention(self.args)
        check_unfreezing(unfreeze_epochs, frozen, "frozen set to true")
        check_adapter(self.args, "frozen")
        args = dict(model_args or {}, num_classes=num_classes, in_chans=in_chans)
        if drop_path_rate is not None:
            args["drop_path_rate"] = drop_path_rate
        self.model = create_classifier(backbone, pretrained, checkpoint_path, args, pooling)
        adapt(self.model, self.args)
        if frozen:
            self.freezing = Freezing(self.model, below_head(self.model, backbone), unfreeze_epochs)
        self.mix = _mixing(mixup, cutmix, mixup_switch_prob, num_classes)
        self.mixing: MaskMix | SelfMotivatedMix | None = None
        if mixing == "maskmix":
            self.mixing = MaskMix(self.model, num_classes, mask_patch, attention_labels)
        elif mixing == "smmix":
            self.mixing = SelfMotivatedMix(self.model, num_classes)
        # No buffer: the moving average of the weights is copied before these are known.
        self.class_weight = None if class_weights in (None, "balanced") else torch.tensor(class_weights)
        metrics = MetricCollection({"accuracy": MulticlassAccuracy(num_classes, average="micro")})
        if num_classes > 5:
            metrics.add_metrics({"accuracy_top5": MulticlassAccuracy(num_classes, average="micro", top_k=5)})
        self.val_metrics, self.test_metrics = metrics.clone(prefix="val/"), metrics.clone(prefix="test/")
        self.val_scores, self.test_scores = MultilabelScores(), MultilabelScores()
        self.thresholds = [0.5] * num_classes
        if multi_label:
            self.monitor = "val/map"
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.num_tested = SumMetric()
        self.counts = SingleLabelCounts(num_classes)
        self._predictions: list[list[Any]] = []

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of ``images [B, C, H, W]``."""
        return self.model(images)

    def setup(self, stage: str) -> None:
        """Takes ``balanced`` class weights from the training images; says what it starts from if that is nothing."""
        super().setup(stage)
        if stage != "fit":
            return
        if self.args.class_weights == "balanced":
            self.class_weight = _balanced(self.data, self.args.multi_label)
        adapter = active_adapter(self.model)
        if adapter is not None and adapter.steps_itself:
            _check_own_step(self.args)
            say("A step takes two forwards, of which the adapter compares the answers, and the backward of both.")
        fresh = not (self.args.pretrained or self.args.checkpoint_path or self.trainer.ckpt_path)
        if self.args.frozen and fresh:
            say("Warning: the frozen layers have random weights: set pretrained or checkpoint_path.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the temperature, or the thresholds of multi-label classes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"]["_temperature"] = self.counts.temperature
        if self.args.multi_label:
            checkpoint["hyper_parameters"]["_thresholds"] = self.thresholds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them from there."""
        self.counts.temperature = checkpoint["hyper_parameters"].get("_temperature")
        super().on_load_checkpoint(checkpoint)
        self.thresholds = checkpoint["hyper_parameters"].get("_thresholds") or self.thresholds

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser and its schedule, stepped once an optimiser step."""
        return self.scheduled_by_epochs([self.mixing] if isinstance(self.mixing, SelfMotivatedMix) else [])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of one batch, mixed if asked for."""
        self._check_labels(batch[1])
        loss, maps = self._batch_loss(*batch)
        losses = auxiliary_losses(self.model)
        if weight := self.args.attention_diversification:
            losses["attention_diversification"] = weight * attention_diversification_loss(maps)
        loss = sum(losses.values(), loss)
        self.log_training(loss, losses, len(batch[1]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Adds one batch to the validation metrics."""
        logits = self._evaluate("val", self.val_metrics, self.val_loss, *batch)
        if not self.args.multi_label and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.counts.validate(logits, batch[1], self.trainer.world_size * sum(self.trainer.num_val_batches))

    def on_validation_epoch_end(self) -> None:
        """Fits the temperature; of multi-label images chooses the thresholds and logs the metrics."""
        self.counts.fit(self.of_all_processes(self.counts.take_validated()))
        if self.args.multi_label:
            scores, labels = self.val_scores.compute()
            if self.trainer.state.fn == "fit":
                self.thresholds = best_thresholds(scores, labels).tolist()
            self._log_scores("val", self.val_scores)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Adds one batch to the test metrics and findings."""
        images, labels = batch
        logits = self._evaluate("test", self.test_metrics, self.test_loss, *batch)
        self.num_tested.update(len(images))
        files = self.test_files(len(images))
        if self.args.multi_label:
            self._add_mistakes(images, logits.sigmoid(), labels.bool(), files)
            return
        self.counts.update(logits, labels)
        shares, guesses = logits.softmax(dim=1).max(dim=1)
        for image, share, label, guess, file in zip(
                images, shares.tolist(), labels.tolist(), guesses.tolist(), files, strict=True):
            if label != guess:
                text = f"true: {self.names[label]}\npredicted: {self.names[guess]} ({share:.1%})"
                self.mistakes.add(share, partial(self._tile, image, text, file))

    def on_test_epoch_end(self) -> None:
        """Writes ``test_metrics.json`` and what was found into the run folder."""
        metrics: dict[str, Any]
        if self.args.multi_label:
            metrics = self._log_scores("test", self.test_scores)
        else:
            metrics = {key.removeprefix("test/"): round(value.item(), 6)
                       for key, value in self.test_metrics.compute().items()}
        metrics |= {
            "loss": round(self.test_loss.compute().item(), 6),
            "num_images": int(self.num_tested.compute()),
            "num_classes": self.args.num_classes,
            "backbone": self.args.backbone,
        }
        self.num_tested.reset()
        worst = "The predictions of the test that are wrong and most sure"
        if self.args.multi_label:
            rows = [{"class": name, **found} for name, found in metrics["per_class"].items()]
            findings = Findings(self.names, classes=rows, mistakes=self.mistakes, worst=worst)
        else:
            calibration, confusion, bins = self.counts.compute()
            metrics |= calibration
            rows = [] if confusion is None else class_rows(self.names, confusion, "images")
            findings = Findings(
                self.names, confusion, "Test images by class", rows, self.mistakes, worst, bins)
        self.write_test_metrics(metrics)
        self.write_findings(findings)

    @property
    def meaning(self) -> Meaning:
        """Names of the classes and, of multi-label ones, their thresholds."""
        return Meaning("classification", self.names, list(self.thresholds) if self.args.multi_label else None)

    def predict_step(self, batch: tuple[Tensor, list[str]]) -> Tensor:
        """Probabilities ``[B, classes]`` of one batch of images with their names."""
        images, names = batch
        probabilities = self.probabilities(images)
        for name, one in zip(names, probabilities.float().cpu().numpy(), strict=True):
            self._predictions.append([name, self.results.best(one)])
        return probabilities

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities ``[B, classes]`` of ``images [B, C, H, W]``; of multi-label classes independent ones."""
        return self(images).sigmoid() if self.args.multi_label else self(images).softmax(dim=1)

    def on_predict_epoch_end(self) -> None:
        """Writes ``predictions.csv`` into the run folder: an image a row, its five most probable classes beside it.

        Of multi-label images: the classes above their thresholds, and the probabilities of all.
        """
        rows, self._predictions = self.of_all_processes(self._predictions), []
        if self.trainer.world_size > 1:
            rows.sort()
        if self.trainer.is_global_zero:
            for row in rows:
                self.results.write(*row)
            rank_zero_info(self.results.close())

    def _evaluate(
            self, split: str, metrics: MetricCollection, loss: MeanMetric, images: Tensor, labels: Tensor) -> Tensor:
        logits = self(images)
        if self.args.multi_label:
            loss.update(binary_cross_entropy_with_logits(logits, labels.float()), weight=len(labels))
            (self.val_scores if split == "val" else self.test_scores).update(logits.float().sigmoid(), labels)
            self.log(f"{split}/loss", loss)
            return logits
        loss.update(cross_entropy(logits, labels), weight=len(labels))
        metrics.update(logits, labels)
        self.log_dict(metrics)
        self.log(f"{split}/loss", loss)
        return logits

    def _add_mistakes(self, images: Tensor, scores: Tensor, labels: Tensor, files: list[str]) -> None:
        """Looks for the worst of a batch of multi-label images, by the class that is most surely wrong."""
        wrong = (scores >= torch.tensor(self.thresholds, device=scores.device)) != labels
        distance = (scores - labels.float()).abs() * wrong
        for index in wrong.any(dim=1).nonzero()[:, 0].tolist():
            classes = distance[index].argsort(descending=True)[:int(wrong[index].sum())].tolist()
            lines = [f"{'missed' if labels[index, label] else 'false'}: {self.names[label]} "
                     f"({scores[index, label]:.1%})" for label in classes[:2]]
            self.mistakes.add(distance[index].max().item(), partial(
                self._tile, images[index], "\n".join(lines), files[index]))

    def _tile(self, image: Tensor, text: str, file: str) -> Tile:
        """An image on the sheet of mistakes."""
        normalisation = getattr(self.data, "normalisation", None)
        return Tile(thumbnail(image, normalisation), f"{text}\n{Path(file).name}".rstrip())

    def _batch_loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Loss of one batch, mixed in the way whose turn it is, and the attention maps if these are asked for."""
        mixing, mixed = self.mixing, None
        if mixing is not None and torch.rand(()).item() < self.args.mixing_prob:
            mixed = mixing.mix(self.model, images, targets)
            images, targets = mixed.images, mixed.targets
        elif self.mix:
            images, targets = self.mix(images, targets)
        labelled = mixed is not None and self.args.attention_labels
        recorded: Any = nullcontext([])
        if self.args.attention_diversification or labelled:
            recorded = attention_maps(self.model, last=not self.args.attention_diversification)
        with recorded as maps:
            tokens = labelled or (mixed is not None and isinstance(mixing, SelfMotivatedMix))
            adapter = active_adapter(self.model)
            if adapter is not None and adapter.steps_itself:
                return adapter.loss(self, images, partial(self._training_loss, targets=targets)), maps
            seen = forward_tokens(self.model, images) if tokens else None
            logits = self(images) if seen is None else seen.logits
        if mixed is not None and seen is not None and isinstance(mixing, MaskMix):
            weight = None if self.class_weight is None else self.class_weight.to(logits.device)
            return mixing.loss(mixed, seen, maps[-1], self.args.label_smoothing, weight), maps
        if mixed is not None and seen is not None and isinstance(mixing, SelfMotivatedMix):
            return mixing.loss(mixed, seen, self._training_loss), maps
        loss = self._training_loss(logits, targets)
        return loss + mixing.unused() if isinstance(mixing, SelfMotivatedMix) else loss, maps

    def _training_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.args.label_smoothing
        weight = None if self.class_weight is None else self.class_weight.to(logits.device)
        if self.args.multi_label:
            targets = targets.float() * (1 - smoothing) + smoothing / 2
            return binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)
        if self.args.bce:
            classes = logits.shape[1]
            wanted = (targets if targets.ndim == 2 else one_hot(targets, classes)) > 0
            return binary_cross_entropy_with_logits(
                logits, wanted.float() * (1 - smoothing) + smoothing / classes, pos_weight=weight)
        return cross_entropy(logits, targets, weight, label_smoothing=smoothing)

    def _log_scores(self, split: str, metric: MultilabelScores) -> dict[str, Any]:
        """Logs and resets the metrics of multi-label images; returns them with those of each class."""
        scores, labels = metric.compute()
        metric.reset()
        thresholds = torch.tensor(self.thresholds, device=scores.device)
        each = {"ap": average_precisions(scores, labels)} | threshold_scores(scores, labels, thresholds)
        mean = {"map" if name == "ap" else name: round(values.nanmean().item(), 6) for name, values in each.items()}
        self.log_dict({f"{split}/{name}": mean[name] for name in ("map", "f1")}, sync_dist=True)
        per_class: dict[str, Any] = {
            name: {"images": int(labels[:, label].sum()), "threshold": round(self.thresholds[label], 6)}
            for label, name in enumerate(self.names)}
        for label, found in enumerate(per_class.values()):
            found |= {key: None if values[label].isnan() else round(values[label].item(), 6)
                      for key, values in each.items()}
        absent = [name for name, found in per_class.items() if not found["images"]]
        if absent and split == "test":
            others = " and others" if len(absent) > 10 else ""
            say(f"No test image has {', '.join(absent[:10])}{others}: the means are those of the other classes.")
        return mean | {"per_class": per_class}

    def _check_labels(self, labels: Tensor) -> None:
        several = labels.ndim == 2
        if several != self.args.multi_label:
            raise ValueError(f"the data gives {'several labels' if several else 'one label'} for an image, and "
                             f"multi_label is {str(self.args.multi_label).lower()}")


def _check_attention(args: Any) -> None:
    """Raises a ValueError for arguments of what looks at attention that do not go together."""
    if not 0 <= args.attention_diversification < math.inf:
        raise ValueError(f"attention_diversification must not be negative, got {args.attention_diversification}")
    if not 0 < args.mixing_prob <= 1:
        raise ValueError(f"mixing_prob must be above 0 and at most 1, got {args.mixing_prob}")
    for name in ("mask_patch", "attention_labels"):
        if args[name] and args.mixing != "maskmix":
            raise ValueError(f"{name} is of mixing maskmix, and mixing is {args.mixing or 'not set'}")
    if args.mixing and args.multi_label:
        raise ValueError(f"mixing {args.mixing} needs one label for an image, and multi_label is true")
    looking = "attention_labels" if args.attention_labels else "mixing smmix" if args.mixing == "smmix" else ""
    if looking and args.bce:
        raise ValueError(f"{looking} weighs cross-entropies: leave bce out")
    looking = looking or ("attention_diversification" if args.attention_diversification else "")
    if looking and args.compile:
        raise ValueError(f"{looking} needs attention maps, which a compiled model does not give: leave compile out")


def _check_own_step(args: Any) -> None:
    """Raises a ValueError for arguments that an adapter whose step has two passes cannot follow."""
    for name in ("mixing", "attention_diversification", "multi_label"):
        if args[name]:
            raise ValueError(f"the adapter compares the classes' probabilities of two passes in a step, which {name} "
                             "does not go with: leave it out, or set the adapter's regulariser and second to 0")


def _check_weights(weights: Any, num_classes: int) -> None:
    """Raises a ValueError for ``class_weights`` that fit no such classes."""
    if weights is None or weights == "balanced":
        return
    if isinstance(weights, str) or len(weights) != num_classes:
        raise ValueError(f"class_weights must be balanced or {num_classes} numbers, got {weights}")
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"class_weights must be positive, got {list(weights)}")


def _balanced(data: Any, multi_label: bool) -> Tensor:
    """Class weights by the counts of the training images; classes without any, or with all, have a weight of 1."""
    split = getattr(getattr(data, "report", None), "splits", {}).get("train")
    if split is None or not split.counts:
        raise ValueError("class_weights balanced needs data that counts its classes; give a number for each class")
    counts = torch.tensor(list(split.counts.values()), dtype=torch.float32)
    most = (split.images - counts) if multi_label else split.images / len(counts)
    weights = most / counts
    return torch.where(weights.isfinite() & (weights > 0), weights, 1.0)


def create_classifier(
        backbone: str, pretrained: bool, checkpoint_path: str | None, args: dict[str, Any],
        pooling: Pooling | None = None) -> nn.Module:
    """A timm model to train, fresh or with the weights of a source.

    Args:
        backbone: Its name.
        pretrained: With the published weights.
        checkpoint_path: With the weights of this file.
        args: Arguments of ``timm.create_model``.
        pooling: Kind of the head that it has in place of its own.
    """
    if ":" not in backbone:
        check_name(backbone)
    if pooling is not None:
        bare = create_classifier(backbone, pretrained, checkpoint_path, args | {"num_classes": 0})
        return pool_tokens(bare, pooling, args["num_classes"])
    if checkpoint_path is None:
        return timm_model(backbone, pretrained=pretrained, **args)
    if pretrained:
        raise ValueError("pretrained and checkpoint_path were both given; choose one to start from")
    state_dict, run = read_checkpoint(checkpoint_path)
    overlay: dict[str, Any] = {"state_dict": state_dict}
    if run is not None:
        if run["backbone"] != backbone:
            raise ValueError(f"{checkpoint_path} is of the model {run['backbone']}, not {backbone}")
        check_unadapted(checkpoint_path, run)
        overlay |= {"num_classes": run["num_classes"], "input_size": (run.get("in_chans", 3), 224, 224)}
        if run.get("pooling"):  # whose head stays behind
            overlay |= {"num_classes": 0, "state_dict": {
                key: value for key, value in state_dict.items() if not key.startswith("pooled_head.")}}
    elif ":" not in backbone:
        classes = classes_of(backbone, state_dict)
        overlay |= {} if classes is None else {"num_classes": classes}
    with fitting(backbone, checkpoint_path):
        model: Any = timm_model(backbone, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    model.pretrained_cfg["state_dict"] = None  # timm would keep the tensors for good
    return model


def _mixing(mixup: float, cutmix: float, switch_prob: float, num_classes: int) -> v2.Transform | None:
    """Takes ``(images, labels)`` to mixed images and soft targets ``[B, classes]``."""
    if mixup and cutmix:
        return v2.RandomChoice(
            [v2.MixUp(alpha=mixup, num_classes=num_classes), v2.CutMix(alpha=cutmix, num_classes=num_classes)],
            p=[1 - switch_prob, switch_prob])
    if mixup:
        return v2.MixUp(alpha=mixup, num_classes=num_classes)
    return v2.CutMix(alpha=cutmix, num_classes=num_classes) if cutmix else None
