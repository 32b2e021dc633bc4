"""Detection data in COCO's JSON format, as the many tools that export it write it: boxes and instance masks."""
import json
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Literal

from ..runtime.folders import visible_folders
from ..runtime.pixels import MAX_PIXELS
from ..runtime.say import say
from .detection import DetectionData, Finder, Listed, Thing, split_of_path, walk
from .polygons import number
from .reading import Faults
from .splits import split_of

__all__ = ["CocoData"]

FOREIGN = {  # what other formats of labelling tools are known by
    "LabelMe": ("shapes", "imagePath"), "VIA": ("_via_img_metadata",), "Supervisely": ("objects", "size"),
    "Label Studio": ("data",), "CreateML": ("image", "annotations"),
}
YES, NO = (1, "1", "true", "yes"), (0, "0", "false", "no", "")  # a crowd, none


class CocoData(DetectionData):
    """Images with boxes, and masks if asked for, that a COCO JSON file lists.

    The classes are the categories of ``val_annotations`` (of the training file where there is none), by their id:
    label ``i`` (from 1) is the category ``category_ids[i - 1]``; the other files must have categories of the same
    names. One without any object in any of the files, such as an exporter's root of all categories, is no class; two
    of one name are one class. Both is said. Images without objects are kept. Crowds (``iscrowd``) do not train;
    evaluation has them. A box without width or height is left out, with a count; one that reaches out of its image by
    up to a pixel is cut to it. Two entries for one image file are joined.

    Where no JSON file is named, they are looked for below ``root``, and likewise folders of images that are not named,
    in any usual spelling of train, valid and test:
    ``train.json`` and ``train/``, ``annotations/instances_val2017.json`` and ``val2017/``,
    ``valid/_annotations.coco.json`` with the images beside it. Where there is no validation file, a fifth of the
    training images validate; where there is no test file, testing uses the validation images; both are said.

    Numbers may be text or floats; sizes of images, ids and areas of annotations, ``iscrowd``, and boxes where there are
    polygons may be missing. An image's name may have backslashes, folders that are not there and no ending, as long
    as one image alone fits it.

    Training images are mirrored and resized at random. Evaluation images are as they are in their files: the
    detector resizes them. Boxes and masks are always in pixels of the image of the batch, ``area`` is the file's.

    All records are checked before the first step; with ``verify`` also that every image is there, has a header that
    can be read and has the size that the JSON says. Loader processes share the records.

    Args:
        root: Folder that the other paths start from.
        train_images: Folder of the training images.
        train_annotations: Their JSON file.
        val_images: Folder of the validation images.
        val_annotations: Their JSON file.
        test_images: Folder of the test images; that of the validation images if None.
        test_annotations: Their JSON file; the validation images are tested if there is none.
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
        orientation: What boxes and masks refer to where a file has an EXIF orientation and the JSON's sizes do not
            tell: ``seen``, the picture as viewers and labelling tools show it, or ``stored``, as it lies in the file.
        value_range: Of images of more than 8 bits: ``type``, ``file`` or the two values that are black and white.
        max_pixels: Largest image that is decoded.
        min_batches: Least number of training batches of an epoch: where there are fewer, it goes through the images
            several times, each time changed at random anew.
        class_names: The classes in the order of their labels; None takes them from the data. Evaluation takes them from
            the checkpoint, so that the training data need not be there.
        in_chans: Channels of the images: 3 as a viewer shows them, 1 in grey, or the bands of the files (4 of RGBA
            files; see ``visionattn.runtime.pixels``).

    Raises:
        FileNotFoundError: A JSON file or folder does not exist.
        ValueError: The message names the file and the record.
    """

    def __init__(
            self,
            root: str = "data/coco",
            train_images: str | None = None,
            train_annotations: str | None = None,
            val_images: str | None = None,
            val_annotations: str | None = None,
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
            orientation: Literal["seen", "stored"] = "seen",
            value_range: Literal["type", "file"] | tuple[float, float] = "type",
            max_pixels: int = MAX_PIXELS,
            min_batches: int = 1,
            class_names: list[str] | None = None,
            in_chans: int = 3,
            detr_crops: bool = False,
    ):
        super().__init__(
            root, predict_root, masks, batch_size, num_workers, seed, train_sizes, max_size, hflip, large_scale_jitter,
            on_error, verify, orientation, value_range, max_pixels, min_batches, class_names, in_chans, detr_crops)
        self._folders = {"train": train_images, "val": val_images, "test": test_images or val_images}
        named = {"train": train_annotations, "val": val_annotations, "test": test_annotations}
        self._json = {split: self.root / file for split, file in named.items() if file is not None}
        if not self._json:
            self._json = _find_files(self.root)
            found = [f"{split}: {file.relative_to(self.root)}" for split, file in self._json.items()]
            say(f"Found in {self.root}: {', '.join(found) or 'no annotations'}.")
        if not self._json:
            raise FileNotFoundError(
                f"{self.root} holds no annotations in COCO's format; data.init_args.root must be a folder with "
                "train.json and train/*.jpg, or say where they are by train_annotations and train_images")
        found = [split for split in ("val", "train", "test") if split in self._json]
        # Where the classes are known, files of other splits need not be there.
        self._first = next((split for split in found if self.known and self._json[split].is_file()), found[0])
        self._contents: dict[str, dict[str, Any]] = {}
        self._categories: dict[str, dict[int, str]] = {}
        self._content(self._first)
        self._choose_classes()

    def _has(self, split: str) -> bool:
        return split in self._json

    def _source(self, split: str) -> Path:
        return self._json[split]

    def _content(self, split: str) -> dict[str, Any]:
        """The content of a split's file, which is kept until its records are made."""
        if split not in self._contents:
            self._contents[split] = _read_json(self._json[split])
            self._categories[split] = _categories(self._contents[split], self._json[split])
        return self._contents[split]

    def _choose_classes(self) -> None:
        """``category_ids`` and ``class_names``: the categories of the first split that have objects anywhere."""
        first = self._first
        names, file = self._categories[first], self._json[first]
        used = self._used(first)
        if self.known:
            self._refuse_unknown(used, file)
            ids = {name: category for category, name in reversed(names.items())}
            lacking = next((name for name in self.known if name not in ids), None)
            if lacking is not None:
                raise ValueError(f"{file} has no category {lacking!r}, which is one of the classes")
            self.category_ids = [ids[name] for name in self.known]
            self.num_classes = len(self.known)
            return
        # The other files, which may be large, are read now only if it depends on them whether there is a class.
        for split in self._json:
            if split != first and used != set(names.values()) and self._json[split].is_file():
                self._content(split)
                self._check_names(split)
                used |= self._used(split)
                del self._contents[split]
        unused = [name for name in dict.fromkeys(names.values()) if name not in used]
        if unused and used:
            say(f"{file}: left out of the classes, as they have no object in any split: "
                           f"{', '.join(unused[:10])}{f' and {len(unused) - 10} more' if len(unused) > 10 else ''}")
        for category, name in names.items():
            if name in self.class_names:
                say(f"{file}: two categories are called {name!r}: they are one class.")
            elif name in used or not used:
                self.category_ids.append(category)
                self.class_names.append(name)
        self.num_classes = len(self.class_names)

    def _used(self, split: str) -> set[str]:
        names = self._categories[split]
        ids = {_key(annotation.get("category_id")) for annotation in self._content(split)["annotations"]}
        return {name for category, name in names.items() if category in ids}

    def _check_names(self, split: str) -> None:
        """Complains if a file has other categories than that of the first split."""
        ours, theirs = self._categories[self._first], self._categories[split]
        other = next((name for name in [*theirs.values(), *ours.values()]
                      if (name in ours.values()) != (name in theirs.values())), None)
        if other is not None:
            category = next(number for number, name in {**ours, **theirs}.items() if name == other)
            raise ValueError(f"{self._json[split]} and {self._json[self._first]} have different categories: "
                             f"{other!r} with id {category} is in one of them only")

    def _image_folder(self, split: str) -> Path:
        """The folder that the names in a file start from: the first of the likely ones that has one of the images."""
        beside = self._json[split].parent
        bases = [folder for folder in (beside, beside.parent, self.root) if folder.is_relative_to(self.root)]
        folders = dict.fromkeys([*bases, *(folder for base in bases for folder in _folders(base))])
        of_split: list[Path] = []
        of_none: list[Path] = []  # a folder that is called after another split is in neither
        for folder in folders:
            spoken = [found for part in folder.relative_to(self.root).parts if (found := split_of(part))]
            if not spoken or spoken[0] == split:
                (of_split if spoken else of_none).append(folder)
        names = [str(image.get("file_name")).replace("\\", "/") for image in self._content(split)["images"][:20]]
        for name in names:
            for folder in of_split + of_none:
                if os.path.isfile(folder / name):
                    return folder
        for finder in map(Finder, of_split):  # by a name that is not quite right
            if any(finder.find(name)[0].is_file() for name in names):
                return finder.folder
        return self.root

    def _of_other(self, file: Path, split: str) -> bool:
        """Whether a file is in a folder of another split."""
        return file.is_relative_to(self.root) and split_of_path(file, self.root) not in (None, split)

    def _listed(self, split: str, faults: Faults) -> list[Listed]:
        named = self._folders[split]
        folder = self._image_folder(split) if named is None else self.root / named
        if not folder.is_dir():
            raise FileNotFoundError(f"image folder {folder} does not exist ({split}_images of the data)")
        content = self._content(split)
        del self._contents[split]
        if split != self._first:
            self._check_names(split)
        images, joined = _images(content["images"], folder, faults, lambda file: self._of_other(file, split))
        label_of_name = {name: label for label, name in enumerate(self.class_names, start=1)}
        labels = {category: label_of_name[name] for category, name in self._categories[split].items()
                  if name in label_of_name}
        left_out = {_key(image.get("id")) for image in content["images"]} - set(images) - set(joined)
        seen: set[str] = set()
        for place, annotation in enumerate(content["annotations"]):
            what = f"annotation {annotation.get('id', f'number {place + 1}')}"
            of = _key(annotation.get("image_id"))
            image = None if of is None else images.get(joined.get(of, of))
            if image is None:
                if of is None or of not in left_out:
                    faults.add(what, "its image is not in the list of images", f"image_id {annotation.get('image_id')}")
                continue
            label = labels.get(_key(annotation.get("category_id")))  # type: ignore[arg-type]
            if label is None:
                faults.add(what, "its category is not in the list of categories",
                           f"category_id {annotation.get('category_id')}, image {image.name}")
                continue
            crowd = _crowd(annotation.get("iscrowd"))
            if crowd is None:
                faults.add(what, "its iscrowd is neither 0 nor 1", f"{annotation['iscrowd']!r}, image {image.name}")
                continue
            if joined:  # an image that is listed twice may have each of its objects twice
                same = repr((image.image_id, label, annotation.get("bbox"), annotation.get("segmentation")))
                if same in seen:
                    continue
                seen.add(same)
            image.things.append(Thing(
                what, label, annotation.get("bbox") or None, annotation.get("segmentation"), annotation.get("area"),
                crowd))
        return list(images.values())


