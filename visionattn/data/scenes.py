"""Scenes composed of scikit-learn's scanned digits: boxes, instance masks and label maps without a download."""
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate
from torch.utils.data import DataLoader, Dataset

from .digits import MEAN, STD, DigitsData
from .loading import LoadedData, collate_detection

__all__ = ["DigitScenesData"]

INK = 0.4  # value of a scan, in [0, 1], above which a pixel belongs to the digit
VISIBLE = 0.7  # least share of a digit's pixels that the digits above it leave visible
TRIES = 8  # places tried for a digit before it is left out
CONTRAST = 0.25  # least difference of grey values between a digit and the canvas' mean colour
TURN = 15  # largest angle of a digit, in degrees


class DigitScenesData(LoadedData):
    """Handwritten digits in random size, place, angle and colour, one over the other, on textured canvases.

    Training, validation and test scenes are composed of the training, validation and test digits of
    :class:`DigitsData`: no scan is in two of them. A scene is made when it is loaded, and is a function of its number
    alone for validation and test (results can be compared), and of ``seed``, epoch and number for training, which
    sees new scenes in every epoch.

    A digit's mask is its visible part and its box is tight around that. Every digit in a picture is annotated and
    seven tenths of it or more are visible: a place where it would hide more of another is not taken, and after eight
    such places the digit is left out of the picture.

    Detection numbers the digits 1 to 10 (``category_ids`` likewise); segmentation has 11 classes: the background and
    the digits. Batches are those that ``visionattn.data`` describes; names are ``scene_<number>``.

    Args:
        task: ``detection`` or ``segmentation``.
        image_size: Height and width of the scenes, in pixels.
        batch_size: Scenes per batch and device.
        num_workers: Loader processes.
        seed: Of the training scenes and their order.
        masks: Detection targets have instance masks too.
        digits: Least and largest number of digits that are placed.
        digit_size: Least and largest height of a digit's scan, in pixels.
        train_scenes: Scenes of an epoch.
        val_scenes: Validation scenes.
        test_scenes: Test scenes, also those of ``predict``.
    """

    def __init__(
            self,
            task: Literal["detection", "segmentation"] = "detection",
            image_size: int = 128,
            batch_size: int = 16,
            num_workers: int = 0,
            seed: int = 0,
            masks: bool = False,
            digits: tuple[int, int] = (3, 6),
            digit_size: tuple[int, int] = (24, 56),
            train_scenes: int = 1000,
            val_scenes: int = 200,
            test_scenes: int = 400,
    ):
        super().__init__(batch_size, num_workers, seed)
        if task not in ("detection", "segmentation"):
            raise ValueError(f"task must be detection or segmentation, got {task!r}")
        if not 1 <= digits[0] <= digits[1]:
            raise ValueError(f"digits must be the least and the largest number, 1 or more, got {tuple(digits)}")
        if not 8 <= digit_size[0] <= digit_size[1]:
            raise ValueError(f"digit_size must be the least and the largest size, 8 or more, got {tuple(digit_size)}")
        if _patch_size(digit_size[1]) > image_size:
            raise ValueError(f"digits of {digit_size[1]} pixels, turned, need an image_size of at least "
                             f"{_patch_size(digit_size[1])}, got {image_size}")
        if min(train_scenes, val_scenes, test_scenes) < 1:
            raise ValueError(f"train_scenes, val_scenes and test_scenes must be 1 or more, got {train_scenes}, "
                             f"{val_scenes} and {test_scenes}")
        self.task, self.image_size, self.masks = task, image_size, masks
        self.digits, self.digit_size = digits, digit_size
        self.scenes = {"train": train_scenes, "val": val_scenes, "test": test_scenes}
        self.image_settings = dict(short_side=None, max_size=None, image_size=image_size)
        self.class_names = [str(digit) for digit in range(10)]
        if task == "detection":
            self.category_ids = list(range(1, 11))
            self.collate = collate_detection
        else:
            self.class_names.insert(0, "background")
        self.num_classes = len(self.class_names)

    def setup(self, stage: str) -> None:
        """Loads the scans: ``scans[split]`` is their images ``[N, 8, 8]`` in [0, 1] and labels ``[N]``."""
        source = DigitsData(image_size=8, in_chans=1)
        source.setup(stage)
        images = source.images[:, 0] * STD + MEAN
        self.scans = {
            split: (images[indices], source.labels[indices].numpy())
            for split, indices in (("train", source.train), ("val", source.val), ("test", source.test))
        }

    def train_dataloader(self) -> DataLoader:
        """Training scenes, new ones in each epoch."""
        return self._train_loader(_Scenes(self, "train"), endless=True)

    def val_dataloader(self) -> DataLoader:
        """Validation scenes."""
        return self._eval_loader(_Scenes(self, "val"))

    def test_dataloader(self) -> DataLoader:
        """Test scenes."""
        return self._eval_loader(_Scenes(self, "test"))

    def predict_dataloader(self) -> DataLoader:
        """Test scenes with names in place of annotations."""
        return self._eval_loader(_Scenes(self, "test", annotated=False))


class _Scene(NamedTuple):
    image: Tensor  # float32 [3, H, W] in [0, 1]
    digits: Tensor  # int64 [N], 0 to 9
    area: Tensor  # float32 [N], visible pixels
    owner: Tensor  # uint8 [H, W]: 0 is the canvas, n the digit n - 1


