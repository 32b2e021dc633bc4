"""What the pixels of a mask mean: values or colours to labels, and what is found where they mean nothing."""
import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from ..runtime.pictures import voc_colors
from ..runtime.pixels import AS_SEEN, Decoding, reason_of, tag_of, turned
from .dense_transforms import IGNORE

__all__ = ["CITYSCAPES", "VOC", "Mask", "MaskTable", "UnusableMask", "blurred", "color_table", "count_codes",
           "describe", "known_colors", "list_of", "meant", "probable_options", "read_mask", "values_table",
           "with_gaps"]

CITYSCAPES = {  # class: value in *_labelIds.png; the other values, up to 33, are ignored
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}
VOC = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
_CITYSCAPES_COLORS = {
    "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70), "wall": (102, 102, 156),
    "fence": (190, 153, 153), "pole": (153, 153, 153), "traffic light": (250, 170, 30), "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35), "terrain": (152, 251, 152), "sky": (70, 130, 180), "person": (220, 20, 60),
    "rider": (255, 0, 0), "car": (0, 0, 142), "truck": (0, 0, 70), "bus": (0, 60, 100), "train": (0, 80, 100),
    "motorcycle": (0, 0, 230), "bicycle": (119, 11, 32),
}
_CITYSCAPES_IGNORED = [(0, 0, 0), (111, 74, 0), (81, 0, 81), (250, 170, 160), (230, 150, 140), (180, 165, 180),
                       (150, 100, 100), (150, 120, 90), (0, 0, 90), (0, 0, 110)]
_IGNORED = {"ignore", "ignored", "void", "unlabeled", "unlabelled"}  # names in a table of colours
LOSSY = ("JPEG", "MPO")
NEAR = 24  # least difference of two values of a lossy mask that may both be meant
SHOWN = 6  # values in a message
MOST_VALUES = 16  # that masks may have for each to be taken as a class where they are not numbered


NO_CLASS = "the mask has a label without a class"
NO_CLASS_OF_COLOR = "the mask has a colour without a class"


class UnusableMask(Exception):
    """What is wrong with a mask, in general and in particular."""

    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class Mask(NamedTuple):
    """A mask's pixels as they are in its file, upright.

    Attributes:
        codes: ``[H, W]``: values, or colours as ``red << 16 | green << 8 | blue``.
        colored: They are colours.
        lossy: The file does not keep them exactly.
        palette: Red, green and blue of each value, ``[N, 3]``, if the file has a palette.
    """

    codes: np.ndarray
    colored: bool
    lossy: bool
    palette: np.ndarray | None = None


