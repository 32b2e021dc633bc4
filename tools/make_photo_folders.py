"""python tools/make_photo_folders.py OUT: three small folders as people have them, to measure what a training reaches.

``plates``: 60 photos of house numbers in three classes, as a phone writes them: stored as the sensor lay, with an EXIF
orientation. A 6 that is read upside down is a 9. ``parts``: nuts, washers and coins with boxes, in YOLO's format.
``leaves``: leaves with masks that are black and white (0 and 255).

All are pieces of the two photographs that scikit-learn brings, with things drawn on them: in perspective, in light and
shade, blurred, with a sensor's noise. Each folder has more test images than a user would, to tell small differences.
"""
import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_sample_images

__all__ = ["make_leaves", "make_parts", "make_plates"]

PLATES, PARTS = ("nine", "seven", "six"), ("coin", "nut", "washer")
TURNS = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
LARGER = 4  # things are drawn as many times larger, for smooth edges


def make_plates(folder: Path, train: int = 16, val: int = 4, test: int = 50) -> Path:
    """``folder/{train,val,test}/<class>/*.jpg``: so many images of each class."""
    for split, count, seed in (("train", train, 0), ("val", val, 1), ("test", test, 2)):
        random = np.random.default_rng(seed)
        for name in PLATES:
            for number in range(count):
                tag = int(random.choice(list(TURNS)))
                photo = _plate({"nine": "9", "seven": "7", "six": "6"}[name], random)
                stored = photo if TURNS[tag] is None else photo.transpose(TURNS[tag])
                exif = Image.Exif()
                exif[0x0112] = tag
                path = folder / split / name / f"IMG_{random.integers(10_000):04d}_{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                stored.save(path, quality=88, exif=exif)
    return folder


def make_parts(folder: Path, train: int = 48, val: int = 12, test: int = 60) -> Path:
    """``folder/{images,labels}/{train,val,test}/*`` and ``folder/data.yaml``."""
    for split, count, seed in (("train", train, 3), ("val", val, 4), ("test", test, 5)):
        random = np.random.default_rng(seed)
        for number in range(count):
            photo, lines = _parts(random)
            for kind, ending in (("images", "jpg"), ("labels", "txt")):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
                path = folder / kind / split / f"{number:03d}.{ending}"
                photo.save(path, quality=88) if kind == "images" else path.write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\ntest: images/test\nnames: "
                                      f"[{', '.join(PARTS)}]\n")
    return folder


def make_leaves(folder: Path, train: int = 48, val: int = 12, test: int = 60) -> Path:
    """``folder/{images,masks}/{train,val,test}/*``; masks of 0 and 255."""
    for split, count, seed in (("train", train, 6), ("val", val, 7), ("test", test, 8)):
        random = np.random.default_rng(seed)
        for number in range(count):
            photo, mask = _leaves(random)
            for kind in ("images", "masks"):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
            photo.save(folder / "images" / split / f"{number:03d}.jpg", quality=88)
            mask.save(folder / "masks" / split / f"{number:03d}.png")
    return folder


_PHOTOS = [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _background(size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """A piece of a photograph, enlarged, mirrored, in other light."""
    photo = _PHOTOS[random.integers(2)]
    height = random.uniform(0.35, 0.95) * min(photo.height, photo.width * size[1] / size[0])
    width = height * size[0] / size[1]
    left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
    piece = photo.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    if random.random() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return piece.filter(ImageFilter.GaussianBlur(random.uniform(0, 2.5)))


def _taken(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """The picture as a camera takes it: light from a side, white balance, a little blur, noise."""
    picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(0, 1.2)))
    pixels = np.asarray(picture, np.float32) / 255
    height, width = pixels.shape[:2]
    angle, depth = random.uniform(0, 2 * math.pi), random.uniform(0, 0.5)
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j]
    light = random.uniform(0.65, 1.25) + depth * (x * math.cos(angle) + y * math.sin(angle)) / 2
    pixels = (pixels * light[..., None] * random.uniform(0.88, 1.12, 3)) ** random.uniform(0.8, 1.25)
    pixels += random.normal(0, random.uniform(0.005, 0.03), pixels.shape)
    return Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8))


