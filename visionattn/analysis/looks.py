"""Where a model looks from every point of an image: the attention of a layer as weights over the image."""
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .by_layer import LayerAttention
from .places import Places, token_places

__all__ = ["Look", "choose_layers", "halved", "look_at", "look_of", "stage_of", "too_large"]

MOST_ROWS = 28  # of queries, and of columns: points of the image that one can tell apart
MOST_KEYS = 56
MOST_LAYERS = 4  # of a model without stages
MOST_NUMBERS = 1 << 29  # of a layer's maps, 2 GB; computing them takes up to four times as much


class Look(NamedTuple):
    """Where a layer looks from points of an image.

    Attributes:
        title: What looks, such as the name of the layer.
        weights: ``[heads, rows, columns, key rows, key columns]``; rows and columns of query points. No rows where no
            query has a place in the image.
        rows: Top and bottom of the query tokens of each row, in pixels, ``[rows, 2]``.
        columns: Left and right of those of each column, ``[columns, 2]``.
        side: Height and width of a key cell in pixels; the first is in the image's top left corner.
        fixed: ``[heads, key rows, key columns]``: what does not depend on the point, such as where the class token
            looks.
        fixed_name: What that is.
        others: What the weights that are not in the image belong to; "" if there are none.
        why: If there is nothing to show: why.
        windows: Edges of what is sampled for a query: left, top, right and bottom in pixels, ``[heads, rows, columns,
            4]``.
    """

    title: str
    weights: Tensor = torch.zeros(1, 0, 0, 1, 1)
    rows: Tensor = torch.zeros(0, 2)
    columns: Tensor = torch.zeros(0, 2)
    side: float = 1
    fixed: Tensor | None = None
    fixed_name: str = ""
    others: str = ""
    why: str = ""
    windows: Tensor | None = None


def stage_of(name: str) -> str:
    """The stage that a module's name says it is of; "" if the model has but one."""
    found = re.match(r"(?:.*\.)?(?:stages|layers|levels)\.(\d+)\.", name)
    return found[1] if found else ""


def choose_layers(layers: Sequence[LayerAttention], every: bool = False) -> list[LayerAttention]:
    """All attention of the last block of each stage; up to four evenly spaced ones of a model that has no stages.

    Args:
        layers: Of one image through one model.
        every: All instead.
    """
    stages = {stage_of(layer.name) for layer in layers}
    if every:
        return list(layers)
    if stages == {""}:
        step = max(1, math.ceil(len(layers) / MOST_LAYERS))
        return list(layers)[(len(layers) - 1) % step::step]
    last = {stage_of(layer.name): _block(layer.name) for layer in layers}
    return [layer for layer in layers if _block(layer.name) == last[stage_of(layer.name)]]


def _block(name: str) -> str:
    """A name up to its last number."""
    found = re.match(r"(.*\.\d+)(?:\.|$)", name)
    return found[1] if found else name


def too_large(*layers: LayerAttention) -> str:
    """Why the maps of these layers cannot be in memory together; "" if they can."""
    count = sum(layer.count for layer in layers)
    if count <= MOST_NUMBERS:
        return ""
    return f"tables of tokens by tokens would be {4e-9 * count:.1f} GB, and {4e-9 * MOST_NUMBERS:.1f} GB are the most"


def look_of(layer: LayerAttention) -> Look:
    """Where a layer looks; with the reason why nothing can be shown, if that is so."""
    title = layer.name if not layer.part else f"{layer.name} ({layer.part + 1})"
    why = too_large(layer)
    if why:
        return Look(title, why=why)
    try:
        places = token_places(layer)
    except ValueError as error:
        return Look(title, why=str(error).removeprefix(f"{layer.name}: "))
    if places.keys.isnan().all():
        return Look(title, why=f"its keys have no place in the image: {places.others}")
    return look_at(title, layer.maps.detach(), places, layer.image)


