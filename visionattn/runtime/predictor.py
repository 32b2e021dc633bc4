"""Images of any source through a model, in batches: what the Python API and the commands have in common."""
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .engine import Engine
from .onnx_engine import OnnxEngine
from .pixels import picture_of
from .prepare import AnyImage, image_size
from .results import Result
from .sources import Item, items_of, opened, shown
from .tiles import detect_in_tiles, label_in_tiles
from .writers import Results, open_results

__all__ = ["BasePredictor", "Runner"]

TILES = 8  # that are looked at at once
READERS = 4  # threads


class _Ready(NamedTuple):
    item: Item
    image: AnyImage | None
    prepared: Any
    fault: str = ""


class BasePredictor:
    """A model that looks at images of any source. May be used by several threads at once.

    Args:
        engine: The model.
        tile: Side of the tiles that a detector or segmenter looks at, in pixels, each as it would look at an image;
            None for the image at once.
        threshold: Least score of a detection; of multi-label classes the probability from which on an image has one;
            None for the model's own.
        batch_size: Images, or tiles, that are looked at at once; None for 8 of a classifier or tiles, else 1.
        max_pixels: Largest image that is decoded; None for what training allowed.

    Raises:
        ValueError: An option does not fit the model.
    """

    def __init__(
            self, engine: Engine, tile: int | None = None, threshold: float | None = None,
            batch_size: int | None = None, max_pixels: int | None = None):
        meaning = engine.meaning
        if tile is not None and tile < 32:
            raise ValueError(f"a tile must have 32 pixels or more, got {tile}")
        if tile is not None and meaning.task not in ("detection", "segmentation"):
            raise ValueError("a classifier sees an image at once: leave tile out")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")
        if threshold is not None and meaning.least_score is not None and threshold < meaning.least_score:
            raise ValueError(f"the file gives detections from a score of {meaning.least_score:g} on: a threshold of "
                             f"{threshold:g} needs one that was exported so")
        self.engine, self.tile, self.threshold = engine, tile, threshold
        self.batch_size = batch_size or (TILES if tile else engine.batch_size)
        self.decoding = engine.decoding
        if max_pixels is not None:
            self.decoding = self.decoding._replace(max_pixels=max_pixels).check()

    @property
    def task(self) -> str:
        """``classification``, ``detection`` or ``segmentation``; ``features`` of a model without a classifier."""
        return self.engine.meaning.task

    @property
    def names(self) -> list[str]:
        """Names of the classes, in the order of the labels."""
        return list(self.engine.meaning.names)

    def __call__(self, source: Any) -> Any:
        """What the model says of images.

        Args:
            source: An image: a file, a Pillow image, an array ``[height, width, 3]`` of uint8 (``[height, width]`` is
                grey), a tensor ``[3, height, width]`` of uint8 or in [0, 1]. Or many: a folder, a pattern, a ``.txt``
                list of files, a batch of arrays or tensors, a list of images. Or a generator, a video file or
                ``"webcam:0"`` (also 0).

        Returns:
            A result of one image, a list of many, a generator of a generator or a video; see :meth:`stream`.

        Raises:
            ValueError: An image cannot be used; the message names it and says why.
            FileNotFoundError: There is no such file.
        """
        kind, items = items_of(source)
        results = self._strictly(items)
        if kind == "one":
            result, = results
            return result
        return list(results) if kind == "many" else results

    def stream(self, source: Any) -> Iterator[Result]:
        """The same one by one, whatever the source; no more of them are in memory than the model looks at at once."""
        return self._strictly(items_of(source)[1])

    def embed(self, source: Any) -> np.ndarray:
        """Pooled features of images.

        Args:
            source: As of a call.

        Returns:
            ``[D]`` float32 of one image, else ``[N, D]``.

        Raises:
            ValueError: The model has no features, or an image cannot be used.
        """
        kind, items = items_of(source)
        found = []
        for item, features, fault in self.embedded(items):
            if features is None:
                raise ValueError(_named(item, fault))
            found.append(features)
        return found[0] if kind == "one" else np.stack(found)

    def warmup(self) -> "BasePredictor":
        """Looks at a grey image, so that the next one need not wait for what is made at the first; returns itself."""
        if self.task == "features":
            self.embed(self._grey())
        else:
            self(self._grey())
        return self

    def predicted(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result | None, str]]:
        """Each image with its result, or with the reason why it has none."""
        def look(batch: list[_Ready]) -> list[Result]:
            sizes = [image_size(one.image) for one in batch if one.image is not None]
            answers = self._answers([one.prepared for one in batch], sizes)
            results = []
            for one, answer in zip(batch, answers, strict=True):
                assert one.image is not None
                image = one.image if isinstance(one.image, Image.Image) else picture_of(one.image)
                results.append(self.engine.meaning.result(image, one.item.file, answer, self.threshold))
            return results

        if self.task == "features":
            raise ValueError("the model has no classes, only features: see embed")
        yield from self._seen(items, look, 1 if self.tile else self.batch_size, tiles=self.tile is not None)

    def embedded(self, items: Iterable[Item]) -> Iterator[tuple[Item, np.ndarray | None, str]]:
        """Each image with its features, or with the reason why it has none."""
        if self.engine.no_features:
            raise ValueError(self.engine.no_features)
        yield from self._seen(
            items, lambda batch: list(self.engine.embed([one.prepared for one in batch])), self.batch_size)

    def open_results(self, folder: Path, crops: bool = False) -> Results:
        """Begins the files that a command writes.

        Raises:
            ValueError: An option does not fit the model.
        """
        return open_results(self.engine.meaning, folder, self.threshold, crops)

    def _strictly(self, items: Iterable[Item]) -> Iterator[Result]:
        for item, result, fault in self.predicted(items):
            if result is None:
                raise ValueError(_named(item, fault))
            yield result

    def _answers(self, prepared: list[Any], sizes: list[tuple[int, int]]) -> list[Any]:
        engine, tile = self.engine, self.tile
        if tile is None:
            return engine.answer(prepared, sizes, self.threshold)
        if self.task == "detection":
            def detect(images: list[AnyImage]) -> list[dict[str, Any]]:
                return engine.answer(
                    [engine.prepare(one) for one in images], [image_size(one) for one in images], self.threshold)

            return [detect_in_tiles(detect, image, tile, self.batch_size, engine.seen_size(size))
                    for image, size in zip(prepared, sizes, strict=True)]
        return [label_in_tiles(
            lambda tiles: engine.logits([engine.prepare(one) for one in tiles], image_size(tiles[0])), image, tile,
            self.batch_size) for image in prepared]

    def _read(self, item: Item, tiles: bool) -> _Ready:
        try:
            image = opened(item, self.decoding)
            return _Ready(item, image, image if tiles else self.engine.prepare(image))
        except ValueError as error:
            return _Ready(item, None, None, str(error))

    def _seen(
            self, items: Iterable[Item], look: Callable[[list[_Ready]], list[Any]], at_once: int,
            tiles: bool = False) -> Iterator[tuple[Item, Any, str]]:
        """What ``look`` makes of the images, as many at once as are wanted."""
        batch: list[_Ready] = []
        for ready in _ahead(lambda item: self._read(item, tiles), items, at_once):
            batch.append(ready)
            if len(batch) == at_once:
                yield from self._looked(batch, look)
                batch = []
        if batch:
            yield from self._looked(batch, look)

    def _looked(
            self, batch: list[_Ready], look: Callable[[list[_Ready]], list[Any]]) -> Iterator[tuple[Item, Any, str]]:
        good = [one for one in batch if not one.fault]
        try:
            found = iter(look(good) if good else ())
        except (ValueError, RuntimeError) as error:  # such as of a model that an image is too small or too thin for
            if "memory" in str(error).lower():
                raise
            if len(batch) > 1:
                for one in batch:
                    yield from self._looked([one], look)
            else:
                yield batch[0].item, None, " ".join(str(error).split())
            return
        for one in batch:
            yield (one.item, None, one.fault) if one.fault else (one.item, next(found), "")

    def _grey(self) -> Any:
        side = self.tile or 224
        if self.decoding.channels == 3:
            return Image.new("RGB", (side, side), (128, 128, 128))
        return np.full((side, side, self.decoding.channels), 0.5, np.float32)