class _Scenes(Dataset):
    """Scenes of one split; of training scenes there is no last one."""

    def __init__(self, data: DigitScenesData, split: str, annotated: bool = True):
        self.scans, self.labels = data.scans[split]
        self.task, self.image_size, self.masks = data.task, data.image_size, data.masks
        self.digits, self.digit_size, self.count = data.digits, data.digit_size, data.scenes[split]
        self.split, self.annotated = split, annotated
        self.entropy = {"train": (0, data.seed), "val": (1,), "test": (2,)}[split]

    def __len__(self) -> int:
        return self.count

    def file_name(self, index: int) -> str:
        return f"scene_{index:05d}"

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        scene = self._compose(np.random.default_rng([*self.entropy, index]))
        name, size = self.file_name(index), torch.tensor([self.image_size, self.image_size])
        if self.task == "segmentation":
            if not self.annotated:
                return scene.image, name, size
            classes = torch.cat([torch.zeros(1, dtype=torch.int64), scene.digits + 1])
            return scene.image, classes[scene.owner.long()]
        target: dict[str, Any] = {"image_id": index, "orig_size": size}
        if self.split != "train":
            target["file_name"] = name
        if self.annotated:
            masks = scene.owner == torch.arange(1, len(scene.digits) + 1, dtype=torch.uint8)[:, None, None]
            target |= {
                "boxes": _boxes(masks), "labels": scene.digits + 1, "area": scene.area,
                "iscrowd": torch.zeros(len(masks), dtype=torch.int64),
            }
            if self.masks:
                target["masks"] = masks.to(torch.uint8)
        return scene.image, target

    def _compose(self, rng: np.random.Generator) -> _Scene:
        size = self.image_size
        colour = rng.uniform(0.1, 0.9, 3).astype(np.float32)
        image = _canvas(rng, size, colour)
        owner = np.zeros((size, size), np.uint8)
        digits: list[int] = []
        full, left = [size * size], [0]  # pixels of each digit, and those that are visible; the canvas may be hidden
        for _ in range(rng.integers(self.digits[0], self.digits[1], endpoint=True)):
            scan = rng.integers(len(self.scans))
            ink = _turned(self.scans[scan], int(rng.integers(*self.digit_size, endpoint=True)),
                          rng.uniform(-TURN, TURN))
            stroke = ink > INK
            for _ in range(TRIES):
                y, x = rng.integers(0, size - len(ink), 2, endpoint=True)
                place = (slice(y, y + len(ink)), slice(x, x + len(ink)))
                hidden = np.bincount(owner[place][stroke], minlength=len(full))
                remaining = [pixels - lost for pixels, lost in zip(left, hidden.tolist(), strict=True)]
                if all(pixels >= VISIBLE * whole for pixels, whole in zip(remaining[1:], full[1:], strict=True)):
                    break
            else:
                continue
            digits.append(int(self.labels[scan]))
            owner[place][stroke] = len(digits)
            full.append(int(stroke.sum()))
            left = [*remaining, full[-1]]
            # The edge is soft over the range of ink that lies around the mask's threshold.
            alpha = np.clip((ink - INK) / 0.2 + 0.5, 0, 1)
            patch = image[:, place[0], place[1]]
            patch += alpha * (_contrasting(rng, colour)[:, None, None] - patch)
        image += 0.12 * rng.random((1, size, size), dtype=np.float32) - 0.06
        area = torch.tensor(left[1:], dtype=torch.float32)
        return _Scene(torch.from_numpy(image.clip(0, 1)), torch.tensor(digits), area, torch.from_numpy(owner))


def _canvas(rng: np.random.Generator, size: int, colour: np.ndarray) -> np.ndarray:
    """A cloudy texture ``[3, size, size]`` around ``colour``: noise of two scales."""
    image = colour[:, None, None]
    for cells, strength in ((rng.integers(2, 6), 0.15), (rng.integers(8, 25), 0.08)):
        noise = torch.from_numpy(rng.uniform(-strength, strength, (1, 3, cells, cells)).astype(np.float32))
        image = image + interpolate(noise, size=(size, size), mode="bilinear")[0].numpy()
    return image


def _contrasting(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """A random colour whose mean differs from that of ``colour`` by ``CONTRAST`` or more."""
    while True:
        drawn = rng.random(3, dtype=np.float32)
        if abs(float((drawn - colour).sum())) >= 3 * CONTRAST:
            return drawn


def _turned(scan: Tensor, size: int, angle: float) -> np.ndarray:
    """A scan ``[8, 8]`` enlarged to ``size`` pixels and turned, in a patch that its corners do not leave."""
    patch = _patch_size(size)
    radians, zoom = np.deg2rad(angle), patch / size
    cos, sin = zoom * np.cos(radians), zoom * np.sin(radians)
    grid = affine_grid(torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]], dtype=torch.float32), [1, 1, patch, patch],
                       align_corners=False)
    return grid_sample(scan[None, None], grid, mode="bicubic", align_corners=False)[0, 0].numpy()


def _patch_size(size: int) -> int:
    """Side of the square around a scan of ``size`` pixels that is turned by up to ``TURN`` degrees."""
    turn = np.deg2rad(TURN)
    return int(np.ceil(size * (np.cos(turn) + np.sin(turn))))


def _boxes(masks: Tensor) -> Tensor:
    """Tight boxes ``[N, 4]`` of ``masks [N, H, W]``; the right and lower edges lie behind the last pixel."""
    def ends(lines: Tensor) -> tuple[Tensor, Tensor]:
        return lines.int().argmax(1), lines.shape[1] - lines.flip(1).int().argmax(1)

    (left, right), (top, bottom) = ends(masks.any(1)), ends(masks.any(2))
    return torch.stack([left, top, right, bottom], dim=1).float()
