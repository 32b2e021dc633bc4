"""Images in folders, one folder a class: the layout of ImageNet and of most people's own data."""
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from sklearn.model_selection import train_test_split
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .loading import LoadedData
from .reading import EXTENSIONS, decoding_fault, find_faults, find_images, header_fault, read_image

__all__ = ["ImageFolderData"]

Sample = tuple[Path, int]


class ImageFolderData(LoadedData):
    """Classification images in ``root/{train,val,test}/<class>/**/*.jpg`` (or ``validation`` for ``val``).

    The classes are the folders of ``train``, in sorted order. Where there is no ``val``, ``val_fraction`` of every
    class of ``train`` is taken for it; ``root/<class>/*.jpg``, without ``train``, is read as training images. Where
    there is no ``test``, testing uses the validation images. Both are said when they happen. Augmentation and
    evaluation crops are timm's (``timm.data.create_transform``).

    Args:
        root: The folder with the images.
        image_size: Height and width of the images, in pixels.
        batch_size: Images per batch and device.
        num_workers: Loader processes.
        seed: Order of the training images and random numbers of the loader's processes.
        val_fraction: Share of every class that validates where there is no ``val`` folder. The choice is fixed: it
            does not depend on ``seed``.
        on_bad_image: What to do with a file that cannot be read as an image. ``error``: stop and name it (every
            header is checked before training; a file that is cut off is found when it is loaded). ``skip``: decode
            every file once before training and leave out, with a count and the names, those that fail.
        verify: False leaves out the check before training, which reads every file's header.
        predict_root: Folder whose images, at any depth, ``predict`` runs over; the test images if None.
        scale: Smallest and largest share of a training image that its random crop covers.
        hflip: Probability of a mirrored training image.
        color_jitter: Strength of random brightness, contrast and saturation where there is no ``auto_augment``.
        auto_augment: timm's policy, such as ``rand-m9-mstd0.5-inc1``, or None.
        random_erasing: Probability that a training image has a random rectangle replaced by noise.
        interpolation: Of evaluation images: ``bilinear`` or ``bicubic``.
        train_interpolation: Of training images: ``bilinear``, ``bicubic`` or ``random``.
        crop_pct: Share of the resized evaluation image that its centre crop keeps.
        mean: Of the channels in [0, 1], for normalisation.
        std: Of the channels in [0, 1], for normalisation.

    Raises:
        FileNotFoundError: ``root`` or ``predict_root`` does not exist.
        ValueError: No class folders, a class without images, a validation or test class that training does not have,
            a file that is not an image.
    """

    def __init__(
            self,
            root: str,
            image_size: int = 224,
            batch_size: int = 64,
            num_workers: int = 4,
            seed: int = 0,
            val_fraction: float = 0.2,
            on_bad_image: Literal["error", "skip"] = "error",
            verify: bool = True,
            predict_root: str | None = None,
            scale: tuple[float, float] = (0.08, 1.0),
            hflip: float = 0.5,
            color_jitter: float = 0.4,
            auto_augment: str | None = "rand-m9-mstd0.5-inc1",
            random_erasing: float = 0.25,
            interpolation: str = "bicubic",
            train_interpolation: str = "random",
            crop_pct: float = 0.875,
            mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
            std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__(batch_size, num_workers, seed)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be error or skip, got {on_bad_image!r}")
        self.val_fraction, self.on_bad_image, self.verify = val_fraction, on_bad_image, verify
        self.predict_root = predict_root
        common: dict[str, Any] = dict(input_size=image_size, mean=mean, std=std)
        self.train_transform = create_transform(
            **common, is_training=True, scale=scale, hflip=hflip, color_jitter=color_jitter,
            auto_augment=auto_augment, re_prob=random_erasing, re_mode="pixel", interpolation=train_interpolation)
        self.eval_transform = create_transform(**common, crop_pct=crop_pct, interpolation=interpolation)

        self.root = Path(root)
        self.folders = _find_splits(self.root)
        self.class_names = _class_folders(self.folders["train"])
        self.num_classes = len(self.class_names)
        for split in ("val", "test"):
            if split in self.folders:
                self._check_classes(self.folders[split])
        self.samples: dict[str, list[Sample]] = {}

    def setup(self, stage: str) -> None:
        """Lists (and checks) the images that ``stage`` needs: ``samples[split]`` is ``[(file, label), ...]``."""
        predicted = () if self.predict_root else ("test",)
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": predicted}[stage]
        for split in needed:
            if split not in self.samples:
                self._list_split(split)

    def train_dataloader(self) -> DataLoader:
        """Augmented training images, shuffled."""
        return self._train_loader(_Images(self.samples["train"], self.train_transform))

    def val_dataloader(self) -> DataLoader:
        """Validation images."""
        return self._eval_loader(_Images(self.samples["val"], self.eval_transform))

    def test_dataloader(self) -> DataLoader:
        """Test images."""
        return self._eval_loader(_Images(self.samples["test"], self.eval_transform))

    def predict_dataloader(self) -> DataLoader:
        """Images of ``predict_root`` (or the test images) with their path in place of the label."""
        if self.predict_root is None:
            files = [file for file, _ in self.samples["test"]]
        else:
            if not Path(self.predict_root).is_dir():
                raise FileNotFoundError(f"predict_root {self.predict_root} is not a folder")
            files = self._check_files(find_images(Path(self.predict_root)))
            if not files:
                raise ValueError(f"predict_root {self.predict_root} holds no images ({EXTENSIONS})")
        return self._eval_loader(_Images([(file, str(file)) for file in files], self.eval_transform))

    def _list_split(self, split: str) -> None:
        if split == "test" and "test" not in self.folders:
            rank_zero_info(f"There is no test folder in {self.root}: the validation images are used.")
            self.setup("validate")
            self.samples["test"] = self.samples["val"]
        elif split != "test" and "val" not in self.folders:
            self.samples["train"], self.samples["val"] = self._hold_out(self._list(self.folders["train"]))
        else:
            self.samples[split] = self._list(self.folders[split])

    def _list(self, folder: Path) -> list[Sample]:
        """The images of one split, in a fixed order; every class must have some."""
        files = {name: find_images(folder / name) for name in _class_folders(folder)}
        for name, found in files.items():
            if not found:
                raise ValueError(f"class folder {folder / name} holds no images ({EXTENSIONS})")
        good = set(self._check_files([file for found in files.values() for file in found]))
        for name, found in files.items():
            if not good.intersection(found):
                raise ValueError(f"class folder {folder / name} holds no readable image")
        return [(file, self.class_names.index(name)) for name, found in files.items() for file in found if file in good]

    def _check_files(self, files: list[Path]) -> list[Path]:
        """``files`` without the unreadable ones; an error if there are such and they are not to be skipped."""
        skip = self.on_bad_image == "skip"
        if not (self.verify or skip):
            return files
        faults = find_faults(decoding_fault if skip else header_fault, files)
        bad = [(file, fault) for file, fault in zip(files, faults, strict=True) if fault]
        if bad and not skip:
            more = f" (and {len(bad) - 1} more such files)" if len(bad) > 1 else ""
            raise ValueError(f"{bad[0][0]} cannot be read as an image: {bad[0][1]}{more}; "
                             "replace or remove it, or set on_bad_image to skip")
        if bad:
            names = "".join(f"\n  {file}: {fault}" for file, fault in bad)
            rank_zero_info(f"Left out {len(bad)} of {len(files)} files that cannot be read as images:{names}")
        return [file for file, fault in zip(files, faults, strict=True) if not fault]

    def _hold_out(self, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        labels = [label for _, label in samples]
        images = Counter(labels)
        for label, name in enumerate(self.class_names):
            if images[label] < 2:
                raise ValueError(f"class folder {self.folders['train'] / name} holds a single image: "
                                 "too few to hold some out for validation; add images or make a val folder")
        count = min(max(round(self.val_fraction * len(samples)), self.num_classes), len(samples) - self.num_classes)
        train, val = train_test_split(samples, test_size=count, random_state=0, stratify=labels)
        rank_zero_info(f"There is no val folder beside the images of {self.folders['train']}: "
                       f"{len(train)} of them train and {len(val)} validate.")
        return train, val

    def _check_classes(self, folder: Path) -> None:
        names = _class_folders(folder)
        train = self.folders["train"]
        for name in names:
            if name not in self.class_names:
                raise ValueError(f"{folder / name} is a class that {train} does not have; it has "
                                 f"{_shorten(self.class_names)}")
        for name in self.class_names:
            if name not in names:
                rank_zero_info(f"{folder} has no images of the class {name!r}.")


class _Images(Dataset):
    """Reads images; a sample's second entry (label or path) is handed through."""

    def __init__(self, samples: list[tuple[Path, Any]], transform: Callable[[Image.Image], Tensor]):
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        file, label = self.samples[index]
        image = read_image(file, "replace or remove it, or set on_bad_image to skip")
        return self.transform(image), label


def _find_splits(root: Path) -> dict[str, Path]:
    """The folders of the splits that ``root`` has; ``root`` itself trains if there is no ``train``."""
    if not root.is_dir():
        raise FileNotFoundError(f"image folder {root} does not exist; data.init_args.root must be a folder with "
                                "train/<class>/*.jpg and val/<class>/*.jpg, or <class>/*.jpg")
    if not (root / "train").is_dir():
        for name in ("val", "validation", "test"):
            if (root / name).is_dir():
                raise ValueError(f"{root} has a folder {name} but no folder train")
        return {"train": root}
    folders = {"train": root / "train"}
    for split, names in {"val": ("val", "validation"), "test": ("test",)}.items():
        for name in names:
            if (root / name).is_dir():
                folders[split] = root / name
    return folders


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} holds no class folders: expected {folder}/<class>/*.jpg")
    return names


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