def _find_files(root: Path) -> dict[str, Path]:
    """The annotation files below ``root`` by split; a single one that speaks of no split is for training."""
    if not root.is_dir():
        return {}
    found: dict[str, list[Path]] = {}
    for file in walk(root, [".json"]):
        places = [file.stem, *(part.name for part in file.parents if root in part.parents)]
        split = next((split for place in places if (split := split_of(place))), None)
        found.setdefault(split or "", []).append(file)
    if "train" not in found and "" in found:
        found["train"] = found[""]
    chosen = {}
    for split in sorted({"train", "val", "test"} & set(found)):
        likely = found[split]
        for word in ("instances", "coco", "annotations"):
            if len(likely) > 1:
                likely = [file for file in likely if word in file.stem.lower()] or likely
        if len(likely) > 1:
            likely = [file for file in likely[:20] if _is_coco(file)] or likely
        if len(likely) > 1:
            _refuse_foreign(likely[0])
            raise ValueError(f"{root} has several files that could be the annotations of {split}: "
                             f"{', '.join(str(file.relative_to(root)) for file in likely[:5])}; name one by "
                             f"{split}_annotations")
        if split != "test" or _is_coco(likely[0]):  # test images may be listed without annotations
            chosen[split] = likely[0]
    return chosen


def _is_coco(file: Path) -> bool:
    try:
        _read_json(file)
    except ValueError:
        return False
    return True


