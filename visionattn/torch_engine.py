"""Models in PyTorch as predictors use them: those of training runs, and timm's by their names."""
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import resolve_model_data_config
from torch import Tensor

from .data.dense_transforms import resize_shorter, to_image
from .dense import dense_backbone_of
from .export.facts import facts, resize_rule
from .runtime.engine import Engine, Meaning
from .runtime.pixels import Decoding
from .runtime.prepare import AnyImage, image_size, normalised, resize_and_crop, scaled_size
from .tasks import ClassificationTask, DetectionTask, SegmentationTask
from .tasks.rebuild import create_model, load_task
from .tasks.run_folder import find_run
from .weights import imagenet_names

__all__ = ["ModelEngine", "RunEngine"]

BATCH_SIZE = 8  # of classification; other images differ in size


class _TorchEngine(Engine):
    """What both have in common: a device, one call at a time, and half precision.

    Args:
        device: Where the model runs; None for the GPU if there is one.
        half: Compute in half precision: float16 on a GPU, else bfloat16, where PyTorch's autocast does.
    """

    def __init__(self, device: str | None, half: bool):
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise ValueError(f"there is no device {device!r}: {' '.join(str(error).split())}") from None
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"the device is {device}, and PyTorch finds no GPU here")
        self.half = half
        self._lock = threading.Lock()  # models keep what they look at, and a detector's threshold is set for a call

    @contextmanager
    def _running(self) -> Iterator[None]:
        dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        half = torch.autocast(self.device.type, dtype) if self.half else nullcontext()
        with self._lock, torch.inference_mode(), half:
            yield

    def _batch(self, prepared: list[Any]) -> Tensor:
        return torch.stack([torch.from_numpy(one) if isinstance(one, np.ndarray) else one
                            for one in prepared]).to(self.device)


class RunEngine(_TorchEngine):
    """A trained model with all that it must know of images.

    Args:
        run: The folder of a training run, or its checkpoint.
        device: Where the model runs; None for the GPU if there is one.
        half: Compute in half precision.

    Raises:
        ValueError: The run cannot be rebuilt.
        FileNotFoundError: There is no such run or checkpoint.
    """

    def __init__(self, run: str | Path, device: str | None = None, half: bool = False):
        super().__init__(device, half)
        found = find_run(run)
        self.task, saved = load_task(found.checkpoint)
        self.settings = saved.get("_image_settings") or found.image_settings()
        if isinstance(self.task, DetectionTask):
            self.task.category_ids = saved.get("_category_ids")
        if isinstance(self.task, ClassificationTask):
            self.task.thresholds = saved.get("_thresholds") or self.task.thresholds
            self.batch_size = BATCH_SIZE
        self.meaning = self.task.meaning
        self.decoding = Decoding(**self.settings.get("decoding") or {}).check()
        side = self.settings.get("image_size") or 0  # of a classifier
        self.resize = resize_rule(self.task.model, self.meaning.task, [side, side], self.settings, {})
        self.task.to(self.device)

    def prepare(self, image: AnyImage) -> Any:
        """As validation does: a classifier's ``[C, S, S]`` normalised, others in [0, 1] on the CPU."""
        settings = self.settings
        if isinstance(self.task, ClassificationTask):
            return normalised(resize_and_crop(image, self.resize), settings["mean"], settings["std"])
        if isinstance(self.task, SegmentationTask):
            scaled_size(image_size(image), self.resize)  # refuses what would become huge
            return to_image(resize_shorter(_tensor(image), settings["short_side"], settings["max_size"]))
        return to_image(_tensor(image))

    def answer(self, prepared: list[Any], sizes: list[tuple[int, int]], threshold: float | None) -> list[Any]:
        """What the model says."""
        task = self.task
        with self._running():
            if isinstance(task, ClassificationTask):
                return list(task.probabilities(self._batch(prepared).to(self.device)).float().cpu().numpy())
            if isinstance(task, DetectionTask):
                found = task.detect([one.to(self.device) for one in prepared], threshold)
                return [{key: _array(value) for key, value in one.items()} for one in found]
            return [self._infer([one], size)[0].argmax(dim=0).to("cpu", torch.uint8).numpy()
                    for one, size in zip(prepared, sizes, strict=True)]

    def logits(self, prepared: list[Any], size: tuple[int, int]) -> np.ndarray:
        """Of a segmenter: logits of images of one size."""
        with self._running():
            return self._infer(prepared, size).float().cpu().numpy()

    def seen_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height that the detector itself would bring a larger image to."""
        assert isinstance(self.task, DetectionTask)
        transform = self.task.model.transform
        scale = min(1.0, transform.min_size[-1] / min(size), transform.max_size / max(size))
        return max(1, round(scale * size[0])), max(1, round(scale * size[1]))

    def embed(self, prepared: list[Any]) -> np.ndarray:
        """A classifier's features before its last layer; of others the mean of the backbone's last map."""
        model: Any = self.task.model
        with self._running():
            if isinstance(self.task, ClassificationTask):
                return _pooled(model, self._batch(prepared))
            rows, backbone = [], dense_backbone_of(model)
            assert backbone is not None
            for one in prepared:
                maps = backbone(self.seen(one))
                rows.append(maps[-1].float().mean(dim=(2, 3)).cpu().numpy())
            return np.concatenate(rows)

    def seen(self, prepared: Any) -> Tensor:
        """A prepared image as the backbone is given it, ``[1, C, H, W]``: normalised, a detector's also resized."""
        model: Any = self.task.model
        if isinstance(self.task, SegmentationTask):
            return model.normalised(self._batch([prepared]))
        if isinstance(self.task, DetectionTask):
            return model.transform([prepared.to(self.device)])[0].tensors
        return self._batch([prepared])

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of the channels of :meth:`seen`, of images in [0, 1]."""
        model: Any = self.task.model
        if isinstance(self.task, SegmentationTask):
            return model.mean.flatten().tolist(), model.std.flatten().tolist()
        if isinstance(self.task, DetectionTask):
            return model.transform.image_mean, model.transform.image_std
        return self.settings["mean"], self.settings["std"]

    def _infer(self, prepared: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits of images of one size (width, height)."""
        assert isinstance(self.task, SegmentationTask)
        return self.task.infer(self._batch(prepared), (size[1], size[0]), testing=True)