class MaskTable(NamedTuple):
    """Which codes of masks are which labels.

    Attributes:
        codes: ``[N]``, ascending.
        labels: ``[N]`` uint8: their labels; 255 is ignored.
        colored: The codes are colours.
        chosen: A user chose the codes, so that a lossy mask's are the nearest of them.
        nearest: Those of other masks are too.
    """

    codes: np.ndarray
    labels: np.ndarray
    colored: bool = False
    chosen: bool = False
    nearest: bool = False

    def labels_of(self, mask: Mask) -> np.ndarray:
        """Labels ``[H, W]`` uint8 of a mask.

        Raises:
            UnusableMask: It has a code that means nothing.
        """
        if mask.colored and not self.colored:
            found = describe(count_codes(mask.codes), True)
            raise UnusableMask("the mask has colours where classes are expected",
                               f"{found}; set mask_colors to cityscapes, voc or a table")
        nearest = self.nearest or (mask.lossy and self.chosen)
        if mask.lossy and not self.chosen:
            counts = count_codes(mask.codes)
            raise UnusableMask(
                "the mask is a JPEG, which does not keep its values",
                f"it has {len(counts)} of them; save masks as PNG, or set mask_values to those that are meant, "
                f"probably {list_of(meant(counts, False), False)}: the nearest is taken then")
        if not nearest and not self.colored and mask.codes.dtype == np.uint8:  # the fast and frequent case
            table = np.full(256, -1, dtype=np.int16)
            inside = (self.codes >= 0) & (self.codes < 256)
            table[self.codes[inside]] = self.labels[inside]
            labels = table[mask.codes]
            self._complain(np.unique(mask.codes[labels < 0]))
            return labels.astype(np.uint8)
        if not nearest:
            places = np.searchsorted(self.codes, mask.codes).clip(0, len(self.codes) - 1)
            self._complain(np.unique(mask.codes[self.codes[places] != mask.codes]))
            return self.labels[places]
        codes, where = np.unique(mask.codes, return_inverse=True)
        known = _channels(self.codes, self.colored)
        parts = np.array_split(_channels(codes, self.colored), len(codes) // 4096 + 1)
        places = np.concatenate([((part[:, None] - known) ** 2).sum(-1).argmin(1) for part in parts])
        return self.labels[places][where.reshape(mask.codes.shape)]

    def _complain(self, wrong: np.ndarray) -> None:
        if not len(wrong):
            return
        if self.colored:
            raise UnusableMask(NO_CLASS_OF_COLOR, f"{_code(wrong[0], True)}; mask_colors has {len(self.codes)} others")
        known = self.codes[self.labels != IGNORE]
        if len(known) == known[-1] - known[0] + 1:
            all_known = f"labels are {known[0]} to {known[-1]}, and {IGNORE} is ignored"
        else:
            all_known = f"known values are {list_of(known.tolist(), False)}"
        raise UnusableMask(NO_CLASS, f"{wrong[0]}; {all_known}")


def read_mask(file: Path, colors: bool = False, decoding: Decoding = AS_SEEN) -> Mask:
    """A mask as its file has it: indices of its palette, grey values, or colours.

    Args:
        file: The mask. Colours that are all grey count as values unless ``colors``.
        colors: Everything is read as colours: palettes and grey too.
        decoding: Bounds the size.

    Raises:
        UnusableMask: It cannot be read.
    """
    try:
        with decoding.open(file) as opened:
            lossy, tag = opened.format in LOSSY, tag_of(opened)
            opened.load()
            image: Image.Image = opened if opened.format == "TIFF" else turned(opened, tag)
            if "A" in image.getbands():
                if image.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]
                    raise ValueError("it is partly transparent: put it on its background's colour")
                image = image.convert("RGB") if colors or image.mode not in ("LA", "PA") else image.getchannel(0)
            elif image.mode in ("CMYK", "YCbCr", "HSV", "LAB", "RGBX"):
                image = image.convert("RGB")
            if colors:
                image = image.convert("RGB")
            values = np.array(image)
            colours = np.array(image.getpalette(), np.uint8).reshape(-1, 3) if image.mode == "P" else None
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise UnusableMask("the mask cannot be read", reason_of(error, file)) from error
    if values.ndim == 3:
        if not colors and (values == values[..., :1]).all():
            return Mask(np.ascontiguousarray(values[..., 0]), False, lossy)
        red, green, blue = values.astype(np.int32).transpose(2, 0, 1)
        return Mask(red << 16 | green << 8 | blue, True, lossy)
    if values.dtype.kind == "f":
        whole = values.astype(np.int64) if np.isfinite(values).all() else None
        if whole is None or (whole != values).any():
            raise UnusableMask("the mask cannot be read", "its values are fractions, not classes")
        values = whole
    return Mask(values.astype(np.uint8) if values.dtype == bool else values, False, lossy, colours)


def values_table(values: Sequence[int] | Mapping[int, int] | int, nearest: bool = False) -> MaskTable:
    """The table of masks with values.

    Args:
        values: The value of each label, or labels by value (values that it does not name keep theirs), or the number of
            labels, which are their values then. 255 is ignored unless it is named.
        nearest: Take the nearest of the values.
    """
    if isinstance(values, int):
        known: dict[int, int] = {label: label for label in range(values)}
    elif isinstance(values, Mapping):
        largest = max([label for label in values.values() if label != IGNORE], default=0)
        known = {label: label for label in range(largest + 1)} | dict(values)
    else:
        known = {value: label for label, value in enumerate(values)}
        if len(known) < len(values):
            raise ValueError(f"mask_values has a value twice: {list(values)}")
    if any(not 0 <= label <= IGNORE for label in known.values()):
        raise ValueError(f"mask_values must give labels from 0 to 254, or 255 for ignored pixels, got {values}")
    known.setdefault(IGNORE, IGNORE)
    codes = sorted(known)
    return MaskTable(np.array(codes, dtype=np.int64), np.array([known[code] for code in codes], dtype=np.uint8),
                     chosen=not isinstance(values, int), nearest=nearest)


