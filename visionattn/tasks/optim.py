"""AdamW with timm's parameter groups, and schedules with warm-up: shared by every task."""
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["adamw", "cosine_with_warmup", "poly_with_warmup", "steps_with_warmup"]


def adamw(
        model: nn.Module,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        layer_decay: float | None = None,
        heads: Iterable[nn.Module] = (),
) -> AdamW:
    """Returns AdamW over the trainable parameters of ``model`` and ``heads``.

    One-dimensional parameters, biases and those that ``model.no_weight_decay()`` names (bias tables) are not decayed.

    Args:
        model: A timm model: ``no_weight_decay()`` and, for ``layer_decay``, ``group_matcher()`` are asked if there.
        lr: Learning rate of the head, and of everything without ``layer_decay``.
        weight_decay: Of the parameters that are decayed.
        betas: Of AdamW.
        layer_decay: Factor on the learning rate from each layer to the one before it, for fine-tuning.
        heads: Modules outside ``model`` that are trained at ``lr``: the heads of a dense task.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    if layer_decay is None:
        groups: list[dict[str, Any]] = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    for head in heads:
        groups += param_groups_weight_decay(head, weight_decay)
    merged: dict[tuple[float, float], list[nn.Parameter]] = {}  # by learning rate and decay
    for group in groups:
        merged.setdefault((lr * group.get("lr_scale", 1.0), group["weight_decay"]), []).extend(group["params"])
    return AdamW(
        [{"params": params, "weight_decay": decay, "lr": rate} for (rate, decay), params in merged.items() if params],
        lr=lr, betas=betas)


def cosine_with_warmup(optimizer: Optimizer, steps: int, warmup_steps: int, min_lr_ratio: float = 0.0) -> LambdaLR:
    """Returns a schedule, stepped once an optimiser step, that scales every group's learning rate.

    It rises linearly from ``1 / warmup_steps`` to 1 over the first ``warmup_steps`` and falls along half a cosine to
    ``min_lr_ratio`` at step ``steps``; it stays there.
    """
    def after(progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2

    return _with_warmup(optimizer, after, steps, warmup_steps, min_lr_ratio)


def poly_with_warmup(
        optimizer: Optimizer,
        steps: int,
        warmup_steps: int,
        min_lr_ratio: float = 0.0,
        power: float = 1.0,
) -> LambdaLR:
    """Returns a schedule like :func:`cosine_with_warmup` that falls as ``(1 - progress) ** power``."""
    return _with_warmup(optimizer, lambda progress: (1 - progress) ** power, steps, warmup_steps, min_lr_ratio)


def steps_with_warmup(
        optimizer: Optimizer,
        milestones: Collection[int],
        warmup_steps: int,
        factor: float = 0.1,
) -> LambdaLR:
    """Returns a schedule, stepped once an optimiser step: the warm-up of :func:`cosine_with_warmup`, then steps.

    From each of the ``milestones`` (optimiser steps) on, every group's learning rate is ``factor`` of what it was.
    """
    def scale(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return factor ** sum(step >= milestone for milestone in milestones)

    return LambdaLR(optimizer, scale)


def _with_warmup(
        optimizer: Optimizer,
        after: Callable[[float], float],
        steps: int,
        warmup_steps: int,
        min_lr_ratio: float,
) -> LambdaLR:
    """``after`` takes the share of the steps after the warm-up to a factor that falls from 1 to 0."""
    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
        return min_lr_ratio + (1 - min_lr_ratio) * after(progress)

    return LambdaLR(optimizer, factor)
