"""Masks as polygons and run lengths: checked before anything is drawn, so that a bad one takes no memory."""
import math
from typing import Any

import numpy as np
from pycocotools import mask as rle

__all__ = ["mask_of", "number", "segmentation_of"]

Extent = list[float]


def number(value: Any) -> float | None:
    """A finite number of what a file has for one, text included; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def segmentation_of(
        value: Any, size: tuple[int, int], scale: tuple[int, int] = (1, 1)) -> tuple[Any, Extent | None, str, str]:
    """Reads COCO's ``segmentation``.

    Args:
        value: Polygons, ``[[x, y, x, y, ...], ...]``, or an RLE, ``{"size": [height, width], "counts": ...}`` with
            the counts as numbers or compressed.
        size: Width and height of the image in pixels.
        scale: What coordinates are multiplied by.

    Returns:
        * the polygons as the bytes of float64 numbers, cut where they reach far out of the image, or an RLE as
          pycocotools has it; None if it cannot be used;
        * left, top, width and height of the polygons or of the RLE, if it can be used;
        * what is wrong with it, or nothing;
        * what was mended, or nothing.
    """
    if isinstance(value, dict):
        code, fault = _rle(value, size)
        return code, None if code is None else rle.toBbox(code).tolist(), fault, ""
    polygons, fault, mended = _polygons(value)
    if fault:
        return None, None, fault, ""
    if scale != (1, 1):
        polygons = [polygon * np.tile(scale, len(polygon) // 2) for polygon in polygons]
    points = (polygons[0] if len(polygons) == 1 else np.concatenate(polygons)).reshape(-1, 2)
    (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
    if max(-left, -top, right, bottom) > 1e10:
        return None, None, "its segmentation has coordinates that no image has", ""
    extent = [left, top, right - left, bottom - top]
    if left >= size[0] or top >= size[1] or right <= 0 or bottom <= 0:
        return None, extent, "its segmentation lies outside the image", ""
    if min(size) > 2 and scale == (1, 1) and min(left, top) >= 0 and max(right, bottom) <= 1.001:
        return None, extent, "its segmentation looks like shares of the image, from 0 to 1, not like pixels", ""
    if max(-left - size[0], -top - size[1], right - 2 * size[0], bottom - 2 * size[1]) > 0:
        polygons = [cut for polygon in polygons if len(cut := _cut(polygon, size)) >= 6]
        if not polygons:
            return None, extent, "its segmentation lies outside the image", ""
        mended = "its segmentation reaches far out of the image"
    longest = 64 * sum(size) + size[0] * size[1] / 8
    if len(points) * max(extent[2:]) > longest and sum(map(_length, polygons)) > longest:
        return None, extent, "the outline of its segmentation is longer than any in its image", ""
    return [polygon.tobytes() for polygon in polygons], extent, "", mended


def mask_of(segmentation: Any, size: tuple[int, ...]) -> np.ndarray:
    """The mask ``[H, W]`` uint8 of what ``segmentation_of`` returned for an image of ``size`` (height, width)."""
    if isinstance(segmentation, list):
        polygons = [np.frombuffer(polygon).tolist() for polygon in segmentation]
        segmentation = rle.merge(rle.frPyObjects(polygons, *size))
    return rle.decode(segmentation)


def _polygons(value: Any) -> tuple[list[np.ndarray], str, str]:
    """Arrays of coordinates, what is wrong with them and what was mended."""
    if not isinstance(value, list) or not value:
        return [], "it has no segmentation, but masks were asked for", ""
    if not any(isinstance(part, list) for part in value):
        value = [value]  # one polygon that is in no list of polygons
    polygons = []
    for part in value:
        numbers = _numbers(part)
        if numbers is None:
            return [], "its segmentation holds something else than numbers", ""
        if len(numbers) % 2:
            return [], "its segmentation has a polygon with an odd number of coordinates", ""
        if len(numbers) >= 6:
            polygons.append(numbers)
    if not polygons:
        return [], "its segmentation has a polygon of less than three points", ""
    return polygons, "", "a part of its segmentation has less than three points" if len(polygons) < len(value) else ""


def _numbers(values: Any) -> np.ndarray | None:
    """The finite numbers of a list, or of a list of pairs, one after the other; None if it holds something else."""
    try:
        found = np.array(values, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    if found.ndim == 2 and found.shape[1] == 2:
        found = found.flatten()
    return found if found.ndim == 1 and np.isfinite(found).all() else None


def _rle(value: dict[str, Any], size: tuple[int, int]) -> tuple[Any, str]:
    """An RLE as pycocotools has it, and what is wrong with it."""
    counts, found = value.get("counts"), value.get("size")
    shape = [size[1], size[0]]
    if not isinstance(found, (list, tuple)) or [number(side) for side in found] != shape:
        return None, "its mask has another size than its image"
    if isinstance(counts, (str, bytes)):
        runs = _decompressed(counts.encode() if isinstance(counts, str) else counts)
    elif isinstance(counts, list):
        runs = _numbers(counts)
    else:
        runs = None
    if runs is None:
        return None, "the runs of its mask cannot be read"
    if (runs < 0).any() or (runs != np.floor(runs)).any() or runs.sum() != shape[0] * shape[1]:
        return None, "the runs of its mask do not add up to its image"
    if shape[0] * shape[1] >= 2 ** 32:
        return None, "its image is too large for a mask"
    if not runs[1::2].any():
        return None, "its mask is empty"
    return rle.frPyObjects({"size": shape, "counts": runs.astype(np.int64).tolist()}, *shape), ""


def _decompressed(text: bytes) -> np.ndarray | None:
    """The runs of a compressed RLE: numbers of 5 bits a character, the lowest first, from the third on as the
    difference to the last but one; None if it is none."""
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = np.flatnonzero((codes & 32) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 10:
        return None  # no image has so many pixels
    shifts = 5 * (np.arange(len(codes)) - np.repeat(first, lengths))
    values = np.add.reduceat((codes & 31) << shifts, first)
    values -= np.where(codes[last] & 16, np.int64(1) << (5 * lengths), 0)
    runs = values.astype(np.float64)
    runs[1::2] = np.cumsum(runs[1::2])
    if len(runs) > 2:
        runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _length(polygon: np.ndarray) -> float:
    points = polygon.reshape(-1, 2)
    return float(np.abs(points - np.roll(points, -1, axis=0)).max(axis=1).sum())


def _cut(polygon: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The polygon's part within the image and a margin of the image's size, by Sutherland and Hodgman's rule."""
    points = polygon.reshape(-1, 2)
    for axis, side in enumerate(size):
        for bound, sign in ((-side, 1.0), (2 * side, -1.0)):
            if not len(points):
                break
            inside = sign * (points[:, axis] - bound) >= 0
            following, next_inside = np.roll(points, -1, axis=0), np.roll(inside, -1)
            step = following[:, axis] - points[:, axis]
            share = np.divide(bound - points[:, axis], step, out=np.zeros_like(step), where=step != 0)
            crossing = points + share[:, None] * (following - points)
            crossing[:, axis] = bound
            pairs = np.stack([crossing, following], axis=1)  # of each edge: where it crosses, and its end
            points = pairs[np.stack([inside != next_inside, next_inside], axis=1)]
    return points.flatten()