def _folders(root: Path) -> list[Path]:
    """The folders in ``root`` and in those, by depth."""
    if not root.is_dir():
        return []
    first = visible_folders(root)
    return [*first, *(inner for folder in first for inner in visible_folders(folder))]


def _read_json(file: Path) -> dict[str, Any]:
    content = _parsed(file)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            _refuse_foreign(file, content)
            raise ValueError(f"{file} is not in COCO's format: it has no list {key!r}")
        if not all(isinstance(record, dict) for record in content[key]):
            raise ValueError(f"{file} is not in COCO's format: its list {key!r} holds something else than records")
    return content


def _parsed(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"annotation file {file} does not exist")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _refuse_foreign(file: Path, content: Any = None) -> None:
    """Complains about the format of another tool, by its name."""
    content = _parsed(file) if content is None else content
    first = content[0] if isinstance(content, list) and content else content
    for tool, keys in FOREIGN.items():
        if isinstance(first, dict) and all(key in first for key in keys):
            raise ValueError(f"{file} is in {tool}'s own format: export the annotations as COCO, VOC or YOLO "
                             "(docs/your-data.md says how)")


def _categories(content: dict[str, Any], file: Path) -> dict[int, str]:
    """Names of the categories by id, in the order of the ids."""
    names: dict[int, str] = {}
    groups: dict[str, Any] = {}
    for category in content["categories"]:
        key, name = _key(category.get("id")), category.get("name")
        if not isinstance(key, int) or not isinstance(name, str):
            raise ValueError(f"{file}: a category needs an integer id and a name, got {category}")
        if key in names:
            raise ValueError(f"{file}: two categories have the id {key}: {names[key]!r} and {name!r}")
        group = category.get("supercategory")
        if groups.setdefault(name, group) != group:
            raise ValueError(f"{file}: two categories are called {name!r}, one of {groups[name]!r} and one of "
                             f"{group!r}: rename one, or give both the same supercategory")
        names[key] = name
    if not names:
        raise ValueError(f"{file} has no categories")
    return dict(sorted(names.items()))


