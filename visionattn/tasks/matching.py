"""Which objects a detector found, took for others, missed or made up: for its confusion matrix and its mistakes."""
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_area, box_iou

from .charts import Tile
from .findings import thumbnail

__all__ = ["MATCHED", "Matches", "match_objects"]

MATCHED = 0.5  # IoU from which a detection is of an object
FOUND, MISSED, FALSE = (60, 200, 75), (235, 25, 45), (255, 150, 20)


class Matches(NamedTuple):
    """The objects and detections of an image; labels are from 1 on.

    Attributes:
        pairs: ``(label of the object, label of the detection)`` of those that lie on each other.
        missed: Labels of the objects that no detection lies on.
        false: Labels of the detections that lie on no object.
        boxes: ``[N, 4]``, those of ``pairs`` (of the objects), ``missed`` and ``false`` one after the other.
    """

    pairs: list[tuple[int, int]]
    missed: list[int]
    false: list[int]
    boxes: Tensor

    def counts(self, num_classes: int) -> Tensor:
        """Confusion matrix ``[classes + 1, classes + 1]``: a row is the truth, what is last is background."""
        counts = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.long)
        for true, predicted in [(true - 1, predicted - 1) for true, predicted in self.pairs] + [
                (label - 1, num_classes) for label in self.missed] + [(num_classes, label - 1) for label in self.false]:
            counts[true, predicted] += 1
        return counts

    def errors(self) -> int:
        """Number of objects that were missed, of false detections and of wrong classes."""
        return len(self.missed) + len(self.false) + sum(true != predicted for true, predicted in self.pairs)

    def tile(self, image: Tensor, target: dict[str, Any], names: Sequence[str]) -> Tile:
        """The image for a sheet, with found objects green, missed ones red and false detections orange.

        Args:
            image: ``[3, H, W]`` in [0, 1].
            target: Its ``orig_size``, which the boxes are in, and ``file_name``.
            names: Of the labels.
        """
        photo = Image.fromarray(thumbnail(image))
        if max(photo.size) < 120:
            photo = photo.resize((2 * photo.width, 2 * photo.height), Image.Resampling.NEAREST)
        height, width = (int(side) for side in target["orig_size"])
        zoom = torch.tensor([photo.width / width, photo.height / height] * 2)
        colours = [FOUND if true == predicted else FALSE for true, predicted in self.pairs]
        colours += [MISSED] * len(self.missed) + [FALSE] * len(self.false)
        draw = ImageDraw.Draw(photo)
        boxes = zip((self.boxes * zoom).tolist(), colours, strict=True)
        for (left, top, right, bottom), colour in sorted(boxes, key=lambda box: box[1] != FALSE):  # false ones lowest
            draw.rectangle((left, top, max(right, left + 1), max(bottom, top + 1)), outline=colour, width=2)
        confused = [f"{names[true - 1]} as {names[predicted - 1]}"
                    for true, predicted in self.pairs if true != predicted]
        lines = [_listed("missed", [names[label - 1] for label in self.missed]),
                 _listed("false", [*confused, *(names[label - 1] for label in self.false)]),
                 Path(str(target.get("file_name", ""))).name]
        return Tile(np.asarray(photo), "\n".join(lines))


def match_objects(found: dict[str, Tensor], truth: dict[str, Tensor], score: float) -> Matches:
    """Pairs detections with objects at an IoU of 0.5: first those of one class, the surest first, then the others.

    Detections that lie in a crowd are left out, as in COCO's metrics.

    Args:
        found: ``boxes [N, 4]``, ``labels [N]``, ``scores [N]``.
        truth: ``boxes [M, 4]``, ``labels [M]`` and, if there are crowds, ``iscrowd [M]``.
        score: Least score of a detection that counts.
    """
    order = found["scores"].argsort(descending=True)
    order = order[found["scores"][order] >= score]
    boxes, labels = found["boxes"][order], found["labels"][order]
    crowd = truth["iscrowd"].bool() if "iscrowd" in truth else torch.zeros(len(truth["labels"]), dtype=torch.bool)
    objects, classes = truth["boxes"][~crowd], truth["labels"][~crowd]
    overlap = box_iou(boxes, objects)
    free = torch.ones(len(objects), dtype=torch.bool)
    taken: dict[int, int] = {}  # object of a detection
    for wanted in (labels[:, None] == classes, torch.ones_like(overlap, dtype=torch.bool)):
        for index in range(len(boxes)):
            if index in taken or not len(objects):
                continue
            values = torch.where(free & wanted[index], overlap[index], -1.0)
            best = int(values.argmax())
            if values[best] >= MATCHED:
                taken[index], free[best] = best, False
    rest = [index for index in range(len(boxes)) if index not in taken]
    if crowd.any() and rest:
        inside = _share_inside(boxes[rest], truth["boxes"][crowd]).amax(dim=1) >= MATCHED
        rest = [index for index, within in zip(rest, inside.tolist(), strict=True) if not within]
    missed = free.nonzero()[:, 0].tolist()
    return Matches(
        [(int(classes[place]), int(labels[index])) for index, place in taken.items()],
        classes[missed].tolist(), labels[rest].tolist(),
        torch.cat([objects[list(taken.values())], objects[missed], boxes[rest]]))


def _share_inside(boxes: Tensor, crowds: Tensor) -> Tensor:
    """``[N, M]``: which share of each box lies in each crowd."""
    corner = torch.maximum(boxes[:, None, :2], crowds[:, :2])
    sides = (torch.minimum(boxes[:, None, 2:], crowds[:, 2:]) - corner).clamp(min=0)
    return sides.prod(dim=2) / box_area(boxes).clamp(min=1e-6)[:, None]


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return f"nothing {what}"
    counts = Counter(names)
    return f"{what} " + ", ".join(f"{name} x{count}" if count > 1 else name for name, count in counts.most_common())
