"""Semantic segmentation: folders of images and label maps, in the layouts of ADE20K, Cityscapes, VOC and one's own."""
import csv
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..runtime.folders import EXTENSIONS, find_images
from ..runtime.pixels import MAX_PIXELS, Decoding, orientation_of, turned
from ..runtime.say import say
from .dense_transforms import IGNORE, SegmentationTransform, resize_shorter, to_image
from .loading import LoadedData
from .mask_folders import Names, Pair, find_folders, match
from .masks import (
    CITYSCAPES,
    NO_CLASS,
    NO_CLASS_OF_COLOR,
    VOC,
    MaskTable,
    UnusableMask,
    blurred,
    color_table,
    count_codes,
    describe,
    known_colors,
    list_of,
    meant,
    probable_options,
    read_mask,
    values_table,
    with_gaps,
)
from .reading import Faults, check_images, find_faults, read_tensor, result_names, say_shared
from .report import DataReport, SplitReport

__all__ = ["SegmentationFolderData"]

LAYOUTS = ("plain", "ade20k", "cityscapes", "voc")
HINT = "replace it, or set verify to true and on_error to skip"  # for a file that fails in training
TURNED = range(5, 9)  # orientation tags that change width and height


class SegmentationFolderData(LoadedData):
    """Images and masks that hold a class at every pixel.

    ``layout`` says where they are below ``root`` and what the masks' values mean; 255 is always ignored:

    * ``plain``: ``images/{train,val,test}/**`` and ``masks/{train,val,test}/**.png`` with the same path but for the
      ending; values are classes from 0. Without ``images/train``, ``images`` and ``masks`` are the training data, and
      where there is no ``val``, ``val_fraction`` of it validates. Splits and folders in other usual spellings, splits
      that hold images and masks, both in one folder, and masks whose name has ``_mask``, ``_seg``, ``_label``, ... more
      than the image's are found.
    * ``ade20k``: ``images/{training,validation}`` and ``annotations/{training,validation}``; 0 is ignored and 1 to
      150 are the classes. Their names come from ``objectInfo150.txt``, if it is there.
    * ``cityscapes``: ``leftImg8bit/{train,val}/<city>/*_leftImg8bit.png`` and
      ``gtFine/{train,val}/<city>/*_gtFine_labelIds.png``; of the label ids, 19 are classes and the others ignored.
    * ``voc``: ``JPEGImages/*.jpg`` and ``SegmentationClass/*.png``, listed in
      ``ImageSets/Segmentation/{train,val}.txt``; 21 classes.

    Where there are no test images, testing uses the validation images; this is said. Masks are PNG with a palette or
    in grey (also grey in RGB), of the size of their image; ``mask_values`` and ``mask_colors`` say what other values
    and colours mean, and are needed for JPEG, which does not keep values. Files are decoded as
    ``visionattn.runtime.pixels`` says: photos upright, and their masks with them. Training images are resized, cropped,
    mirrored and coloured at random to ``crop_size``. Evaluation resizes the image and leaves the labels, so that
    ``labels`` have the size of the file.

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
        mask_values: What the masks' values mean, where they are not the classes' numbers: the value of each class, such
            as ``[0, 255]``, or classes by value, such as ``{0: 0, 255: 1}`` (values that are not named keep theirs; the
            class 255 is ignored). Of a JPEG the nearest is taken.
        mask_colors: What the masks' colours mean: ``cityscapes``, ``voc``, a YAML or CSV file of names and colours, or
            colours by class name, such as ``{ground: [0, 0, 0], road: '#804080'}``.
        mask_nearest: Take the nearest of ``mask_values`` or ``mask_colors``, not only of a JPEG.
        image_folder: ``plain``: the folder of the images below ``root``; None looks for it.
        mask_folder: The folder of the masks.
        image_name: ``plain``: names of images without ending, where ``*`` is what the mask's name has too.
        mask_name: The same for masks, such as ``*_mask``; None tries what is usual.
        orientation: What masks of photos with an orientation tag (EXIF) refer to, where the size does not tell:
            ``seen`` is the picture as viewers show it, ``stored`` the pixels as they lie in the file.
        value_range: Of images of more than 8 bits: ``type``, ``file`` or the two values that are black and white.
        max_pixels: Largest image that is decoded.
        min_batches: Least number of training batches of an epoch: where there are fewer, it goes through the images
            several times, each time changed at random anew.
        in_chans: Channels of the images: 3 as a viewer shows them, 1 in grey, or the bands of the files (4 of RGBA
            files; see ``visionattn.runtime.pixels``).

    Raises:
        FileNotFoundError: A folder or list does not exist.
        ValueError: No images, an image without mask or a mask without image, a mask of another size than its image, a
            label without a class, masks of one class alone, a file that is not an image; the message names the file, or
            the values that were found and the option for them.
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
            mask_values: list[int] | dict[int, int] | None = None,
            mask_colors: dict[str, list[int] | str] | str | None = None,
            mask_nearest: bool = False,
            image_folder: str | None = None,
            mask_folder: str | None = None,
            image_name: str = "*",
            mask_name: str | None = None,
            orientation: Literal["seen", "stored"] = "seen",
            value_range: Literal["type", "file"] | tuple[float, float] = "type",
            max_pixels: int = MAX_PIXELS,
            min_batches: int = 1,
            in_chans: int = 3,
    ):
        super().__init__(batch_size, num_workers, seed, min_batches)
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
        if color_jitter and in_chans != 3:
            say(f"Images of {in_chans} channels are not coloured at random: color_jitter is left out.")
        self.transform = SegmentationTransform(
            crop_size, short_side, max_size, scale, cat_max_ratio, hflip, color_jitter if in_chans == 3 else 0)
        Faults(root, on_error)  # complains about on_error
        if orientation not in ("seen", "stored"):
            raise ValueError(f"orientation must be seen or stored, got {orientation!r}")
        if layout in ("ade20k", "cityscapes") and (mask_values or mask_colors):
            raise ValueError(f"the layout {layout} says what values mean: leave mask_values and mask_colors out")
        if mask_values and mask_colors:
            raise ValueError("mask_values and mask_colors were both given; masks have either")
        self.decoding, self.in_chans = Decoding(value_range, max_pixels, in_chans).check(), in_chans
        self.stored = orientation == "stored"
        self.image_settings = dict(
            short_side=short_side, max_size=max_size, crop_size=crop_size, decoding=self.decoding._asdict())
        self.names = Names(image_name, mask_name).check()
        if layout == "plain":
            self.folders = find_folders(self.root, image_folder, mask_folder, bool(class_names))
        else:
            self.folders = {split: (self.root, self.root) for split in ("train", "val")}
        colored = None if mask_colors is None else color_table(mask_colors, mask_nearest)
        self.mask_values, self.mask_nearest = mask_values or None, mask_nearest
        if not (mask_values or mask_colors) and layout == "plain":
            exported, values = _exported_classes(
                self.folders.get("train", next(iter(self.folders.values())))[1])
            if class_names in (None, exported):
                class_names, self.mask_values = exported, values
        self.class_names = class_names or (colored[0] if colored else self._find_class_names())
        self.num_classes = len(self.class_names)
        self.table = colored[1] if colored else self._label_table()
        labels = len(set(self.table.labels.tolist()) - {IGNORE})
        if labels != self.num_classes:
            source = "mask_colors" if colored else "mask_values" if mask_values else f"the layout {layout}"
            raise ValueError(f"{self.num_classes} class names were given; {source} has {labels} classes")
        self.report = DataReport("pixels")
        self.pairs: dict[str, list[Pair]] = {}

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
        if self.verify or faults.skip:
            files = check_images(files, faults, self.decoding)
        faults.report()
        self.report.splits["predict"] = SplitReport(len(files), {}, faults.listed, faults.more)
        names = result_names(files, self.predict_root)
        pairs = [Pair(name, file, None) for name, file in zip(names, files, strict=True)]
        return self._eval_loader(_Images(pairs, self, annotated=False))

    def _find_class_names(self) -> list[str]:
        if self.layout == "voc":
            return list(VOC)
        if self.layout == "cityscapes":
            return list(CITYSCAPES)
        if self.layout == "ade20k":
            return _ade20k_names(self.root / "objectInfo150.txt")
        if self.mask_values is not None:
            labels = self.mask_values.values() if isinstance(self.mask_values, dict) else range(len(self.mask_values))
            return [f"class_{number}" for number in range(1 + max(label for label in labels if label != IGNORE))]
        counts = self._count_values()
        largest = max((value for value in counts if value != IGNORE), default=-1)
        found = f"found are {describe(counts, False)}"
        if largest < 0:
            raise ValueError(f"all pixels of the training masks of {self.root} are {IGNORE}, which is ignored; set "
                             f"data.init_args.mask_values to the values that are classes")
        if largest == 0:
            option = f"; set data.init_args.mask_values to [0, {IGNORE}] to make {IGNORE} class 1"
            raise ValueError(f"the training masks of {self.root} have the class 0 alone; classes are the values 0, 1, "
                             f"2, ..., and {IGNORE} is ignored; {found}{option * (len(counts) > 1)}")
        present = sorted(counts)
        if blurred(counts):
            probable = list_of(meant(counts, False, 0.02), False)
            raise ValueError(f"the training masks of {self.root} have edges that were smoothed; {found}; set "
                             f"data.init_args.mask_values to {probable} and mask_nearest to true, or give class_names "
                             "if each value is a class")
        if with_gaps(counts):
            raise ValueError(f"most of the classes 0 to {largest} of the training masks of {self.root} have no pixel; "
                             f"{found}; set data.init_args.mask_values to {list_of(present, False)} if each value is a "
                             "class, or give class_names")
        say(f"No class_names were given: the training masks have values up to {largest}, "
                       f"so there are {largest + 1} classes.")
        return [f"class_{number}" for number in range(largest + 1)]

    def found_options(self) -> tuple[dict[str, Any], str]:
        """Options for the training masks' values or colours, and what was found (see ``masks.probable_options``)."""
        if self.layout != "plain" or _exported_classes(self.folders["train"][1])[0]:
            return {}, ""
        return probable_options(**self._count_kinds())

    def _count_kinds(self) -> dict[str, Counter[int]]:
        """The codes of all training masks with their pixels, by what they are: values, colours, or lossy values."""
        faults = Faults(self.root, "skip")  # setup says what is wrong with them
        counts = {kind: Counter[int]() for kind in ("values", "colours", "lossy")}
        for kind, found in find_faults(self._look, self._find_pairs("train", faults)):
            counts[kind].update(found)
        return counts

    def _count_values(self) -> Counter[int]:
        """The values of all training masks with their pixels; an error that says what they hold instead of values."""
        counts = self._count_kinds()
        if counts["values"]:
            return counts["values"]
        lossy, colors = counts["lossy"], counts["colours"]
        if lossy:
            probable = list_of(meant(lossy, False), False)
            raise ValueError(f"the training masks of {self.root} are JPEG files, which do not keep values; found are "
                             f"{describe(lossy, False)}; save masks as PNG, or set data.init_args.mask_values to those "
                             f"that are meant, probably {probable}: the nearest is taken then")
        if colors:
            known = known_colors(colors)
            fits = f"{known}, which has these" if known else "a YAML or CSV file of names and colours"
            raise ValueError(f"the training masks of {self.root} are in colours: {describe(colors, True)}; set "
                             f"data.init_args.mask_colors to {fits}")
        raise ValueError(f"{self.root} holds no mask to count classes in; give class_names")

    def _look(self, pair: Pair) -> tuple[str, Counter[int]]:
        """Of which kind a mask is, and its values or colours with their pixels."""
        try:
            mask = read_mask(pair.mask, decoding=self.decoding)  # type: ignore[arg-type]
        except UnusableMask:
            return "values", Counter()
        kind = "colours" if mask.colored else "lossy" if mask.lossy else "values"
        return kind, Counter(dict(count_codes(mask.codes).most_common(1024)))

    def _label_table(self) -> MaskTable:
        """Labels of the masks' values."""
        if self.layout == "cityscapes":
            return values_table({value: IGNORE for value in range(34)} | {
                value: label for label, value in enumerate(CITYSCAPES.values())})
        if self.layout == "ade20k":
            return values_table({0: IGNORE} | {label + 1: label for label in range(150)})
        if self.mask_values is not None:
            return values_table(self.mask_values, self.mask_nearest)
        if self.num_classes > IGNORE:
            raise ValueError(f"a mask can have {IGNORE} classes at most, got {self.num_classes} class names")
        return values_table(len(VOC) if self.layout == "voc" else self.num_classes)

    def _list_split(self, split: str) -> None:
        faults = Faults(self.root, self.on_error)
        splits = [name for name, (_, masks) in self.folders.items() if masks is not None]
        if split == "test" and "test" not in splits:
            say(f"{self.root} has no test images with labels: the validation images are used.")
            self.setup("validate")
            self.pairs["test"] = self.pairs["val"]
            return
        held_out = split != "test" and "val" not in splits
        source = "train" if held_out else split
        if source not in self.folders:
            raise ValueError(f"{self.root} has no {source} images, which are needed")
        pairs, counts = self._check_pairs(source, self._find_pairs(source, faults), faults)
        faults.report()
        if not pairs:
            raise ValueError(f"{self.root} holds no {split} images that can be used (layout {self.layout})")
        parts = {split: pairs}
        if held_out:
            if len(pairs) < 2:
                raise ValueError(
                    f"{self.root} has no val images and a single training image: too few to hold some out")
            count = min(max(round(self.val_fraction * len(pairs)), 1), len(pairs) - 1)
            parts["train"], parts["val"] = train_test_split(pairs, test_size=count, random_state=0)
            say(f"{self.root} has no val images: {len(pairs) - count} of its images train and {count} "
                           "validate.")
        self.pairs |= parts
        for name, part in parts.items():
            pixels = sum((counts[pair] for pair in part if pair in counts), np.zeros(256, dtype=np.int64))
            if counts:
                self._check_labels(name, part, pixels)
            left_out = (faults.listed, faults.more) if name == source else ([], 0)
            named = dict(zip(self.class_names, pixels.tolist(), strict=False))
            self.report.splits[name] = SplitReport(len(part), named if counts else {}, *left_out)
        for name in ("val", "test"):
            known = self.verify and name in self.pairs and "train" in self.pairs
            if known and (name in parts or "train" in parts):
                say_shared(name, *([pair.image for pair in self.pairs[part]] for part in (name, "train")))

    def _check_labels(self, split: str, pairs: list[Pair], pixels: np.ndarray) -> None:
        """Complains if there is nothing to learn or to measure in the labels of a split.

        Args:
            split: Its name.
            pairs: Its images.
            pixels: ``[256]``: number of pixels of each label.
        """
        present = np.flatnonzero(pixels[:IGNORE])
        if len(present) > 1 or (len(present) and split != "train"):
            return
        codes = Counter[int]()
        for pair in pairs:
            mask = read_mask(pair.mask, self.table.colored, self.decoding)  # type: ignore[arg-type]
            codes.update(count_codes(mask.codes))
        what = "are ignored as a whole"
        if len(present):
            what = f"have pixels of one class alone, {self.class_names[present[0]]}"
        option = f"data.init_args.mask_values to {list_of(sorted(codes), False)} if each value is a class"
        if self.table.colored:
            option = "data.init_args.mask_colors to the colours of all classes"
        advice = f"; set {option}" if len(codes) > 1 else ""
        found = describe(codes, self.table.colored)
        raise ValueError(f"the {split} masks of {self.root} {what}; found are {found}{advice}")

    def _find_pairs(self, split: str, faults: Faults) -> list[Pair]:
        """Images and masks of a split, matched by name; what has no partner goes to ``faults``."""
        if self.layout == "voc":
            return self._listed_pairs(self.train_split if split == "train" else split, faults)
        if self.layout == "plain":
            return match(self.folders[split], self.names, faults)
        if self.layout == "ade20k":
            part = {"train": "training", "val": "validation"}[split]
            folders, templates = (self.root / "images" / part, self.root / "annotations" / part), ("*", "*")
        else:
            folders = (self.root / "leftImg8bit" / split, self.root / "gtFine" / split)
            templates = ("*_leftImg8bit", "*_gtFine_labelIds")
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"folder {folder} does not exist")
        return match(folders, Names(*templates), faults)

    def _listed_pairs(self, name: str, faults: Faults) -> list[Pair]:
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
                pairs.append(Pair(stem, image, mask))
        return pairs

    def _check_pairs(
            self, split: str, pairs: list[Pair], faults: Faults) -> tuple[list[Pair], dict[Pair, np.ndarray]]:
        """The pairs that can be used, and the number of pixels of each label in each; none if nothing is checked."""
        if not (self.verify or faults.skip):
            return pairs, {}
        good = set(check_images([pair.image for pair in pairs], faults, self.decoding))
        pairs = [pair for pair in pairs if pair.image in good]
        found = find_faults(self._mask_fault, pairs)
        self._explain_codes(split, pairs, found, faults)
        if not self.table.colored:
            _compare_palettes(pairs, self.decoding)
        for pair, look in zip(pairs, found, strict=True):
            if isinstance(look, _Fault):
                faults.add(str(pair.mask), look.kind, look.detail)
            elif look[:IGNORE].sum() == 0:
                faults.note(str(pair.mask), "all of the mask is ignored", remedy="kept")
        return ([pair for pair, look in zip(pairs, found, strict=True) if not isinstance(look, _Fault)],
                {pair: look for pair, look in zip(pairs, found, strict=True) if not isinstance(look, _Fault)})

    def _explain_codes(self, split: str, pairs: list[Pair], found: list[Any], faults: Faults) -> None:
        """Says which values or colours the masks have of which some mean nothing, if there are such."""
        bad = [(pair, look) for pair, look in zip(pairs, found, strict=True) if isinstance(look, _Fault) and look.codes]
        if not bad:
            return
        codes, colored = Counter[int](), self.table.colored
        for _, look in bad:
            codes.update(look.codes)
        option = "mask_colors to a table of them, or mask_nearest to true" if colored else (
            f"mask_values to what they mean, such as {list_of(sorted(codes), False)}, or name all classes")
        if not colored and len(codes) > 32:
            probable = list_of(meant(codes, False, 0.02), False)
            option = f"mask_values to those meant, probably {probable}, and mask_nearest to true"
        unknown = "colours" if colored else "labels"
        text = f"{split} masks with unknown {unknown} have {describe(codes, colored)}: set {option}"
        if faults.skip:
            say(f"{self.root}: the {text}")
            return
        pair, look = bad[0]
        raise ValueError(f"{pair.mask}: {look.kind} ({look.detail}); the {text}; or set on_error to skip")

    def _mask_fault(self, pair: Pair) -> "_Fault | np.ndarray":
        """What is wrong with a mask, or the number of pixels of each of 256 labels."""
        size = self.decoding.look(pair.image).size
        try:
            labels = _read_labels(pair, size, self.table, self.decoding, self.stored)
        except UnusableMask as fault:
            codes = Counter[int]()
            if fault.kind in (NO_CLASS, NO_CLASS_OF_COLOR):
                mask = read_mask(pair.mask, self.table.colored, self.decoding)  # type: ignore[arg-type]
                codes = Counter(dict(count_codes(mask.codes).most_common(1024)))
            return _Fault(fault.kind, fault.detail, codes)
        return np.bincount(labels.ravel(), minlength=256)


