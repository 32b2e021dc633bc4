"""What a model says of one image, as plain arrays with names: one small class a task."""
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .pictures import Patch, draw_classes, draw_label_map, draw_objects, voc_colors
from .rle import area_of, encode

__all__ = ["Classification", "Detections", "Result", "Segmentation", "coco_records"]

_DRAWN = 3  # classes below a picture


@dataclass(frozen=True, eq=False)
class Result(ABC):
    """What all results have.

    Attributes:
        image: The image in RGB, upright, as a viewer shows it.
        names: Of the classes, in the order of the labels.
        file: Where the image came from; "" of what was given as pixels.
    """

    image: Image.Image = field(repr=False)
    names: Sequence[str] = field(repr=False)
    file: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image, in pixels."""
        return self.image.size

    @abstractmethod
    def plot(self) -> Image.Image:
        """The image with what was found in it."""

    def save(self, path: str | Path) -> Path:
        """Writes :meth:`plot` to a file, of the format that its ending says; makes the folder.

        Raises:
            ValueError: There is no such format.
        """
        path = Path(path)
        if path.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"{path} has no ending of a picture that can be written, such as .png or .jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.plot().save(path)
        return path


@dataclass(frozen=True, eq=False)
class Classification(Result):
    """Classes of an image.

    Attributes:
        probabilities: ``[classes]`` float32; they sum to 1 unless the classes are multi-label.
        thresholds: Of multi-label classes: probability of each from which on the image has it; else None.
    """

    probabilities: np.ndarray
    thresholds: Sequence[float] | None = None

    @property
    def label(self) -> int:
        """The most probable class."""
        return int(self.probabilities.argmax())

    @property
    def name(self) -> str:
        """Name of the most probable class."""
        return self.names[self.label]

    @property
    def probability(self) -> float:
        """Probability of the most probable class."""
        return float(self.probabilities[self.label])

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """Names and probabilities of the most probable classes, the best first."""
        return [(self.names[label], float(self.probabilities[label]))
                for label in (-self.probabilities).argsort(kind="stable")[:count]]

    def present(self) -> list[tuple[str, float]]:
        """The classes that the image has, the best first: of multi-label classes those from their threshold on."""
        if self.thresholds is None:
            return self.top(1)
        limits = dict(zip(self.names, self.thresholds, strict=True))
        return [(name, value) for name, value in self.top(len(self.names)) if value >= limits[name]]

    def plot(self) -> Image.Image:
        """The image with classes and probabilities below: the three most probable, or those that it has."""
        return draw_classes(self.image, self.top(_DRAWN) if self.thresholds is None else self.present())

    def to_supervision(self) -> Any:
        """As ``supervision.Classifications``, the best first.

        Raises:
            ModuleNotFoundError: The package supervision is missing.
        """
        order = (-self.probabilities).argsort(kind="stable")
        return _supervision().Classifications(class_id=order, confidence=self.probabilities[order])


@dataclass(frozen=True, eq=False)
class Detections(Result):
    """Objects in an image, the best first.

    Attributes:
        boxes: ``[N, 4]`` float32: left, top, right, bottom in pixels of the image.
        labels: ``[N]`` int64 from 1 on: ``names[label - 1]``.
        scores: ``[N]`` float32 in [0, 1].
        masks: Of each object the part of the image that it covers, of detectors that find it; else None.
        category_ids: Numbers of the classes in COCO files, in the order of the names.
        threshold: Score from which on objects are drawn.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: list[Patch] | None = None
    category_ids: Sequence[int] = ()
    threshold: float = 0.5

    def __len__(self) -> int:
        return len(self.boxes)

    def above(self, score: float) -> "Detections":
        """The objects with a score of ``score`` or more."""
        kept = np.flatnonzero(self.scores >= score)
        return replace(
            self, boxes=self.boxes[kept], labels=self.labels[kept], scores=self.scores[kept],
            masks=None if self.masks is None else [self.masks[index] for index in kept])

    def found(self) -> dict[str, Any]:
        """Boxes, labels, scores and, if there are, masks, by these names."""
        masks = {} if self.masks is None else {"masks": self.masks}
        return {"boxes": self.boxes, "labels": self.labels, "scores": self.scores} | masks

    def plot(self) -> Image.Image:
        """The image with boxes, names, scores and masks of the objects from the threshold on."""
        return draw_objects(self.image, self.above(self.threshold).found(), self.names)

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """The objects in COCO's format for results, which pycocotools' ``loadRes`` reads; masks are RLE."""
        ids = self.category_ids or range(1, 1 + len(self.names))
        return coco_records(image_id, self.file, self.found(), (self.image.height, self.image.width), self.names, ids)

    def to_supervision(self) -> Any:
        """As ``supervision.Detections``, whose ``class_id`` counts from 0: the place in ``names``.

        Raises:
            ModuleNotFoundError: The package supervision is missing.
        """
        masks = None
        if self.masks is not None:
            masks = np.zeros((len(self.masks), self.image.height, self.image.width), bool)
            for mask, patch in zip(masks, self.masks, strict=True):
                mask[patch.top:, patch.left:][:patch.mask.shape[0], :patch.mask.shape[1]] = patch.mask
        return _supervision().Detections(
            xyxy=self.boxes.astype(np.float32), mask=masks, confidence=self.scores, class_id=self.labels - 1,
            data={"class_name": np.array([self.names[label - 1] for label in self.labels], dtype=str)})


