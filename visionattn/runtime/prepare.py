"""What validation does to an image before a model sees it, in numpy and Pillow; and answers at the image's size."""
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

__all__ = ["FILTERS", "AnyImage", "fitted", "image_size", "linear", "neighbours", "normalised", "resize_and_crop",
           "scaled_size", "shares"]

AnyImage: TypeAlias = Image.Image | np.ndarray  # in RGB, or [channels, H, W] float32 in [0, 1] of other channels

FILTERS = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR,
           "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX,
           "hamming": Image.Resampling.HAMMING}
_MOST = 1 << 26  # pixels of a resized image, of which otherwise only the crop is made
_LARGEST = 1 << 28  # pixels of an image that is resized as a whole


def image_size(image: AnyImage) -> tuple[int, int]:
    """Width and height of an image, in pixels."""
    return image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])


def shares(image: AnyImage) -> np.ndarray:
    """float32 ``[C, H, W]`` in [0, 1]."""
    if isinstance(image, Image.Image):
        image = np.asarray(image).transpose(2, 0, 1)
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image, np.float32) / np.float32(255)
    return np.ascontiguousarray(image, np.float32)


def normalised(image: AnyImage, mean: Any, std: Any) -> np.ndarray:
    """float32 ``[C, H, W]``: values in [0, 1] less ``mean``, divided by ``std``: a number for each channel."""
    mean, std = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in (mean, std))
    return (shares(image).clip(0, 1) - mean) / std


def resize_and_crop(image: AnyImage, rule: dict[str, Any]) -> AnyImage:
    """An image of a classifier's size: resized by the shorter side or by both, then the centre.

    Args:
        image: The image.
        rule: ``interpolation``, ``shorter_side`` or both ``sides`` (height, width), and ``centre_crop`` (height,
            width), as an exported file's metadata say ``resize``.

    Returns:
        The image in the same form; where the crop is larger than what was resized, in the middle of zeros.
    """
    width, height = image_size(image)
    if "sides" in rule:
        high, wide = rule["sides"]
    elif width <= height:
        wide, high = rule["shorter_side"], int(rule["shorter_side"] * height / width)
    else:
        wide, high = int(rule["shorter_side"] * width / height), rule["shorter_side"]
    rows, columns = rule["centre_crop"]
    # As torchvision rounds: half to even.
    top, left = (round((side - crop) / 2) for side, crop in ((high, rows), (wide, columns)))
    kind = FILTERS[rule["interpolation"]]
    if wide * high > _MOST and min(top, left) >= 0:  # of an image that is long and thin
        across, down = width / wide, height / high
        box = left * across, top * down, min((left + columns) * across, width), min((top + rows) * down, height)
        return _resized(image, (columns, rows), kind, box)
    resized = _resized(image, (wide, high), kind)
    if min(top, left) >= 0:
        if isinstance(resized, Image.Image):
            return resized.crop((left, top, left + columns, top + rows))
        return resized[:, top:top + rows, left:left + columns]
    before = [max(0, (crop - side) // 2) for side, crop in ((high, rows), (wide, columns))]
    after = [max(0, (crop - side + 1) // 2) for side, crop in ((high, rows), (wide, columns))]
    if isinstance(resized, Image.Image):
        canvas = Image.new("RGB", (wide + before[1] + after[1], high + before[0] + after[0]))
        canvas.paste(resized, (before[1], before[0]))
        padded: AnyImage = canvas
    else:
        padded = np.pad(resized, [(0, 0), *zip(before, after, strict=True)])
    return resize_and_crop(padded, {
        "interpolation": "nearest", "sides": image_size(padded)[::-1], "centre_crop": rule["centre_crop"]})


def scaled_size(size: tuple[int, int], rule: dict[str, Any]) -> tuple[int, int]:
    """Width and height with the rule's ``shorter_side``, the longer one ``longest_side`` at most; else its own.

    Raises:
        ValueError: An image that is long and thin would become huge.
    """
    if rule.get("shorter_side") is None:
        return size
    scale = min(rule["shorter_side"] / min(size), (rule.get("longest_side") or float("inf")) / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    if width * height > max(_LARGEST, size[0] * size[1]):
        raise ValueError(f"it is {size[0]} x {size[1]} pixels and would be resized to {width} x {height}: cut it into "
                         "parts")
    return width, height


def fitted(image: AnyImage, size: tuple[int, int]) -> AnyImage:
    """The image resized to ``size`` (width, height), bilinearly over all pixels that a new one covers."""
    return image if image_size(image) == size else _resized(image, size, Image.Resampling.BILINEAR)


def linear(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation of ``x [..., H, W]`` as PyTorch has it: of four neighbours, corners not aligned."""
    for axis, length in ((-2, height), (-1, width)):
        before = x.shape[axis]
        if length == before:
            continue
        low, high, share = neighbours(np.arange(length), length, before)
        share = share[:, None] if axis == -2 else share
        x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
    return x


def neighbours(places: np.ndarray, length: int, before: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of places on an axis of ``length``, once ``before``: the old ones on both sides, and the second one's share."""
    place = ((places.astype(np.float32) + np.float32(0.5)) * np.float32(before / length) - np.float32(0.5)).clip(0)
    low = np.minimum(place.astype(np.int64), before - 1)
    return low, np.minimum(low + 1, before - 1), (place - low).astype(np.float32)


def _resized(
        image: AnyImage, size: tuple[int, int], kind: Image.Resampling,
        box: tuple[float, float, float, float] | None = None) -> AnyImage:
    if isinstance(image, Image.Image):
        return image.resize(size, kind, box)
    return np.stack([np.asarray(Image.fromarray(np.ascontiguousarray(plane, np.float32)).resize(size, kind, box))
                     for plane in image])
