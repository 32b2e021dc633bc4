"""What the detection data have in common, whatever format their boxes come in: checks, targets, loaders."""
import os
import pickle
import unicodedata
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors

from ..runtime.folders import EXTENSIONS, find_images, visible_files, without_copies
from ..runtime.pixels import ENDINGS, Decoding, orientation_of, turned
from ..runtime.say import say
from .dense_transforms import detection_transform, to_image
from .loading import LoadedData, collate_detection
from .polygons import mask_of, number, segmentation_of
from .reading import Faults, find_faults, read_tensor, say_shared
from .report import DataReport, SplitReport, shortened
from .splits import split_of

__all__ = ["DetectionData", "Finder", "Listed", "Records", "Thing", "split_of_path", "walk"]

HINT = "replace it, or set verify to true and on_error to skip"  # for a file that fails in training
EDGELESS = "its box has no width or height"
SHARES = ("its box looks like shares of the image, from 0 to 1, where pixels are expected: multiply left and width by "
          "the image's width, top and height by its height")


class Thing(NamedTuple):
    """An object as its file has it, unchecked.

    Attributes:
        what: Which record of the file it is.
        label: Number of its class, from 1 on.
        box: ``[left, top, width, height]``; None: that around ``segmentation``.
        segmentation: Polygons or an RLE as COCO has them, or None.
        area: In pixels; None: that of the mask or of the box.
        crowd: Whether it is many objects, or one that is too difficult: it does not train.
        shares: Lengths are shares of the image's, not pixels.
    """

    what: str
    label: int
    box: Any
    segmentation: Any = None
    area: Any = None
    crowd: bool = False
    shares: bool = False


class Listed(NamedTuple):
    """An image as the annotations have it.

    Attributes:
        image_id: Its number, or its name where the file has no numbers.
        name: What results about it are called: its path in its folder.
        file: Where it is.
        size: Width and height that its objects refer to; None: those of the file.
        things: Its objects.
    """

    image_id: int | str
    name: str
    file: Path
    size: tuple[int, int] | None
    things: list[Thing]


