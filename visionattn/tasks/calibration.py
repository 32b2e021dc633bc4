"""Whether a classifier is as sure as it is right: its calibration error, and the temperature that mends it."""
import math

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from .findings import Sums

__all__ = ["SingleLabelCounts", "calibration_bins", "calibration_error", "fit_temperature"]

BINS = 15  # of confidence
MATRIX = 2000  # classes up to which a test counts which is taken for which: the matrix has 32 MB then
FITTED = 2_000_000  # logits of the validation that the temperature is fitted to


class SingleLabelCounts(nn.Module):
    """What is counted of images that have one class each, to tell confusions and calibration.

    Args:
        num_classes: Number of classes.

    Attributes:
        temperature: By which logits are divided to be calibrated, fitted to the last validation; None before.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.matrix = MulticlassConfusionMatrix(num_classes) if num_classes <= MATRIX else None
        self.before, self.after = (Sums(BINS, 3, dtype=torch.float32) for _ in range(2))
        self.temperature: float | None = None
        self._validated: list[tuple[Tensor, Tensor]] = []

    def validate(self, logits: Tensor, labels: Tensor, batches: float) -> None:
        """Adds a batch of the validation, of which all processes have ``batches``."""
        # Evenly chosen, as the images may be in the order of their classes; there may be no end of batches.
        step = math.ceil(min(batches, FITTED) * logits.numel() / FITTED)
        self._validated.append((logits[::step].detach().float().cpu(), labels[::step].cpu()))

    def take_validated(self) -> list[tuple[Tensor, Tensor]]:
        """What :meth:`validate` kept."""
        kept, self._validated = self._validated, []
        return kept

    def fit(self, validated: list[tuple[Tensor, Tensor]]) -> None:
        """Fits the temperature to what was kept in all processes, if there is anything."""
        if validated:
            logits, labels = (torch.cat(part) for part in zip(*validated, strict=True))
            self.temperature = fit_temperature(logits, labels)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch of the test."""
        self.before.update(calibration_bins(logits, labels))
        self.after.update(calibration_bins(logits / (self.temperature or 1.0), labels))
        if self.matrix is not None:
            self.matrix.update(logits, labels)

    def compute(self) -> tuple[dict[str, float], np.ndarray | None, dict[str, np.ndarray]]:
        """The test's metrics of calibration, confusion matrix and bins by name, of all processes; resets them."""
        before, after = self.before.compute(), self.after.compute()
        metrics = {"ece": round(calibration_error(before), 6)}
        bins = {f"as it is: ECE {metrics['ece']:.3f}": before.cpu().numpy()}
        if self.temperature is not None:
            metrics["ece_calibrated"] = round(calibration_error(after), 6)
            metrics["temperature"] = round(self.temperature, 6)
            bins[f"logits / {self.temperature:.3g}: ECE {metrics['ece_calibrated']:.3f}"] = after.cpu().numpy()
        confusion = None if self.matrix is None else self.matrix.compute().cpu().numpy()
        for metric in (self.before, self.after, self.matrix):
            if metric is not None:
                metric.reset()
        return metrics, confusion, bins


def calibration_bins(logits: Tensor, labels: Tensor) -> Tensor:
    """``[BINS, 3]``: by confidence the number of images, the sum of their confidences, how many are right."""
    confidence, predicted = logits.float().softmax(dim=1).max(dim=1)
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # as torchmetrics has them: ]0, 1/15], ...
    values = torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).float()], dim=1)
    return torch.zeros(BINS, 3, device=logits.device).index_add_(0, place, values)


def calibration_error(bins: Tensor) -> float:
    """Expected calibration error of ``bins``: mean distance of confidence and accuracy."""
    count, confidence, right = bins.T
    return ((confidence - right).abs().sum() / count.sum()).item()


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """What to divide logits ``[N, classes]`` by so that their cross-entropy is least, between 0.05 and 20."""
    logits = logits.double()
    target = logits.gather(1, labels[:, None])[:, 0].mean()
    low, high = 1 / 20, 1 / 0.05  # of the inverse temperature, in which the loss is convex
    for _ in range(30):
        inverse = (low * high) ** 0.5
        slope = ((inverse * logits).softmax(dim=1) * logits).sum(dim=1).mean() - target
        low, high = (low, inverse) if slope > 0 else (inverse, high)
    return 1 / (low * high) ** 0.5
