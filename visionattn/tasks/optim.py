"""timm's optimisers with its parameter groups, and schedules with warm-up: shared by every task."""
import math
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from typing import Any

from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["check_optimizer", "cosine_with_warmup", "make_optimizer", "optimizer_over", "parameter_groups",
           "poly_with_warmup", "steps_with_warmup"]


def make_optimizer(
        name: str,
        model: nn.Module,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] | None = None,
        layer_decay: float | None = None,
        heads: Iterable[nn.Module] = (),
        args: dict[str, Any] | None = None,
) -> Optimizer:
    """Returns an optimiser over the trainable parameters of ``model`` and ``heads``.

    One-dimensional parameters, biases and those that ``model.no_weight_decay()`` names (bias tables) are not decayed;
    Muon and its kin leave them to the AdamW that they have beside them.

    Args:
        name: Of timm's registry (``timm.optim.list_optimizers()``): ``adamw``, ``lamb``, ``muon``, ...
        model: A timm model: ``no_weight_decay()`` and, for ``layer_decay``, ``group_matcher()`` are asked if there.
        lr: Learning rate of the head, and of everything without ``layer_decay``.
        weight_decay: Of the parameters that are decayed.
        betas: None for the optimiser's own.
        layer_decay: Factor on the learning rate from each layer to the one before it, for fine-tuning.
        heads: Modules outside ``model`` that are trained at ``lr``: the heads of a dense task.
        args: More arguments of the optimiser.

    Raises:
        ValueError: The optimiser needs a package that is not there, or does not take ``args``.
    """
    groups = parameter_groups(name, model, weight_decay, layer_decay, heads)
    return optimizer_over(name, groups, lr, weight_decay, betas, args)


def parameter_groups(
        name: str,
        model: nn.Module,
        weight_decay: float,
        layer_decay: float | None = None,
        heads: Iterable[nn.Module] = (),
) -> list[dict[str, Any]]:
    """The trainable parameters as :func:`make_optimizer` groups them; ``lr_scale`` is the factor on the rate, or 1."""
    groups_args: dict[str, Any] = {"no_weight_decay_list": getattr(model, "no_weight_decay", set)()}
    if "muon" in name:
        groups_args["fallback_no_weight_decay"] = True
    if layer_decay is None:
        groups: list[dict[str, Any]] = param_groups_weight_decay(model, weight_decay, **groups_args)
    else:
        groups = param_groups_layer_decay(model, weight_decay, layer_decay=layer_decay, **groups_args)
    for head in heads:
        groups += param_groups_weight_decay(head, weight_decay)
    return groups


def optimizer_over(
        name: str,
        groups: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] | None = None,
        args: dict[str, Any] | None = None,
) -> Optimizer:
    """The optimiser ``name`` over groups of parameters, of which those of one rate, decay and kind become one.

    Raises:
        ValueError: The optimiser needs a package that is not there, or does not take ``args``.
    """
    merged: dict[tuple[float, float, bool], list[nn.Parameter]] = {}  # by learning rate, decay and optimiser
    for group in groups:
        kind = lr * group.get("lr_scale", 1.0), group["weight_decay"], group.get("use_fallback", False)
        merged.setdefault(kind, []).extend(group["params"])
    parameters = [
        {"params": params, "weight_decay": decay, "lr": rate} | ({"use_fallback": True} if fallback else {})
        for (rate, decay, fallback), params in merged.items() if params]
    more = dict(args or {}) | ({} if betas is None else {"betas": betas})
    try:
        return create_optimizer_v2(parameters, opt=name, lr=lr, weight_decay=weight_decay, **more)
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:  # of timm's and of the optimisers'
        reason = " ".join(str(error).split()) or "a package that it needs is not installed"
        raise ValueError(f"optimizer {name} cannot be made: {reason}") from error


def check_optimizer(name: str, betas: tuple[float, float] | None) -> None:
    """Raises a ValueError for an optimiser that timm has not, or that our training step does not suit."""
    base = name.lower().rpartition("_")[2]
    known = list_optimizers()
    if base not in known or name.lower() not in (base, f"lookahead_{base}"):
        near = ", ".join(get_close_matches(name, map(str, known), cutoff=0.5)) or "adamw, lamb, lion, muon, sgd"
        raise ValueError(f"there is no optimizer {name!r} in timm; similar names: {near}")
    info = get_optimizer_info(base)
    if info.second_order:
        raise ValueError(f"optimizer {name} needs second derivatives, which are not computed here")
    if betas is not None and not info.has_betas:
        raise ValueError(f"optimizer {name} has no betas: leave them out (optimizer_args takes what it has)")


def cosine_with_warmup(
        optimizer: Optimizer,
        steps: int,
        warmup_steps: int,
        min_lr_ratio: float = 0.0,
        start_ratio: float | None = None,
) -> LambdaLR:
    """Returns a schedule, stepped once an optimiser step, that scales every group's learning rate.

    It rises linearly from ``start_ratio`` (None for ``1 / warmup_steps``) to 1 over the first ``warmup_steps`` and
    falls along half a cosine to ``min_lr_ratio`` at step ``steps``; it stays there.
    """
    def after(progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2

    return _with_warmup(optimizer, after, steps, warmup_steps, min_lr_ratio, start_ratio)


def poly_with_warmup(
        optimizer: Optimizer,
        steps: int,
        warmup_steps: int,
        min_lr_ratio: float = 0.0,
        power: float = 1.0,
        start_ratio: float | None = None,
) -> LambdaLR:
    """Returns a schedule like :func:`cosine_with_warmup` that falls as ``(1 - progress) ** power``."""
    def after(progress: float) -> float:
        return (1 - progress) ** power

    return _with_warmup(optimizer, after, steps, warmup_steps, min_lr_ratio, start_ratio)


def steps_with_warmup(
        optimizer: Optimizer,
        milestones: Collection[int],
        warmup_steps: int,
        factor: float = 0.1,
        start_ratio: float | None = None,
) -> LambdaLR:
    """Returns a schedule, stepped once an optimiser step: the warm-up of :func:`cosine_with_warmup`, then steps.

    From each of the ``milestones`` (optimiser steps) on, every group's learning rate is ``factor`` of what it was.
    """
    def scale(step: int) -> float:
        if step < warmup_steps:
            return _rising(step, warmup_steps, start_ratio)
        return factor ** sum(step >= milestone for milestone in milestones)

    return LambdaLR(optimizer, scale)


def _with_warmup(
        optimizer: Optimizer,
        after: Callable[[float], float],
        steps: int,
        warmup_steps: int,
        min_lr_ratio: float,
        start_ratio: float | None,
) -> LambdaLR:
    """``after`` takes the share of the steps after the warm-up to a factor that falls from 1 to 0."""
    def factor(step: int) -> float:
        if step < warmup_steps:
            return _rising(step, warmup_steps, start_ratio)
        progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
        return min_lr_ratio + (1 - min_lr_ratio) * after(progress)

    return LambdaLR(optimizer, factor)


def _rising(step: int, warmup_steps: int, start_ratio: float | None) -> float:
    """The factor at a step of the warm-up."""
    if start_ratio is None:
        return (step + 1) / warmup_steps
    return start_ratio + (1 - start_ratio) * step / warmup_steps
