"""A classifier that learns its classes in steps: an adapter for each step, self-refined retrieval, an ensemble.

Paper: "MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning" (AAAI 2025).
"""
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..adapters import adapters_of
from ..adapters.mos import StepAdapters
from ..ops.dispatch import exporting

__all__ = ["IncrementalClassifier", "ensemble", "prototype_logits", "retrieve"]

PASSES = 4  # of the retrieval at most
LABEL = "steps"  # of the adapters on the backbone


class IncrementalClassifier(nn.Module):
    """A frozen backbone with an adapter for each step of classes, a linear head and cosine prototypes.

    An image's classes are guessed by the prototypes under the adapter of the first step; the head, under the adapter of
    the step that the guessed class is of, guesses again, until the step stays the same. The probabilities of head and
    prototypes are averaged. Classes of steps that are not done have a probability of 0.

    Args:
        backbone: A timm model whose blocks have ``norm2`` and ``mlp``, made without classes: it gives pooled features.
        step_of: The step of each class, from 0 on.
        bottleneck: Channels between the two layers of an adapter.
        sigma: Factor on the cosines of the prototypes.

    Attributes:
        head: Logits of all classes, ``[classes, dim]``, without a bias.
        prototypes: Mean feature of each class under the first adapter, ``[classes, dim]``.
        done: Number of steps that were trained.

    Raises:
        ValueError: The backbone has no such blocks.
    """

    def __init__(self, backbone: Any, step_of: Sequence[int], bottleneck: int = 16, sigma: float = 1.0):
        super().__init__()
        dim = getattr(backbone, "head_hidden_size", None) or backbone.num_features
        self.num_classes, self.sigma = len(step_of), sigma
        self.pretrained_cfg = backbone.pretrained_cfg
        self.backbone = backbone
        StepAdapters(max(step_of) + 1, bottleneck).attach(backbone, LABEL)
        self.head = nn.Linear(dim, self.num_classes, bias=False)
        self.step_of: Tensor
        self.prototypes: Tensor
        self.done: Tensor
        self.register_buffer("step_of", torch.tensor(step_of))
        self.register_buffer("prototypes", torch.zeros(self.num_classes, dim))
        self.register_buffer("done", torch.tensor(0))

    @property
    def step_adapters(self) -> StepAdapters:
        """Those of all steps, and the one in training; layers of the backbone's."""
        return cast(StepAdapters, adapters_of(self.backbone)[LABEL])

    def train(self, mode: bool = True) -> "IncrementalClassifier":
        """Sets the mode of adapters and head; the backbone, which does not train, stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        self.step_adapters.train(mode)
        return self

    def features(self, images: Tensor, step: Tensor | int | None = None) -> Tensor:
        """Pooled features ``[B, dim]`` of ``images [B, C, H, W]`` under an adapter.

        Args:
            images: Normalised images.
            step: Whose stored adapter is taken: of each image ``[B]``, or one for all; None for the one in training.
        """
        with self.step_adapters.using(step):
            return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logarithms of the classes' probabilities, ``[B, classes]``, of ``images [B, C, H, W]``."""
        first = self.features(images, 0)
        unseen = self.step_of >= self.done
        prototypes = prototype_logits(first, self.prototypes, self.sigma).masked_fill(unseen, -torch.inf)

        def logits_under(rows: Tensor | None, step: Tensor) -> Tensor:
            if rows is None:  # all of them, in a graph that is the same for all images
                features = self.features(images, step)
            else:
                features, others = first[rows], (step > 0).nonzero()[:, 0]  # those of the first step are known
                if len(others):
                    features[others] = self.features(images[rows[others]], step[others]).to(features.dtype)
            return self.head(features).masked_fill(unseen, -torch.inf)

        logits = retrieve(self.step_of[prototypes.argmax(dim=1)], logits_under, self.step_of, unrolled=exporting())
        shares = ensemble(logits.float(), prototypes.float(), self.done) / 2
        return shares.clamp_min(torch.finfo(shares.dtype).tiny).log()

    def forward_features(self, images: Tensor) -> Tensor:
        """The backbone's tokens or maps under the adapter of the first step, as prototypes see them."""
        with self.step_adapters.using(0):
            return self.backbone.forward_features(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features ``[B, dim]`` of these, or the logits of the prototypes."""
        pooled = self.backbone.forward_head(features, pre_logits=True)
        return pooled if pre_logits else prototype_logits(pooled, self.prototypes, self.sigma)


def prototype_logits(features: Tensor, prototypes: Tensor, sigma: float) -> Tensor:
    """``sigma`` times the cosines ``[B, classes]`` of ``features [B, dim]`` and ``prototypes [classes, dim]``."""
    return sigma * normalize(features, dim=1) @ normalize(prototypes, dim=1).to(features.dtype).mT


def retrieve(
        step: Tensor, logits_under: Callable[[Tensor | None, Tensor], Tensor], step_of: Tensor, unrolled: bool = False,
) -> Tensor:
    """Self-refined retrieval of each image's adapter: the step of the class that it says is tried next.

    It ends for an image when its step stays the same, or after four passes.

    Args:
        step: The step of each image to begin with, ``[B]``.
        logits_under: Gives the logits ``[rows, classes]`` of the images ``rows`` (None for all) under the adapters of
            the steps that it is given with them, ``[rows]``.
        step_of: The step of each class, ``[classes]``.
        unrolled: Make all passes for all images, which changes no result, but nothing depends on the data then.

    Returns:
        The logits of each image's last pass, ``[B, classes]``.
    """
    if unrolled:
        logits = logits_under(None, step)
        for _ in range(PASSES - 1):
            logits = logits_under(None, step_of[logits.argmax(dim=1)])
        return logits
    rows = torch.arange(len(step), device=step.device)
    logits = logits_under(rows, step)
    for _ in range(PASSES - 1):
        after = step_of[logits[rows].argmax(dim=1)]
        moved = after != step
        rows, step = rows[moved], after[moved]
        if not len(rows):
            break
        logits[rows] = logits_under(rows, step)
    return logits


def ensemble(logits: Tensor, prototypes: Tensor, steps: Tensor | int) -> Tensor:
    """Sum of the probabilities of head and prototypes, ``[B, classes]``, after so many steps."""
    return logits.softmax(dim=1) + (prototypes * steps).softmax(dim=1)
