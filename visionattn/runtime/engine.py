"""What a predictor needs of a model, whatever runs it: PyTorch or ONNX Runtime."""
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .pixels import Decoding
from .prepare import AnyImage
from .results import Classification, Detections, Result, Segmentation

__all__ = ["Engine", "Meaning"]


class Meaning(NamedTuple):
    """What a model's answers mean.

    Attributes:
        task: ``classification``, ``detection``, ``segmentation`` or ``features`` of a model without a classifier.
        names: Of the classes, in the order of the labels.
        thresholds: Of multi-label classes: probability of each from which on an image has it.
        category_ids: Of a detector: numbers of the classes in COCO files.
        picture_score: Of a detector: score from which on objects are drawn.
        least_score: Of a detector: least score that it gives; None where any can be asked for.
    """

    task: str
    names: Sequence[str] = ()
    thresholds: Sequence[float] | None = None
    category_ids: Sequence[int] = ()
    picture_score: float = 0.5
    least_score: float | None = None

    def result(self, image: Image.Image, file: str, found: Any, threshold: float | None) -> Result:
        """The result of what was found in an image: probabilities, detections by their names, or labels."""
        if self.task == "classification":
            limits = self.thresholds
            if limits is not None and threshold is not None:
                limits = [threshold] * len(limits)
            return Classification(image, self.names, file, found, limits)
        if self.task == "detection":
            drawn = self.picture_score if threshold is None else threshold
            return Detections(
                image, self.names, file, found["boxes"], found["labels"], found["scores"], found.get("masks"),
                self.category_ids, drawn)
        return Segmentation(image, self.names, file, found)


class Engine(ABC):
    """A model that runs somewhere. All methods may be called from several threads.

    Attributes:
        meaning: Of its answers.
        decoding: How files become its images.
        batch_size: Images that it looks at at once if nothing else is asked for.
        no_features: Why ``embed`` has nothing to give; nothing if it has.
    """

    meaning: Meaning
    decoding: Decoding
    batch_size: int = 1
    no_features: str = ""

    @abstractmethod
    def prepare(self, image: AnyImage) -> Any:
        """What is done to an image by itself before the model sees it."""

    @abstractmethod
    def answer(self, prepared: list[Any], sizes: list[tuple[int, int]], threshold: float | None) -> list[Any]:
        """What the model says of images that had these sizes (width, height) before they were prepared.

        Returns:
            For each image probabilities ``[classes]`` of a classifier; a dict of ``boxes [N, 4]``, ``labels [N]``,
            ``scores [N]`` and maybe a list of patches ``masks`` of a detector, in pixels of the image; labels ``[H,
            W]`` uint8 of a segmenter.
        """

    @abstractmethod
    def embed(self, prepared: list[Any]) -> np.ndarray:
        """Pooled features ``[N, D]`` float32."""

    def logits(self, prepared: list[Any], size: tuple[int, int]) -> np.ndarray:
        """Of a segmenter: logits ``[B, classes, H, W]`` of images of one ``size`` (width, height)."""
        raise NotImplementedError

    def seen_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Of a detector: width and height that it brings an image of ``size`` to, no larger than that."""
        raise NotImplementedError
