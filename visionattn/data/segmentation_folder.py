"""Semantic segmentation: folders of images and label maps, in the layouts of ADE20K, Cityscapes, VOC and one's own."""
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import functional as F

from .dense_transforms import IGNORE, SegmentationTransform, resize_shorter, to_image
from .loading import LoadedData
from .reading import (
    EXTENSIONS,
    Faults,
    decoding_fault,
    find_faults,
    find_images,
    header_fault,
    read_image,
    result_names,
)

__all__ = ["SegmentationFolderData"]

LAYOUTS = ("plain", "ade20k", "cityscapes", "voc")
HINT = "replace it, or set verify to true and on_error to skip"  # for a file that fails in training

CITYSCAPES = {  # class: value in *_labelIds.png; the other values, up to 33, are ignored
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}
VOC = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]


class SegmentationFolderData(LoadedData):
    """Images and masks that hold a class at every pixel.

    ``layout`` says where they are below ``root`` and what the masks' values mean; 255 is always ignored:

    * ``plain``: ``images/{train,val,test}/**`` and ``masks/{train,val,test}/**.png`` with the same path but for the
      ending; values are classes from 0. Without ``images/train``, ``images`` and ``masks`` are the training data, and
      where there is no ``val``, ``val_fraction`` of it validates.
    * ``ade20k``: ``images/{training,validation}`` and ``annotations/{training,validation}``; 0 is ignored and 1 to
      150 are the classes. Their names come from ``objectInfo150.txt``, if it is there.
    * ``cityscapes``: ``leftImg8bit/{train,val}/<city>/*_leftImg8bit.png`` and
      ``gtFine/{train,val}/<city>/*_gtFine_labelIds.png``; of the label ids, 19 are classes and the others ignored.
    * ``voc``: ``JPEGImages/*.jpg`` and ``SegmentationClass/*.png``, listed in
      ``ImageSets/Segmentation/{train,val}.txt``; 21 classes.

    Where there are no test images, testing uses the validation images; this is said. Masks are PNG with a palette or
    in grey, of the size of their image. Training images are resized, cropped, mirrored and coloured at random to
    ``crop_size``. Evaluation resizes the image and leaves the labels, so that ``labels`` have the size of the file.

    Args:
        root: The folder.
        layout: ``plain``, ``ade20k``, ``cityscapes`` or ``voc``.
        class_names: Names of the classes; for ``plain``, if None, the values of the training masks are counted (all
            are read for this) and numbered.
        train_split: ``voc``: list of the training images, such as ``train`` or ``trainaug``.
        predict_root: Folder whose images, at any depth, ``predict`` runs over; the test images if None.
        crop_size: Height and width of training images, in pixels.
        short_side: Length of the shorter side of evaluation images, and of training images before the random resize;
            None leaves the files' sizes.
        max_size: Bound of the longer side.
        scale: Range of the random resize.
        cat_max_ratio: Largest share of one class in a crop, where one of ten crops keeps to it.
        hflip: Probability of a mirrored training image.
        color_jitter: Strength of random contrast and saturation (brightness a quarter, hue a tenth of it); 0 is off.
        batch_size: Training images per batch and device.
        eval_batch_size: The same for evaluation: more than 1 needs images of one size.
        num_workers: Loader processes.
        seed: Order of the training images and random numbers of the loader's processes.
        val_fraction: ``plain``: share of the training images that validates where there is no ``val``. The choice is
            fixed: it does not depend on ``seed``.
        on_error: What to do with an image or mask that cannot be used. ``raise``: stop and name it. ``skip``: leave
            the pair out and say how many there were of each kind; every image is decoded once for this.
        verify: False leaves out the check before training, which reads every image's header and every mask.

    Raises:
        FileNotFoundError: A folder or list does not exist.
        ValueError: No images, an image without mask or a mask without image, a mask of another size than its image, a
            label without a class, a file that is not an image; the message names the file.
    """

    def __init__(
            self,
            root: str,
            layout: Literal["plain", "ade20k", "cityscapes", "voc"] = "plain",
            class_names: list[str] | None = None,
            train_split: str = "train",
            predict_root: str | None = None,
            crop_size: int = 512,
            short_side: int | None = 512,
            max_size: int | None = 2048,
            scale: tuple[float, float] = (0.5, 2.0),
            cat_max_ratio: float = 0.75,
            hflip: float = 0.5,
            color_jitter: float = 0.5,
            batch_size: int = 4,
            eval_batch_size: int = 1,
            num_workers: int = 4,
            seed: int = 0,
            val_fraction: float = 0.2,
            on_error: Literal["raise", "skip"] = "raise",
            verify: bool = True,
    ):
        super().__init__(batch_size, num_workers, seed)
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        if eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be 1 or more, got {eval_batch_size}")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be the least and the largest factor, above 0, got {tuple(scale)}")
        self.root, self.layout, self.train_split = Path(root), layout, train_split
        if not self.root.is_dir():
            raise FileNotFoundError(f"folder {root} does not exist; data.init_args.root must be a folder with the "
                                    f"{layout} layout")
        self.predict_root = None if predict_root is None else Path(predict_root)
        self.eval_batch_size, self.collate = eval_batch_size, _collate
        self.short_side, self.max_size = short_side, max_size
        self.val_fraction, self.on_error, self.verify = val_fraction, on_error, verify
        self.transform = SegmentationTransform(
            crop_size, short_side, max_size, scale, cat_max_ratio, hflip, color_jitter)
        Faults(root, on_error)  # complains about on_error
        self.class_names = class_names or self._find_class_names()
        self.num_classes = len(self.class_names)
        self.table = self._label_table()
        self.pairs: dict[str, list[_Pair]] = {}

    def setup(self, stage: str) -> None:
        """Lists and checks what ``stage`` needs: ``pairs[split]`` are image and mask files."""
        predicted = () if self.predict_root else ("test",)
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": predicted}[stage]:
            if split not in self.pairs:
                self._list_split(split)

    def train_dataloader(self) -> DataLoader:
        """Random crops of the training images, shuffled."""
        return self._train_loader(_Images(self.pairs["train"], self, self.transform))

    def val_dataloader(self) -> DataLoader:
        """Validation images."""
        return self._eval_loader(_Images(self.pairs["val"], self))

    def test_dataloader(self) -> DataLoader:
        """Test images."""
        return self._eval_loader(_Images(self.pairs["test"], self))

    def predict_dataloader(self) -> DataLoader:
        """Images of ``predict_root`` (or the test images) with name and size in place of labels."""
        if self.predict_root is None:
            return self._eval_loader(_Images(self.pairs["test"], self, annotated=False))
        if not self.predict_root.is_dir():
            raise FileNotFoundError(f"predict_root {self.predict_root} is not a folder")
        files = find_images(self.predict_root)
        if not files:
            raise ValueError(f"predict_root {self.predict_root} holds no images ({EXTENSIONS})")
        faults = Faults(self.predict_root, self.on_error)
        files = self._check_images(files, faults)
        faults.report()
        names = result_names(files, self.predict_root)
        pairs = [_Pair(name, file, None) for name, file in zip(names, files, strict=True)]
        return self._eval_loader(_Images(pairs, self, annotated=False))

    def _find_class_names(self) -> list[str]:
        if self.layout == "voc":
            return list(VOC)
        if self.layout == "cityscapes":
            return list(CITYSCAPES)
        if self.layout == "ade20k":
            return _ade20k_names(self.root / "objectInfo150.txt")
        faults = Faults(self.root, "skip")  # setup says what is wrong with them
        largest = max(find_faults(_largest_label, self._find_pairs("train", faults)), default=-1)
        if largest < 0:
            raise ValueError(f"{self.root} holds no mask to count classes in; give class_names")
        if largest == 0:
            raise ValueError(f"the training masks of {self.root} have the class 0 alone; classes are the values 0, 1, "
                             f"2, ..., and {IGNORE} is ignored")
        rank_zero_info(f"No class_names were given: the training masks have values up to {largest}, "
                       f"so there are {largest + 1} classes.")
        return [f"class_{number}" for number in range(largest + 1)]

    def _label_table(self) -> np.ndarray:
        """Label of each of a mask's 256 possible values; -1 where there is none."""
        table = np.full(256, -1, dtype=np.int64)
        table[IGNORE] = IGNORE
        if self.layout == "cityscapes":
            table[:34] = IGNORE
            table[list(CITYSCAPES.values())] = range(len(CITYSCAPES))
            count = len(CITYSCAPES)
        else:
            count = {"ade20k": 150, "voc": len(VOC)}.get(self.layout, self.num_classes)
            first = int(self.layout == "ade20k")
            table[:first] = IGNORE
            if count > IGNORE:
                raise ValueError(f"a mask can have {IGNORE} classes at most, got {count} class names")
            table[first:first + count] = range(count)
        if count != self.num_classes:
            raise ValueError(f"{self.num_classes} class names were given; the layout {self.layout} has {count} classes")
        return table

    def _list_split(self, split: str) -> None:
        faults = Faults(self.root, self.on_error)
        splits = self._splits()
        if split == "test" and "test" not in splits:
            rank_zero_info(f"{self.root} has no test images with labels: the validation images are used.")
            self.setup("validate")
            self.pairs["test"] = self.pairs["val"]
            return
        held_out = split != "test" and "val" not in splits
        pairs = self._check_pairs(self._find_pairs("train" if held_out else split, faults), faults)
        faults.report()
        if not pairs:
            raise ValueError(f"{self.root} holds no {split} images that can be used (layout {self.layout})")
        if not held_out:
            self.pairs[split] = pairs
            return
        if len(pairs) < 2:
            raise ValueError(f"{self.root} has no val images and a single training image: too few to hold some out")
        count = min(max(round(self.val_fraction * len(pairs)), 1), len(pairs) - 1)
        self.pairs["train"], self.pairs["val"] = train_test_split(pairs, test_size=count, random_state=0)
        rank_zero_info(f"{self.root} has no val images: {len(pairs) - count} of its images train and {count} "
                       "validate.")

    def _splits(self) -> list[str]:
        """The splits that there are; plain images without folders for them all train."""
        if self.layout != "plain":
            return ["train", "val"]
        found = [name for name in ("train", "val", "test") if (self.root / "images" / name).is_dir()]
        if found and "train" not in found:
            raise ValueError(f"{self.root / 'images'} has a folder {found[0]} but no folder train")
        return found or ["train"]

    def _find_pairs(self, split: str, faults: Faults) -> list["_Pair"]:
        """Images and masks of a split, matched by name; what has no partner goes to ``faults``."""
        if self.layout == "voc":
            return self._listed_pairs(self.train_split if split == "train" else split, faults)
        if self.layout == "plain":
            part = split if (self.root / "images" / "train").is_dir() else "."
            folders, endings = (self.root / "images" / part, self.root / "masks" / part), ("", "")
        elif self.layout == "ade20k":
            part = {"train": "training", "val": "validation"}[split]
            folders, endings = (self.root / "images" / part, self.root / "annotations" / part), ("", "")
        else:
            folders = (self.root / "leftImg8bit" / split, self.root / "gtFine" / split)
            endings = ("_leftImg8bit", "_gtFine_labelIds")
        images, masks = (_by_stem(folder, ending, faults) for folder, ending in zip(folders, endings, strict=True))
        for stem in sorted(images.keys() ^ masks.keys()):
            if stem in images:
                faults.add(str(images[stem]), "the image has no mask", f"expected below {folders[1]}")
            else:
                faults.add(str(masks[stem]), "the mask has no image", f"expected below {folders[0]}")
        return [_Pair(stem, images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys())]

    def _listed_pairs(self, name: str, faults: Faults) -> list["_Pair"]:
        listing = self.root / "ImageSets" / "Segmentation" / f"{name}.txt"
        if not listing.is_file():
            raise FileNotFoundError(f"{listing} does not exist (layout voc)")
        pairs = []
        for stem in listing.read_text().split():
            image, mask = self.root / "JPEGImages" / f"{stem}.jpg", self.root / "SegmentationClass" / f"{stem}.png"
            missing = [file for file in (image, mask) if not file.is_file()]
            if missing:
                faults.add(str(missing[0]), "a listed file does not exist", f"{listing.name} lists {stem}")
            else:
                pairs.append(_Pair(stem, image, mask))
        return pairs

    def _check_images(self, files: list[Path], faults: Faults) -> list[Path]:
        if not (self.verify or faults.skip):
            return files
        found = find_faults(decoding_fault if faults.skip else header_fault, files)
        for file, fault in zip(files, found, strict=True):
            if fault:
                faults.add(str(file), "the file cannot be read as an image", fault)
        return [file for file, fault in zip(files, found, strict=True) if not fault]

    def _check_pairs(self, pairs: list["_Pair"], faults: Faults) -> list["_Pair"]:
        if not (self.verify or faults.skip):
            return pairs
        good = set(self._check_images([pair.image for pair in pairs], faults))
        pairs = [pair for pair in pairs if pair.image in good]
        found = find_faults(self._mask_fault, pairs)
        for pair, fault in zip(pairs, found, strict=True):
            if fault:
                faults.add(str(pair.mask), fault.kind, fault.detail)
        return [pair for pair, fault in zip(pairs, found, strict=True) if not fault]

    def _mask_fault(self, pair: "_Pair") -> "_UnusableMask | None":
        with Image.open(pair.image) as image:
            size = image.size
        try:
            _read_labels(pair.mask, size, self.table)
        except _UnusableMask as fault:
            return fault
        return None