class Runner(BasePredictor):
    """An exported file with all that it says of itself, in ONNX Runtime; needs no PyTorch.

    Args:
        file: A file of ``visionattn export``.
        provider: Where it runs: ``cpu``, ``cuda`` (``cuda:1`` of several) or ``openvino``.
        tile: Side of tiles of large images, of detectors and segmenters; None for none.
        threshold: Least score of a detection, or of the classes that a multi-label image has; None for the file's own.
        batch_size: Images, or tiles, at once; None for 8 of a classifier or tiles, else 1.
        max_pixels: Largest image that is decoded; None for what the file says.

    Raises:
        ValueError: It is no such file, is damaged, or says what cannot be; the provider is not there; an option does
            not fit.
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: There is no onnxruntime.
    """

    def __init__(
            self, file: str | Path, provider: str = "cpu", tile: int | None = None, threshold: float | None = None,
            batch_size: int | None = None, max_pixels: int | None = None):
        super().__init__(OnnxEngine(file, provider), tile, threshold, batch_size, max_pixels)


def _named(item: Item, fault: str) -> str:
    return f"{shown(item.file) or 'the image'} cannot be used: {fault}"


def _ahead(read: Callable[[Item], Any], items: Iterable[Item], count: int) -> Iterator[Any]:
    """What ``read`` makes of each item, in their order; threads are ``count`` items ahead."""
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1, count)) as pool:
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
