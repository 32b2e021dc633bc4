"""Pictures of what was predicted, with names and scores that can be read at any size of the image."""
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["PALETTE", "Patch", "draw_classes", "draw_label_map", "draw_objects", "patch_of", "patches",
           "printable", "voc_colors"]

PALETTE = [
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240),
    (240, 50, 230), (210, 245, 60), (250, 190, 212), (0, 128, 128), (170, 110, 40), (128, 0, 0), (128, 128, 0),
]
LEAST = 256  # longer side of a picture, in pixels: smaller images are enlarged
LEGEND = 12  # labels in the legend of a label map
FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "arialuni.ttf", "Arial Unicode.ttf",
         "msyh.ttc")  # tried for names that Pillow's own font cannot write


class Patch(NamedTuple):
    """A mask as the part of it that is not empty.

    Attributes:
        mask: ``[h, w]`` of bools.
        left: Where it lies in its image.
        top: The same.
    """

    mask: np.ndarray
    left: int
    top: int


def patches(masks: np.ndarray) -> list[Patch]:
    """The patches of ``masks [N, H, W]`` of bools."""
    return [patch_of(mask) for mask in masks]


def draw_objects(image: Image.Image, found: dict[str, Any], names: Sequence[str]) -> Image.Image:
    """Boxes with names and scores, and masks, over an image.

    Args:
        image: The image, in RGB.
        found: ``boxes [N, 4]``, ``labels [N]`` from 1 on, ``scores [N]`` and, of masks, a list of patches ``masks``.
        names: Of the labels.
    """
    order = found["scores"].argsort().tolist()  # the best is drawn last
    labels, scores = found["labels"].tolist(), found["scores"].tolist()
    boxes = found["boxes"].tolist()
    picture, zoom = _enlarged(image)
    if "masks" in found and order:
        pixels = np.array(picture)
        for index in order:
            patch = found["masks"][index]
            mask = patch.mask.repeat(zoom, 0).repeat(zoom, 1)
            part = pixels[zoom * patch.top:, zoom * patch.left:][:mask.shape[0], :mask.shape[1]]
            part[mask] = (part[mask].astype(np.uint16) + PALETTE[labels[index] % len(PALETTE)]) // 2
        picture = Image.fromarray(pixels)
    size = _text_size(picture)
    texts = [f"{printable(names[label - 1])} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    lengths = [_length(text, size) for text in texts]
    height = round(1.3 * size)
    if lengths:
        picture = _enclosed(picture, max(lengths) + size, height)
    draw, line = ImageDraw.Draw(picture), max(1, round(max(picture.size) / 300))
    for index in order:
        color = PALETTE[labels[index] % len(PALETTE)]
        left, top, right, bottom = (zoom * edge for edge in boxes[index])
        draw.rectangle((left, top, max(right, left + 1), max(bottom, top + 1)), outline=color, width=line)
    for index in order:  # over all boxes
        color = PALETTE[labels[index] % len(PALETTE)]
        left, top = zoom * boxes[index][0], zoom * boxes[index][1]
        x = max(0, min(left, picture.width - lengths[index] - size // 2))
        y = top - height if top >= height else top  # above the box, or at its upper edge within
        y = max(0, min(y, picture.height - height))
        draw.rectangle((x, y, x + lengths[index] + size // 2, y + height), fill=color)
        _write(draw, (x + size // 4, y + round(0.1 * size)), texts[index], size, _on(color))
    return picture


def draw_label_map(image: Image.Image, label_map: Image.Image, names: Sequence[str]) -> Image.Image:
    """A label map (with a palette) over its image, and below them names and shares of the labels that occur."""
    counts = label_map.histogram()
    total = sum(counts)
    present = sorted((label for label in range(256) if counts[label]), key=lambda label: -counts[label])
    zoomed, _ = _enlarged(Image.blend(image, label_map.convert("RGB"), 0.5))
    size = _text_size(zoomed)
    colors = voc_colors()
    items: list[tuple[str, tuple[int, ...] | None]] = [
        (f"{printable(names[label])} {_share(counts[label] / total)}", colors[label]) for label in present[:LEGEND]]
    if len(present) > LEGEND:
        items.append((f"and {len(present) - LEGEND} more", None))
    return _with_caption(zoomed, items, size)


def draw_classes(image: Image.Image, classes: Sequence[tuple[str, float]]) -> Image.Image:
    """An image with classes and their probabilities below it, a line each."""
    picture, _ = _enlarged(image)
    size = _text_size(picture)
    items = [(f"{printable(name)} {probability:.2f}", None) for name, probability in classes] or [("no class", None)]
    return _with_caption(picture, items, size, lines=True)


def voc_colors() -> list[tuple[int, int, int]]:
    """Red, green and blue of 256 labels, as PASCAL VOC colours them: the label's bits, dealt to the high bits."""
    def value(label: int, channel: int) -> int:
        return sum(((label >> 3 * bit + channel) & 1) << 7 - bit for bit in range(8))

    return [(value(label, 0), value(label, 1), value(label, 2)) for label in range(256)]


def patch_of(mask: np.ndarray) -> Patch:
    """The part of a mask ``[H, W]`` that holds all of it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return Patch(np.zeros((0, 0), bool), 0, 0)
    top, left = int(rows[0]), int(columns[0])
    return Patch(mask[top:rows[-1] + 1, left:columns[-1] + 1].copy(), left, top)


def printable(name: str) -> str:
    """A name on one line, with what is no text as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
                   for char in name.encode("utf-8", "backslashreplace").decode("utf-8"))


def _enlarged(image: Image.Image) -> tuple[Image.Image, int]:
    """The image with each pixel as a square, so large that names can be read beside it, and the side of the squares."""
    zoom = -(-LEAST // max(image.size))
    if zoom == 1:
        return image, 1
    return image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST), zoom


def _enclosed(picture: Image.Image, width: int, height: int) -> Image.Image:
    """A copy of the picture, on white where it is smaller than ``width`` and ``height``."""
    canvas = Image.new("RGB", (max(width, picture.width), max(height, picture.height)), "white")
    canvas.paste(picture)
    return canvas


def _with_caption(
        picture: Image.Image, items: Sequence[tuple[str, tuple[int, ...] | None]], size: int,
        lines: bool = False) -> Image.Image:
    """The picture with texts below it, each after a square of its colour, side by side as far as there is room."""
    margin, height = size // 2, round(1.4 * size)
    widths = [_length(text, size) + (round(1.3 * size) if color else 0) for text, color in items]
    width = max(picture.width, max(widths) + 2 * margin)
    places, x, y = [], margin, picture.height + margin // 2
    for index, wide in enumerate(widths):
        if index and (lines or x + wide + margin > width):
            x, y = margin, y + height
        places.append((x, y))
        x += wide + size
    result = Image.new("RGB", (width, y + height + margin // 2), "white")
    result.paste(picture)
    draw = ImageDraw.Draw(result)
    for (text, color), (x, y) in zip(items, places, strict=True):
        if color:
            draw.rectangle((x, y + size // 8, x + size, y + size // 8 + size), fill=color, outline="black")
            x += round(1.3 * size)
        _write(draw, (x, y), text, size, "black")
    return result


def _text_size(picture: Image.Image) -> int:
    return max(12, round(max(picture.size) / 50))


def _font(text: str, size: int) -> Any:
    if not text.isascii():
        for name in FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def _length(text: str, size: int) -> int:
    return round(_font(text, size).getlength(text)) + 1


def _write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, color: Any) -> None:
    draw.text(place, text, color, _font(text, size))


def _on(color: tuple[int, int, int]) -> str:
    """What can be read on a colour."""
    red, green, blue = color
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 110 else "white"


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"