class _Pair(NamedTuple):
    name: str
    image: Path
    mask: Any  # Path; None of an image without labels


def _largest_label(pair: _Pair) -> int:
    try:
        values = _read_mask(pair.mask)
    except _UnusableMask:
        return -1
    return max((value for value in np.unique(values).tolist() if value != IGNORE), default=-1)


class _Images(Dataset):
    """Images with labels (transformed together if they train), or with name and size."""

    def __init__(
            self, pairs: list[_Pair], data: SegmentationFolderData, transform: SegmentationTransform | None = None,
            annotated: bool = True):
        self.pairs, self.table, self.transform, self.annotated = pairs, data.table, transform, annotated
        self.short_side, self.max_size = data.short_side, data.max_size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        pair = self.pairs[index]
        photo = read_image(pair.image, HINT)
        image = F.pil_to_tensor(photo)
        if not self.annotated:
            size = torch.tensor([photo.height, photo.width])
            return to_image(resize_shorter(image, self.short_side, self.max_size)), pair.name, size
        try:
            labels = torch.from_numpy(_read_labels(pair.mask, photo.size, self.table))
        except _UnusableMask as fault:
            raise ValueError(f"{pair.mask}: {fault.kind} ({fault.detail}); {HINT}") from fault
        if self.transform is None:
            image = resize_shorter(image, self.short_side, self.max_size)
        else:
            image, labels = self.transform(image, labels)
        return to_image(image), labels.long()


