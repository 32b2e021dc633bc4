"""Heads of attention taken away for good: exactly what masking them with 0 computes, in less time and memory."""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ..adapters import adapters_of
from ..layers.agent import BiasTables
from ..sealed_file import read_sealed, write_sealed
from .heads import Heads, find_heads, input_layer

__all__ = ["inseparable_heads", "least_important", "load_pruned", "prune_heads", "pruned_heads", "save_pruned"]

# What there is by head in timm's layers. Ours say it themselves, in by_head: names of children and of parameters, along
# the first axis of which the heads follow each other, once unless the name is here.
_TIMMS: dict[type, tuple[str, ...]] = {
    Attention: ("qkv", "gate"),
    WindowAttention: ("qkv", "relative_position_bias_table"),
}
_REPEATS = {"qkv": 3, "kv": 2}
_AXES = {"relative_position_bias_table": 1}  # where it is not the first one
_FORMAT, _VERSION = "visionattn pruned model", "1"


def prune_heads(model: nn.Module, away: Mapping[str, Sequence[int]]) -> nn.Module:
    """Takes heads out of attention layers, in place: their queries, keys, values, tables, and columns of projections.

    The model then computes what it did with these heads masked by 0 (:func:`visionattn.analysis.masked_heads`), and
    trains on as any other. Parameters that lost a part are new objects: make optimisers afterwards. What heads a model
    lost is known to its layers (:func:`pruned_heads`) but not to its ``state_dict``, which loads into a model that was
    pruned alike.

    Args:
        model: A model; ours, or timm's with the attention of ViT, DeiT or Swin (first version).
        away: For each layer, by its name in :func:`visionattn.analysis.find_heads`, the numbers of the heads to take
            away, among those it has now.

    Returns:
        The model.

    Raises:
        ValueError: A name is none of a layer with heads, a number none of its heads or named twice; a layer would lose
            all heads, or its heads cannot be taken apart (:func:`inseparable_heads`); or the model works with adapters.
            Nothing was changed then.
    """
    found = {heads.name: heads for heads in find_heads(model)}
    for name, numbers in away.items():
        if name not in found:
            raise ValueError(f"{type(model).__name__} has no attention layer {name!r} with heads; it has "
                             f"{', '.join(found)}")
        count = found[name].count
        if len({*numbers}) != len(numbers) or not all(isinstance(i, int) and 0 <= i < count for i in numbers):
            raise ValueError(f"heads to take from {name} must be different numbers from 0 to {count - 1}, got "
                             f"{list(numbers)}")
        if len(numbers) == count:
            raise ValueError(f"{name} would lose all of its {count} heads; at least one must stay")
        if numbers and (reason := _inseparable(found[name])):
            raise ValueError(f"the heads of {name} cannot be taken apart: {reason}")
    if adapters_of(model):
        raise ValueError("the model has adapters, which are made for all of its heads: merge or remove them before")
    for name, numbers in away.items():
        if numbers:
            _prune(found[name], [i for i in range(found[name].count) if i not in numbers])
    return model


def inseparable_heads(model: nn.Module) -> dict[str, str]:
    """The layers with heads of which none can be taken away as if it was masked, each with the reason."""
    reasons = {heads.name: _inseparable(heads) for heads in find_heads(model)}
    return {name: reason for name, reason in reasons.items() if reason}


def pruned_heads(model: nn.Module) -> dict[str, list[int]]:
    """The heads that a model lost, layer by layer, by their numbers before any was taken away."""
    return {name: list(module.pruned_heads) for name, module in model.named_modules()
            if isinstance(getattr(module, "pruned_heads", None), list)}


def least_important(scores: Mapping[str, Tensor], number: int) -> dict[str, list[int]]:
    """The heads of least score over all layers, as :func:`prune_heads` takes them; each layer keeps its best one.

    Args:
        scores: How important each head of a layer is, ``[heads]``, by the layer's name.
        number: How many heads.

    Returns:
        Their numbers in ascending order, for layers that lose some.

    Raises:
        ValueError: There are not so many heads to spare, or a score is no number.
    """
    spare = sum(len(score) - 1 for score in scores.values())
    if not 0 <= number <= spare:
        raise ValueError(f"of {spare + len(scores)} heads in {len(scores)} layers at most {spare} can be taken away: "
                         f"each layer keeps one; got {number}")
    ranked = []
    for name, score in scores.items():
        if not score.isfinite().all():
            raise ValueError(f"the scores of {name} must be finite, got {score.tolist()}")
        values = score.tolist()
        ascending = sorted(range(len(values)), key=values.__getitem__)
        ranked += [(values[i], name, i) for i in ascending[:-1]]
    ranked.sort(key=lambda entry: entry[0])
    chosen: dict[str, list[int]] = {}
    for _, name, i in ranked[:number]:
        chosen.setdefault(name, []).append(i)
    return {name: sorted(chosen[name]) for name in scores if name in chosen}


