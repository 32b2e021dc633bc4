"""How many key tiles a block-sparse kernel must visit, and so how much faster than dense attention it can be at best.

The model of "Generalized Neighborhood Attention" (arXiv 2504.16922); ``visionattn bench simulate`` on the command line.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .ops.neighborhood import _check_windows, _per_axis, naive

__all__ = ["Simulation", "simulate"]


class Simulation(NamedTuple):
    """What :func:`simulate` found.

    Attributes:
        q_tile: Queries of a tile along each axis.
        kv_tile: Keys of a tile along each axis.
        query_tiles: Number of query tiles.
        key_tiles: Number of key tiles.
        visited: Key tiles visited, summed over the query tiles.
        most: Key tiles that one query tile visits at most.
        fraction: ``visited`` divided by ``query_tiles * key_tiles``.
        speedup: Best possible speed-up over dense attention: query-key pairs of dense attention, none of them wasted,
            divided by the pairs in visited tiles, all of them computed.
        flop_speedup: Pairs of dense attention divided by the pairs that are in some window.
        efficiency: ``speedup / flop_speedup``, the part of the computed pairs that is in some window.
        perfectly_sparse: Whether no pair is computed in vain.
    """

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    query_tiles: int
    key_tiles: int
    visited: int
    most: int
    fraction: float
    speedup: float
    flop_speedup: float
    efficiency: float
    perfectly_sparse: bool


def simulate(
        size: Sequence[int],
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        q_tile: Sequence[int] | None = None,
        kv_tile: Sequence[int] | None = None,
) -> Simulation:
    """Counts the key tiles that a block-sparse kernel visits for neighborhood attention.

    The model of "Generalized Neighborhood Attention" (arXiv 2504.16922): tokens are permuted so that the residue
    classes of a dilation lie apart and every tile inside of a class is consecutive; a query tile visits each key tile
    that holds a key of one of its queries, and computes all of it. Tiles at the end of a class are counted whole. No
    time is simulated: permutation, masks and memory cost nothing, so the speed-up is an upper bound.

    Args:
        size: Tokens along 1, 2 or 3 axes.
        kernel_size: As for :func:`~visionattn.ops.neighborhood_attention`, as the next three.
        dilation: Distance between neighbours.
        stride: Queries that share a window.
        is_causal: Whether queries see no key after them.
        q_tile: Queries of a tile along each axis; None searches the usual shapes of 64 to 256 tokens.
        kv_tile: Keys of a tile along each axis; None searches them too.

    Returns:
        The counts; of the searched tiles those of the greatest speed-up, the largest among equals.

    Raises:
        ValueError: Arguments that do not fit each other.
    """
    size, axes = tuple(size), len(size)
    if axes not in _TILES or min(size) < 1:
        raise ValueError(f"size must be 1 to 3 positive numbers, got {list(size)}")
    options: list[tuple] = [size, _per_axis("kernel_size", kernel_size, axes, int),
                            _per_axis("dilation", dilation, axes, int), _per_axis("stride", stride, axes, int)]
    _check_windows(*options)
    options.append(_per_axis("is_causal", is_causal, axes, bool))
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        if tile is not None and (len(tile) != axes or min(tile) < 1):
            raise ValueError(f"{name} must be {axes} positive numbers, one per axis, got {list(tile)}")
    candidates = [
        _simulate(options, tuple(q), tuple(kv))
        for q in ([q_tile] if q_tile else _TILES[axes]) for kv in ([kv_tile] if kv_tile else _TILES[axes])
    ]
    return max(candidates, key=lambda found: (found.speedup, math.prod(found.q_tile) * math.prod(found.kv_tile)))


_TILES: dict[int, list[tuple[int, ...]]] = {
    1: [(64,), (128,), (256,)],
    2: [(8, 8), (4, 16), (16, 4), (8, 16), (16, 8), (16, 16)],
    3: [(4, 4, 4), (2, 4, 8), (4, 4, 8), (2, 8, 8), (4, 8, 8)],
}


def _simulate(options: list[tuple], q_tile: tuple[int, ...], kv_tile: tuple[int, ...]) -> Simulation:
    # Axes are independent, so every count is the product of those of the axes.
    counts = [_simulate_axis(*axis) for axis in zip(*options, q_tile, kv_tile, strict=True)]
    query_tiles, key_tiles, visited, most, pairs = (math.prod(count) for count in zip(*counts, strict=True))
    computed = visited * math.prod(q_tile) * math.prod(kv_tile)
    dense = math.prod(options[0]) ** 2
    return Simulation(
        q_tile, kv_tile, query_tiles, key_tiles, visited, most, fraction=visited / (query_tiles * key_tiles),
        speedup=dense / computed, flop_speedup=dense / pairs, efficiency=pairs / computed,
        perfectly_sparse=pairs == computed)


def _simulate_axis(
        length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool, q_tile: int, kv_tile: int,
) -> tuple[int, ...]:
    """Query tiles, key tiles, visited key tiles of all and at most of one query tile, and query-key pairs."""
    keys, _, valid = naive.axis_windows(length, kernel_size, dilation, stride, is_causal, torch.device("cpu"))
    position = torch.arange(length, device="cpu")

    def tile_number(x: Tensor, tile: int) -> Tensor:
        return x % dilation * length + x // dilation // tile

    query = tile_number(position, q_tile)[:, None].expand_as(keys)
    visits = torch.stack([query[valid], tile_number(keys, kv_tile)[valid]]).unique(dim=1)
    per_query_tile = visits[0].unique(return_counts=True)[1]
    return (len(per_query_tile), len(tile_number(position, kv_tile).unique()), visits.shape[1],
            int(per_query_tile.max()), int(valid.sum()))