class _UnusableMask(Exception):
    """What is wrong with a mask, in general and in particular."""

    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


def _read_mask(file: Path) -> np.ndarray:
    """The values ``[H, W]`` of a mask: indices of its palette, or its grey values."""
    try:
        with Image.open(file) as opened:
            values = np.asarray(opened)
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise _UnusableMask("the mask cannot be read", " ".join(str(error).split())) from error
    if values.ndim != 2:
        raise _UnusableMask("the mask has colours where classes are expected",
                            f"{values.shape[2]} channels; masks are PNG with a palette or in grey")
    return values.astype(np.uint8) if values.dtype == bool else values


def _read_labels(file: Path, size: tuple[int, int], table: np.ndarray) -> np.ndarray:
    """The labels ``[H, W]`` uint8 of a mask that must have ``size`` (width, height)."""
    values = _read_mask(file)
    height, width = values.shape
    if (width, height) != size:
        raise _UnusableMask("the mask has another size than its image",
                            f"{width} x {height} pixels, the image {size[0]} x {size[1]}")
    present = np.unique(values)
    wrong = [value for value in present.tolist() if not 0 <= value < len(table) or table[value] < 0]
    if wrong:
        known = np.flatnonzero((table >= 0) & (table != IGNORE))
        raise _UnusableMask("the mask has a label without a class",
                            f"{wrong[0]}; labels are {known.min()} to {known.max()}, and {IGNORE} is ignored")
    return table.astype(np.uint8)[values]