class DetectionData(LoadedData):
    """Images with boxes, and masks if asked for.

    A format's class sets ``class_names`` and ``category_ids`` and says by ``_has``, ``_source`` and ``_listed`` which
    splits there are and what they hold; the rest is done here. Where there are no validation images, a fifth of the
    training images validate, always the same; where there are no test images, testing uses the validation images;
    both are said. ``records[split]`` are the checked images of a split, ``report`` the counts.

    Args:
        root: Folder of the data.
        predict_root: Folder whose images, at any depth, ``predict`` runs over; the test images if None.
        masks: Targets have instance masks.
        batch_size: Images per batch and device.
        num_workers: Loader processes.
        seed: Order of the training images and random numbers of the loader's processes.
        train_sizes: Lengths that the shorter side of a training image may get, in pixels; None leaves the size to
            the detector, which resizes images by its own ``min_size``.
        max_size: Bound of the longer side, with ``train_sizes``.
        hflip: Probability of a mirrored training image.
        large_scale_jitter: Side of square training images by a random resize of 0.1 to 2 and a crop, such as 1024
            (the detector's ``min_size`` and ``max_size`` should be the same); replaces ``train_sizes``. None is off.
        detr_crops: Half of the training images are cropped at random before they are resized, as DETR's are; the
            detector's list of ``min_size`` then does what is left of its multi-scale training.
        on_error: What to do with a record or file that cannot be used. ``raise``: stop and name it. ``skip``: leave it
            out (cut a box that reaches out of its image) and say how many there were of each kind; every image is
            decoded once for this.
        verify: False leaves out the check of the image files.
        orientation: What boxes and masks refer to where a file has an EXIF orientation and the size that the
            annotations say does not tell: ``seen`` is the picture as viewers and labelling tools show it, ``stored``
            the pixels as they lie in the file. The images themselves are always loaded as they are seen.
        value_range: Of images of more than 8 bits: ``type``, ``file`` or the two values that are black and white.
        max_pixels: Largest image that is decoded.
        min_batches: Least number of training batches of an epoch: where there are fewer, it goes through the images
            several times, each time changed at random anew.
        class_names: The classes in the order of their labels; None takes them from the data.
        in_chans: Channels of the images.

    Raises:
        FileNotFoundError: A file or folder does not exist.
        ValueError: The message names the file and the record.
    """

    def __init__(
            self, root: str, predict_root: str | None, masks: bool, batch_size: int, num_workers: int, seed: int,
            train_sizes: list[int] | None, max_size: int | None, hflip: float, large_scale_jitter: int | None,
            on_error: Literal["raise", "skip"], verify: bool, orientation: Literal["seen", "stored"],
            value_range: Literal["type", "file"] | tuple[float, float], max_pixels: int, min_batches: int,
            class_names: list[str] | None, in_chans: int, detr_crops: bool = False):
        super().__init__(batch_size, num_workers, seed, min_batches)
        if train_sizes is not None and (not train_sizes or min(train_sizes) < 1):
            raise ValueError(f"train_sizes must be one or more lengths in pixels, or null, got {train_sizes}")
        if detr_crops and large_scale_jitter is not None:
            raise ValueError("detr_crops and large_scale_jitter were both given; choose one")
        if orientation not in ("seen", "stored"):
            raise ValueError(f"orientation must be seen or stored, got {orientation!r}")
        self.root, self.masks, self.verify, self.on_error = Path(root), masks, verify, on_error
        self.stored = orientation == "stored"
        self.decoding, self.in_chans = Decoding(value_range, max_pixels, in_chans).check(), in_chans
        self.image_settings = dict(decoding=self.decoding._asdict())
        self.predict_root = None if predict_root is None else Path(predict_root)
        self.transform = detection_transform(train_sizes, max_size, hflip, large_scale_jitter, in_chans, detr_crops)
        self.collate = collate_detection
        Faults(root, on_error)  # complains about on_error
        self.known = list(class_names or [])  # with them, training data need not be there
        self.class_names = list(self.known)
        self.category_ids: list[int] = []
        self.records: dict[str, Records] = {}
        self.outlined = Counter[bool]()  # objects that were read, by whether they have polygons or a mask
        self.report = DataReport("objects")

    def _refuse_unknown(self, names: Iterable[str], source: str | Path) -> None:
        """Raises a ValueError for a class that is not among those that were given."""
        unknown = next((name for name in names if name not in self.known), None)
        if self.known and unknown is not None:
            raise ValueError(f"{source} has the class {unknown!r}, and the classes are {shortened(self.known)}")

    @abstractmethod
    def _has(self, split: str) -> bool:
        """Whether there is a split of its own for ``train``, ``val`` or ``test``."""

    @abstractmethod
    def _source(self, split: str) -> str | Path:
        """What a split is read from, for messages."""

    @abstractmethod
    def _listed(self, split: str, faults: Faults) -> list[Listed]:
        """The images of a split that there is, with unchecked objects; what cannot be read goes to ``faults``."""

    def setup(self, stage: str) -> None:
        """Reads and checks what ``stage`` needs: ``records[split]`` are the images of a split with their objects."""
        predicted = () if self.predict_root else ("test",)
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": predicted}[stage]:
            if split not in self.records:
                self._list_split(split)
        if stage == "fit" and self.verify:
            files = {split: [Path(record.file) for record in records] for split, records in self.records.items()
                     if split != "test" or self._has("test")}
            for split in sorted({"val", "test"} & set(files)):
                say_shared(split, files[split], files["train"])

    def train_dataloader(self) -> DataLoader:
        """Training images in random size, shuffled."""
        return self._train_loader(_Images(
            self.records["train"], self.decoding, self.masks, self.stored, self.transform))

    def val_dataloader(self) -> DataLoader:
        """Validation images."""
        return self._eval_loader(_Images(self.records["val"], self.decoding, self.masks, self.stored))

    def test_dataloader(self) -> DataLoader:
        """Test images."""
        return self._eval_loader(_Images(self.records["test"], self.decoding, self.masks, self.stored))

    def predict_dataloader(self) -> DataLoader:
        """Images of ``predict_root`` (or the test images) without annotations."""
        if self.predict_root is None:
            return self._eval_loader(_Images(self.records["test"], self.decoding, annotated=False))
        if not self.predict_root.is_dir():
            raise FileNotFoundError(f"predict_root {self.predict_root} is not a folder")
        files = find_images(self.predict_root)
        if not files:
            raise ValueError(f"predict_root {self.predict_root} holds no images ({EXTENSIONS})")
        faults = Faults(self.predict_root, self.on_error)
        images = self._check_files([
            Listed(count, str(file.relative_to(self.predict_root)), file, None, [])
            for count, file in enumerate(files, start=1)], faults)
        faults.report()
        self.report.splits["predict"] = SplitReport(len(images), {}, faults.listed, faults.more)
        return self._eval_loader(_Images(
            Records(Record(image.image_id, image.name, str(image.file), None, []) for image in images),
            self.decoding, annotated=False))

    def _list_split(self, split: str) -> None:
        if split == "test" and not self._has("test"):
            say(f"There is no test split in {self.root}: the validation images are used.")
            self.setup("validate")
            self.records["test"] = self.records["val"]
        elif split in ("train", "val") and not self._has("val"):
            self._hold_out()
        else:
            records, faults = self._read(split)
            self._keep(split, records, faults)

    def _hold_out(self) -> None:
        """A fifth of the training images becomes the validation images."""
        records, faults = self._read("train")
        if len(records) < 2:
            raise ValueError(f"{faults.source} has a single image: too few to hold some out for validation; add images "
                             "or a validation split")
        val = _fifth(records)
        train = sorted(set(range(len(records))) - set(val))
        say(f"There are no validation images: of the {len(records)} images of {faults.source}, {len(train)} "
                       f"train and {len(val)} validate, always the same.")
        self._keep("train", [records[index] for index in train], faults)
        self._keep("val", [records[index] for index in val], Faults(faults.source, self.on_error))

    def _keep(self, split: str, records: list["Record"], faults: Faults) -> None:
        counts = Counter(thing.label for record in records for thing in record.objects if not thing.crowd)
        self.report.splits[split] = SplitReport(
            len(records), {name: counts[label] for label, name in enumerate(self.class_names, start=1)},
            faults.listed, faults.more)
        if split == "train" and not counts:
            raise ValueError(f"{faults.source} has no object to train on")
        self.records[split] = Records(records)

    def _read(self, split: str) -> tuple[list["Record"], Faults]:
        """The images of a split that can be used, with their objects, and what was wrong with others."""
        if not self._has(split):
            raise ValueError(f"{self.root} has no {split} split")
        faults = Faults(self._source(split), self.on_error)
        images = self._check_files(self._listed(split, faults), faults)
        records = [Record(image.image_id, image.name, str(image.file), image.size, [
            found for thing in image.things if (found := self._check(thing, image, faults))]) for image in images]
        edgeless = faults.kinds.pop((EDGELESS, "left out"), 0)
        if edgeless:
            say(f"{faults.source}: {edgeless} boxes without width or height are left out; the first is "
                           f"{faults.first[EDGELESS, 'left out']}")
        faults.report()
        if not records:
            self.report.splits[split] = SplitReport(0, {}, faults.listed, faults.more)
            raise ValueError(f"{faults.source} lists no image that can be used")
        return records, faults

    def _check_files(self, images: list[Listed], faults: Faults) -> list[Listed]:
        """The images whose file can be used, with their sizes; of each the header is read, or all where faults skip."""
        whole = self.verify or faults.skip
        looked_at = [image.file for image in images if whole or image.size is None]
        look_at = partial(self.decoding.look, decode=faults.skip)
        looks = dict(zip(looked_at, find_faults(look_at, looked_at), strict=True))
        good = []
        for image in images:
            look = looks.get(image.file)
            if look is None:
                good.append(image)
                continue
            fault, size, seen = look.fault, image.size, look.size
            if size is None and not fault:
                size = seen[::-1] if self.stored and orientation_of(image.file) > 4 else seen
            if not fault and _tag_between(size, seen, image.file, self.stored) is None:
                fault = f"it is {seen[0]} x {seen[1]} pixels, not {size[0]} x {size[1]}"  # type: ignore[index]
            if fault:
                faults.add(f"image {image.image_id}", "the image file cannot be used", f"{image.file}: {fault}")
            else:
                if look.animated:
                    faults.note(
                        f"image {image.file}", "it has several frames or pages", remedy="read by the first of them")
                good.append(image._replace(size=size))
        return good

    def _check(self, thing: Thing, image: Listed, faults: Faults) -> "Object | None":
        """The object if it can be used, cut to its image; says why not, and what is mended."""
        width, height = size = image.size or (0, 0)
        where = f"image {image.name} of {width} x {height} pixels"
        self.outlined[bool(thing.segmentation)] += 1
        segmentation, extent, box = None, None, thing.box
        if self.masks or box is None:
            scale = (width, height) if thing.shares else (1, 1)
            segmentation, extent, fault, mended = segmentation_of(thing.segmentation, size, scale)
            if box is None and extent is not None:
                box = extent
            elif thing.shares and box is not None:
                box = [value * side for value, side in zip(box, size * 2, strict=True)]
            if fault and (self.masks or thing.segmentation):
                faults.add(thing.what, fault, where)
                return None
            if mended:
                faults.note(thing.what, mended, where, "mended")
        elif thing.shares:
            box = [value * side for value, side in zip(box, size * 2, strict=True)]
        edges, fault = _box(box, size, thing.shares)
        if fault:
            detail = f"bbox {box}, {where}"
            if edges is not None:
                detail += _as_corners(box, size)
            (faults.note if fault is EDGELESS else faults.add)(
                thing.what, fault, detail, "left out" if edges is None else "cut to it")
        if edges is None:
            return None
        if extent is not None and _apart(edges, extent):
            faults.add(thing.what, "its box and its segmentation lie apart", f"bbox {box}, {where}")
            return None
        area = number(thing.area)
        if area is not None and not 0 <= area <= width * height:
            area = None
        return Object(thing.label, edges, area, thing.crowd, segmentation if self.masks else None)


