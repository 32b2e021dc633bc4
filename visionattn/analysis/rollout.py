"""Attention rollout: what the tokens of the last layer are made of, layers taken together.

"Quantifying Attention Flow in Transformers" (ACL 2020, arXiv 2005.00928), section 3.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from .by_layer import LayerAttention
from .looks import Look, look_at, stage_of, too_large
from .places import token_places

__all__ = ["find_rollout", "rollout"]


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """The product of the layers' mean attention over heads, each half with the token itself, the last layer first.

    Args:
        maps: Probabilities ``[batch, heads, tokens, tokens]`` of all layers, the first one first.

    Returns:
        ``[batch, tokens, tokens]``, in which every row sums to one.
    """
    product = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    for found in maps:
        mixed = found.mean(dim=1) + torch.eye(found.shape[-1], dtype=found.dtype, device=found.device)
        product = mixed / mixed.sum(dim=-1, keepdim=True) @ product
    return product


def find_rollout(layers: Sequence[LayerAttention]) -> Look:
    """The rollout of all layers of a model, or why there is none."""
    title = "attention rollout"
    batch = layers[0].around[0][1][0]
    if len({stage_of(layer.name) for layer in layers}) > 1:  # known before large maps are computed
        return Look(title, why="the layers of its stages have not the same tokens")
    why = too_large(*layers)
    if why:
        return Look(title, why=why)
    maps = [layer.maps.detach().float() for layer in layers]
    sizes = list(dict.fromkeys((found.shape[2], found.shape[3]) for found in maps))
    if any(found.shape[0] != batch for found in maps):
        return Look(title, why="its layers attend within windows, which have no tokens in common")
    if len(sizes) > 1 or sizes[0][0] != sizes[0][1]:
        shown = ", ".join(f"{queries} x {keys}" for queries, keys in sizes[:4])
        return Look(title, why=f"its layers do not attend among the same tokens (queries x keys: {shown})")
    if any(((found.sum(dim=-1) - 1).abs() > 1e-3).any() for found in maps):
        return Look(title, why="the weights of a query do not sum to one in all of its layers")
    try:
        places = token_places(layers[-1])
    except ValueError as error:
        return Look(title, why=str(error))
    return look_at(title, rollout(maps)[:, None], places, layers[0].image)
