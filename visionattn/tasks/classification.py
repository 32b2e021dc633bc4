"""Image classification: any timm backbone, soft-target cross-entropy, AdamW with a cosine schedule."""
import math
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from ..layers import auxiliary_losses
from ..weights import check_name, fitting, read_checkpoint, timm_model
from .base import Task, check_arguments
from .optim import adamw, cosine_with_warmup
from .results import ClassificationResults

__all__ = ["ClassificationTask"]


class ClassificationTask(Task):
    """Trains and tests a timm model as an image classifier.

    Logs ``train/loss`` and the model's auxiliary losses, which it includes, as ``train/<name>``; ``val/`` and ``test/``
    ``accuracy``, with more than five classes ``accuracy_top5`` (both fractions), and ``loss``. Testing writes
    ``test_metrics.json``, prediction ``predictions.csv``, into the trainer's ``default_root_dir``. Accumulated
    gradients, clipping and mixed precision are the Trainer's.

    Args:
        backbone: Name of a model of timm's registry, ours included.
        num_classes: Number of classes; the command line takes it from the data.
        class_names: Their names, for predictions; the command line takes them from the data.
        pretrained: Start from the published weights.
        checkpoint_path: Start from the weights of this file: a run's checkpoint or the authors' state dict. A head
            for another number of classes is replaced.
        model_args: More arguments of ``timm.create_model``.
        in_chans: Channels of the images.
        drop_path_rate: Stochastic depth; None leaves the model's own.
        lr: Peak learning rate, for the batch size as it is (it is not scaled).
        weight_decay: Of weights; biases, norms and bias tables have none.
        betas: Of AdamW.
        layer_decay: Factor on the learning rate from each layer to the one before it; None for one rate.
        warmup_epochs: Epochs of linear warm-up; fractions count. It takes a third of the run at most.
        min_lr: Learning rate that the cosine ends at.
        label_smoothing: Share of the target spread over all classes.
        mixup: Alpha of mixup; 0 is off.
        cutmix: Alpha of cutmix; 0 is off.
        mixup_switch_prob: Probability of cutmix for a batch where both are on.
        ema_decay: Decay per step of the moving average of the weights, less in the first steps. The average is what is
            validated and tested; a checkpoint holds it as ``state_dict`` and the raw weights beside it. None keeps no
            average.
    """

    monitor = "val/accuracy"  # what the best checkpoint is best in
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
            lr: float = 1e-3,
            weight_decay: float = 0.05,
            betas: tuple[float, float] = (0.9, 0.999),
            layer_decay: float | None = None,
            warmup_epochs: float = 5.0,
            min_lr: float = 1e-5,
            label_smoothing: float = 0.1,
            mixup: float = 0.0,
            cutmix: float = 0.0,
            mixup_switch_prob: float = 0.5,
            ema_decay: float | None = None,
    ):
        super().__init__()
        check_arguments(num_classes, 2, class_names, ema_decay)
        self.save_hyperparameters()
        self.args = self.hparams
        args = dict(model_args or {}, num_classes=num_classes, in_chans=in_chans)
        if drop_path_rate is not None:
            args["drop_path_rate"] = drop_path_rate
        self.model = _create_model(backbone, pretrained, checkpoint_path, args)
        self.mix = _mixing(mixup, cutmix, mixup_switch_prob, num_classes)
        metrics = MetricCollection({"accuracy": MulticlassAccuracy(num_classes, average="micro")})
        if num_classes > 5:
            metrics.add_metrics({"accuracy_top5": MulticlassAccuracy(num_classes, average="micro", top_k=5)})
        self.val_metrics, self.test_metrics = metrics.clone(prefix="val/"), metrics.clone(prefix="test/")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.num_tested = SumMetric()
        self._predictions: list[list[Any]] = []

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of ``images [B, C, H, W]``."""
        return self.model(images)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its schedule, stepped once an optimiser step."""
        args = self.args
        optimizer = adamw(self.model, args.lr, args.weight_decay, args.betas, args.layer_decay)
        steps = self.training_steps()
        self.trainer.fit_loop.setup_data()  # so that num_training_batches is known
        epoch_steps = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        schedule = cosine_with_warmup(
            optimizer, steps, self.warmup_steps(args.warmup_epochs * epoch_steps, steps),
            args.min_lr / args.lr if args.lr else 0.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of one batch, mixed if asked for."""
        images, targets = self.mix(*batch) if self.mix else batch
        loss = cross_entropy(self(images), targets, label_smoothing=self.args.label_smoothing)
        for name, auxiliary_loss in auxiliary_losses(self.model).items():
            self.log(f"train/{name}", auxiliary_loss, on_step=True, on_epoch=True, batch_size=len(images),
                     sync_dist=True)
            loss = loss + auxiliary_loss
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(images),
                 sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Adds one batch to the validation metrics."""
        self._evaluate("val", self.val_metrics, self.val_loss, *batch)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Adds one batch to the test metrics."""
        self._evaluate("test", self.test_metrics, self.test_loss, *batch)
        self.num_tested.update(len(batch[0]))

    def on_test_epoch_end(self) -> None:
        """Writes ``test_metrics.json`` into the run folder."""
        metrics: dict[str, Any] = {
            key.removeprefix("test/"): round(value.item(), 6) for key, value in self.test_metrics.compute().items()}
        metrics |= {
            "loss": round(self.test_loss.compute().item(), 6),
            "num_images": int(self.num_tested.compute()),
            "num_classes": self.args.num_classes,
            "backbone": self.args.backbone,
        }
        self.num_tested.reset()
        self.write_test_metrics(metrics)

    def open_results(
            self, folder: Path, threshold: float | None = None, crops: bool = False,
            first: bool = True) -> ClassificationResults:
        """Begins ``predictions.csv`` and ``pictures``; there is neither a threshold nor anything to cut out."""
        if threshold is not None or crops:
            raise ValueError("a classifier gives every image its most probable class: leave threshold and crops out")
        return ClassificationResults(folder, self.names, first)

    def predict_step(self, batch: tuple[Tensor, list[str]]) -> Tensor:
        """Probabilities ``[B, classes]`` of one batch of images with their names."""
        images, names = batch
        probabilities = self.probabilities(images)
        for name, one in zip(names, probabilities, strict=True):
            self._predictions.append([name, self.results.best(one)])
        return probabilities

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities ``[B, classes]`` of ``images [B, C, H, W]``."""
        return self(images).softmax(dim=1)

    def on_predict_epoch_end(self) -> None:
        """Writes ``predictions.csv`` into the run folder: an image a row, its five most probable classes beside it."""
        rows, self._predictions = self.of_all_processes(self._predictions), []
        if self.trainer.world_size > 1:
            rows.sort()
        if self.trainer.is_global_zero:
            for row in rows:
                self.results.write(*row)
            rank_zero_info(self.results.close())

    def _evaluate(
            self, split: str, metrics: MetricCollection, loss: MeanMetric, images: Tensor, labels: Tensor) -> None:
        logits = self(images)
        loss.update(cross_entropy(logits, labels), weight=len(labels))
        metrics.update(logits, labels)
        self.log_dict(metrics)
        self.log(f"{split}/loss", loss)


def _create_model(backbone: str, pretrained: bool, checkpoint_path: str | None, args: dict[str, Any]) -> nn.Module:
    if ":" not in backbone:
        check_name(backbone)
    if checkpoint_path is None:
        return timm_model(backbone, pretrained=pretrained, **args)
    if pretrained:
        raise ValueError("pretrained and checkpoint_path were both given; choose one to start from")
    state_dict, run = read_checkpoint(checkpoint_path)
    overlay: dict[str, Any] = {"state_dict": state_dict}
    if run is not None:
        if run["backbone"] != backbone:
            raise ValueError(f"{checkpoint_path} is of the model {run['backbone']}, not {backbone}")
        overlay |= {"num_classes": run["num_classes"], "input_size": (run.get("in_chans", 3), 224, 224)}
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
