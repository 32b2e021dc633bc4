"""Files of ``visionattn export`` in ONNX Runtime, by what their metadata say; nothing of PyTorch."""
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .engine import Engine, Meaning
from .pictures import Patch, patch_of
from .pixels import Decoding
from .prepare import (
    FILTERS,
    AnyImage,
    fitted,
    image_size,
    linear,
    neighbours,
    normalised,
    resize_and_crop,
    scaled_size,
    shares,
)
from .tiles import logits_in_tiles

__all__ = ["PROVIDERS", "OnnxEngine"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "openvino": "OpenVINOExecutionProvider"}
_PACKAGES = {"cuda": "onnxruntime-gpu", "openvino": "onnxruntime-openvino"}
_TASKS = ("classification", "detection", "segmentation", "features")
_LONGEST = 16384  # side of a file's images
_MOST = 1 << 28  # numbers in an image that a file takes
_MULTIPLE = 32  # of free sides
_BYTES = 1 << 31  # of a segmenter's logits that are kept at once
_BATCH = 8  # of classification
_FILL = (124 / 255, 116 / 255, 104 / 255)  # beside an image that has not a detector's shape: nothing, once normalised
_NUMBERS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


class OnnxEngine(Engine):
    """A file of ``visionattn export`` with all that it says of itself.

    Args:
        file: The file.
        provider: Where it runs: ``cpu``, ``cuda`` (``cuda:1`` of several) or ``openvino``.

    Raises:
        ValueError: It is no such file, is damaged, says what cannot be, or the provider is not there.
        ModuleNotFoundError: There is no onnxruntime.
    """

    def __init__(self, file: str | Path, provider: str = "cpu"):
        self.file = Path(file)
        self.session = _session(self.file, provider)
        said = _Said(self.file, self.session.get_modelmeta().custom_metadata_map)
        self.meaning = said.meaning()
        self.decoding = said.decoding()
        self.resize = said.resize(self.meaning.task)
        self.mean, self.std = said.numbers("mean"), said.numbers("std", positive=True)
        self.photos = said.get("layout") is not None
        self._multi_label = self.meaning.thresholds is not None
        self._look_at_values(said)
        if self.meaning.task != "features":
            self.no_features = (f"{self.file} gives the answers of {self.meaning.task} and no features: export a model "
                                "without a classifier (--num-classes 0)")
        if self.meaning.task in ("classification", "features") and self.batch != 1:
            self.batch_size = _BATCH

    def prepare(self, image: AnyImage) -> Any:
        """A classifier's images as its graph takes them; a segmenter's of validation's size; a detector's as it is."""
        task = self.meaning.task
        if task in ("classification", "features"):
            if self.photos:
                width, height = image_size(image)
                if max(width, height) * self.resize.get("shorter_side", 0) ** 2 > _MOST * min(width, height):
                    raise ValueError(f"it is {width} x {height} pixels, too long and thin to be resized in the file")
                return np.asarray(image)
            return normalised(resize_and_crop(image, self.resize), self.mean, self.std)
        if task == "segmentation":
            return fitted(image, scaled_size(image_size(image), self.resize))
        return image

    def answer(self, prepared: list[Any], sizes: list[tuple[int, int]], threshold: float | None) -> list[Any]:
        """What the file says; detectors look at one image after the other."""
        task = self.meaning.task
        if task == "features":
            raise ValueError(f"{self.file} gives features and has no classes: see embed")
        if task == "classification":
            return list(_probabilities(self._batches(prepared)[0], self._multi_label))
        if task == "detection":
            return [self._detect(image, threshold) for image in prepared]
        return [self._label(image, size) for image, size in zip(prepared, sizes, strict=True)]

    def logits(self, prepared: list[Any], size: tuple[int, int]) -> np.ndarray:
        """Logits of prepared images, brought to the ``size`` that they had."""
        seen = image_size(prepared[0])
        sides = self._window(seen)
        parts = [np.concatenate(list(logits_in_tiles(self._infer, image, sides, self._at_once())), axis=1)
                 for image in prepared]
        return np.stack([linear(one, size[1], size[0]) for one in parts])

    def embed(self, prepared: list[Any]) -> np.ndarray:
        """The last map, pooled, or what the model without a classifier gives."""
        last = self._batches(prepared)[-1].astype(np.float32)
        return last.mean(axis=tuple(range(2, last.ndim))) if last.ndim > 2 else last

    def seen_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of an image within the file's, of the same shape as the image."""
        height, width = self.size
        scale = min(1.0, width / size[0], height / size[1])
        return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))

    def _look_at_values(self, said: "_Said") -> None:
        """Compares the file's inputs and outputs with what it says."""
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        single = self.meaning.task == "detection"
        wanted = ["image"] if single else ["images"]
        shape = list(inputs[0].shape) if inputs else []
        if [one.name for one in inputs] != wanted or len(shape) != 4 - single or inputs[0].type not in _NUMBERS:
            raise said.wrong(f"a file of {self.meaning.task} takes {wanted[0]}, this one "
                             f"{', '.join(one.name for one in inputs) or 'nothing'}")
        self.dtype = _NUMBERS[inputs[0].type]
        if self.photos != (self.dtype == np.uint8):
            raise said.wrong(f"its layout does not fit its values ({inputs[0].type})")
        self.batch = None if single or not isinstance(shape[0], int) else shape[0]
        if self.batch not in (None, 1):
            raise said.wrong(f"it takes {self.batch} images at once; a free number or 1 was expected")
        *sides, channels = shape[-3:] if self.photos else [*shape[-2:], shape[-3]]
        if channels != self.decoding.channels:
            raise said.wrong(f"its images have {channels} channels, and its metadata say {self.decoding.channels}")
        self.free = any(not isinstance(side, int) for side in sides)
        self.size = said.size() if self.free else (sides[0], sides[1])
        if self.size != said.size():
            raise said.wrong(f"its images are {' x '.join(map(str, self.size))}, and its metadata say "
                             f"{' x '.join(map(str, said.size()))}")
        crop = self.resize.get("centre_crop")
        if crop and not self.free and crop != list(self.size):
            raise said.wrong(f"its images are {self.size[0]} x {self.size[1]}, and validation's {crop[0]} x {crop[1]}")
        self.outputs = [one.name for one in outputs]
        known = {"detection": ["boxes", "labels", "scores"], "features": []}.get(self.meaning.task, ["logits"])
        if self.outputs[:len(known)] != known or not self.outputs:
            raise said.wrong(f"it gives {', '.join(self.outputs)}, not {', '.join(known)}")
        classes = outputs[0].shape[1] if known == ["logits"] and len(outputs[0].shape) > 1 else None
        if isinstance(classes, int) and not self.meaning.names:
            self.meaning = self.meaning._replace(names=[str(label) for label in range(classes)])
        if known == ["logits"] and classes != len(self.meaning.names):
            raise said.wrong(f"it has {classes} logits and {len(self.meaning.names)} class_names")
        limits = self.meaning.thresholds
        if limits is not None and not limits:
            self.meaning = self.meaning._replace(thresholds=[0.5] * len(self.meaning.names))
        elif limits is not None and len(limits) != len(self.meaning.names):
            raise said.wrong(f"it has {len(limits)} thresholds and {len(self.meaning.names)} class_names")

    def _run(self, x: np.ndarray) -> list[np.ndarray]:
        name = "image" if self.meaning.task == "detection" else "images"
        try:
            return self.session.run(None, {name: np.ascontiguousarray(x)})
        except Exception as error:  # of classes of its own
            raise ValueError(f"{self.file}: onnxruntime stopped at an image of {' x '.join(map(str, x.shape))}: "
                             f"{_first_line(error)}") from error

    def _batches(self, prepared: list[np.ndarray]) -> list[np.ndarray]:
        """The answers to images of a classifier: at once, where they have one size."""
        if len({one.shape for one in prepared}) > 1 or self.batch == 1:
            each = [self._run(one[None].astype(self.dtype, copy=False)) for one in prepared]
            return [np.concatenate(parts) for parts in zip(*each, strict=True)]
        return self._run(np.stack(prepared).astype(self.dtype, copy=False))

    def _at_once(self) -> int:
        return self.batch or 1

    # A segmenter

    def _window(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of what the graph looks at of an image."""
        if self.free:
            width, height = (min(-(-side // _MULTIPLE) * _MULTIPLE, 4096) for side in size)
            return width, height
        return self.size[1], self.size[0]

    def _infer(self, images: list[AnyImage]) -> np.ndarray:
        """Logits of images that are no larger than the graph's: what is missing is made of the edge."""
        width, height = image_size(images[0])
        wide, high = self._window((width, height))
        planes = np.stack([np.asarray(one).transpose(2, 0, 1) if not isinstance(one, np.ndarray) else one
                           for one in images])
        planes = np.pad(planes, ((0, 0), (0, 0), (0, high - height), (0, wide - width)), mode="edge")
        x = planes.transpose(0, 2, 3, 1) if self.photos else np.stack([shares(one) for one in planes])
        found = self._run(x.astype(self.dtype, copy=False))[0]
        return found[..., :height, :width].astype(np.float32, copy=False)

    def _label(self, image: AnyImage, size: tuple[int, int]) -> np.ndarray:
        seen = image_size(image)
        bands = logits_in_tiles(self._infer, image, self._window(seen), self._at_once())
        if seen == size:
            return np.concatenate([band.argmax(axis=0).astype(np.uint8) for band in bands])
        if 4 * len(self.meaning.names) * seen[0] * seen[1] > _BYTES:
            raise ValueError(f"it is looked at as an image of {seen[0]} x {seen[1]} pixels, and the logits of its "
                             f"{len(self.meaning.names)} classes take too much memory: cut it into parts")
        whole = np.concatenate(list(bands), axis=1)
        wide = linear(whole.transpose(0, 2, 1), size[0], whole.shape[1]).transpose(0, 2, 1)
        return _argmax_of_rows(wide, size[1])

    # A detector

    def _detect(self, image: AnyImage, threshold: float | None) -> dict[str, Any]:
        x, (across, down) = self._within(image)
        boxes, labels, scores, *masks = self._run(x)
        width, height = image_size(image)
        boxes = boxes.astype(np.float32) / np.array([across, down] * 2, np.float32)
        boxes = boxes.clip(0, np.array([width, height] * 2, np.float32))
        kept = scores >= (threshold or 0)
        kept &= (labels >= 1) & (labels <= len(self.meaning.names))
        found: dict[str, Any] = {
            "boxes": boxes[kept], "labels": labels[kept].astype(np.int64), "scores": scores[kept].astype(np.float32)}
        if masks:
            found["masks"] = [_patch(mask, box, (across, down), (width, height))
                              for mask, box in zip(masks[0][kept][:, 0], found["boxes"], strict=True)]
        return found

    def _within(self, image: AnyImage) -> tuple[np.ndarray, tuple[float, float]]:
        """An image in the file's size, as the detector itself resizes images, and how much wider and higher it is."""
        width, height = image_size(image)
        high, wide = self.size
        x = shares(image)
        across, down = 1.0, 1.0
        if (width, height) != (wide, high):
            scale = min(wide / width, high / height)
            columns, rows = max(1, int(width * scale + 1e-6)), max(1, int(height * scale + 1e-6))
            x = linear(x, rows, columns)
            across, down = columns / width, rows / height
            fill = np.array(_FILL if len(x) == 3 else [0.5] * len(x), np.float32)[:, None, None]
            canvas = np.broadcast_to(fill, (len(x), high, wide)).copy()
            canvas[:, :rows, :columns] = x
            x = canvas
        if self.photos:
            return (x.transpose(1, 2, 0) * 255).round().astype(np.uint8), (across, down)
        return x.astype(self.dtype, copy=False), (across, down)


class _Said:
    """A file's metadata, each value looked at before it is believed."""

    def __init__(self, file: Path, metadata: dict[str, str]):
        self.file, self.metadata = file, metadata
        if not metadata.get("producer", "").startswith("visionattn") or metadata.get("task") not in _TASKS:
            raise ValueError(f"{file} does not say how its images are made and what its answers mean: it is not of "
                             "visionattn export, or another program left its metadata out")

    def wrong(self, why: str) -> ValueError:
        return ValueError(f"{self.file} cannot be used: {why}")

    def get(self, key: str, kind: Callable[[Any], bool] = lambda value: True) -> Any:
        """A value, or None; of text that is no JSON the text."""
        text = self.metadata.get(key)
        if text is None:
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        if value is not None and not kind(value):
            raise self.wrong(f"its metadata say {key} is {text[:60]}")
        return value

    def size(self) -> tuple[int, int]:
        """Height and width."""
        found = self.get("image_size", _two_sides)
        if found is None:
            raise self.wrong("its metadata lack image_size")
        return found[0], found[1]

    def channels(self) -> int:
        found = self.get("channels", lambda value: _whole(value, 1, 1024))
        height, width = self.size()
        if found is None or height * width * found > _MOST:
            raise self.wrong("its metadata lack channels" if found is None else
                             f"its metadata say that its images are {height} x {width} of {found} channels")
        return found

    def numbers(self, key: str, positive: bool = False) -> np.ndarray:
        """A number for each channel."""
        def good(value: Any) -> bool:
            return _all(value, lambda one: _number(one) and (one > 0 or not positive)) and len(value) == self.channels()

        found = self.get(key, good)
        if found is None:
            raise self.wrong(f"its metadata lack {key}")
        return np.array(found, np.float32)

    def decoding(self) -> Decoding:
        told = self.get("decoding", lambda value: isinstance(value, dict)) or {}
        channels = self.channels()
        options = {key: value for key, value in told.items() if key in ("value_range", "max_pixels")}
        try:
            if isinstance(options.get("value_range"), list):
                options["value_range"] = tuple(float(value) for value in options["value_range"])
            most = options.get("max_pixels", 1)
            if not _whole(most, 1, Decoding().max_pixels):
                options["max_pixels"] = Decoding().max_pixels  # larger ones are the user's to allow
            return Decoding(**options, channels=channels).check()
        except (TypeError, ValueError) as error:
            raise self.wrong(f"its metadata say that files are decoded by {told}: {error}") from None

    def resize(self, task: str) -> dict[str, Any]:
        def good(value: Any) -> bool:
            sides = [value.get(key) for key in ("shorter_side", "longest_side")] if isinstance(value, dict) else [0]
            return (all(side is None or _whole(side, 1, _LONGEST) for side in sides)
                    and value.get("interpolation", "bilinear") in list(FILTERS)
                    and all(key not in value or _two_sides(value[key]) for key in ("sides", "centre_crop")))

        found = self.get("resize", good) or {}
        if task in ("classification", "features"):
            if "sides" not in found and found.get("shorter_side") is None:
                raise self.wrong("its metadata do not say how images are resized")
            return {"interpolation": "bicubic", "centre_crop": list(self.size())} | found
        return found

    def meaning(self) -> Meaning:
        task = self.metadata["task"]
        names = self.get("class_names", lambda value: _all(value, lambda one: isinstance(one, str)))
        meaning = Meaning(task, names or [])
        if task == "classification":
            limits = self.get("thresholds", lambda value: _all(value, _number)) or []
            return meaning._replace(thresholds=limits if self.get("multi_label") is True else None)
        if task == "detection":
            if not names:
                raise self.wrong("its metadata lack class_names")
            ids = self.get("category_ids", lambda value: _all(value, lambda one: _whole(one, 0, 1 << 53))
                           and len(value) == len(names))
            return meaning._replace(
                category_ids=ids or range(1, 1 + len(names)),
                picture_score=0.5 if (score := self.get("picture_score", _number)) is None else score,
                least_score=self.get("score_threshold", _number) or 0.0)
        return meaning


def _session(file: Path, provider: str) -> Any:
    """The file's graph, ready to run."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise ModuleNotFoundError("ONNX files need the package onnxruntime: pip install onnxruntime") from None
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    kind, _, number = provider.partition(":")
    if kind not in PROVIDERS or (number and not number.isdigit()):
        raise ValueError(f"there is no provider {provider!r}; choose {', '.join(PROVIDERS)}")
    name = PROVIDERS[kind]
    if name not in onnxruntime.get_available_providers():
        raise ValueError(f"this onnxruntime has no provider {kind}: pip install {_PACKAGES[kind]} in its place")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    chosen: list[Any] = [(name, {"device_id": number}) if number else name]
    if kind != "cpu":
        chosen.append(PROVIDERS["cpu"])
    try:
        # Its fallback would print lines of its own and open the file a second time.
        session = onnxruntime.InferenceSession(str(file), options, providers=chosen, enable_fallback=0)
    except Exception as error:  # of classes of its own
        raise ValueError(f"{file} cannot be opened as an ONNX file: {_first_line(error)}") from error
    if name not in session.get_providers():
        raise ValueError(f"onnxruntime cannot use {kind} here: its libraries or the device are missing")
    return session


def _probabilities(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    logits = logits.astype(np.float32)
    if multi_label:
        return np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * logits))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _argmax_of_rows(logits: np.ndarray, height: int) -> np.ndarray:
    """The largest of the classes ``[classes, h, W]`` at ``height`` rows, some of which are made at a time."""
    labels = np.empty((height, logits.shape[2]), np.uint8)
    step = max(1, (1 << 24) // (logits.shape[0] * logits.shape[2]))
    for start in range(0, height, step):
        low, high, share = neighbours(np.arange(start, min(start + step, height)), height, logits.shape[1])
        part = logits[:, low] * (1 - share[:, None]) + logits[:, high] * share[:, None]
        labels[start:start + step] = part.argmax(axis=0)
    return labels


def _patch(mask: np.ndarray, box: np.ndarray, scale: tuple[float, float], size: tuple[int, int]) -> Patch:
    """The part of a mask (probabilities, of a file's size) that lies about a box, in pixels of the image."""
    left, top = (max(0, int(edge) - 1) for edge in box[:2])
    right, bottom = (min(side, math.ceil(edge) + 1) for edge, side in zip(box[2:], size, strict=True))
    if right <= left or bottom <= top:
        return Patch(np.zeros((0, 0), bool), 0, 0)
    if scale == (1.0, 1.0):
        part = mask[top:bottom, left:right]
    else:
        (columns, beside), (rows, below) = (
            _places(first, last, factor, length) for first, last, factor, length in (
                (left, right, scale[0], mask.shape[1]), (top, bottom, scale[1], mask.shape[0])))
        across = [mask[:, place] for place in columns]
        part = across[0] * (1 - beside) + across[1] * beside
        part = part[rows[0]] * (1 - below[:, None]) + part[rows[1]] * below[:, None]
    patch = patch_of(part > 0.5)
    return patch._replace(left=left + patch.left, top=top + patch.top) if patch.mask.size else patch


def _places(first: int, last: int, factor: float, length: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Pixels of a mask on both sides of those of an image, and the share of the second."""
    place = ((np.arange(first, last) + 0.5) * factor - 0.5).clip(0, length - 1)
    low = place.astype(np.int64)
    return [low, np.minimum(low + 1, length - 1)], (place - low).astype(np.float32)


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _all(value: Any, kind: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(kind, value))


def _two_sides(value: Any) -> bool:
    return _all(value, lambda side: _whole(side, 1, _LONGEST)) and len(value) == 2


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .* failed:)?", "", text)
    return text if len(text) <= 200 else f"{text[:200]} ..."
