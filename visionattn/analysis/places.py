"""Where the queries and keys of a layer's attention lie in the image."""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn

from ..layers import (
    AggregatedAttention,
    BiLevelRoutingAttention,
    CascadedGroupAttention,
    FactorizedAttention,
    ForwardCrossAttention,
    LocalGlobalAttention,
    NeighborhoodAttention2d,
    VariedSizeWindowAttention,
    WindowAttention,
    aggregated,
    bilevel_routing,
    varied_window,
    window,
)
from ..models.agent_cswin import StripeAttention
from ..models.datr import SpatialReductionAttention
from ..models.dhvt import HeadInteractionAttention
from ..models.fcaformer import FcaBlock
from .by_layer import LayerAttention

__all__ = ["Places", "cell_boxes", "token_grid", "token_places"]

Grid = tuple[int, int]  # rows and columns


class Places(NamedTuple):
    """Boxes of a layer's tokens in the image, in pixels: top, left, bottom and right, which may lie outside of it.

    A token that has no place in the image (a class token, a key made of all of the map) has NaN.

    Attributes:
        queries: ``[windows, queries, 4]``; one window where attention is not within windows. The windows of every
            image of a batch lie alike.
        keys: ``[windows, keys, 4]``.
        prefix: How many of the first queries are class tokens and the like.
        others: What the keys without a place are, or what else takes weight; "" if all is on keys that have one.
    """

    queries: Tensor
    keys: Tensor
    prefix: int = 0
    others: str = ""


def token_places(layer: LayerAttention) -> Places:
    """Where the queries and keys of a layer's map lie in the image.

    Raises:
        ValueError: It is not known where they lie; the message says why.
    """
    root, images = layer.around[0]
    if root is not layer.model or len(images) != 4:
        raise ValueError(f"{type(layer.model).__name__} was not called with images [batch, channels, height, width]")
    place = next((place for kind, place in _KINDS.items() if isinstance(layer.module, kind)), _all_tokens)
    size, places = place(layer)
    found, expected = layer.maps.shape, (images[0] * len(places.keys), places.queries.shape[1], places.keys.shape[1])
    if (found[0], *found[2:]) != expected:
        raise _unknown(layer)
    pixels = _pixels(layer.image, size)
    if pixels is None:
        raise ValueError(f"{layer.name}: a map of {size[0]} x {size[1]} tokens is no even reduction of an image of "
                         f"{images[2]} x {images[3]} pixels")
    return places._replace(queries=places.queries * pixels, keys=places.keys * pixels)