def color_table(colors: str | Mapping[str, Sequence[int] | str], nearest: bool = False) -> tuple[list[str], MaskTable]:
    """Class names and table of masks in colours.

    Args:
        colors: ``cityscapes``, ``voc``, red, green and blue by class name, or a file with them: YAML (``road: [128,
            64, 128]``), CSV (name, red, green, blue) or CVAT's labelmap.txt (``road:128,64,128::``). Classes called
            ``void``, ``ignore`` or ``unlabeled`` are ignored.
        nearest: Take the nearest of the colours.

    Raises:
        ValueError: The table cannot be read, or has a colour twice.
    """
    ignored: list[tuple[int, ...]] = []
    if colors == "cityscapes":
        table: dict[str, tuple[int, ...]] = dict(_CITYSCAPES_COLORS)
        ignored = list(_CITYSCAPES_IGNORED)
    elif colors == "voc":
        table, ignored = dict(zip(VOC, voc_colors(), strict=False)), [(224, 224, 192)]
    else:
        source = "mask_colors" if isinstance(colors, Mapping) else colors
        rows = list(colors.items()) if isinstance(colors, Mapping) else _read_table(Path(colors))
        table = {}
        for name, color in rows:
            color = _color(color)
            if color is None:
                raise ValueError(f"{source}: the colour of {name!r} is not red, green and blue from 0 to 255")
            if name.strip().lower() in _IGNORED:
                ignored.append(color)
            elif name.strip() in table:
                raise ValueError(f"{source}: the class {name.strip()!r} has two colours")
            else:
                table[name.strip()] = color
        if not table:
            raise ValueError(f"{source} names no class")
    known: dict[int, tuple[str, int]] = {}
    for name, label, color in [(name, label, color) for label, (name, color) in enumerate(table.items())] + [
            ("ignored pixels", IGNORE, color) for color in ignored]:
        code = color[0] << 16 | color[1] << 8 | color[2]
        if code in known and label != IGNORE:
            raise ValueError(f"mask_colors: {known[code][0]!r} and {name!r} have the same colour {color}")
        known.setdefault(code, (name, label))
    codes = sorted(known)
    labels = np.array([known[code][1] for code in codes], dtype=np.uint8)
    return list(table), MaskTable(np.array(codes, dtype=np.int64), labels, True, True, nearest)