class Object(NamedTuple):
    """An object that was checked; lengths in pixels."""

    label: int
    box: tuple[float, float, float, float]  # left, top, right, bottom
    area: float | None  # None: of the mask, or of the box
    crowd: bool
    segmentation: Any  # what segmentation_of returned, or None


class Record(NamedTuple):
    """An image that was checked."""

    image_id: int | str
    name: str
    file: str
    size: tuple[int, int] | None  # width, height that the objects refer to; None: there are none
    objects: list[Object]


class Records(Sequence):
    """Records in one block of memory, which the loader's processes share.

    Of Python objects each process would come to have a copy of its own, as reading one writes its reference count.
    """

    def __init__(self, records: Iterable[Record]):
        packed = [pickle.dumps((*record[:-1], [tuple(thing) for thing in record.objects]), protocol=5)
                  for record in records]
        self._ends = torch.tensor([0, *map(len, packed)]).cumsum(0)
        self._bytes = torch.frombuffer(bytearray(b"".join(packed)) or bytearray(1), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = self._bytes[int(self._ends[index]):int(self._ends[index + 1])].numpy()
        record = Record(*pickle.loads(part.data))  # what __init__ wrote
        return record._replace(objects=[Object(*thing) for thing in record.objects])


class _Images(Dataset):
    """Images with targets; crowds and ``file_name`` depend on whether they train, which they do with a transform."""

    def __init__(
            self, records: Records, decoding: Decoding, masks: bool = False, stored: bool = False,
            transform: Callable[..., Any] | None = None, annotated: bool = True):
        self.records, self.decoding, self.masks, self.stored = records, decoding, masks, stored
        self.transform, self.annotated = transform, annotated

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        record = self.records[index]
        file = Path(record.file)
        image = tv_tensors.Image(read_tensor(file, HINT, self.decoding))
        size = tuple(image.shape[-2:])
        target: dict[str, Any] = {"image_id": record.image_id, "orig_size": torch.tensor(size)}
        if self.annotated:
            target |= self._annotations(record, file, size)
        if self.transform is None:
            target["file_name"] = record.name
        else:
            image, target = self.transform(image, target)
        return to_image(image).as_subclass(Tensor), {
            key: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for key, value in target.items()}

    def _annotations(self, record: Record, file: Path, size: tuple[int, ...]) -> dict[str, Tensor]:
        tag = _tag_between(record.size, size[::-1], file, self.stored)
        if tag is None:
            width, height = record.size or (0, 0)
            raise ValueError(f"{file} is {size[1]} x {size[0]} pixels, but its record {record.image_id} says "
                             f"{width} x {height}; {HINT}")
        objects = [thing for thing in record.objects if self.transform is None or not thing.crowd]
        boxes = torch.tensor([thing.box for thing in objects], dtype=torch.float32).reshape(-1, 4)
        boxes = _turned_boxes(boxes, tag, size)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        target: dict[str, Tensor] = {}
        if self.masks:
            masks = torch.zeros(len(objects), *size, dtype=torch.uint8)
            shape = size[::-1] if tag > 4 else size
            for index, thing in enumerate(objects):
                mask = mask_of(thing.segmentation, shape)
                masks[index] = torch.from_numpy(mask if tag == 1 else np.array(turned(Image.fromarray(mask), tag)))
            area = masks.flatten(1).sum(1).float()
            target["masks"] = tv_tensors.Mask(masks)
        for index, thing in enumerate(objects):
            if thing.area is not None:
                area[index] = thing.area
        return target | {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),  # type: ignore[call-overload]
            "labels": torch.tensor([thing.label for thing in objects], dtype=torch.int64),
            "area": area,
            "iscrowd": torch.tensor([thing.crowd for thing in objects], dtype=torch.int64),
        }