def token_grid(model: nn.Module, image: Sequence[int], count: int) -> Grid | None:
    """Rows and columns of ``count`` patches of an image (height, width), if a model cuts it into so many; else None."""
    embed = getattr(model, "patch_embed", None)
    grid, patch = getattr(embed, "grid_size", None), getattr(embed, "patch_size", None)
    if grid is not None and not getattr(embed, "dynamic_img_pad", False) and grid[0] * grid[1] == count:
        return grid[0], grid[1]
    steps = range(1, max(image) + 1)
    if patch is not None:
        steps = range(patch[0], patch[0] + 1)
    for step in steps:
        for rows, columns in ((-(-image[0] // step), -(-image[1] // step)), (image[0] // step, image[1] // step)):
            if rows * columns == count:
                return rows, columns
    return None


def cell_boxes(size: Sequence[int], cells: Sequence[int]) -> Tensor:
    """Boxes of the cells that a map is pooled to, in its tokens, ``[cells, 4]``; they may overlap, as adaptive ones."""
    edges = []
    for side, count in zip(size, cells, strict=True):
        number = torch.arange(count)
        edges.append(torch.stack([number * side // count, -(-(number + 1) * side // count)], dim=1).float())
    shape = len(edges[0]), len(edges[1]), 2
    boxes = torch.cat([edges[0][:, None].expand(shape), edges[1][None].expand(shape)], dim=-1)
    return boxes[..., [0, 2, 1, 3]].flatten(0, 1)


def _unknown(layer: LayerAttention) -> ValueError:
    return ValueError(f"{layer.name}: it is not known where the tokens of {type(layer.module).__name__} lie")


def _pixels(image: tuple[int, int], size: Grid) -> int | None:
    """Side of a token in pixels: maps are halved again and again, rounded up or down, or made of patches."""
    exact, up, down = (lambda a, b: a / b), (lambda a, b: -(-a // b)), (lambda a, b: a // b)
    powers, numbers = [2 ** n for n in range(16)], range(1, max(image) + 1)
    for steps, rule in ((powers, exact), (powers, up), (numbers, exact), (powers, down), (numbers, up),
                        (numbers, down)):
        for step in steps:
            if all(rule(side, step) == count for side, count in zip(image, size, strict=True)):
                return step
    return None


def _boxes(size: Grid, first: Grid = (0, 0), side: float = 1) -> Tensor:
    """``[rows * columns, 4]`` of a grid of tokens that begins ``first`` tokens below and to the right of the map."""
    top = (torch.arange(size[0]) + first[0])[:, None].expand(size) * side
    left = (torch.arange(size[1]) + first[1]).expand(size) * side
    return torch.stack([top, left, top + side, left + side], dim=-1).flatten(0, 1).float()


def _cut(boxes: Tensor, size: Grid, side: Grid) -> Tensor:
    """Boxes of a map's tokens as those of its windows ``[windows, tokens, 4]``, row by row."""
    boxes = boxes.view(size[0] // side[0], side[0], size[1] // side[1], side[1], 4)
    return boxes.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _nowhere(count: int) -> Tensor:
    return torch.full((count, 4), torch.nan)


def _up(length: int, step: int) -> int:
    """The next multiple."""
    return -(-length // step) * step


def _map_of(layer: LayerAttention) -> Grid:
    """Rows and columns of the map ``[batch, height, width, dim]`` that the layer was given."""
    _, rows, columns, _ = layer.around[-1][1]
    return rows, columns


def _same(size: Grid, boxes: Tensor) -> tuple[Grid, Places]:
    boxes = boxes if boxes.ndim == 3 else boxes[None]
    return size, Places(boxes, boxes)


def _all_tokens(layer: LayerAttention) -> tuple[Grid, Places]:
    """Attention of all tokens of an image to all, class tokens first, or of the class token alone."""
    shape, maps = layer.around[-1][1], layer.maps
    if len(shape) not in (3, 4):
        raise _unknown(layer)
    prefix, size = 0, (shape[1], shape[2])
    if len(shape) == 3:
        prefix = int(getattr(layer.model, "num_prefix_tokens", 0))
        found = token_grid(layer.model, layer.image, shape[1] - prefix)
        if found is None:
            prefix, found = 0, token_grid(layer.model, layer.image, shape[1])
        if found is None:
            raise _unknown(layer)
        size = found
    boxes = torch.cat([_nowhere(prefix), _boxes(size)])[None]
    extra = maps.shape[3] - boxes.shape[1]
    others = "class token" if prefix == 1 else "class tokens and the like" if prefix else ""
    if isinstance(layer.module, HeadInteractionAttention) and extra == layer.module.num_heads:
        boxes = torch.cat([boxes, _nowhere(extra)[None]], dim=1)
        others = "class token and head tokens"
    queries = boxes[:, :1] if prefix and maps.shape[2] == 1 else boxes
    return size, Places(queries, boxes, prefix, others)


def _neighborhood(layer: LayerAttention) -> tuple[Grid, Places]:
    module, (rows, columns) = layer.module, _map_of(layer)
    least, margin = module.kernel_size * module.dilation, module.margin
    size = max(rows, least), max(columns + 2 * margin, least)
    keys = _boxes(size, (0, -margin)).view(*size, 4)
    queries = keys.clone()
    if margin:  # columns of the other side, which are keys there
        repeated = keys[:, :columns + 2 * margin]
        left = repeated[..., 1] % columns
        repeated[..., 1], repeated[..., 3] = left, left + 1
        queries[:, :margin], queries[:, margin + columns:] = torch.nan, torch.nan
    return (rows, columns), Places(queries.view(1, -1, 4), keys.view(1, -1, 4))


def _routed(layer: LayerAttention) -> tuple[Grid, Places]:
    module, size = layer.module, _map_of(layer)
    grid, region = bilevel_routing._cut(*size, module.n_win, module.pad == "input")
    return _same(size, _boxes((grid[0] * region[0], grid[1] * region[1])))


def _windows(layer: LayerAttention) -> tuple[Grid, Places]:
    module, size = layer.module, _map_of(layer)
    padded, shift = window._layout(size, module.window_size, module.shift, module.always_shift)
    boxes = _boxes(padded).view(*padded, 4).roll((-shift[0], -shift[1]), dims=(0, 1))
    return _same(size, _cut(boxes, padded, (module.window_size, module.window_size)))


def _swin(layer: LayerAttention) -> tuple[Grid, Places]:
    block, shape = layer.around[-2]
    if not isinstance(block, (swin_transformer.SwinTransformerBlock, swin_transformer_v2.SwinTransformerV2Block)):
        raise ValueError(f"{layer.name}: its windows are not those of a block of timm's Swin")
    size, side, shift = (shape[1], shape[2]), block.window_size, block.shift_size
    padded = _up(size[0], side[0]), _up(size[1], side[1])
    boxes = _boxes(padded).view(*padded, 4)  # padding comes after the shift
    boxes[:size[0], :size[1]] = boxes[:size[0], :size[1]].roll((-shift[0], -shift[1]), dims=(0, 1))
    return _same(size, _cut(boxes, padded, side))


def _cascaded(layer: LayerAttention) -> tuple[Grid, Places]:
    (_, _, *size), side = layer.around[-1][1], layer.module.window_size
    padded = _up(size[0], side), _up(size[1], side)
    return _same((size[0], size[1]), _cut(_boxes(padded), padded, (side, side)))


def _varied(layer: LayerAttention) -> tuple[Grid, Places]:
    module, size = layer.module, _map_of(layer)
    before, _, grid = varied_window._padding(size, module.window_size, module.rules == "vitae_dense")
    padded = grid[0] * module.window_size[0], grid[1] * module.window_size[1]
    boxes = _boxes(padded, (-before[0], -before[1]))[None]
    return size, Places(boxes, boxes, others="samples beyond the map")


def _stripes(layer: LayerAttention) -> tuple[Grid, Places]:
    size = _map_of(layer)
    boxes = _boxes(size).view(*size, 4)
    if layer.module.stripe_width is None:
        return _same(size, boxes.flatten(0, 1))
    runs: list[list[Tensor]] = []
    for axis in (1, 0):  # vertical stripes first
        count = -(-size[axis] // layer.module.stripe_width)
        width = -(-size[axis] // count)
        stripes = [stripe.flatten(0, 1) for stripe in boxes.split(width, dim=axis)]
        runs += [stripes] if size[axis] == width * count else [[stripe] for stripe in stripes]
    return _same(size, torch.stack(runs[layer.part]))


def _patches(layer: LayerAttention) -> tuple[Grid, Places]:
    (rows, columns), step = _map_of(layer), layer.module.sr.stride[0]
    keys = _boxes((rows // step, columns // step), side=step)
    return (rows, columns), Places(_boxes((rows, columns))[None], keys[None])


def _factorized(layer: LayerAttention) -> tuple[Grid, Places]:
    if layer.part == 0:
        return _patches(layer)
    size = _map_of(layer)
    return size, Places(
        _boxes(size)[None], _nowhere(layer.module.window ** 2)[None], others="keys merged from all tiles of the map")


def _summary(layer: LayerAttention) -> tuple[Grid, Places]:
    size, step = _map_of(layer), layer.module.reduction
    grid = -(-size[0] // step), -(-size[1] // step)
    queries = _boxes(size)[None]
    if layer.module.linear:
        return size, Places(queries, _nowhere(grid[0] * grid[1])[None], others="learnt sums of all tokens")
    return size, Places(queries, _boxes(grid, side=step)[None])


def _aggregated(layer: LayerAttention) -> tuple[Grid, Places]:
    module, size = layer.module, _map_of(layer)
    cells = cell_boxes(size, tuple(aggregated._cells(side, module.pool_ratio, module.pool_size) for side in size))
    boxes = _boxes(size)
    return size, Places(boxes[None], torch.cat([boxes, cells])[None])


def _crossed(layer: LayerAttention) -> tuple[Grid, Places]:
    size, boxes = _map_of(layer), _boxes(_map_of(layer))[None]
    block, shape = layer.around[-2]
    if isinstance(block, FcaBlock) and block.window is not None:  # of dense backbones
        size, side = (shape[1], shape[2]), block.window
        padded = _up(size[0], side), _up(size[1], side)
        first = (size[0] - padded[0], size[1] - padded[1]) if block.pads_front else (0, 0)
        boxes = _cut(_boxes(padded, first), padded, (side, side))
    extra = layer.maps.shape[3] - boxes.shape[1]
    keys = torch.cat([boxes, _nowhere(extra).expand(len(boxes), extra, 4)], dim=1)
    return size, Places(boxes, keys, others="tokens of earlier blocks" if extra else "")


_KINDS: dict[type[nn.Module], Callable[[Any], tuple[Grid, Places]]] = {
    AggregatedAttention: _aggregated,
    BiLevelRoutingAttention: _routed,
    CascadedGroupAttention: _cascaded,
    FactorizedAttention: _factorized,
    ForwardCrossAttention: _crossed,
    LocalGlobalAttention: _summary,
    NeighborhoodAttention2d: _neighborhood,
    SpatialReductionAttention: _patches,
    StripeAttention: _stripes,
    VariedSizeWindowAttention: _varied,
    WindowAttention: _windows,
    swin_transformer.WindowAttention: _swin,
    swin_transformer_v2.WindowAttention: _swin,
}