class _Fault(NamedTuple):
    kind: str
    detail: str
    codes: Counter[int]  # those of the mask, where they are what is wrong


class _Images(Dataset):
    """Images with labels (transformed together if they train), or with name and size."""

    def __init__(
            self, pairs: list[Pair], data: SegmentationFolderData, transform: SegmentationTransform | None = None,
            annotated: bool = True):
        self.pairs, self.transform, self.annotated = pairs, transform, annotated
        self.reading = (data.table, data.decoding, data.stored)
        self.short_side, self.max_size = data.short_side, data.max_size

    def __len__(self) -> int:
        return len(self.pairs)

    def file_name(self, index: int) -> str:
        return str(self.pairs[index].image)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        pair = self.pairs[index]
        image = read_tensor(pair.image, HINT, self.reading[1])
        height, width = image.shape[-2:]
        if not self.annotated:
            size = torch.tensor([height, width])
            return to_image(resize_shorter(image, self.short_side, self.max_size)), pair.name, size
        try:
            labels = torch.from_numpy(np.array(_read_labels(pair, (width, height), *self.reading)))
        except UnusableMask as fault:
            raise ValueError(f"{pair.mask}: {fault.kind} ({fault.detail}); {HINT}") from fault
        if self.transform is None:
            image = resize_shorter(image, self.short_side, self.max_size)
        else:
            image, labels = self.transform(image, labels)
        return to_image(image), labels.long()


