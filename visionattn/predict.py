"""``visionattn predict RUN IMAGE|FOLDER|PATTERN|LIST.txt|- ...``: what a trained model says of images.

RUN is the folder of a training run, of which the best checkpoint is taken, or a checkpoint of one. Nothing but it and
the images is needed. The older form, ``visionattn predict --config RUN/config.yaml``, goes on working.
"""
import argparse
import csv
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from .data.classification import evaluation_transform
from .data.dense_transforms import resize_shorter, to_image
from .runtime.inputs import Input, find_inputs
from .runtime.pictures import printable
from .runtime.pixels import Decoding, picture_of
from .runtime.say import say
from .tasks import ClassificationTask, DetectionTask, SegmentationTask
from .tasks.rebuild import load_task
from .tasks.run_folder import Run, find_run
from .tasks.summary import write_readme
from .tasks.tiles import detect_in_tiles, image_size, label_in_tiles

__all__ = ["Prediction", "Predictor", "main"]

BATCH_SIZE = 8  # of classification, and of tiles; other images differ in size
READERS = 4  # threads
OLDER = ("--config", "--model", "--data", "--trainer", "--ckpt_path", "--print_config")  # options of the older form


class Prediction(NamedTuple):
    """What was said of one image.

    Attributes:
        file: The image.
        image: The image in RGB as a viewer shows it; None where it cannot be read.
        found: Of a classifier probabilities ``[classes]``; of a detector ``boxes [N, 4]``, ``labels [N]`` from 1 on,
            ``scores [N]`` and of Mask R-CNN a list ``masks`` of patches; of a segmenter labels ``[H, W]`` uint8. On the
            CPU, and in pixels of the image.
        fault: Why it cannot be read, or nothing.
    """

    file: Path
    image: Image.Image | None
    found: Any
    fault: str = ""


