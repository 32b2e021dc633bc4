"""AdamW with timm's parameter groups, and the cosine schedule with warm-up: shared by every task."""
import math
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["adamw", "cosine_with_warmup"]


def adamw(
        model: nn.Module,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        layer_decay: float | None = None,
) -> AdamW:
    """Returns AdamW over ``model``'s trainable parameters.

    One-dimensional parameters, biases and those that ``model.no_weight_decay()`` names (bias tables) are not decayed.

    Args:
        model: A timm model: ``no_weight_decay()`` and, for ``layer_decay``, ``group_matcher()`` are asked if there.
        lr: Learning rate of the head, and of everything without ``layer_decay``.
        weight_decay: Of the parameters that are decayed.
        betas: Of AdamW.
        layer_decay: Factor on the learning rate from each layer to the one before it, for fine-tuning.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    if layer_decay is None:
        groups: list[dict[str, Any]] = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"], "lr": lr * group.get("lr_scale", 1.0)}
        for group in groups
    ]
    return AdamW(groups, lr=lr, betas=betas)


def cosine_with_warmup(optimizer: Optimizer, steps: int, warmup_steps: int, min_lr_ratio: float = 0.0) -> LambdaLR:
    """Returns a schedule, stepped once an optimiser step, that scales every group's learning rate.

    It rises linearly from ``1 / warmup_steps`` to 1 over the first ``warmup_steps`` and falls along half a cosine to
    ``min_lr_ratio`` at step ``steps``; it stays there.
    """
    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
        return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)
