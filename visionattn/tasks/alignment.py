"""What is kept of classes whose images are gone, their Gaussians, and the alignment of a classifier on these."""
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["ClassGaussians", "align", "mean_contrast_loss"]

RIDGE = 1e-4  # on the variances
TEMPERATURE = 0.8  # of the contrast


class ClassGaussians(nn.Module):
    """Mean and covariance of the features of each class.

    Args:
        num_classes: Number of classes.
        dim: Channels of the features.
        kind: ``full`` covariances, ``dim ** 2`` numbers a class, or their diagonals, ``variance``.

    Attributes:
        mean: ``[classes, dim]``.
        covariance: ``[classes, dim, dim]``, or ``[classes, dim]``.
    """

    def __init__(self, num_classes: int, dim: int, kind: Literal["full", "variance"] = "full"):
        super().__init__()
        self.kind = kind
        self.mean: Tensor
        self.covariance: Tensor
        self.register_buffer("mean", torch.zeros(num_classes, dim))
        self.register_buffer("covariance", torch.zeros(num_classes, dim, *[dim] * (kind == "full")))

    def fit(self, label: int, features: Tensor) -> None:
        """Takes the Gaussian of a class from its features ``[N, dim]``, of one image with hardly any spread."""
        features = features.double()
        mean = features.mean(dim=0)
        centred = (features - mean) / math.sqrt(max(1, len(features) - 1))
        if self.kind == "full":
            spread = centred.mT @ centred
            spread.diagonal().add_(RIDGE)
        else:
            spread = centred.square().sum(dim=0) + RIDGE
        self.mean[label], self.covariance[label] = mean.to(self.mean.dtype), spread.to(self.mean.dtype)

    def roots(self, classes: Tensor) -> Tensor:
        """What makes features of normal numbers: ``[n, dim, dim]``, or ``[n, dim]`` of variances."""
        chosen = self.covariance[classes]
        if self.kind == "variance":
            return chosen.sqrt()
        values, vectors = torch.linalg.eigh(chosen.double())  # fewer images than channels: many are the ridge alone
        return (vectors * values.clamp_min(0).sqrt()[:, None]).to(chosen.dtype)

    def draw(self, classes: Tensor, roots: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """``count`` features of each of ``classes [n]``, whose :meth:`roots` are given: ``[n, count, dim]``."""
        shape = len(classes), count, self.mean.shape[1]
        normal = torch.randn(shape, generator=generator).to(self.mean)
        spread = normal * roots[:, None] if self.kind == "variance" else normal @ roots.mT
        return self.mean[classes][:, None] + spread


def align(
        head: nn.Module, gaussians: ClassGaussians, classes: Tensor, count: int, epochs: int, lr: float,
        generator: torch.Generator) -> None:
    """Trains a classifier alone on features that are drawn of the Gaussians of ``classes [n]`` (SGD, a cosine).

    Args:
        head: Takes features ``[B, dim]`` to logits of all classes; the others of them are left out of the loss.
        gaussians: Of the classes.
        classes: Whose features are drawn.
        count: Features of each class an epoch, and features of all classes a step.
        epochs: Of drawing and training.
        lr: Learning rate at the start.
        generator: Draws the features and their order, on the CPU.
    """
    optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    roots, places = gaussians.roots(classes), torch.arange(len(classes), device=classes.device)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        features = gaussians.draw(classes, roots, count, generator).flatten(0, 1)
        labels = places.repeat_interleave(count)
        for rows in torch.randperm(len(labels), generator=generator).to(labels.device).split(count):
            optimizer.zero_grad()
            cross_entropy(head(features[rows])[:, classes], labels[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()


def mean_contrast_loss(features: Tensor, means: Tensor) -> Tensor:
    """Keeps features ``[B, dim]`` apart from each other and from the means ``[n, dim]`` of classes seen before.

    The cross-entropy of their products over 0.8 against the identity: each is to be most like itself (MOS, AAAI 2025).
    """
    rows = torch.cat([means.to(features.dtype), features])
    return cross_entropy(rows @ rows.mT / TEMPERATURE, torch.arange(len(rows), device=rows.device))