def _read_labels(
        pair: Pair, size: tuple[int, int], table: MaskTable, decoding: Decoding, stored: bool) -> np.ndarray:
    """The labels ``[H, W]`` uint8 of a mask whose image is seen with ``size`` (width, height).

    Where a photo's orientation tag turns it, and the mask has the size of the pixels as they are ``stored`` (or the
    user says that it refers to them), it is turned with the photo.
    """
    labels = table.labels_of(read_mask(pair.mask, table.colored, decoding))  # type: ignore[arg-type]
    if stored or labels.shape[::-1] != size:
        tag = orientation_of(pair.image)
        if labels.shape[::-1] == (size[::-1] if tag in TURNED else size):
            labels = np.asarray(turned(Image.fromarray(labels), tag))
    if labels.shape[::-1] != size:
        raise UnusableMask("the mask has another size than its image",
                           f"{labels.shape[1]} x {labels.shape[0]} pixels, the image {size[0]} x {size[1]}")
    return labels


def _compare_palettes(pairs: list[Pair], decoding: Decoding) -> None:
    """Warns if a value has different colours in the palettes of two masks: its colour may be what was meant."""
    seen: dict[int, tuple[tuple[int, ...], Any]] = {}
    for pair, colors in zip(pairs, find_faults(partial(_palette_of, decoding=decoding), pairs), strict=True):
        for value, color in colors.items():
            other, file = seen.setdefault(value, (color, pair.mask))
            if other != color:
                say(f"Warning: the palettes of masks differ: the value {value} has the colour {other} in "
                               f"{file} and {color} in {pair.mask}. Values are taken as classes; if colours are, set "
                               "mask_colors.")
                return


def _palette_of(pair: Pair, decoding: Decoding) -> dict[int, tuple[int, ...]]:
    """Colours of the values in a mask with a palette."""
    try:
        with decoding.open(pair.mask) as opened:  # type: ignore[arg-type]
            if opened.mode != "P":
                return {}
        mask = read_mask(pair.mask, decoding=decoding)  # type: ignore[arg-type]
    except (UnusableMask, OSError, SyntaxError, ValueError):
        return {}
    if mask.palette is None:
        return {}
    known = [value for value in count_codes(mask.codes) if value < len(mask.palette)]
    return {value: tuple(mask.palette[value].tolist()) for value in known}


def _exported_classes(folder: Path | None) -> tuple[list[str] | None, list[int] | None]:
    """Names and values of the classes where Roboflow's ``_classes.csv`` lies beside the masks."""
    file = (folder or Path()) / "_classes.csv"
    if folder is None or not file.is_file():
        return None, None
    rows = [[cell.strip() for cell in row] for row in csv.reader(file.read_text(encoding="utf-8-sig").splitlines())]
    rows = [row for row in rows if len(row) == 2 and row[0].isdecimal()]
    return ([name for _, name in rows], [int(value) for value, _ in rows]) if rows else (None, None)


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
