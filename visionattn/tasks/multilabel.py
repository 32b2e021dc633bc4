"""Multi-label classification: average precision, and the probability from which on each class counts as present."""
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.utilities.data import dim_zero_cat

__all__ = ["MultilabelScores", "average_precisions", "best_thresholds", "threshold_scores"]


class MultilabelScores(Metric):
    """Collects probabilities and labels ``[N, classes]`` of all batches and processes."""

    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Adds ``[B, classes]`` probabilities and labels (0 and 1)."""
        self.scores.append(scores.detach().float())
        self.labels.append(labels.bool())

    def compute(self) -> tuple[Tensor, Tensor]:
        """All probabilities and labels."""
        return dim_zero_cat(self.scores), dim_zero_cat(self.labels)


def average_precisions(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision ``[classes]``, NaN for classes of which there is no image.

    Args:
        scores: Probabilities ``[N, classes]``.
        labels: Booleans ``[N, classes]``.
    """
    result = scores.new_full((scores.shape[1],), torch.nan)
    present = labels.any(dim=0)
    if present.any():
        scores, labels = scores[:, present], labels[:, present].long()
        if scores.shape[1] == 1:  # torchmetrics takes two or more
            scores, labels = scores.expand(-1, 2), labels.expand(-1, 2)
        found: Any = multilabel_average_precision(scores, labels, num_labels=scores.shape[1], average=None)
        result[present] = found[:int(present.sum())]
    return result


def best_thresholds(scores: Tensor, labels: Tensor) -> Tensor:
    """The thresholds ``[classes]`` with the best F1: a class is present from there on.

    They lie between two scores that occur. A class of which there is no image has 0.5.

    Args:
        scores: Probabilities ``[N, classes]``.
        labels: Booleans ``[N, classes]``.
    """
    ordered, order = scores.sort(dim=0, descending=True)
    hits = labels.gather(0, order).cumsum(0)
    found = torch.arange(1, len(scores) + 1, device=scores.device)[:, None]
    following = torch.cat([ordered[1:], torch.zeros_like(ordered[:1])])
    f1 = (2 * hits / (found + labels.sum(0))).masked_fill((ordered == following) & (found < len(scores)), -1)
    best = f1.argmax(dim=0, keepdim=True)
    middle = (ordered.gather(0, best) + following.gather(0, best))[0] / 2
    return torch.where(labels.any(dim=0), middle, 0.5)


def threshold_scores(scores: Tensor, labels: Tensor, thresholds: Tensor) -> dict[str, Tensor]:
    """``precision``, ``recall`` and ``f1`` at the thresholds, each ``[classes]``, NaN for classes without an image."""
    found = scores >= thresholds
    hits, absent = (found & labels).sum(0), ~labels.any(dim=0)
    precision, recall = hits / found.sum(0).clamp(min=1), hits / labels.sum(0).clamp(min=1)
    f1 = 2 * hits / (found.sum(0) + labels.sum(0)).clamp(min=1)
    return {name: value.masked_fill(absent, torch.nan)
            for name, value in (("precision", precision), ("recall", recall), ("f1", f1))}