class Predictor:
    """A trained model with all that it must know of images.

    Args:
        run: The folder of a training run, or its checkpoint.
        device: Where the model runs; None for the GPU if there is one.
        tile: Side of the tiles that a detector or segmenter looks at, in pixels, each as it would look at an image;
            None for the image at once.
        threshold: Least score of a detection; None for the detector's own.
        batch_size: Images, or tiles, that are looked at at once; None for 8 of a classifier or tiles, else 1.
        max_pixels: Largest image that is decoded; None for what training allowed.

    Raises:
        ValueError: The run cannot be rebuilt, or an option does not fit its task.
        FileNotFoundError: There is no such run or checkpoint.
    """

    def __init__(
            self, run: str | Path, device: str | None = None, tile: int | None = None, threshold: float | None = None,
            batch_size: int | None = None, max_pixels: int | None = None):
        self.run: Run = find_run(run)
        self.task, saved = load_task(self.run.checkpoint)
        self.settings = saved.get("_image_settings") or self.run.image_settings()
        if isinstance(self.task, DetectionTask):
            self.task.category_ids = saved.get("_category_ids")
        if isinstance(self.task, ClassificationTask):
            self.task.thresholds = saved.get("_thresholds") or self.task.thresholds
        if tile is not None and tile < 32:
            raise ValueError(f"a tile must have 32 pixels or more, got {tile}")
        if tile is not None and isinstance(self.task, ClassificationTask):
            raise ValueError("a classifier sees an image at once: leave tile out")
        self.tile, self.threshold = tile, threshold
        self.batch_size = batch_size or (BATCH_SIZE if tile or isinstance(self.task, ClassificationTask) else 1)
        self.decoding = Decoding(**self.settings.get("decoding") or {})
        if max_pixels is not None:
            self.decoding = self.decoding._replace(max_pixels=max_pixels)
        self.decoding.check()
        self._prepare = self._preparation()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.task.to(self.device)

    def __call__(self, files: Iterable[Path]) -> Iterator[Prediction]:
        """What the model says of each image, in their order; no more of them are in memory than it looks at at once."""
        at_once = 1 if self.tile else self.batch_size
        with torch.inference_mode():
            batch: list[tuple[Path, Any, Any]] = []
            for file, image, prepared in _ahead(self._read, files, at_once):
                batch.append((file, image, prepared))
                if len(batch) == at_once:
                    yield from self._predict(batch)
                    batch = []
            if batch:
                yield from self._predict(batch)

    def _preparation(self) -> Callable[[Any], Any]:
        """What is done to an image, beside those that the model sees in one batch, before it goes to the device."""
        settings = self.settings
        if isinstance(self.task, ClassificationTask):
            return evaluation_transform(
                settings["image_size"], settings["interpolation"], settings["crop_pct"], settings["mean"],
                settings["std"])
        if isinstance(self.task, SegmentationTask):
            return lambda image: to_image(resize_shorter(
                _tensor(image), settings["short_side"], settings["max_size"]))
        return lambda image: to_image(_tensor(image))

    def _read(self, file: Path) -> tuple[Path, Any, Any]:
        """The file, its image and that as the model takes it, or tiles are cut of; in place of the image why not."""
        try:
            values: Any = self.decoding.read(file) if self.decoding.channels == 3 else self.decoding.array(file)
        except ValueError as error:
            return file, str(error), None
        image = picture_of(values) if isinstance(values, np.ndarray) else values
        values = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        return file, image, values if self.tile else self._prepare(values)

    def _predict(self, batch: list[tuple[Path, Any, Any]]) -> Iterator[Prediction]:
        good = [(image, prepared) for _, image, prepared in batch if not isinstance(image, str)]
        try:
            found = iter(self._found([image.size for image, _ in good], [one for _, one in good]) if good else ())
        except (ValueError, RuntimeError) as error:  # such as of a model that an image is too small or too thin for
            if "memory" in str(error).lower():
                raise
            if len(batch) > 1:
                for one in batch:
                    yield from self._predict([one])
            else:
                yield Prediction(batch[0][0], None, None, " ".join(str(error).split()))
            return
        for file, image, _ in batch:
            if isinstance(image, str):
                yield Prediction(file, None, None, image)
            else:
                yield Prediction(file, image, next(found))

    def _found(self, sizes: list[tuple[int, int]], prepared: list[Any]) -> Iterable[Any]:
        """What is found in images of these sizes (width, height); with tiles they are not prepared yet."""
        task = self.task
        if isinstance(task, ClassificationTask):
            return task.probabilities(torch.stack(prepared).to(self.device)).float().cpu().numpy()
        if isinstance(task, DetectionTask):
            if self.tile is None:
                return [_arrays(one) for one in task.detect([one.to(self.device) for one in prepared], self.threshold)]
            return [_arrays(detect_in_tiles(self._detect, image, self.tile, self.batch_size, self._seen_size(size)))
                    for image, size in zip(prepared, sizes, strict=True)]
        if self.tile is None:
            return [self._infer([one], size)[0].argmax(dim=0).to("cpu", torch.uint8).numpy()
                    for one, size in zip(prepared, sizes, strict=True)]
        return [label_in_tiles(
            lambda tiles: self._infer([self._prepare(tile) for tile in tiles], image_size(tiles[0])), image, self.tile,
            self.batch_size).numpy() for image in prepared]

    def _detect(self, images: list[Image.Image | Tensor]) -> list[dict[str, Any]]:
        assert isinstance(self.task, DetectionTask)
        return self.task.detect([self._prepare(image).to(self.device) for image in images], self.threshold)

    def _infer(self, prepared: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits of images of one size (width, height)."""
        assert isinstance(self.task, SegmentationTask)
        return self.task.infer(torch.stack(prepared).to(self.device), (size[1], size[0]), testing=True)

    def _seen_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height that the detector itself would bring a larger image of ``size`` to."""
        transform = self.task.model.transform
        scale = min(1.0, transform.min_size[-1] / min(size), transform.max_size / max(size))
        return max(1, round(scale * size[0])), max(1, round(scale * size[1]))


def main(argv: list[str]) -> int:
    """Runs ``visionattn predict``.

    Returns:
        0, or 1 if images could not be read.
    """
    if any(argument == "-c" or argument.startswith(OLDER) for argument in argv):
        from .tasks.run import main as run_main

        run_main(["predict", *argv])
        return 0
    args = _parser().parse_intermixed_args(argv)
    predictor = Predictor(args.run, args.device, args.tile, args.threshold, args.batch_size, args.max_pixels)
    out = Path(args.out) if args.out else predictor.run.folder or Path("predictions")
    inputs = find_inputs(args.images, without=_results(out) + _results(predictor.run.folder or out))
    results = predictor.task.open_results(out, args.threshold, args.save_crops)
    left_out = out / "left_out_predict.csv"
    left_out.unlink(missing_ok=True)
    faults = []
    try:
        seen = zip(inputs, predictor(one.file for one in inputs), strict=True)
        for number, (one, prediction) in enumerate(tqdm(seen, total=len(inputs), unit="image", disable=None), start=1):
            if prediction.fault:
                faults.append((str(one.file), prediction.fault))
            else:
                _write(results, number, one, prediction)
        said = results.close()
    except BaseException:
        results.abandon()
        raise
    if (out / "config.yaml").is_file():
        write_readme(out)
    say(said + ".")
    if not faults:
        return 0
    with left_out.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([("what", "why"), *faults])
    first, why = faults[0]
    say(f"{len(faults)} of {len(inputs)} images cannot be used and were left out, the first is {printable(first)}: "
        f"{why}; {left_out} lists them.")
    return 1


def _arrays(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value.numpy() if isinstance(value, Tensor) else value for key, value in found.items()}


def _tensor(image: Image.Image | Tensor) -> Tensor:
    return image if isinstance(image, Tensor) else F.pil_to_tensor(image)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visionattn predict", description="Predicts on any images with a trained model. Needs the run, or its "
        "checkpoint, and the images only.", epilog="Exits with 1 if an image could not be used. The older form takes a "
        "configuration: visionattn predict --config RUN/config.yaml --data.init_args.predict_root FOLDER. "
        "docs/predict.md has more.")
    parser.add_argument(
        "run", metavar="RUN", help="folder of a training run (its best checkpoint is taken), or a .ckpt")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=(
        "image files, folders (images at any depth), patterns ('inbox/**/*.jpg'), lists (LIST.txt, a file a line), or "
        "- for a list from the standard input"))
    parser.add_argument("--out", metavar="FOLDER", help=(
        "where results go (default: the run folder; 'predictions' for a checkpoint without one)"))
    parser.add_argument("--threshold", type=float, metavar="SCORE", help=(
        "detection: least score of what is written; multi-label classification: of the classes that an image has"))
    parser.add_argument("--tile", type=int, metavar="SIDE", help=(
        "detection and segmentation: look at overlapping square tiles of this side, in pixels, and merge the results"))
    parser.add_argument("--save-crops", action="store_true", help="detection: cut each detection out, by class")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images, or tiles, at once (default: "
                        f"{BATCH_SIZE} of a classifier or tiles, else 1)")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="largest image that is decoded")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    return parser


def _results(folder: Path) -> list[Path]:
    """Where images are, in a run folder or that of a prediction, that are nobody's own."""
    charts = folder.glob("*.png") if (folder / "config.yaml").is_file() else ()
    return [*(folder / name for name in ("pictures", "predictions", "crops")), *charts]


def _write(results: Any, number: int, one: Input, prediction: Prediction) -> None:
    """Writes and draws what was found in one image, the ``number``-th."""
    image, found = prediction.image, prediction.found
    assert image is not None
    if isinstance(found, dict):
        results.write(results.records(number, one.name, found, (image.height, image.width)))
        results.draw(one.stem, image, found)
    elif found.ndim == 1:
        best = results.best(found)
        results.write(str(one.file), best)
        results.draw(one.stem, image, best)
    else:
        results.draw(one.stem, image, found)


def _ahead(read: Callable[[Path], Any], files: Iterable[Path], count: int) -> Iterator[Any]:
    """What ``read`` makes of each file, in their order; threads are ``count`` files ahead."""
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1, count)) as pool:
        waiting: deque[Future] = deque()
        for file in files:
            waiting.append(pool.submit(read, file))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
