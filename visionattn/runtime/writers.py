"""What a prediction leaves behind: a file or folder of results and pictures, one an image, none of before."""
import csv
import hashlib
import json
import os
import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .engine import Meaning
from .inputs import Input
from .pictures import draw_classes, draw_label_map, draw_objects, printable, voc_colors
from .results import coco_records
from .rle import area_of

__all__ = ["ClassificationResults", "DetectionResults", "MultilabelResults", "ResultFolder", "Results",
           "SegmentationResults", "open_results"]

_MARK = ("Software", "visionattn predict")  # in the files that are written here, so that no others are removed
_LONGEST = 255  # bytes of a file's name
_RANKS = 5  # classes of an image that are listed, the best first
_DRAWN = 3  # classes below a picture


class ResultFolder:
    """A folder of PNG files that are named after the images that they are made of.

    The names come from data files and may say anything: a file is always written below the folder. In place of ``..``
    is ``_``, and neither a leading slash nor a drive letter is followed; backslashes part folders as slashes do. Names
    that are too long are cut, and of names that would then be the same the second gets a number of its own.

    Args:
        folder: The folder; it is made when there is something to write.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.sources: dict[str, str] = {}  # of each file

    def clear(self) -> None:
        """Removes what earlier predictions wrote here, and nothing else."""
        emptied = set()
        for file in sorted(self.folder.rglob("*.png")):
            if file.is_file() and not file.is_symlink() and _is_ours(file):
                file.unlink()
                emptied.add(file.parent)
        for folder in sorted(emptied, reverse=True):
            while folder != self.folder.parent and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
                folder = folder.parent

    def save(self, picture: Image.Image, name: str) -> Path:
        """Writes ``<name>.png`` and returns its path."""
        parts = [part for part in re.split(r"[/\\]", name.replace(":", "_")) if part not in ("", ".")]
        *folders, last = ["_" if part == ".." else part for part in parts] or ["_"]
        parent = self.folder.joinpath(*(_cut(part, "") for part in folders))
        path = parent / _cut(last, ".png")
        if self.sources.setdefault(str(path), name) != name:
            path = parent / _cut(last, ".png", _digest(name))
            self.sources[str(path)] = name
        path.parent.mkdir(parents=True, exist_ok=True)
        mark = PngInfo()
        mark.add_text(*_MARK)
        picture.save(path, pnginfo=mark)
        return path


class Results:
    """Results of one task in a folder: made, it removes those of an earlier prediction; ``close`` completes them.

    ``draw`` and ``write`` are called for every image; several processes may draw while one writes.

    Args:
        folder: Where they go.
        first: Whether this process is the one that removes and writes.
    """

    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def __init__(self, folder: Path, first: bool = True):
        self.folder = folder
        self.parts = {name: ResultFolder(folder / name) for name in self.folders}
        if first:
            for name in self.files:
                if (folder / name).is_file() and not _is_ours_by_head(folder / name):
                    raise ValueError(f"{folder / name} is not of an earlier prediction and would be written over: move "
                                     "it, or name another folder for the results")
                for path in (folder / name, _part(folder / name)):
                    path.unlink(missing_ok=True)
            for part in self.parts.values():
                part.clear()

    @abstractmethod
    def add(self, number: int, named: Input, result: Any) -> None:
        """Writes and draws the result of the ``number``-th image (from 1 on)."""

    @abstractmethod
    def close(self) -> str:
        """Completes the files and says what is where."""

    def abandon(self) -> None:
        """Closes and removes what was not completed."""


class ClassificationResults(Results):
    """``predictions.csv``, a row an image with its most probable classes, and ``pictures``.

    Args:
        folder: Where they go.
        names: Of the classes.
        first: Whether this process is the one that removes and writes.
    """

    files = ("predictions.csv",)
    folders = ("pictures",)

    def __init__(self, folder: Path, names: Sequence[str], first: bool = True):
        super().__init__(folder, first)
        self.names, self.count = names, 0
        self._file: IO[str] | None = None

    def best(self, probabilities: np.ndarray) -> list[tuple[str, float]]:
        """The most probable classes of ``probabilities [classes]``, the best first."""
        labels = (-probabilities).argsort(kind="stable")[:_RANKS]
        return [(self.names[label], float(probabilities[label])) for label in labels]

    def add(self, number: int, named: Input, result: Any) -> None:
        """Writes the row and the picture of one image."""
        best = self.best(result.probabilities)
        self.write(str(named.file), best)
        self.draw(named.stem, result.image, best)

    def write(self, file: str, best: list[tuple[str, float]]) -> None:
        """Adds the row of one image."""
        self._table().writerow([file, *(text for name, value in best for text in (name, f"{value:.6f}"))])
        self.count += 1

    def draw(self, name: str, image: Image.Image, best: list[tuple[str, float]]) -> None:
        """Writes the picture of one image."""
        self.parts["pictures"].save(draw_classes(image, best[:_DRAWN]), name)

    def close(self) -> str:
        """Completes the table."""
        self._table()
        _complete(self._file, self.folder / self.files[0])
        return f"Predictions of {self.count} images are in {self.folder / self.files[0]}"

    def abandon(self) -> None:
        """Closes and removes the table."""
        _remove(self._file, self.folder / self.files[0])

    def _columns(self) -> list[str]:
        pair, ranks = ("class", "probability"), range(2, 1 + min(_RANKS, len(self.names)))
        return ["file", *pair, *(f"{column}_{rank}" for rank in ranks for column in pair)]

    def _table(self) -> Any:
        """What writes rows, with the columns' names before the first."""
        if self._file is None:
            self._file = _opened(self.folder / self.files[0])
            csv.writer(self._file).writerow(self._columns())
        return csv.writer(self._file)


