"""Detection data in COCO's JSON format: boxes and instance masks."""
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from .dense_transforms import detection_transform, to_image
from .loading import LoadedData, collate_detection
from .reading import EXTENSIONS, Faults, decoding_fault, find_faults, find_images, header_fault, read_image

__all__ = ["CocoData"]

HINT = "replace it, or set verify to true and on_error to skip"  # for a file that fails in training


class CocoData(LoadedData):
    """Images with boxes, and masks if asked for, that a COCO JSON file lists.

    The classes are the categories of ``val_annotations``, by their id: label ``i`` (from 1) is the category
    ``category_ids[i - 1]``; the other files must have the same categories. Images without objects are kept. Crowds
    (``iscrowd``) do not train; evaluation has them. A box without width or height is left out, with a count; one
    that reaches out of its image by up to a pixel is cut to it. Where there is no ``test_annotations``, testing uses
    the validation images; this is said.

    Training images are mirrored and resized at random. Evaluation images are as they are in their files: the
    detector resizes them. Boxes and masks are always in pixels of the image of the batch, ``area`` is the file's.

    All records are checked before the first step; with ``verify`` also that every image is there, has a header that
    can be read and has the size that the JSON says.

    Args:
        root: Folder that the other paths start from.
        train_images: Folder of the training images.
        train_annotations: Their JSON file.
        val_images: Folder of the validation images.
        val_annotations: Their JSON file.
        test_images: Folder of the test images; that of the validation images if None.
        test_annotations: Their JSON file; the validation images are tested if None.
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
        on_error: What to do with a record or file that cannot be used. ``raise``: stop and name it. ``skip``: leave it
            out (cut a box that reaches out of its image) and say how many there were of each kind; every image is
            decoded once for this.
        verify: False leaves out the check of the image files.

    Raises:
        FileNotFoundError: A JSON file or folder does not exist.
        ValueError: The message names the file and the record.
    """

    def __init__(
            self,
            root: str = "data/coco",
            train_images: str = "train2017",
            train_annotations: str = "annotations/instances_train2017.json",
            val_images: str = "val2017",
            val_annotations: str = "annotations/instances_val2017.json",
            test_images: str | None = None,
            test_annotations: str | None = None,
            predict_root: str | None = None,
            masks: bool = False,
            batch_size: int = 2,
            num_workers: int = 4,
            seed: int = 0,
            train_sizes: list[int] | None = None,
            max_size: int | None = 1333,
            hflip: float = 0.5,
            large_scale_jitter: int | None = None,
            on_error: Literal["raise", "skip"] = "raise",
            verify: bool = True,
    ):
        super().__init__(batch_size, num_workers, seed)
        if train_sizes is not None and (not train_sizes or min(train_sizes) < 1):
            raise ValueError(f"train_sizes must be one or more lengths in pixels, or null, got {train_sizes}")
        self.root, self.masks, self.verify, self.on_error = Path(root), masks, verify, on_error
        self.predict_root = None if predict_root is None else Path(predict_root)
        self.files = {
            "train": (self.root / train_images, self.root / train_annotations),
            "val": (self.root / val_images, self.root / val_annotations),
        }
        if test_annotations is not None:
            self.files["test"] = (self.root / (test_images or val_images), self.root / test_annotations)
        self.transform = detection_transform(train_sizes, max_size, hflip, large_scale_jitter)
        self.collate = collate_detection
        Faults(root, on_error)  # complains about on_error
        self._contents: dict[str, dict[str, Any]] = {"val": _read_json(self.files["val"][1])}
        self.categories = _categories(self._contents["val"], self.files["val"][1])
        self.category_ids = list(self.categories)
        self.class_names = list(self.categories.values())
        self.num_classes = len(self.class_names)
        self.records: dict[str, list[_Record]] = {}

    def setup(self, stage: str) -> None:
        """Reads and checks what ``stage`` needs: ``records[split]`` are the images of a split with their objects."""
        predicted = () if self.predict_root else ("test",)
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": predicted}[stage]:
            if split not in self.records:
                self._list_split(split)

    def train_dataloader(self) -> DataLoader:
        """Training images in random size, shuffled."""
        return self._train_loader(_Images(self.files["train"][0], self.records["train"], self.masks, self.transform))

    def val_dataloader(self) -> DataLoader:
        """Validation images."""
        return self._eval_loader(_Images(self.files["val"][0], self.records["val"], self.masks))

    def test_dataloader(self) -> DataLoader:
        """Test images."""
        return self._eval_loader(_Images(self._test_folder(), self.records["test"], self.masks))

    def predict_dataloader(self) -> DataLoader:
        """Images of ``predict_root`` (or the test images) without annotations."""
        if self.predict_root is None:
            return self._eval_loader(_Images(self._test_folder(), self.records["test"], annotated=False))
        if not self.predict_root.is_dir():
            raise FileNotFoundError(f"predict_root {self.predict_root} is not a folder")
        names = [str(file.relative_to(self.predict_root)) for file in find_images(self.predict_root)]
        if not names:
            raise ValueError(f"predict_root {self.predict_root} holds no images ({EXTENSIONS})")
        records = [_Record(number, name, None, []) for number, name in enumerate(names, start=1)]
        faults = Faults(self.predict_root, self.on_error)
        records = self._check_files(self.predict_root, records, faults)
        faults.report()
        return self._eval_loader(_Images(self.predict_root, records, annotated=False))

    def _test_folder(self) -> Path:
        return self.files["test" if "test" in self.files else "val"][0]

    def _list_split(self, split: str) -> None:
        if split not in self.files:
            rank_zero_info("There is no test_annotations: the validation images are used.")
            self.setup("validate")
            self.records["test"] = self.records["val"]
            return
        folder, file = self.files[split]
        if not folder.is_dir():
            raise FileNotFoundError(f"image folder {folder} does not exist ({split}_images of the data)")
        content = self._contents.pop(split, None) or _read_json(file)
        categories = _categories(content, file)
        if categories != self.categories:
            other = next(iter(set(categories.items()) ^ set(self.categories.items())))
            raise ValueError(f"{file} and {self.files['val'][1]} have different categories: {other[1]!r} with id "
                             f"{other[0]} is in one of them only")
        faults = Faults(file, self.on_error)
        records = _read_records(content, self.category_ids, self.masks, faults)
        records = self._check_files(folder, records, faults)
        faults.report()
        if not records:
            raise ValueError(f"{file} lists no image that can be used")
        if split == "train" and not any(not thing.crowd for record in records for thing in record.objects):
            raise ValueError(f"{file} has no object to train on")
        self.records[split] = records

    def _check_files(self, folder: Path, records: list["_Record"], faults: Faults) -> list["_Record"]:
        """The records whose image can be used; every header is read, and every pixel where faults are skipped."""
        if not (self.verify or faults.skip):
            return records
        found = find_faults(decoding_fault if faults.skip else header_fault,
                            [folder / record.name for record in records], [record.size for record in records])
        for record, fault in zip(records, found, strict=True):
            if fault:
                faults.add(f"image {record.image_id}", "the image file cannot be used",
                           f"{folder / record.name}: {fault}")
        return [record for record, fault in zip(records, found, strict=True) if not fault]


