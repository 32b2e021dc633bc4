"""The images that a quantisation is calibrated with, and how its error is measured on others."""
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.folders import find_images
from ..runtime.pixels import Decoding
from ..runtime.prepare import fitted, normalised, resize_and_crop
from ..runtime.say import say
from .quantizable import read_facts

__all__ = ["IMAGES", "Calibration", "Part", "error_of", "known", "parted", "root", "squares"]

IMAGES, FEWEST = 128, 8  # that calibrate, and that a folder must hold at least
JUDGED = 3  # images that the error is measured on, as a multiple of those that calibrate


class Calibration(Sequence[np.ndarray]):
    """The images of a folder as an exported file takes them, read when they are asked for: ``[1, C, H, W]`` float32.

    Of a detector's file ``[C, H, W]``; of a file that takes photos uint8, channels last. They are prepared as the
    file's metadata says, which for a run is what validation does, and come in a fixed random order.

    Attributes:
        calibrating: How many of them, from the first on, calibrate; the others measure the error.
        labels: Of a classifier, where each image's folder bears the name of a class; else None.

    Args:
        file: The exported ONNX file.
        folder: Folder of images, at any depth.
        images: Most images that calibrate; three times as many others measure. A smaller folder is halved.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: Fewer than 8 images in it can be read as images of the file's channels.
    """

    def __init__(self, file: str | Path, folder: str | Path, images: int = IMAGES):
        import onnx

        folder = Path(folder)
        if images < FEWEST // 2:
            raise ValueError(f"{FEWEST // 2} images or more must calibrate, {images} were asked for")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder of images to calibrate with")
        proto = onnx.load(file, load_external_data=False)
        self._facts = read_facts(proto)
        self._batched = len(proto.graph.input[0].type.tensor_type.shape.dim) == 4
        decoding = self._facts.get("decoding") or {}
        self._decoding = Decoding(**decoding | {"channels": self._facts["channels"]})
        files = find_images(folder)
        shuffled = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
        self.files, faults = [], []
        for path in shuffled:
            if fault := self._decoding.look(path, decode=True).fault:
                faults.append(f"{path}: {fault}")
            else:
                self.files.append(path)
            if len(self.files) == (1 + JUDGED) * images:
                break
        left_out = f"; {len(faults)} cannot be read, the first is {faults[0]}" if faults else ""
        if len(self.files) < FEWEST:
            raise ValueError(
                f"{folder} holds {len(self.files)} images to calibrate with, {FEWEST} are needed{left_out}")
        if faults:
            say(f"{folder}: {len(self.files)} images are used{left_out}.")
        self.calibrating = min(images, len(self.files) // 2)
        names = self._facts.get("class_names") or []
        parents = [path.relative_to(folder).parts[0] for path in self.files]
        known = self._facts["task"] == "classification" and not self._facts.get("multi_label")
        self.labels = [names.index(parent) for parent in parents] if known and set(parents) <= set(names) else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image = self._prepared(self.files[index])
        return image[None] if self._batched else image

    def _prepared(self, path: Path) -> np.ndarray:
        """One image as validation makes it; of a dense task in the size of the file."""
        said, rule = self._facts, self._facts["resize"]
        image = self._decoding.read(path) if said["channels"] == 3 else self._decoding.array(path)
        if "centre_crop" not in rule:
            height, width = said["image_size"]
            image = fitted(image, (width, height))
        elif not said.get("layout"):
            image = resize_and_crop(image, rule)
        return np.asarray(image) if said.get("layout") else normalised(image, said["mean"], said["std"])


class Part(Sequence[np.ndarray]):
    """Some of a calibration's images, with their labels."""

    def __init__(self, images: Sequence[np.ndarray], numbers: Sequence[int]):
        self.images, self.numbers = images, numbers
        labels = getattr(images, "labels", None)
        self.labels = [labels[i] for i in numbers] if labels else None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Part(self.images, self.numbers[index])
        return self.images[self.numbers[index]]


def parted(images: Sequence[np.ndarray]) -> tuple[Part, Part]:
    """The images that calibrate, and those that the error is measured on."""
    if len(images) < 2:
        raise ValueError(f"quantisation needs two images or more: to calibrate and to measure; there are {len(images)}")
    count = getattr(images, "calibrating", (len(images) + 1) // 2)
    return Part(images, range(count)), Part(images, range(count, len(images)))


def known(network: Any, images: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Images with those answers of the float network whose error is measured."""
    return ((image, network.compared(network.float(image))) for image in images)


def error_of(
        network: Any, answer: Callable[[np.ndarray], Any],
        images: Iterable[tuple[np.ndarray, list[np.ndarray]]]) -> float:
    """The root mean square of the answers' difference, as a share of that of the answers; the worst of several.

    Args:
        network: What is quantised.
        answer: What answers to an image when it is.
        images: With their float answers, as :func:`known` gives them.
    """
    return root(sum(squares(network.compared(answer(image)), expected) for image, expected in images))


def squares(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> np.ndarray:
    """Of each answer the sums of the squares of the difference and of itself, both less their mean over the classes."""
    sums = []
    for pair in zip(actual, expected, strict=True):
        one, other = (x - x.mean(axis=1, keepdims=True) for x in pair)
        sums.append([float(np.square(x, dtype=np.float64).sum()) for x in (one - other, other)])
    return np.array(sums)


def root(sums: Any) -> float:
    """The largest of the errors whose squares were summed."""
    shares = np.sqrt(sums[:, 0] / np.maximum(sums[:, 1], 1e-12))
    return float(np.nan_to_num(shares, nan=np.inf).max())
