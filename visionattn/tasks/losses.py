"""Losses of segmentation: cross-entropy, soft dice and online hard example mining, alone or as a weighted sum. And a
loss of attention maps, and weights of several tasks' losses that are learnt.

Those of segmentation take logits ``[B, C, H, W]`` of any floating dtype and labels ``[B, H, W]`` (int64), leave out the
pixels whose label is ``ignore_index``, compute in float32 and return a scalar, which is 0 where no pixel is left.
"""
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

__all__ = ["SegmentationLoss", "UncertaintyWeighting", "attention_diversification_loss", "dice_loss", "ohem_loss",
           "pixel_loss"]

HARD = -math.log(0.7)  # cross-entropy of a pixel whose class has a probability of 0.7
LEAST_KEPT = 16  # hard example mining keeps at least one in so many pixels


class SegmentationLoss(nn.Module):
    """Weighted sum of losses.

    Args:
        weights: Weight of each loss; the names are ``cross_entropy``, ``dice`` and ``ohem``.
        ignore_index: Label of pixels that do not count.
        class_weights: Weight of each label's pixels in the mean cross-entropy; None for equal ones.
    """

    class_weights: Tensor | None

    def __init__(
            self, weights: dict[str, float], ignore_index: int = 255, class_weights: Sequence[float] | None = None):
        super().__init__()
        unknown = sorted(set(weights) - set(_LOSSES))
        if unknown or not weights:
            raise ValueError(f"losses must name some of {', '.join(_LOSSES)} with their weights, got "
                             f"{', '.join(unknown) or 'none'}")
        if class_weights is not None and "cross_entropy" not in weights:
            raise ValueError(f"class_weights are those of cross_entropy, losses are {', '.join(weights)}")
        if class_weights is not None and not all(0 < weight < math.inf for weight in class_weights):
            raise ValueError(f"class_weights must be positive, got {list(class_weights)}")
        self.weights, self.ignore_index = dict(weights), ignore_index
        self.register_buffer(
            "class_weights", None if class_weights is None else torch.tensor(class_weights), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of logits ``[B, C, H, W]`` against labels ``[B, H, W]``."""
        losses = _LOSSES | {"cross_entropy": partial(pixel_loss, class_weights=self.class_weights)}
        terms = [weight * losses[name](logits, labels, self.ignore_index) for name, weight in self.weights.items()]
        return torch.stack(terms).sum()


class UncertaintyWeighting(nn.Module):
    """Sum of several tasks' losses whose weights are learnt: ``0.5 / s^2 * loss + log(1 + s^2)`` of each task.

    "Multi-Task Learning Using Uncertainty to Weigh Losses" (arXiv 1705.07115), with the positive regulariser of
    arXiv 1805.06334. ``scales[task]`` is ``s``, 1 at the start: a task whose loss stays large gets less weight.

    Args:
        tasks: Names of the tasks.
    """

    def __init__(self, tasks: Iterable[str]):
        super().__init__()
        self.scales = nn.ParameterDict({task: torch.ones(()) for task in tasks})

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The sum over the tasks that are in ``losses``, scalars; others learn nothing from it."""
        squares = {task: self.scales[task].square() for task in losses}
        return torch.stack([0.5 / squares[task] * loss + squares[task].log1p() for task, loss in losses.items()]).sum()


def pixel_loss(
        logits: Tensor, labels: Tensor, ignore_index: int = 255, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy, mean over the pixels that count, each weighted by ``class_weights [C]`` of its label."""
    weight = None if class_weights is None else class_weights.float()
    total = cross_entropy(logits.float(), labels, weight, ignore_index=ignore_index, reduction="sum")
    counts = labels != ignore_index
    if weight is None:
        return total / counts.sum().clamp(min=1)
    return total / (weight[labels.where(counts, 0)] * counts).sum().clamp(min=weight.min())


def dice_loss(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """One minus the soft dice coefficient (Milletari et al., 2016), mean over the classes that occur in the labels.

    The coefficient of a class is ``2 sum(p t) / (sum(p) + sum(t))`` over all pixels of the batch.
    """
    probabilities = logits.float().softmax(dim=1)
    counts = (labels != ignore_index).to(probabilities.dtype)
    labels = labels.where(labels != ignore_index, 0)

    def per_class(x: Tensor) -> Tensor:
        return x.new_zeros(logits.shape[1]).index_add(0, labels.flatten(), x.flatten())

    common = per_class(probabilities.gather(1, labels[:, None])[:, 0] * counts)
    predicted, true = (probabilities * counts[:, None]).sum((0, 2, 3)), per_class(counts)
    present = true > 0
    loss = 1 - 2 * common / (predicted + true).clamp(min=1e-6)
    return (loss * present).sum() / present.sum().clamp(min=1)


def ohem_loss(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy, mean over hard pixels: those whose own class has a probability below 0.7.

    Where these are fewer than a sixteenth of all pixels, the hardest sixteenth counts (as in BiSeNet).
    """
    losses = cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="none").flatten()
    least = losses.detach().topk(max(1, len(losses) // LEAST_KEPT)).values[-1]
    hard = (losses >= least.clamp(max=HARD)) & (labels.flatten() != ignore_index)
    return (losses * hard).sum() / hard.sum().clamp(min=1)


def attention_diversification_loss(maps: Sequence[Tensor], threshold: float = 2.0) -> Tensor:
    """How much all queries attend to the same keys, mean over the layers: 1 if they all do, 0 if none is attended to.

    "Robustifying Token Attention for Vision Transformers" (arXiv 2303.11126). In each layer, with means
    over the heads, the attention of every query is compared with the mean of all queries by their cosine, both without
    the keys that get ``threshold / keys`` or less. Where attention is so even that no key's mean gets more, the loss
    and its gradient are 0.

    Args:
        maps: Attention probabilities ``[batch, heads, queries, keys]`` of each layer, of any floating dtype. Those of a
            single query (class attention) are left out.
        threshold: What counts as attended to, in multiples of even attention.

    Returns:
        A scalar, computed in float32 or better.

    Raises:
        ValueError: There is no map of several queries.
    """
    losses = []
    for attention in maps:
        if attention.shape[2] > 1:
            rows = attention.to(torch.promote_types(attention.dtype, torch.float32)).mean(dim=1)
            even = threshold / rows.shape[-1]
            mean = rows.mean(dim=1, keepdim=True)
            rows, mean = (x.masked_fill(x <= even, 0) for x in (rows, mean))
            losses.append(cosine_similarity(mean, rows, dim=-1, eps=1e-8).mean())
    if not losses:
        raise ValueError("the attention diversification loss needs attention maps of several queries, got none")
    return torch.stack(losses).sum() / (len(losses) + 1e-6)


_LOSSES: dict[str, Callable[..., Tensor]] = {"cross_entropy": pixel_loss, "dice": dice_loss, "ohem": ohem_loss}