class _Object(NamedTuple):
    label: int
    box: tuple[float, float, float, float]  # left, top, right, bottom
    area: float | None  # None: of the mask, or of the box
    crowd: bool
    segmentation: Any  # polygons as arrays, or an RLE


class _Record(NamedTuple):
    image_id: int
    name: str
    size: tuple[int, int] | None  # width, height; None: what the file has
    objects: list[_Object]


class _Images(Dataset):
    """Images with targets; crowds and ``file_name`` depend on whether they train, which they do with a transform."""

    def __init__(
            self, folder: Path, records: list[_Record], masks: bool = False,
            transform: Callable[..., Any] | None = None, annotated: bool = True):
        self.folder, self.records, self.masks = folder, records, masks
        self.transform, self.annotated = transform, annotated

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        record = self.records[index]
        file = self.folder / record.name
        image = F.to_image(read_image(file, HINT))
        height, width = size = tuple(image.shape[-2:])
        if record.size not in (None, (width, height)):
            raise ValueError(f"{file} is {width} x {height} pixels, but its record {record.image_id} says "
                             f"{record.size[0]} x {record.size[1]}; {HINT}")  # type: ignore[index]
        target: dict[str, Any] = {"image_id": record.image_id, "orig_size": torch.tensor(size)}
        if self.annotated:
            target |= self._annotations(record, file, size)
        if self.transform is None:
            target["file_name"] = record.name
        else:
            image, target = self.transform(image, target)
        return to_image(image).as_subclass(Tensor), {
            key: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for key, value in target.items()}

    def _annotations(self, record: _Record, file: Path, size: tuple[int, int]) -> dict[str, Tensor]:
        objects = [thing for thing in record.objects if self.transform is None or not thing.crowd]
        boxes = torch.tensor([thing.box for thing in objects], dtype=torch.float32).reshape(-1, 4)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        target: dict[str, Tensor] = {}
        if self.masks:
            masks = torch.zeros(len(objects), *size, dtype=torch.uint8)
            for index, thing in enumerate(objects):
                try:
                    masks[index] = torch.from_numpy(_mask(thing.segmentation, size))
                except ValueError as error:
                    raise ValueError(f"{file}: the mask of object {index + 1} cannot be decoded: {error}") from error
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


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"annotation file {file} does not exist")
    try:
        content = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{file} is not in COCO's format: it has no list {key!r}")
        if not all(isinstance(record, dict) for record in content[key]):
            raise ValueError(f"{file} is not in COCO's format: its list {key!r} holds something else than records")
    return content


