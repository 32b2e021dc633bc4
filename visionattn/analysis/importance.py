"""How much what a classifier says depends on each of its heads.

By gradient and by ablation, after "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt" (TVCG
2023, arXiv 2303.13731).
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .heads import find_heads, masked_heads

__all__ = ["Ablation", "ablate_heads", "gradient_importance", "loss_and_accuracy"]


def gradient_importance(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """How much the loss of an image depends on each head: mean over the images of ``|dL / dm|``.

    ``m = 1`` multiplies the head's output, as :func:`visionattn.analysis.masked_heads` does; L is the cross-entropy.

    Args:
        model: A classifier in eval mode.
        images: ``[images, channels, height, width]``, which are run one by one.
        labels: ``[images]``.

    Returns:
        ``[heads]`` for each layer of :func:`visionattn.analysis.find_heads`, by its name.
    """
    masks = {heads.name: torch.ones(heads.count, device=images.device, requires_grad=True)
             for heads in find_heads(model)}
    sums = {name: torch.zeros(len(mask), dtype=torch.float64) for name, mask in masks.items()}
    with masked_heads(model, masks):
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            with torch.enable_grad():
                loss = cross_entropy(model(image).float(), label)
                found = torch.autograd.grad(loss, list(masks.values()), materialize_grads=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                total += gradient.abs().cpu()
    return {name: (total / len(images)).float() for name, total in sums.items()}


class Ablation(NamedTuple):
    """What a classifier says without one head.

    Attributes:
        loss: Mean cross-entropy of the whole model.
        accuracy: Share of the images that it is right about.
        losses: The loss without each head ``[heads]``, by the name of the layer.
        accuracies: The accuracy without each head.
    """

    loss: float
    accuracy: float
    losses: dict[str, Tensor]
    accuracies: dict[str, Tensor]


def ablate_heads(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 8) -> Ablation:
    """Runs a classifier on all images once for each head, which is masked by 0.

    Args:
        model: A classifier in eval mode.
        images: ``[images, channels, height, width]``.
        labels: ``[images]``.
        batch: Images at once.
    """
    losses, accuracies = {}, {}
    with torch.inference_mode():
        whole = loss_and_accuracy(model, images, labels, batch)
        for heads in find_heads(model):
            found = []
            for mask in 1 - torch.eye(heads.count, device=images.device):
                with masked_heads(model, {heads.name: mask}):
                    found.append(loss_and_accuracy(model, images, labels, batch))
            losses[heads.name], accuracies[heads.name] = torch.tensor(found).T.unbind()
    return Ablation(*whole, losses, accuracies)


def loss_and_accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> tuple[float, float]:
    """Mean cross-entropy of a classifier on images, run ``batch`` at once, and the share that it is right about."""
    loss = right = 0.
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        scores = model(x).float()
        loss += cross_entropy(scores, y, reduction="sum").item()
        right += (scores.argmax(dim=1) == y).sum().item()
    return loss / len(images), right / len(images)