def look_at(title: str, maps: Tensor, places: Places, image: tuple[int, int]) -> Look:
    """Weights of queries over keys as those of points of an image over its cells.

    A key of several cells, such as one pooled of them, spreads its weight evenly. Of more than 28 rows or columns of
    queries as many are taken out, evenly; key cells are made larger until there are no more than 56.

    Args:
        title: What looks.
        maps: ``[windows, heads, queries, keys]`` of one image.
        places: Of the queries and keys.
        image: Its height and width in pixels.
    """
    maps, keys = maps.float().cpu(), places.keys
    sides = torch.minimum(keys[..., 2] - keys[..., 0], keys[..., 3] - keys[..., 1])
    side = float(sides[~sides.isnan()].min())
    side *= max(1, math.ceil(math.ceil(max(image) / side) / MOST_KEYS))
    grid = math.ceil(image[0] / side), math.ceil(image[1] / side)
    fixed = None
    if places.prefix:
        fixed = _spread(maps[:1, :, 0], keys[0], side, grid)[0]
    others = places.others
    inside = (keys[..., :2] >= 0).all(dim=-1) & (keys[..., 0] < image[0]) & (keys[..., 1] < image[1])
    if not (inside | keys[..., 0].isnan()).all():
        others = f"{others} and padding around the map" if others else "padding around the map"
    number, rows, columns = _points(places.queries, image)
    weights = maps.new_zeros(maps.shape[1], *number.shape, *grid)
    window, query = number // maps.shape[2], number % maps.shape[2]
    for one in window.unique().tolist():
        chosen = window == one
        found = _spread(maps[one][:, query[chosen]].transpose(0, 1), keys[one], side, grid)
        weights[:, chosen] = found.transpose(0, 1)
    return Look(title, weights, rows, columns, side, fixed, "class token" if fixed is not None else "", others)


def halved(look: Look) -> Look:
    """With a quarter of the query points, or of the key cells where these are more."""
    heads, rows, columns, key_rows, key_columns = look.weights.shape
    if rows * columns >= key_rows * key_columns:
        row, column = torch.arange((rows > 1), rows, 2), torch.arange((columns > 1), columns, 2)
        windows = None if look.windows is None else look.windows[:, row][:, :, column]
        return look._replace(
            weights=look.weights[:, row][:, :, column], rows=look.rows[row], columns=look.columns[column],
            windows=windows)
    return look._replace(
        weights=_pooled(look.weights.flatten(0, 2)).unflatten(0, (heads, rows, columns)), side=2 * look.side,
        fixed=None if look.fixed is None else _pooled(look.fixed))


def _pooled(x: Tensor) -> Tensor:
    """Sums of 2 x 2 cells."""
    x = torch.nn.functional.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
    return x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).sum(dim=(-3, -1))


def _points(queries: Tensor, image: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of queries in the image ``[rows, columns]``, counted over all windows, and their rows and columns."""
    boxes = queries.flatten(0, 1)
    inside = ((boxes[:, :2] >= 0).all(dim=1) & (boxes[:, 0] < image[0]) & (boxes[:, 1] < image[1])).nonzero()[:, 0]
    boxes = boxes[inside]
    tops, row = boxes[:, 0].unique(return_inverse=True)
    lefts, column = boxes[:, 1].unique(return_inverse=True)
    number = torch.full((len(tops), len(lefts)), -1)
    number[row, column] = inside
    bottoms, rights = torch.zeros_like(tops), torch.zeros_like(lefts)
    bottoms[row], rights[column] = boxes[:, 2], boxes[:, 3]
    rows, columns = _thinned(len(tops)), _thinned(len(lefts))
    number = number[rows][:, columns]
    assert (number >= 0).all(), "queries fill the image"
    return number, torch.stack([tops, bottoms], 1)[rows], torch.stack([lefts, rights], 1)[columns]


def _thinned(count: int) -> Tensor:
    step = max(1, math.ceil(count / MOST_ROWS))
    return torch.arange((step - 1) // 2, count, step)


def _spread(weights: Tensor, boxes: Tensor, side: float, grid: tuple[int, int]) -> Tensor:
    """Weights ``[n, heads, keys]`` of boxes ``[keys, 4]`` as those of cells, ``[n, heads, *grid]``."""
    placed = ~boxes[:, 0].isnan()
    weights, boxes = weights[..., placed], boxes[placed]
    shares = []  # of a box in each row, and in each column
    for axis, count in enumerate(grid):
        first, last, edge = boxes[:, axis, None], boxes[:, 2 + axis, None], torch.arange(count) * side
        shares.append((torch.minimum(last, edge + side) - torch.maximum(first, edge)).clamp(min=0) / (last - first))
    (row, at_row), (column, at_column) = (share.max(dim=1) for share in shares)
    whole = (row > 1 - 1e-6) & (column > 1 - 1e-6)  # in one cell
    cells = weights.new_zeros(*weights.shape[:2], grid[0] * grid[1])
    cells.index_add_(2, (at_row * grid[1] + at_column)[whole], weights[..., whole])
    split = ~whole & (row > 0) & (column > 0)
    if split.any():
        cells += weights[..., split] @ (shares[0][split][:, :, None] * shares[1][split][:, None]).flatten(1)
    return cells.unflatten(2, grid)