def _categories(content: dict[str, Any], file: Path) -> dict[int, str]:
    """Names of the categories by id, in the order of the ids."""
    names: dict[int, str] = {}
    for category in content["categories"]:
        number, name = category.get("id"), category.get("name")
        if not isinstance(number, int) or not isinstance(name, str):
            raise ValueError(f"{file}: a category needs an integer id and a name, got {category}")
        if number in names:
            raise ValueError(f"{file}: two categories have the id {number}: {names[number]!r} and {name!r}")
        names[number] = name
    if not names:
        raise ValueError(f"{file} has no categories")
    return dict(sorted(names.items()))


def _read_records(content: dict[str, Any], category_ids: list[int], masks: bool, faults: Faults) -> list[_Record]:
    """The images of a file with those of their objects that can be used; the others go to ``faults``."""
    records: dict[int, _Record] = {}
    for place, image in enumerate(content["images"]):
        number, name, shape = image.get("id"), image.get("file_name"), (image.get("width"), image.get("height"))
        if not isinstance(number, int) or not isinstance(name, str):
            faults.add(f"image {number if number is not None else f'number {place + 1}'}",
                       "an image needs an integer id and a file_name")
        elif not all(isinstance(side, int) and side > 0 for side in shape):
            faults.add(f"image {number}", "an image needs a width and a height", f"got {shape[0]} and {shape[1]}")
        elif number in records:
            faults.add(f"image {number}", "two images have this id", f"{records[number].name} and {name}")
        else:
            records[number] = _Record(number, name, shape, [])  # type: ignore[arg-type]
    labels = {number: label for label, number in enumerate(category_ids, start=1)}
    degenerate = 0
    for place, annotation in enumerate(content["annotations"]):
        what = f"annotation {annotation.get('id', f'number {place + 1}')}"
        record = records.get(annotation.get("image_id"))  # type: ignore[arg-type]
        if record is None:
            faults.add(what, "its image is not in the list of images", f"image_id {annotation.get('image_id')}")
            continue
        width, height = size = record.size or (0, 0)
        where = f"image {record.name} of {width} x {height} pixels"
        label = labels.get(annotation.get("category_id"))  # type: ignore[arg-type]
        if label is None:
            faults.add(what, "its category is not in the list of categories",
                       f"category_id {annotation.get('category_id')}, image {record.name}")
            continue
        box, fault = _box(annotation.get("bbox"), size)
        if fault:
            remedy = "left out" if box is None else "cut to it"
            faults.add(what, fault, f"bbox {annotation.get('bbox')}, {where}", remedy)
        if box is None:
            degenerate += not fault
            continue
        segmentation = None
        if masks:
            segmentation, fault = _segmentation(annotation.get("segmentation"), size)
            if fault:
                faults.add(what, fault, where)
                continue
        area = annotation.get("area")
        record.objects.append(_Object(label, box, area if isinstance(area, (int, float)) else None,
                                      bool(annotation.get("iscrowd", 0)), segmentation))
    if degenerate:
        rank_zero_info(f"{faults.source}: {degenerate} boxes without width or height are left out.")
    return list(records.values())


def _box(box: Any, size: tuple[int, int]) -> tuple[tuple[float, float, float, float] | None, str]:
    """Edges of a ``[left, top, width, height]``, cut to the image, and what is wrong with it; None: unusable."""
    if not (isinstance(box, list) and len(box) == 4
            and all(isinstance(value, (int, float)) and math.isfinite(value) for value in box)):
        return None, "its bbox is not four numbers"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return None, ""
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, size[0]), min(y + h, size[1])
    if left >= right or top >= bottom:
        return None, "its box lies outside the image"
    outside = max(-x, -y, x + w - size[0], y + h - size[1]) > 1
    return (left, top, right, bottom), "its box reaches out of the image" if outside else ""


def _segmentation(value: Any, size: tuple[int, int]) -> tuple[Any, str]:
    """Polygons as arrays or an RLE as pycocotools has it, and what is wrong with it."""
    shape = [size[1], size[0]]
    if isinstance(value, dict):
        counts, found = value.get("counts"), value.get("size")
        if found is None or list(found) != shape:
            return None, "its mask has another size than its image"
        if isinstance(counts, str):
            return {"size": shape, "counts": counts.encode()}, ""
        if not isinstance(counts, list) or sum(counts) != shape[0] * shape[1]:
            return None, "the runs of its mask do not add up to its image"
        return rle.frPyObjects({"size": shape, "counts": counts}, *shape), ""
    if not isinstance(value, list) or not value:
        return None, "it has no segmentation, but masks were asked for"
    if not all(isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in value):
        return None, "its segmentation has a polygon of less than three points"
    return [np.array(polygon, dtype=np.float64) for polygon in value], ""


def _mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """The mask ``[H, W]`` uint8 of polygons or of an RLE."""
    if isinstance(segmentation, list):
        segmentation = rle.merge(rle.frPyObjects([polygon.tolist() for polygon in segmentation], *size))
    return rle.decode(segmentation)