class Finder:
    """Finds the images that annotations name, also as other machines and tools spell them.

    A name is taken as it is if there is such a file; then with slashes for backslashes, without leading folders, in
    other case, and without its ending, where that fits one file alone.

    Args:
        folder: The images are in it, at any depth.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._known: dict[str, list[Path]] | None = None

    def find(self, name: str) -> tuple[Path, bool]:
        """The file, whether there is one or not, and whether its name is right as it stands (but for backslashes)."""
        plain = name.replace("\\", "/")
        for spelled in (name, plain):
            if os.path.isfile(self.folder / spelled):
                return self.folder / spelled, True
        parts = PurePosixPath(plain).parts
        for start in range(len(parts)):
            found = self.ending_in(PurePosixPath(*parts[start:]))
            if len(found) == 1:
                return found[0], False
        return self.folder / plain, False

    def ending_in(self, path: PurePosixPath) -> list[Path]:
        """The images whose path ends in this one, or else in this one but for the ending of the name."""
        known = self._files()
        return known.get(_folded(str(path))) or (known.get(_folded(str(path.with_suffix(""))), []) if path.name else [])

    def _files(self) -> dict[str, list[Path]]:
        """Every image by each end of its path, with and without its extension."""
        if self._known is None:
            self._known = {}
            for file in walk(self.folder, ENDINGS):
                parts = file.relative_to(self.folder).parts
                for start in range(len(parts)):
                    whole = PurePosixPath(*parts[start:])
                    for key in (str(whole), str(whole.with_suffix(""))):
                        self._known.setdefault(_folded(key), []).append(file)
        return self._known


def walk(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The visible files below a folder whose names, in lower case, end so; in a fixed order."""
    return without_copies(sorted(
        file for file in visible_files(folder) if file.name.lower().endswith(tuple(endings))))


