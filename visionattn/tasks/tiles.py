"""Images too large to be seen at once: seen in square tiles that overlap by a quarter, whose results are merged."""
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms
from torchvision.transforms.v2 import functional as F

from ..heads.segmenter import window_starts
from ..runtime.pictures import Patch

__all__ = ["detect_in_tiles", "image_size", "label_in_tiles"]

SAME = 0.5  # intersection over union from which two detections of a class are of one object
PIECE = 0.7  # share of a detection that lies in a larger one, of which it is then a piece
EDGE = 2  # pixels: what is so near to an edge within the image was cut there

AnyImage: TypeAlias = Image.Image | Tensor  # [C, H, W]
Detect = Callable[[list[Any]], list[dict[str, Any]]]


class _Tile(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int


def detect_in_tiles(
        detect: Detect, image: AnyImage, side: int, batch_size: int, whole: tuple[int, int]) -> dict[str, Any]:
    """Detections in a large image: those in its tiles, and those in all of it for what is larger than their overlap.

    Of detections of one class with a common part of half their union the best stays, and of one that a tile's edge cut
    nothing where a whole one has most of it.

    Args:
        detect: Takes images to detections in pixels of them (``boxes``, ``labels``, ``scores``, ``masks``: patches).
        image: The image, of Pillow or ``[C, H, W]``.
        side: Of the tiles, in pixels.
        batch_size: Tiles that are looked at at once.
        whole: Size (width, height) that all of the image is brought to.

    Returns:
        Detections in pixels of the image, best first.
    """
    size = image_size(image)
    tiles = _tiles(size, side)
    if len(tiles) == 1:
        return detect([image])[0]
    parts = []
    for start in range(0, len(tiles), batch_size):
        batch = tiles[start:start + batch_size]
        parts += [_moved(found, tile, size) for tile, found in zip(
            batch, detect([_crop(image, tile) for tile in batch]), strict=True)]
    found, = detect([image if whole == size else _resized(image, whole)])
    found = _zoomed(found, size, whole)
    large = (found["boxes"][:, 2:] - found["boxes"][:, :2]).amax(dim=1) > side // 4
    parts.append(_select(found | {"cut": torch.zeros(len(large), dtype=torch.bool)}, large.nonzero()[:, 0]))
    merged = _joined(parts)
    merged = _select(merged, (~_pieces(merged)).nonzero()[:, 0])
    merged = _select(merged, batched_nms(merged["boxes"], merged["scores"], merged["labels"], SAME))
    del merged["cut"]
    return merged


def label_in_tiles(
        infer: Callable[[list[Any]], Tensor], image: AnyImage, side: int, batch_size: int) -> Tensor:
    """The label map of a large image by the mean logits of its tiles; no more than a row of them is kept.

    Args:
        infer: Takes images of one size to logits ``[B, classes, H, W]`` of that size.
        image: The image, of Pillow or ``[C, H, W]``.
        side: Of the tiles, in pixels.
        batch_size: Tiles that are looked at at once.

    Returns:
        Labels ``[H, W]`` uint8.
    """
    width, height = image_size(image)
    labels = torch.empty(height, width, dtype=torch.uint8)
    rows = [list(row) for _, row in groupby(_tiles((width, height), side), key=lambda tile: tile.top)]
    kept, first = torch.zeros(0), 0  # sums of logits from the row ``first`` of pixels on
    for index, row in enumerate(rows):
        top, bottom = row[0].top, row[0].bottom
        sums = torch.zeros(0)
        for start in range(0, len(row), batch_size):
            batch = row[start:start + batch_size]
            logits = infer([_crop(image, tile) for tile in batch]).float().cpu()
            if not sums.ndim > 1:
                sums = torch.zeros(logits.shape[1], bottom - top, width)
            for tile, one in zip(batch, logits, strict=True):
                sums[:, :, tile.left:tile.right] += one
        if index:
            above = kept[:, top - first:]
            sums[:, :above.shape[1]] += above
        kept, first = sums, top
        end = rows[index + 1][0].top if index + 1 < len(rows) else bottom
        # All labels of a pixel were added equally often, so that sums decide as means would.
        labels[top:end] = kept[:, :end - top].argmax(dim=0)
    return labels


def image_size(image: AnyImage) -> tuple[int, int]:
    """Width and height of an image, in pixels."""
    return image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])