def _colour(random: np.random.Generator, dark: bool) -> tuple[int, ...]:
    return tuple(int(value) for value in random.integers(*((10, 90) if dark else (150, 245)), 3))


def _plate(text: str, random: np.random.Generator) -> Image.Image:
    """A photo, upright, 640 pixels long, of a plate with a number: on its own, or with a smaller line below."""
    size = (640, 480) if random.random() < 0.5 else (480, 640)
    side, dark = int(random.uniform(0.8, 1.1) * 480), False
    plate = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw = ImageDraw.Draw(plate)
    radius = side * random.choice([0.05, 0.2, 0.5])
    draw.rounded_rectangle((0, 0, side - 1, side - 1), radius, (*_colour(random, dark), 255), _colour(random, not dark),
                           max(1, round(side * random.uniform(0.01, 0.04))))
    font = ImageFont.load_default(side * random.uniform(0.7, 0.95))
    centre = side * random.uniform(0.46, 0.54), side * random.uniform(0.46, 0.54)
    draw.text(centre, text, _colour(random, not dark), font, "mm",
              stroke_width=round(side * random.uniform(0, 0.02)), stroke_fill=_colour(random, not dark))
    shift = side * random.uniform(-0.12, 0.12, 8)  # of the corners: perspective
    corners = np.array([0, 0, 0, side, side, side, side, 0]) + shift
    plate = plate.transform((side, side), Image.Transform.QUAD, corners, Image.Resampling.BICUBIC)
    plate = plate.rotate(random.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
    photo = _background(size, random)
    place = [int((size[axis] - plate.size[axis]) / 2 + random.uniform(-0.05, 0.05) * size[axis]) for axis in (0, 1)]
    shadow = Image.new("RGBA", plate.size, (0, 0, 0, 120))
    photo.paste(shadow, (place[0] + side // 30, place[1] + side // 25), plate.getchannel("A").filter(
        ImageFilter.GaussianBlur(side / 40)).point(lambda value: value // 2))
    photo.paste(plate, (place[0], place[1]), plate)
    return _taken(photo, random)


def _parts(random: np.random.Generator) -> tuple[Image.Image, list[str]]:
    """A photo of 480 x 360 pixels of nuts, washers and coins, and their lines in YOLO's format."""
    width, height = 480, 360
    photo, lines, taken = _background((width, height), random), list[str](), list[tuple[float, float, float]]()
    for _ in range(random.integers(1, 6)):
        for _ in range(20):
            radius = random.uniform(18, 56)
            x, y = random.uniform(radius, width - radius), random.uniform(radius, height - radius)
            if all(math.hypot(x - other, y - below) > 0.9 * (radius + far) for other, below, far in taken):
                break
        else:
            continue
        taken.append((x, y, radius))
        label = int(random.integers(3))
        part = _part(PARTS[label], radius, random)
        left, top, right, bottom = part.getchannel("A").point(lambda value: 255 * (value > 127)).getbbox()
        place = round(x - part.width / 2), round(y - part.height / 2)
        shadow = part.getchannel("A").filter(ImageFilter.GaussianBlur(radius / 8)).point(lambda value: value // 2)
        photo.paste((0, 0, 0), (place[0] + round(radius / 8), place[1] + round(radius / 6)), shadow)
        photo.paste(part, place, part)
        numbers = ((place[0] + (left + right) / 2) / width, (place[1] + (top + bottom) / 2) / height,
                   (right - left) / width, (bottom - top) / height)
        lines.append(f"{label} " + " ".join(f"{number:.6f}" for number in numbers))
    return _taken(photo, random), lines


def _part(name: str, radius: float, random: np.random.Generator) -> Image.Image:
    """A thing of metal on a transparent ground."""
    side = round(2.1 * radius) * LARGER
    middle, radius = side / 2, radius * LARGER
    picture = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw, tone = ImageDraw.Draw(picture), random.integers(110, 220)
    metal = (int(tone), int(tone * random.uniform(0.8, 1)), int(tone * random.uniform(0.55, 1)), 255)
    rim = tuple(round(0.6 * value) for value in metal[:3])

    def disc(share: float, fill: object, outline: object = None) -> None:
        box = (middle - share * radius, middle - share * radius, middle + share * radius, middle + share * radius)
        draw.ellipse(box, fill, outline, round(radius / 14))

    if name == "nut":
        turn = random.uniform(0, math.pi / 3)
        corners = [(middle + radius * math.cos(turn + math.pi * step / 3),
                    middle + radius * math.sin(turn + math.pi * step / 3)) for step in range(6)]
        draw.polygon(corners, metal, rim, round(radius / 14))
        disc(random.uniform(0.45, 0.55), (0, 0, 0, 0), rim)
    elif name == "washer":
        disc(1, metal, rim)
        disc(random.uniform(0.4, 0.6), (0, 0, 0, 0), rim)
    else:
        disc(1, metal, rim)
        disc(0.85, None, rim)
        font = ImageFont.load_default(radius * 0.9)
        text = Image.new("L", picture.size)
        ImageDraw.Draw(text).text((middle, middle), str(random.choice([1, 2, 5])), 255, font, "mm")
        picture.paste(rim, (0, 0), text.rotate(random.uniform(0, 360)))
    # Light falls on it from one side.
    shine = np.linspace(0.7, 1.3, side)[:, None] * np.linspace(*random.permutation([0.8, 1.2]), side)
    pixels = np.asarray(picture, np.float32).copy()
    pixels[..., :3] *= shine[..., None]
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return picture.resize((side // LARGER, side // LARGER), Image.Resampling.LANCZOS)


def _leaves(random: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A photo of 320 x 240 pixels of leaves, and their mask."""
    size = (320, 240)
    photo, mask = _background(size, random), Image.new("L", size)
    for _ in range(random.integers(1, 5)):
        length, share = random.uniform(30, 75), random.uniform(0.25, 0.5)
        turn, x, y = random.uniform(0, 2 * math.pi), random.uniform(20, size[0] - 20), random.uniform(20, size[1] - 20)
        along = np.linspace(0, 1, 24)
        half = length * share * np.sin(math.pi * along ** random.uniform(0.7, 1)) * (
            1 + 0.08 * np.sin(40 * along + random.uniform(0, 6)))
        outline = [((place - 0.5) * 2 * length, sign * wide) for sign in (1, -1) for place, wide in
                   list(zip(along, half, strict=True))[::sign]]
        cos, sin = math.cos(turn), math.sin(turn)
        points = [(LARGER * (x + a * cos - b * sin), LARGER * (y + a * sin + b * cos)) for a, b in outline]
        shape = Image.new("L", (size[0] * LARGER, size[1] * LARGER))
        ImageDraw.Draw(shape).polygon(points, 255)
        shape = shape.resize(size, Image.Resampling.BOX)
        base = np.array([random.integers(60, 190), random.integers(90, 190), random.integers(10, 70)])
        leaf = Image.new("RGB", (size[0] * 2, size[1] * 2), tuple(int(value) for value in base))
        draw = ImageDraw.Draw(leaf)
        vein = tuple(int(value * 0.65) for value in base)
        ends = [(2 * (x + a * cos), 2 * (y + a * sin)) for a in (-length, length)]
        draw.line(ends, vein, 4)
        for place in np.linspace(-0.8, 0.8, 9):
            root = 2 * (x + place * length * cos), 2 * (y + place * length * sin)
            for sign in (1, -1):
                tip = (root[0] + length * (0.5 * cos - sign * share * 1.6 * sin),
                       root[1] + length * (0.5 * sin + sign * share * 1.6 * cos))
                draw.line([root, tip], vein, 2)
        shadow = shape.filter(ImageFilter.GaussianBlur(4)).point(lambda value: value // 3)
        photo.paste((0, 0, 0), (3, 4), shadow)
        photo.paste(leaf.resize(size, Image.Resampling.LANCZOS), (0, 0), shape)
        mask.paste(255, (0, 0), shape.point(lambda value: 255 * (value > 127)))
    return _taken(photo, random), mask


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT", type=Path)
    out = parser.parse_args().out
    for make, name in ((make_plates, "plates"), (make_parts, "parts"), (make_leaves, "leaves")):
        print(make(out / name))
