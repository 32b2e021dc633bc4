"""Several dense tasks on one image: a segmentation, and beside it its boundaries and the distances from these."""
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, max_pool2d
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryF1Score

from ..heads.blocks import resize
from ..heads.segmenter import make_head
from ..heads.taskexpert import TaskExpertHead
from ..layers.auxiliary import auxiliary_losses
from .segmentation import SegmentationTask

__all__ = ["DENSE_TASKS", "DenseTasks", "boundaries_of", "distances_of"]

DENSE_TASKS = ("boundary", "distance")
REACH = 16  # pixels: the largest distance that is told from larger ones


class DenseTasks(SegmentationTask):
    """A :class:`SegmentationTask` that learns two more things of each pixel, from the same label maps.

    ``boundary``: whether a neighbour (above, below, left, right) has another label, by binary cross-entropy.
    ``distance``: how far the nearest such pixel is, in steps to any of eight neighbours, at most 16, by the mean
    absolute difference. With the head ``taskexpert`` all tasks assemble the features of the same experts; with
    another each has a head of that kind for itself. What the label maps leave out does not count; distances are those
    to what is known of boundaries.

    Logs ``train/boundary`` and ``train/distance``, unweighted, and ``val/`` and ``test/`` ``boundary_f1`` (of pixels, a
    fraction) and ``distance_error`` (mean, in pixels). Its checkpoints are a :class:`SegmentationTask`'s to all that
    reads them.

    Args:
        dense_tasks: Weight of each task's loss beside segmentation's.
        kwargs: Arguments of :class:`SegmentationTask`.

    Raises:
        ValueError: There is no such task, or a weight is not positive.
    """

    def __init__(self, dense_tasks: dict[str, float] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        weights = dict.fromkeys(DENSE_TASKS, 1.0) if dense_tasks is None else dict(dense_tasks)
        unknown = sorted(set(weights) - set(DENSE_TASKS))
        if unknown or not weights or min(weights.values()) <= 0:
            raise ValueError(f"dense_tasks must be positive weights of {' and '.join(DENSE_TASKS)} or of one of them, "
                             f"got {dense_tasks}")
        if self.args.adapter:
            raise ValueError("an adapter is trained for one task: leave adapter out, or take SegmentationTask")
        self.task_weights = weights
        head: Any = self.model.head
        self.others = nn.ModuleDict({
            name: head.another(1) if isinstance(head, TaskExpertHead) else
            make_head(self.model.backbone, 1, self.args.head, self.args.head_channels)
            for name in weights})
        self.f1, self.error = BinaryF1Score(), MeanMetric()
        self.found: dict[str, float] = {}  # of the last evaluation

    def heads(self) -> list[nn.Module]:
        """What is trained beside the timm model."""
        return [*super().heads(), self.others]

    def compiled(self) -> list[nn.Module]:
        """The backbone and the parts of the heads that a training step calls."""
        model: Any = self.model
        whole = not isinstance(model.head, TaskExpertHead)
        heads = [model.head] if whole else [model.head.experts, model.head.decoder]
        auxiliary = [] if model.auxiliary_head is None else [model.auxiliary_head]
        return [model.backbone, *heads, *auxiliary, *self.others.values()]

    def maps(self, images: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What the heads give of ``images [B, C, H, W]`` in [0, 1], at the size of the backbone's finest map.

        Returns:
            Logits of the classes, from the head and, if there is one, the auxiliary head; and of each other task
            ``[B, 1, h, w]``: logits of ``boundary``, ``distance`` in parts of 16 pixels.
        """
        model: Any = self.model
        features = model.features(images)
        if isinstance(model.head, TaskExpertHead):
            levels = model.head.experts(features)
            logits = [model.head.decoder(levels)]
            others = {name: decoder(levels) for name, decoder in self.others.items()}
        else:
            logits = [model.head(features)]
            others = {name: head(features) for name, head in self.others.items()}
        if model.auxiliary_head is not None:
            logits.append(model.auxiliary_head(features[-2]))
        return logits, others

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of one batch: segmentation's, as its task has it, and the other tasks', weighted."""
        images, labels = batch
        logits, others = self.maps(images)
        size = labels.shape[-2:]
        segmentation, *auxiliary = (self.loss(resize(x, size), labels) for x in logits)
        losses = {"segmentation": segmentation}
        if auxiliary:
            losses["auxiliary"] = self.args.auxiliary_weight * auxiliary[0]
        apart = self._losses(others, labels)
        losses |= apart | auxiliary_losses(self.model)
        loss = torch.stack([self.task_weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()
        self.log_training(loss, losses, len(images))
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves a segmenter's checkpoint, which needs no other heads."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"].pop("dense_tasks", None)

    def write_test_metrics(self, metrics: dict[str, Any]) -> None:
        """Adds those of the other tasks."""
        super().write_test_metrics(metrics | {name: round(value, 6) for name, value in self.found.items()})

    def _losses(self, others: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The losses of the other tasks, unweighted; 0 where no pixel counts."""
        ignored = self.args.ignore_index
        known, edges = labels != ignored, boundaries_of(labels, ignored)
        losses = {}
        for name, x in others.items():
            guess = resize(x, labels.shape[-2:])[:, 0].float()
            if name == "boundary":
                loss = binary_cross_entropy_with_logits(guess, edges.float(), reduction="none")
            else:
                loss = (guess - distances_of(edges)).abs()
            losses[name] = (loss * known).sum() / known.sum().clamp(min=1)
        return losses

    def _evaluate(self, matrix: Any, loss: Any, images: Tensor, labels: Tensor, testing: bool = False) -> Tensor:
        """Adds one batch to the metrics, of the other tasks by the images seen whole; returns the predicted labels."""
        guesses = super()._evaluate(matrix, loss, images, labels, testing)
        ignored = self.args.ignore_index
        known, edges = labels != ignored, boundaries_of(labels, ignored)
        others = {name: resize(x, labels.shape[-2:])[:, 0].float() for name, x in self.maps(images)[1].items()}
        if "boundary" in others and known.any():
            self.f1.update(others["boundary"][known].sigmoid(), edges[known].long())
        if "distance" in others and known.any():
            self.error.update(REACH * (others["distance"] - distances_of(edges)).abs()[known])
        return guesses

    def _log(self, split: str, matrix: Any, loss: Any) -> Any:
        """Logs and resets the metrics of ``split``."""
        metrics = {"boundary": ("boundary_f1", self.f1), "distance": ("distance_error", self.error)}
        self.found = {}
        for task, (name, metric) in metrics.items():
            if task in self.task_weights:
                self.found[name] = float(metric.compute())
                metric.reset()
        self.log_dict({f"{split}/{name}": value for name, value in self.found.items()}, sync_dist=True)
        if split == "test":
            rank_zero_info("  ".join(f"{name} {value:.4g}" for name, value in self.found.items()))
        return super()._log(split, matrix, loss)


def boundaries_of(labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Which pixels of ``labels [B, H, W]`` have a neighbour on one of four sides with another label, ``[B, H, W]``.

    Pixels that are labelled ``ignore_index`` are no boundary and make none.
    """
    edges = torch.zeros_like(labels, dtype=torch.bool)
    known = labels != ignore_index
    for axis in (1, 2):
        count = labels.shape[axis] - 1
        before, after = labels.narrow(axis, 0, count), labels.narrow(axis, 1, count)
        other = (before != after) & known.narrow(axis, 0, count) & known.narrow(axis, 1, count)
        for start in (0, 1):
            edges.narrow(axis, start, count).logical_or_(other)
    return edges


def distances_of(edges: Tensor) -> Tensor:
    """Steps to the nearest pixel of ``edges [B, H, W]``, to any of eight neighbours each, in parts of 16, at most 1."""
    distance = torch.where(edges, 0.0, float(REACH))
    for _ in range(REACH - 1):
        distance = torch.minimum(distance, 1 - max_pool2d(-distance[:, None], 3, stride=1, padding=1)[:, 0])
    return distance / REACH