def _crop(image: AnyImage, tile: _Tile) -> AnyImage:
    if isinstance(image, Image.Image):
        return image.crop(tile)
    return image[:, tile.top:tile.bottom, tile.left:tile.right]


def _resized(image: AnyImage, size: tuple[int, int]) -> AnyImage:
    if isinstance(image, Image.Image):
        return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3)
    return F.resize(image, [size[1], size[0]], antialias=True)


def _tiles(size: tuple[int, int], side: int) -> list[_Tile]:
    """Tiles of an image of ``size`` (width, height), row by row."""
    width, height = size
    stride = max(1, side - side // 4)
    return [_Tile(left, top, min(left + side, width), min(top + side, height))
            for top in dict.fromkeys(window_starts(height, side, stride))
            for left in dict.fromkeys(window_starts(width, side, stride))]


def _moved(found: dict[str, Any], tile: _Tile, size: tuple[int, int]) -> dict[str, Any]:
    """A tile's detections in pixels of the image, and whether an edge within the image ``cut`` them."""
    boxes = found["boxes"] + torch.tensor([tile.left, tile.top] * 2)
    inside = torch.tensor([tile.left > 0, tile.top > 0, tile.right < size[0], tile.bottom < size[1]])
    moved = found | {"boxes": boxes, "cut": (((boxes - torch.tensor(tile)).abs() <= EDGE) & inside).any(dim=1)}
    if "masks" in found:
        moved["masks"] = [Patch(mask, left + tile.left, top + tile.top) for mask, left, top in found["masks"]]
    return moved


def _zoomed(found: dict[str, Any], size: tuple[int, int], of: tuple[int, int]) -> dict[str, Any]:
    """Detections of an image that was seen with the size ``of`` in pixels of it as it is."""
    if size == of:
        return found
    across, down = (now / then for now, then in zip(size, of, strict=True))
    zoomed = found | {"boxes": found["boxes"] * torch.tensor([across, down] * 2)}
    if "masks" in found:
        zoomed["masks"] = [_zoomed_patch(patch, across, down) for patch in found["masks"]]
    return zoomed


def _zoomed_patch(patch: Patch, across: float, down: float) -> Patch:
    height, width = patch.mask.shape
    left, top = round(patch.left * across), round(patch.top * down)
    shape = round((patch.left + width) * across) - left, round((patch.top + height) * down) - top
    if not patch.mask.size or not min(shape):
        return Patch(np.zeros((0, 0), bool), 0, 0)
    return Patch(np.asarray(Image.fromarray(patch.mask).resize(shape, Image.Resampling.NEAREST)), left, top)


def _pieces(found: dict[str, Any]) -> Tensor:
    """Which detections were cut by an edge and lie mostly in one of their class that was not, and is sure enough."""
    boxes, cut = found["boxes"], found["cut"]
    pieces = torch.zeros(len(boxes), dtype=torch.bool)
    whole = (~cut).nonzero()[:, 0]
    if not len(whole):
        return pieces
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).clamp(min=1e-6)
    for index in cut.nonzero()[:, 0].tolist():
        others = whole[(found["labels"][whole] == found["labels"][index])
                       & (found["scores"][whole] >= found["scores"][index] / 2)]
        shared = (torch.minimum(boxes[others, 2:], boxes[index, 2:])
                  - torch.maximum(boxes[others, :2], boxes[index, :2])).clamp(min=0).prod(dim=1)
        pieces[index] = bool((shared > PIECE * areas[index]).any())
    return pieces


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: [item for part in parts for item in part[key]] if isinstance(value, list)
            else torch.cat([part[key] for part in parts]) for key, value in parts[0].items()}


def _select(found: dict[str, Any], kept: Tensor) -> dict[str, Any]:
    return {key: [value[index] for index in kept.tolist()] if isinstance(value, list) else value[kept]
            for key, value in found.items()}