def count_codes(codes: np.ndarray) -> Counter[int]:
    """Number of pixels of each code."""
    if codes.dtype == np.uint8:
        counts = np.bincount(codes.ravel(), minlength=256)
        return Counter({code: count for code, count in enumerate(counts.tolist()) if count})
    found, counts = np.unique(codes, return_counts=True)
    return Counter(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def describe(counts: Counter[int], colored: bool) -> str:
    """The most frequent codes with their shares of the pixels."""
    total = sum(counts.values())
    shown = [f"{_code(code, colored)} ({100 * count / total:.1f} %)" for code, count in counts.most_common(SHOWN)]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def list_of(codes: Sequence[int], colored: bool) -> str:
    """A few codes as an option would have them."""
    shown = [_code(code, colored) for code in codes[:SHOWN]] + ["..."] * (len(codes) > SHOWN)
    return f"[{', '.join(shown)}]"


def known_colors(counts: Counter[int]) -> str:
    """Which of our tables has these colours, as those of two classes or more: ``cityscapes``, ``voc`` or none."""
    found = {code for code, _ in counts.most_common(SHOWN)}
    for name in ("cityscapes", "voc"):
        table = color_table(name)[1]
        if found <= set(table.codes.tolist()) and len(found & set(table.codes[table.labels != IGNORE].tolist())) > 1:
            return name
    return ""


def blurred(counts: Counter[int]) -> bool:
    """Whether values look like edges that were smoothed: many of them, but the frequent ones are few and far apart."""
    total = sum(counts.values())
    frequent = sorted(code for code, count in counts.items() if count > 0.02 * total)
    most = sum(counts[code] for code in frequent) > 0.7 * total
    return len(counts) > 32 and len(frequent) > 1 and most and frequent == meant(counts, False, 0.02)


def meant(counts: Counter[int], colored: bool, least: float = 0.005) -> list[int]:
    """The codes of a lossy mask that are probably meant: those with a share of ``least`` or more that lie apart."""
    total, chosen = sum(counts.values()), list[int]()
    for code, count in counts.most_common(256):
        near = _channels(np.array([*chosen, code]), colored)
        if count > least * total and (not chosen or np.abs(near[:-1] - near[-1]).max(axis=-1).min() >= NEAR):
            chosen.append(code)
    return sorted(chosen)


def with_gaps(values: Counter[int]) -> bool:
    """Whether values are no numbers of classes: most of the numbers up to the largest do not occur."""
    largest = max(value for value in values if value != IGNORE)
    return largest >= IGNORE or 2 * sum(value != IGNORE for value in values) < largest + 1


def probable_options(
        values: Counter[int], lossy: Counter[int], colours: Counter[int]) -> tuple[dict[str, Any], str]:
    """What masks' values or colours probably mean, where that is not the numbers of the classes.

    Args:
        values: Pixels of each value of masks that keep them.
        lossy: The same of masks that do not.
        colours: Pixels of each colour.

    Returns:
        ``mask_values`` (each value a class), ``mask_nearest`` and ``mask_colors``, as far as they are needed, and what
        was found; nothing where values are the numbers of the classes, or nothing fits.
    """
    if values:
        present, largest = sorted(values), max((value for value in values if value != IGNORE), default=-1)
        if blurred(values):
            return {"mask_values": meant(values, False, 0.02), "mask_nearest": True}, describe(values, False)
        few = 1 < len(present) <= MOST_VALUES
        if few and (largest < 1 or with_gaps(values)):
            return {"mask_values": present}, describe(values, False)
    elif lossy:
        found = meant(lossy, False)
        return ({"mask_values": found}, describe(lossy, False)) if 1 < len(found) <= MOST_VALUES else ({}, "")
    elif known_colors(colours):
        return {"mask_colors": known_colors(colours)}, describe(colours, True)
    return {}, ""


def _channels(codes: np.ndarray, colored: bool) -> np.ndarray:
    """``[N, 3]`` of colours, ``[N, 1]`` of values."""
    codes = codes.astype(np.int64)
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255] if colored else [codes], axis=-1)


def _code(code: int, colored: bool) -> str:
    return str(tuple(_channels(np.array(code), True).tolist())) if colored else str(code)


def _color(value: Any) -> tuple[int, ...] | None:
    """Red, green and blue of three numbers, or of ``#804080``."""
    if isinstance(value, str) and len(value.strip().lstrip("#")) == 6:
        try:
            return tuple(bytes.fromhex(value.strip().lstrip("#")))
        except ValueError:
            return None
    if isinstance(value, str):
        value = value.replace(";", ",").split(",")
    try:
        color = tuple(int(part) for part in value)
    except (TypeError, ValueError):
        return None
    return color if len(color) == 3 and all(0 <= part <= 255 for part in color) else None


def _read_table(file: Path) -> list[tuple[str, Any]]:
    """Names and colours of a file."""
    if not file.is_file():
        raise ValueError("mask_colors must be cityscapes, voc, or a YAML or CSV file of names and colours; there is "
                         f"no file {file}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() in (".yaml", ".yml", ".json"):
            content = yaml.safe_load(text)
            if isinstance(content, list):  # of {name, color} as Supervisely and others have it
                return [(str(row["name"]), row.get("color", row.get("colour"))) for row in content]
            return [(str(name), color) for name, color in content.items()]
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if lines and ":" in lines[0]:
            return [(line.split(":")[0], line.split(":")[1]) for line in lines]
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, csv.Sniffer().sniff(lines[0], ",;\t"))]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, csv.Error, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no table of names and colours: {' '.join(str(error).split())}") from error
    if rows and _color(rows[0][-3:] if len(rows[0]) > 3 else rows[0][-1]) is None:
        rows = rows[1:]  # the head
    return [(row[-4] if len(row) > 3 else row[0], row[-3:] if len(row) > 3 else row[-1]) for row in rows]