@dataclass(frozen=True, eq=False)
class Segmentation(Result):
    """A class for each pixel of an image.

    Attributes:
        labels: ``[H, W]`` uint8: ``names[label]``.
    """

    labels: np.ndarray

    def label_map(self) -> Image.Image:
        """The labels as a picture with VOC's palette."""
        picture = Image.fromarray(self.labels)
        picture.putpalette([value for color in voc_colors() for value in color])
        return picture

    def plot(self) -> Image.Image:
        """The label map over the image, with names and shares below."""
        return draw_label_map(self.image, self.label_map(), self.names)

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """A record of each class that occurs, with all its pixels as one RLE mask; ``category_id`` is the label."""
        records = []
        for label in np.unique(self.labels).tolist():
            code = encode(Patch(self.labels == label, 0, 0), *self.labels.shape)
            rows, columns = (np.flatnonzero((self.labels == label).any(axis)) for axis in (1, 0))
            box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
            records.append({
                "image_id": image_id, "file_name": self.file, "category_id": label, "category_name": self.names[label],
                "bbox": [int(edge) for edge in box], "area": area_of(code), "iscrowd": 0, "segmentation": code})
        return records

    def to_supervision(self) -> Any:
        """As ``supervision.Detections``: an object of each class that occurs, with all its pixels as a mask.

        Raises:
            ModuleNotFoundError: The package supervision is missing.
        """
        present = np.unique(self.labels).astype(np.int64)
        masks = np.stack([self.labels == label for label in present])
        boxes = [[left, top, left + width, top + height]
                 for left, top, width, height in (record["bbox"] for record in self.to_coco())]
        return _supervision().Detections(
            xyxy=np.array(boxes, np.float32), mask=masks, class_id=present,
            data={"class_name": np.array([self.names[label] for label in present], dtype=str)})


def coco_records(
        image_id: int | str, name: str, found: dict[str, Any], size: Sequence[int], names: Sequence[str],
        category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Objects in COCO's format for results.

    Args:
        image_id: Of the image.
        name: Of its file.
        found: ``boxes [N, 4]``, ``labels [N]`` from 1 on, ``scores [N]`` and, of masks, a list of patches ``masks``.
        size: Height and width of the image.
        names: Of the labels.
        category_ids: Their numbers in files.
    """
    height, width = (int(side) for side in size)
    records = []
    for index, ((x1, y1, x2, y2), score, label) in enumerate(zip(
            found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)):
        records.append({
            "image_id": image_id,
            "file_name": name,
            "category_id": category_ids[label - 1],
            "category_name": names[label - 1],
            "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, 6),
        })
        if "masks" in found:
            records[-1]["segmentation"] = encode(found["masks"][index], height, width)
    return records


def _supervision() -> Any:
    try:
        import supervision
    except ModuleNotFoundError as error:
        if error.name != "supervision":
            raise
        raise ModuleNotFoundError("to_supervision needs the package supervision: pip install supervision") from None
    return supervision