class ModelEngine(_TorchEngine):
    """A classifier of timm's or ours by its name, with images as its configuration wants them.

    Args:
        name: As in ``timm.create_model``.
        checkpoint: Its weights, if they are not to be downloaded.
        pretrained: Download the published weights; False leaves them as they are drawn.
        device: Where the model runs; None for the GPU if there is one.
        half: Compute in half precision.

    Raises:
        ValueError: There is no such model, or the file is not of it.
    """

    batch_size = BATCH_SIZE

    def __init__(
            self, name: str, checkpoint: str | Path | None = None, pretrained: bool = True,
            device: str | None = None, half: bool = False):
        super().__init__(device, half)
        try:
            model: Any = create_model(name, checkpoint, pretrained=pretrained and checkpoint is None)
        except RuntimeError as error:  # timm's, for names
            raise ValueError(f"there is no model, run or file {name}: {' '.join(str(error).split())}") from None
        self.model = model.eval().to(self.device)
        shape = resolve_model_data_config(self.model)["input_size"]
        self.config = facts(self.model, shape)
        classes = getattr(self.model, "num_classes", 0)
        names = imagenet_names(self.model) or [str(label) for label in range(classes)]
        self.meaning = Meaning("classification" if classes else "features", names)
        self.decoding = Decoding(channels=shape[0])

    def prepare(self, image: AnyImage) -> Any:
        """As timm's evaluation does: ``[C, H, W]``, normalised."""
        return normalised(resize_and_crop(image, self.config["resize"]), *self.normalisation)

    def seen(self, prepared: Any) -> Tensor:
        """A prepared image as the model is given it, ``[1, C, H, W]``."""
        return self._batch([prepared])

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of the channels of :meth:`seen`, of images in [0, 1]."""
        return self.config["mean"], self.config["std"]

    def answer(self, prepared: list[Any], sizes: list[tuple[int, int]], threshold: float | None) -> list[Any]:
        """Probabilities."""
        with self._running():
            return list(self.model(self._batch(prepared)).float().softmax(dim=1).cpu().numpy())

    def embed(self, prepared: list[Any]) -> np.ndarray:
        """What comes before the classifier."""
        with self._running():
            return _pooled(self.model, self._batch(prepared))


def _pooled(model: Any, images: Tensor) -> np.ndarray:
    """timm's features of images before the classifier, ``[B, D]`` float32."""
    features = model.forward_head(model.forward_features(images), pre_logits=True).float()
    if features.ndim == 4:  # of a model that does not pool
        features = features.mean(dim=(1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else (2, 3))
    return (features.mean(dim=1) if features.ndim == 3 else features).cpu().numpy()


def _tensor(image: AnyImage) -> Tensor:
    """``[C, H, W]``: uint8 of Pillow's images."""
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _array(value: Any) -> Any:
    return value.float().numpy() if isinstance(value, Tensor) and value.is_floating_point() else (
        value.numpy() if isinstance(value, Tensor) else value)
