"""COCO's code of masks: the lengths of runs of pixels, column by column, as text."""
from typing import Any

import numpy as np

from .pictures import Patch

__all__ = ["area_of", "encode"]


def encode(patch: Patch, height: int, width: int) -> dict[str, Any]:
    """The code of a mask in an image of ``height`` x ``width``, made from its patch alone, however large the image is.

    Returns:
        ``size`` and ``counts`` (text), as ``pycocotools.mask.encode`` gives them.
    """
    if not patch.mask.size:
        ends = np.zeros(0, np.int64)
    else:
        columns = np.zeros((patch.mask.shape[1], patch.mask.shape[0] + 2), np.int8)
        columns[:, 1:-1] = patch.mask.T
        column, row = np.nonzero(np.diff(columns, axis=1))
        ends = (patch.left + column) * height + patch.top + row  # where runs begin and end, column by column
        meeting = np.flatnonzero(ends[1:-1:2] == ends[2::2]) * 2 + 1  # runs that end where the next begins
        ends = np.delete(ends, np.concatenate([meeting, meeting + 1]))
    counts = np.diff(np.concatenate([[0], ends, [height * width]])).tolist()
    counts = counts[:-1] if ends.size and not counts[-1] else counts
    return {"size": [height, width], "counts": _text(counts)}


def area_of(code: dict[str, Any]) -> int:
    """Number of pixels of a mask by its code."""
    counts: list[int] = []
    value = shift = 0
    for character in code["counts"]:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:  # the last of a number
            if digit & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return sum(counts[1::2])


def _text(counts: list[int]) -> str:
    """Run lengths in digits of five bits and a sixth for "more follow"; from the fourth on as differences from the
    last but one, which may be negative."""
    characters = []
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            digit = value & 31
            value >>= 5
            more = value != (-1 if digit & 16 else 0)
            characters.append(chr(digit + 32 * more + 48))
    return "".join(characters)