def _images(
        records: list[dict[str, Any]], folder: Path, faults: Faults,
        foreign: Callable[[Path], bool]) -> tuple[dict[int | str, Listed], dict[int | str, int | str]]:
    """The images by id, and for those that are joined with another of the same file, its id.

    A file that is not of a record's exact name is taken unless it is ``foreign``.
    """
    images: dict[int | str, Listed] = {}
    joined: dict[int | str, int | str] = {}
    finder, by_file = Finder(folder), dict[str, int | str]()
    for place, image in enumerate(records):
        key, name, shape = _key(image.get("id")), image.get("file_name"), (image.get("width"), image.get("height"))
        if key is None or not isinstance(name, str) or not name:
            faults.add(f"image {image.get('id') if image.get('id') is not None else f'number {place + 1}'}",
                       "an image needs an integer id and a file_name")
            continue
        sides = tuple(0 if side is None else _whole(side) for side in shape)  # none at all: the file has them
        if any(side != 0 for side in sides) and not all(side and side > 0 for side in sides):
            faults.add(f"image {key}", "an image needs a width and a height", f"got {shape[0]} and {shape[1]}")
            continue
        if key in images or key in joined:
            other = images[joined.get(key, key)].name
            faults.add(f"image {key}", "two images have this id", f"{other} and {name}")
            continue
        file, exact = finder.find(name)
        if not exact and foreign(file):
            file = folder / _plain(name)
        first = by_file.setdefault(os.path.normpath(file), key)
        size = None if not all(sides) else sides
        if first == key:
            images[key] = Listed(key, name, file, size, [])  # type: ignore[arg-type]
        elif _plain(images[first].name) != _plain(name) and not exact:
            # Another image has this file with better right.
            images[key] = Listed(key, name, folder / _plain(name), size, [])  # type: ignore[arg-type]
        elif size is not None and images[first].size not in (None, size):
            faults.add(f"image {key}", "it has the file of another image, but another size", f"{name}, image {first}")
        else:
            joined[key] = first
            faults.note(f"image {key}", "another image has the same file", f"{name}, image {first}",
                        "joined with it")
    return images, joined


def _plain(name: str) -> str:
    return os.path.normpath(name.replace("\\", "/"))


def _key(value: Any) -> int | str | None:
    """An id: a whole number, also of text or a float, or else text; None if it is neither."""
    whole = _whole(value)
    return whole if whole is not None else value if isinstance(value, str) and value else None


def _whole(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = number(value)
    return int(found) if found is not None and found.is_integer() else None


def _crowd(value: Any) -> bool | None:
    """``iscrowd`` as the tools write it; None if it cannot be told."""
    if value is None:
        return False
    value = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(value, Hashable):
        return None
    return True if value in YES else False if value in NO else None