def _by_stem(folder: Path, ending: str, faults: Faults) -> dict[str, Path]:
    """Images below ``folder`` by their path without extension and ``ending``, which they must have."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist")
    files: dict[str, Path] = {}
    for file in find_images(folder):
        stem = file.relative_to(folder).with_suffix("").as_posix()
        if not stem.endswith(ending):
            continue  # Cityscapes has other pictures beside the labels
        stem = stem.removesuffix(ending)
        if stem in files:
            faults.add(str(file), "two files have the same name but for the extension", f"the other is {files[stem]}")
        else:
            files[stem] = file
    return files


def _ade20k_names(file: Path) -> list[str]:
    """The first name of each of the 150 classes, or their numbers if the data set's table is not there."""
    if not file.is_file():
        return [f"class_{number}" for number in range(1, 151)]
    names = [line.split("\t")[-1].split(",")[0].split(";")[0].strip() for line in file.read_text().splitlines()[1:]]
    names = [name for name in names if name]
    if len(names) != 150:
        raise ValueError(f"{file} names {len(names)} classes where 150 are expected")
    return names


def _collate(samples: list[tuple[Any, ...]]) -> Any:
    """PyTorch's batch, with one clear line for images that differ in size."""
    for parts in zip(*samples, strict=True):
        if isinstance(parts[0], Tensor) and len({part.shape for part in parts}) > 1:
            raise ValueError("images of different sizes cannot be in one batch: set the data's eval_batch_size to 1")
    return default_collate(samples)
