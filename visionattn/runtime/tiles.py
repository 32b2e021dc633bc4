"""Images too large to be seen at once: seen in tiles that overlap by a quarter, whose results are merged."""
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .pictures import Patch
from .prepare import AnyImage, fitted, image_size

__all__ = ["detect_in_tiles", "label_in_tiles", "logits_in_tiles", "window_starts"]

SAME = 0.5  # intersection over union from which two detections of a class are of one object
PIECE = 0.7  # share of a detection that lies in a larger one, of which it is then a piece
EDGE = 2  # pixels: what is so near to an edge within the image was cut there

Detect = Callable[[list[Any]], list[dict[str, Any]]]
Infer = Callable[[list[Any]], np.ndarray]


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
    tiles = _tiles(size, (side, side))
    if len(tiles) == 1:
        return detect([image])[0]
    parts = []
    for start in range(0, len(tiles), batch_size):
        batch = tiles[start:start + batch_size]
        parts += [_moved(found, tile, size) for tile, found in zip(
            batch, detect([_crop(image, tile) for tile in batch]), strict=True)]
    found, = detect([image if whole == size else _smaller(image, whole)])
    found = _zoomed(found, size, whole)
    large = (found["boxes"][:, 2:] - found["boxes"][:, :2]).max(axis=1, initial=0) > side // 4
    parts.append(_select(found | {"cut": np.zeros(len(large), bool)}, np.flatnonzero(large)))
    merged = _joined(parts)
    merged = _select(merged, np.flatnonzero(~_pieces(merged)))
    merged = _select(merged, _best(merged))
    del merged["cut"]
    return merged


def label_in_tiles(infer: Infer, image: AnyImage, side: int | tuple[int, int], batch_size: int) -> np.ndarray:
    """The label map of a large image by the mean logits of its tiles; no more than a row of them is kept.

    Args:
        infer: Takes images of one size to logits ``[B, classes, H, W]`` of that size.
        image: The image, of Pillow or ``[C, H, W]``.
        side: Of the tiles, in pixels; or their width and height.
        batch_size: Tiles that are looked at at once.

    Returns:
        Labels ``[H, W]`` uint8.
    """
    bands = logits_in_tiles(infer, image, side, batch_size)
    return np.concatenate([band.argmax(axis=0).astype(np.uint8) for band in bands])


def logits_in_tiles(
        infer: Infer, image: AnyImage, side: int | tuple[int, int], batch_size: int) -> Iterator[np.ndarray]:
    """Sums of the logits of an image's tiles ``[classes, rows, W]``, band by band from the top.

    All logits of a pixel were added equally often, so that sums decide as means would. The arguments are those of
    :func:`label_in_tiles`.
    """
    width, height = image_size(image)
    tiles = _tiles((width, height), (side, side) if isinstance(side, int) else side)
    rows = [list(row) for _, row in groupby(tiles, key=lambda tile: tile.top)]
    kept, first = np.zeros(0, np.float32), 0  # sums of logits from the row ``first`` of pixels on
    for index, row in enumerate(rows):
        top, bottom = row[0].top, row[0].bottom
        sums = np.zeros(0, np.float32)
        for start in range(0, len(row), batch_size):
            batch = row[start:start + batch_size]
            logits = infer([_crop(image, tile) for tile in batch])
            if not sums.ndim > 1:
                sums = np.zeros((logits.shape[1], bottom - top, width), np.float32)
            for tile, one in zip(batch, logits, strict=True):
                sums[:, :, tile.left:tile.right] += one
        if index:
            above = kept[:, top - first:]
            sums[:, :above.shape[1]] += above
        kept, first = sums, top
        end = rows[index + 1][0].top if index + 1 < len(rows) else bottom
        yield kept[:, :end - top]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side of ``length`` pixels; the last one is moved back to end where the side does."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def _crop(image: AnyImage, tile: _Tile) -> AnyImage:
    if isinstance(image, Image.Image):
        return image.crop(tile)
    return image[:, tile.top:tile.bottom, tile.left:tile.right]


def _smaller(image: AnyImage, size: tuple[int, int]) -> AnyImage:
    if isinstance(image, Image.Image):
        return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3)
    return fitted(image, size)


def _tiles(size: tuple[int, int], sides: tuple[int, int]) -> list[_Tile]:
    """Tiles of an image of ``size`` (width, height), row by row."""
    columns, rows = (
        list(dict.fromkeys(window_starts(length, side, max(1, side - side // 4))))
        for length, side in zip(size, sides, strict=True))
    return [_Tile(left, top, min(left + sides[0], size[0]), min(top + sides[1], size[1]))
            for top in rows for left in columns]


def _moved(found: dict[str, Any], tile: _Tile, size: tuple[int, int]) -> dict[str, Any]:
    """A tile's detections in pixels of the image, and whether an edge within the image ``cut`` them."""
    boxes = found["boxes"] + np.array([tile.left, tile.top] * 2, np.float32)
    inside = np.array([tile.left > 0, tile.top > 0, tile.right < size[0], tile.bottom < size[1]])
    cut = ((np.abs(boxes - np.array(tile, np.float32)) <= EDGE) & inside).any(axis=1)
    moved = found | {"boxes": boxes, "cut": cut}
    if "masks" in found:
        moved["masks"] = [Patch(mask, left + tile.left, top + tile.top) for mask, left, top in found["masks"]]
    return moved


def _zoomed(found: dict[str, Any], size: tuple[int, int], of: tuple[int, int]) -> dict[str, Any]:
    """Detections of an image that was seen with the size ``of`` in pixels of it as it is."""
    if size == of:
        return found
    across, down = (now / then for now, then in zip(size, of, strict=True))
    zoomed = found | {"boxes": found["boxes"] * np.array([across, down] * 2, np.float32)}
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


def _pieces(found: dict[str, Any]) -> np.ndarray:
    """Which detections were cut by an edge and lie mostly in one of their class that was not, and is sure enough."""
    boxes, cut = found["boxes"], found["cut"]
    pieces = np.zeros(len(boxes), bool)
    whole = np.flatnonzero(~cut)
    if not len(whole):
        return pieces
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).clip(min=1e-6)
    for index in np.flatnonzero(cut).tolist():
        others = whole[(found["labels"][whole] == found["labels"][index])
                       & (found["scores"][whole] >= found["scores"][index] / 2)]
        pieces[index] = bool((_shared(boxes[others], boxes[index]) > PIECE * areas[index]).any())
    return pieces


def _best(found: dict[str, Any]) -> np.ndarray:
    """Detections of which no better one of their class has half of the union, best first (non-maximum suppression)."""
    boxes, labels = found["boxes"], found["labels"]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    left = (-found["scores"]).argsort(kind="stable")
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        shared = _shared(boxes[left], boxes[best])
        same = (labels[left] == labels[best]) & (shared > SAME * (areas[left] + areas[best] - shared))
        left = left[~same]
    return np.array(kept, np.int64)


def _shared(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Areas that boxes ``[N, 4]`` have in common with a box."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    return sides.clip(min=0).prod(axis=1)


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: [item for part in parts for item in part[key]] if isinstance(value, list)
            else np.concatenate([part[key] for part in parts]) for key, value in parts[0].items()}


def _select(found: dict[str, Any], kept: np.ndarray) -> dict[str, Any]:
    return {key: [value[index] for index in kept.tolist()] if isinstance(value, list) else value[kept]
            for key, value in found.items()}