class MultilabelResults(ClassificationResults):
    """``predictions.csv``, a row an image with its classes and the probabilities of all classes, and ``pictures``.

    Args:
        folder: Where they go.
        names: Of the classes.
        thresholds: Probability of each class from which on an image has it.
        first: Whether this process is the one that removes and writes.
    """

    def __init__(self, folder: Path, names: Sequence[str], thresholds: Sequence[float], first: bool = True):
        super().__init__(folder, names, first)
        self.thresholds = dict(zip(names, thresholds, strict=True))

    def best(self, probabilities: np.ndarray) -> list[tuple[str, float]]:
        """All classes with their probabilities."""
        return list(zip(self.names, probabilities.tolist(), strict=True))

    def write(self, file: str, best: list[tuple[str, float]]) -> None:
        """Adds the row of one image."""
        present = "|".join(name for name, _ in self._present(best))
        self._table().writerow([file, present, *(f"{value:.6f}" for _, value in best)])
        self.count += 1

    def draw(self, name: str, image: Image.Image, best: list[tuple[str, float]]) -> None:
        """Writes the picture of one image with the classes that it has."""
        self.parts["pictures"].save(draw_classes(image, sorted(self._present(best), key=lambda one: -one[1])), name)

    def _columns(self) -> list[str]:
        return ["file", "labels", *self.names]

    def _present(self, best: list[tuple[str, float]]) -> list[tuple[str, float]]:
        return [(name, value) for name, value in best if value >= self.thresholds[name]]