def split_of_path(file: Path, root: Path) -> str | None:
    """The split that a folder between ``root`` and ``file`` is called after, the outermost first."""
    return next((split for part in file.relative_to(root).parts[:-1] if (split := split_of(part, alone=True))), None)


def _tag_between(size: tuple[int, int] | None, seen: tuple[int, ...], file: Path, stored: bool) -> int | None:
    """The orientation tag that leads from the picture of ``size`` that objects refer to to that which is seen.

    Args:
        size: Width and height of the first.
        seen: Those of the second.
        file: The image.
        stored: The first is that in the file where sizes do not tell.

    Returns:
        1 for no turn; None where ``size`` is neither that of the seen picture nor that of the stored one.
    """
    if size == seen and not stored:
        return 1
    tag = orientation_of(file)
    if size == (seen[::-1] if tag > 4 else seen):
        return tag
    return 1 if size == seen else None


def _turned_boxes(boxes: Tensor, tag: int, size: tuple[int, ...]) -> Tensor:
    """Boxes of the stored picture in the seen one of ``size`` (height, width), by the orientation tag."""
    left, top, right, bottom = boxes[:, [1, 0, 3, 2] if tag > 4 else [0, 1, 2, 3]].unbind(1)
    height, width = size
    if tag in (2, 3, 6, 7):  # mirrored, after a transposition from 5 on
        left, right = width - right, width - left
    if tag in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    return torch.stack([left, top, right, bottom], dim=1)