def save_pruned(model: nn.Module, path: str | Path) -> int:
    """Writes a pruned model's weights and which heads it lost into a file.

    Args:
        model: The model.
        path: Of the file, ``.safetensors``.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: The model lost no heads.
    """
    lost = pruned_heads(model)
    if not lost:
        raise ValueError(f"{type(model).__name__} lost no heads: save its state_dict")
    return write_sealed(path, {"format": _FORMAT, "version": _VERSION, "heads": json.dumps(lost)}, model.state_dict())


def load_pruned(model: nn.Module, path: str | Path) -> nn.Module:
    """Makes of a whole model the pruned one of a file, in place.

    Args:
        model: A model as the pruned one was at first (:func:`visionattn.tasks.create_model`, ``timm.create_model``);
            its weights do not matter.
        path: Of a file by :func:`save_pruned`.

    Returns:
        The model.

    Raises:
        ValueError: The file is no such file or damaged, or the model is another one (which may have lost heads then).
        FileNotFoundError: There is no such file.
    """
    facts, tensors = read_sealed(path, "a pruned model's file", _FORMAT, _VERSION, ["heads"])
    if pruned_heads(model):
        raise ValueError(f"{path} must be loaded into a model with all of its heads; this one lost some")
    try:
        prune_heads(model, json.loads(facts["heads"]))
        model.load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is of another model than this {type(model).__name__}: "
                         f"{' '.join(str(error).split())[:300]}") from error
    return model


def _by_head(layer: Any) -> tuple[str, ...]:
    """What a layer has by head; of timm's own classes alone, as those derived from them may compute otherwise."""
    return getattr(layer, "by_head", None) or _TIMMS.get(type(layer), ())


def _inseparable(heads: Heads) -> str:
    """Why heads cannot be taken away from a layer; "" where they can."""
    layer: Any = heads.layer
    names = _by_head(layer)
    if reason := getattr(layer, "inseparable", ""):
        return reason
    if not names:
        return f"{type(layer).__name__} does not say which of its parameters belong to which head"
    if type(layer) is Attention and not isinstance(getattr(layer, "norm", nn.Identity()), nn.Identity):
        return "a norm runs over the outputs of all heads"
    for name, part in [*((name, _part(layer, name)) for name in names), ("proj", heads.projection)]:
        if isinstance(part, nn.Module) and type(part) not in (nn.Linear, nn.Conv2d, BiasTables):
            return f"its {name} is no plain layer but {type(part).__name__}"
    return ""


def _prune(heads: Heads, kept: list[int]) -> None:
    layer: Any = heads.layer
    for name in _by_head(layer):
        part, repeats = _part(layer, name), _REPEATS.get(name, 1)
        if isinstance(part, nn.Module):
            for key in part._parameters:
                _cut(part, key, heads.count, kept, repeats, 0)
            _settle(part)
        elif part is not None:
            _cut(layer, name, heads.count, kept, repeats, _AXES.get(name, 0))
    projection = input_layer(heads.projection)
    _cut(projection, "weight", heads.count, kept, 1, 1)
    projection.in_features = projection.weight.shape[1]
    before = getattr(layer, "pruned_heads", [])
    numbers = [i for i in range(heads.count + len(before)) if i not in before]  # of the heads, as they were at first
    layer.pruned_heads = sorted({*range(heads.count + len(before))} - {numbers[i] for i in kept})
    for key in ("num_heads", "kv_heads"):
        if hasattr(layer, key):
            setattr(layer, key, len(kept))
    if hasattr(layer, "attn_dim"):  # timm's
        layer.attn_dim = projection.in_features


def _part(layer: nn.Module, name: str) -> Any:
    """A child, parameter or buffer of a layer, or of a child of it; None where it has none."""
    part: Any = layer
    for key in name.split("."):
        part = getattr(part, key, None)
    return part


def _cut(owner: Any, key: str, count: int, kept: list[int], repeats: int, axis: int) -> None:
    """Leaves those rows of a parameter or buffer along an axis that belong to heads that stay."""
    old = getattr(owner, key)
    if old is None:
        return
    index = torch.tensor(kept, device=old.device)
    new = old.detach().unflatten(axis, (repeats, count, -1)).index_select(axis + 1, index).flatten(axis, axis + 2)
    setattr(owner, key, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _settle(layer: Any) -> None:
    """Makes a layer's numbers of channels those of its weight."""
    if isinstance(layer, nn.Linear):
        layer.out_features = len(layer.weight)
    elif isinstance(layer, nn.Conv2d):  # depthwise
        layer.in_channels = layer.out_channels = layer.groups = len(layer.weight)