class DetectionResults(Results):
    """``predictions.json``, all detections in COCO's format for results; ``predictions_coco.json``, a COCO file of the
    images, categories and those detections that are sure enough; ``pictures`` and ``crops`` of these.

    Args:
        folder: Where they go.
        names: Of the labels, which begin at 1.
        category_ids: Their numbers in files.
        threshold: Least score of what is sure enough.
        crops: Whether to cut these out.
        first: Whether this process is the one that removes and writes.
    """

    files = ("predictions.json", "predictions_coco.json")
    folders = ("pictures", "crops")

    def __init__(
            self, folder: Path, names: Sequence[str], category_ids: Sequence[int], threshold: float,
            crops: bool = False, first: bool = True):
        super().__init__(folder, first)
        self.names, self.category_ids, self.threshold, self.crops = names, category_ids, threshold, crops
        self.count = self.sure = self.images = 0
        self._json: list[_JSONList] = []

    def add(self, number: int, named: Input, result: Any) -> None:
        """Writes the records, the picture and the crops of one image."""
        found = result.found()
        self.write(self.records(number, named.name, found, (result.image.height, result.image.width)))
        self.draw(named.stem, result.image, found)

    def records(self, image_id: int | str, name: str, found: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
        """What is written of one image of ``size`` (height, width) with the objects that were ``found``."""
        height, width = (int(side) for side in size)
        objects = coco_records(image_id, name, found, size, self.names, self.category_ids)
        return {"image": {"id": image_id, "file_name": name, "width": width, "height": height}, "objects": objects}

    def write(self, records: dict[str, Any]) -> None:
        """Adds the records of one image."""
        if not self._json:
            self._open()
        results, images, annotations = self._json
        images.add(records["image"])
        self.images += 1
        for record in records["objects"]:
            results.add(record)
            self.count += 1
            if record["score"] >= self.threshold:
                self.sure += 1
                mask = record.get("segmentation")
                area = float(area_of(mask)) if mask else round(record["bbox"][2] * record["bbox"][3], 3)
                annotations.add({"id": self.sure, "iscrowd": 0, "area": area, **record})

    def draw(self, name: str, image: Image.Image, found: dict[str, Any]) -> None:
        """Writes the picture, and the crops, of one image."""
        shown = np.flatnonzero(found["scores"] >= self.threshold).tolist()
        sure: dict[str, Any] = {key: [value[index] for index in shown] if isinstance(value, list) else value[shown]
                for key, value in found.items()}
        self.parts["pictures"].save(draw_objects(image, sure, self.names), name)
        for number, (box, label) in enumerate(zip(sure["boxes"].tolist(), sure["labels"].tolist(), strict=True), 1):
            if self.crops:
                left, top = (min(int(edge), side - 1) for edge, side in zip(box[:2], image.size, strict=True))
                right, bottom = (max(near + 1, min(-int(-edge // 1), side)) for near, edge, side in zip(
                    (left, top), box[2:], image.size, strict=True))
                kind = re.sub(r"[/\\]", "_", printable(self.names[label - 1]))
                self.parts["crops"].save(image.crop((left, top, right, bottom)), f"{kind}/{name}-{number}")

    def close(self) -> str:
        """Completes the files."""
        if not self._json:
            self._open()
        results, images, annotations = self._json
        results.file.write("\n]\n")
        images.file.write("\n],\n" + '"categories": ' + json.dumps([
            {"id": number, "name": name} for number, name in zip(self.category_ids, self.names, strict=True)]))
        images.file.write(',\n"annotations": [')
        annotations.file.seek(0)
        while block := annotations.file.read(1 << 20):
            images.file.write(block)
        images.file.write("\n]}\n")
        annotations.file.close()
        _part(self.folder / "objects.tmp").unlink()
        for file, name in zip((results.file, images.file), self.files, strict=True):
            _complete(file, self.folder / name)
        self._json = []
        also = ", what was cut out in crops" if self.crops else ""
        return (f"{self.count} detections in {self.images} images are in {self.folder / self.files[0]}, the "
                f"{self.sure} with a score of {self.threshold:g} or more in {self.files[1]} and pictures{also}")

    def abandon(self) -> None:
        """Closes and removes the files."""
        for part, name in zip(self._json, (*self.files, "objects.tmp"), strict=False):
            _remove(part.file, self.folder / name)

    def _open(self) -> None:
        self._json = [_JSONList(_opened(self.folder / name)) for name in (*self.files, "objects.tmp")]
        results, images, _ = self._json
        results.file.write("[")
        images.file.write('{"info": ' + json.dumps({"description": "predictions of visionattn"}) + ',\n"images": [')


class SegmentationResults(Results):
    """``predictions``, label maps with VOC's palette, and ``pictures`` of them over the images.

    Args:
        folder: Where they go.
        names: Of the labels.
        first: Whether this process is the one that removes.
    """

    folders = ("predictions", "pictures")

    def __init__(self, folder: Path, names: Sequence[str], first: bool = True):
        super().__init__(folder, first)
        self.names, self.count = names, 0

    def add(self, number: int, named: Input, result: Any) -> None:
        """Writes the label map and the picture of one image."""
        self.draw(named.stem, result.image, result.labels)

    def draw(self, name: str, image: Image.Image, labels: np.ndarray) -> Path:
        """Writes the label map ``[H, W]`` (uint8) of one image and its picture; returns the path of the map."""
        label_map = Image.fromarray(labels)
        label_map.putpalette([value for color in voc_colors() for value in color])
        self.parts["pictures"].save(draw_label_map(image, label_map, self.names), name)
        self.count += 1
        return self.parts["predictions"].save(label_map, name)

    def close(self) -> str:
        """Nothing is left to complete."""
        return f"Label maps are in {self.folder / 'predictions'}, pictures in {self.folder / 'pictures'}"


def open_results(
        meaning: Meaning, folder: Path, threshold: float | None = None, crops: bool = False,
        first: bool = True) -> Results:
    """Begins the results of a prediction in ``folder`` and removes those of an earlier one there.

    Args:
        meaning: Of the model's answers.
        folder: Where they go.
        threshold: Least score of what is drawn, or of the classes of a multi-label image; None for the model's own.
        crops: Cut out what was found.
        first: Whether this process is the one that removes and writes.

    Raises:
        ValueError: The task has no such results, or a file there is not of a prediction.
    """
    if meaning.task == "detection":
        least = meaning.picture_score if threshold is None else threshold
        return DetectionResults(folder, meaning.names, meaning.category_ids, least, crops, first)
    if meaning.task == "segmentation":
        if threshold is not None or crops:
            raise ValueError("segmentation gives every pixel its label: leave threshold and crops out")
        return SegmentationResults(folder, meaning.names, first)
    if meaning.task != "classification":
        raise ValueError("the model has no classes, only features: see visionattn embed")
    if crops:
        raise ValueError("a classifier finds nothing to cut out: leave crops out")
    if meaning.thresholds is not None:
        limits = meaning.thresholds if threshold is None else [threshold] * len(meaning.names)
        return MultilabelResults(folder, meaning.names, limits, first)
    if threshold is not None:
        raise ValueError("a classifier gives every image its most probable class: leave threshold out")
    return ClassificationResults(folder, meaning.names, first)


class _JSONList:
    """A list in a file, written record by record."""

    def __init__(self, file: IO[str]):
        self.file, self.started = file, False

    def add(self, record: dict[str, Any]) -> None:
        self.file.write((",\n" if self.started else "\n") + json.dumps(record))
        self.started = True


def _part(path: Path) -> Path:
    """Where a file is written until it is complete."""
    return path.with_name(f"{path.name}.part")


def _opened(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return _part(path).open("w+", newline="", encoding="utf-8", errors="backslashreplace")


def _complete(file: IO[str] | None, path: Path) -> None:
    if file is not None:
        file.close()
        os.replace(_part(path), path)


def _remove(file: IO[str] | None, path: Path) -> None:
    if file is not None:
        file.close()
        _part(path).unlink(missing_ok=True)


def _cut(name: str, ending: str, number: str = "") -> str:
    """A file's name with its ending, cut where it is longer than file systems allow."""
    whole = f"{name}-{number}{ending}" if number else f"{name}{ending}"
    if len(os.fsencode(whole)) <= _LONGEST:
        return whole
    number = number or _digest(name)
    kept = os.fsencode(name)[:_LONGEST - len(number) - len(ending) - 1].decode("utf-8", "ignore")
    return f"{kept}-{number}{ending}"


def _digest(name: str) -> str:
    return hashlib.blake2b(os.fsencode(name), digest_size=4).hexdigest()


def _is_ours_by_head(file: Path) -> bool:
    """Whether a table or a list looks like one that is written here."""
    with file.open("rb") as opened:
        head = opened.read(200).lstrip()
    if file.suffix == ".csv":
        return not head or head.startswith((b"file,class,probability", b"file,labels"))
    ours = rb'\[\s*(\]|\{"image_id")|\{"info": \{"description": "predictions of visionattn"'
    return not head or bool(re.match(ours, head))


def _is_ours(file: Path) -> bool:
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            return picture.info.get(_MARK[0]) == _MARK[1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