def _fifth(records: list[Record]) -> list[int]:
    """Every fifth of the images, in an order by the rarest class in each, so that every class has its share."""
    images = Counter(label for record in records for label in {thing.label for thing in record.objects})
    rarest = [min(((images[thing.label], thing.label) for thing in record.objects), default=(0, 0))
              for record in records]
    order = np.random.default_rng(0).permutation(len(records)).tolist()
    return sorted(sorted(order, key=rarest.__getitem__)[min(2, len(records) - 1)::5])


def _box(box: Any, size: tuple[int, int], shares: bool) -> tuple[tuple[float, float, float, float] | None, str]:
    """Edges of a ``[left, top, width, height]``, cut to the image, and what is wrong with it; None: unusable."""
    numbers = [number(value) for value in box] if isinstance(box, (list, tuple)) else []
    values = [value for value in numbers if value is not None]
    if len(values) != 4 or len(numbers) != 4:
        return None, "its bbox is not four numbers"
    x, y, w, h = values
    if w <= 0 or h <= 0:
        return None, EDGELESS
    if not shares and min(size) > 2 and min(x, y) >= 0 and max(x, y, w, h) <= 1.001 and not all(
            value.is_integer() for value in (x, y, w, h)):
        return None, SHARES
    left, top, right, bottom = max(x, 0.), max(y, 0.), min(x + w, size[0]), min(y + h, size[1])
    if left >= right or top >= bottom:
        return None, "its box lies outside the image"
    outside = max(-x, -y, x + w - size[0], y + h - size[1]) > 1
    return (left, top, right, bottom), "its box reaches out of the image" if outside else ""


def _as_corners(box: Any, size: tuple[int, int]) -> str:
    """What to say of a box that would fit if it were two corners."""
    left, top, right, bottom = map(float, box)
    if left < right <= size[0] and top < bottom <= size[1]:
        return "; it may hold right and bottom in place of width and height"
    return ""


def _apart(edges: tuple[float, float, float, float], extent: list[float]) -> bool:
    """Whether a box, by its edges, and another, by left, top, width and height, are more than a pixel apart."""
    left, top, width, height = extent
    return left > edges[2] + 1 or left + width < edges[0] - 1 or top > edges[3] + 1 or top + height < edges[1] - 1


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
