"""Detection data in PASCAL VOC's XML format, with its files wherever people put them."""
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from ..runtime.pixels import MAX_PIXELS
from ..runtime.say import say
from .detection import SHARES, DetectionData, Finder, Listed, Thing, split_of_path, walk
from .polygons import number
from .reading import Faults
from .splits import split_of

__all__ = ["Annotated", "Annotation", "VocData", "image_of", "listed_names", "read_annotation"]


class VocData(DetectionData):
    """Images with boxes in PASCAL VOC's format: an XML file for each image.

    XML files and images may lie in ``Annotations`` and ``JPEGImages``, beside each other, or in any other folders
    below ``root``. An image is found by the name of its XML file or by ``filename``, with or without its ending.
    Corners count pixels from 1 and belong to the box, as VOC has it; they may be floats. Objects marked difficult
    become crowds: they neither train nor count in evaluation. Files may be in any encoding that they name.

    Splits are the lists ``train.txt``, ``val.txt`` and ``test.txt`` in ``ImageSets/Main``, ``ImageSets`` or ``root``,
    or else the folders of these names, in any usual spelling. Without validation images a fifth of the training images
    validates; without test images testing uses the validation images; both are said. Classes are all names of
    objects, sorted.

    Args:
        root: Folder of the data.
        predict_root: Folder whose images, at any depth, ``predict`` runs over; the test images if None.
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
        on_error: What to do with an object or file that cannot be used. ``raise``: stop and name it. ``skip``: leave it
            out (cut a box that reaches out of its image) and say how many there were of each kind; every image is
            decoded once for this.
        verify: False leaves out the check of the image files.
        orientation: What boxes refer to where a file has an EXIF orientation and the XML's size does not tell:
            ``seen``, the picture as viewers and labelling tools show it, or ``stored``, as it lies in the file.
        value_range: Of images of more than 8 bits: ``type``, ``file`` or the two values that are black and white.
        max_pixels: Largest image that is decoded.
        min_batches: Least number of training batches of an epoch: where there are fewer, it goes through the images
            several times, each time changed at random anew.
        class_names: The classes in the order of their labels; None takes them from the data. Evaluation takes them from
            the checkpoint, so that the training data need not be there.
        in_chans: Channels of the images: 3 as a viewer shows them, 1 in grey, or the bands of the files (4 of RGBA
            files; see ``visionattn.runtime.pixels``).

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The message names the file and the object.
    """

    def __init__(
            self,
            root: str = "data/voc",
            predict_root: str | None = None,
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
            root, predict_root, False, batch_size, num_workers, seed, train_sizes, max_size, hflip, large_scale_jitter,
            on_error, verify, orientation, value_range, max_pixels, min_batches, class_names, in_chans, detr_crops)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{root} does not exist; data.init_args.root must be a folder with VOC's XML "
                                    "files, such as Annotations/*.xml and JPEGImages/*.jpg")
        self._finder = Finder(self.root)
        self._annotations: dict[Path, Annotation | str] = {}  # or why a file cannot be read
        for file in walk(self.root, [".xml"]):
            try:
                self._annotations[file] = read_annotation(file)
            except ValueError as error:
                self._annotations[file] = str(error)
        if not self._annotations:
            raise ValueError(f"{root} holds no XML files of VOC's format")
        self._splits = self._listed_splits() or self._found_splits()
        names = sorted({thing.name for found in self._annotations.values() if isinstance(found, Annotation)
                        for thing in found.things if thing.name})
        if not names:
            fault = next((found for found in self._annotations.values() if isinstance(found, str)), None)
            raise ValueError(fault or f"{root} has no object whose class could be taken")
        self._refuse_unknown(names, root)
        names = self.known or names
        self.class_names, self.category_ids = names, list(range(1, len(names) + 1))
        self.num_classes = len(names)

    def _has(self, split: str) -> bool:
        return bool(self._splits.get(split))

    def _source(self, split: str) -> str:
        return f"{self.root} ({split})"

    def _listed(self, split: str, faults: Faults) -> list[Listed]:
        images: dict[str, Listed] = {}
        for file in self._splits[split]:
            found = self._annotations.get(file, f"{file} does not exist, but a list has it")
            if isinstance(found, str):
                faults.add(f"annotation file {file.name}", "it cannot be read", found)
                continue
            image = image_of(file, found.filename, self._finder)
            other = images.get(str(image))
            if other is not None:
                faults.add(f"annotation file {file.name}", "another one has the same image", other.name)
                continue
            things = []
            for place, thing in enumerate(found.things, start=1):
                what = f"{file}, object {place}"
                if thing.fault:
                    faults.add(what, thing.fault, thing.name)
                else:
                    things.append(Thing(what, self.class_names.index(thing.name) + 1, thing.box, crowd=thing.difficult))
            name = image.relative_to(self.root).as_posix() if image.is_relative_to(self.root) else str(image)
            images[str(image)] = Listed(len(images) + 1, name, image, found.size, things)
        return list(images.values())

    def _listed_splits(self) -> dict[str, list[Path]]:
        """The XML files of each split that lists of names say."""
        by_stem: dict[str, list[Path]] = {}
        for file in self._annotations:
            by_stem.setdefault(file.stem, []).append(file)
        for folder in (self.root / "ImageSets" / "Main", self.root / "ImageSets", self.root):
            lists = {file.stem.lower(): file for file in sorted(folder.glob("*.txt"))}
            splits = {split: file for name, file in lists.items() if (split := split_of(name, alone=True))}
            if "train" not in splits and "trainval" in lists:
                splits["train"] = lists["trainval"]
            if splits:
                return {split: [
                    file for name in listed_names(listing)
                    for file in by_stem.get(name, by_stem.get(PurePosixPath(name).stem, [self.root / f"{name}.xml"]))]
                    for split, listing in splits.items()}
        return {}

    def _found_splits(self) -> dict[str, list[Path]]:
        """The XML files by the split that a folder is called after; all train where none is."""
        found: dict[str, list[Path]] = {}
        for file in self._annotations:
            found.setdefault(split_of_path(file, self.root) or "", []).append(file)
        rest = found.pop("", [])
        if "train" not in found:
            found["train"] = rest
        elif rest:
            say(f"{self.root}: {len(rest)} XML files in no folder of a split are not read, such as "
                           f"{rest[0]}.")
        return found


class Annotated(NamedTuple):
    """An object of an XML file."""

    name: str
    fault: str  # why it cannot be used
    box: list[float]  # left, top, width, height, from 0
    difficult: bool


class Annotation(NamedTuple):
    """What an XML file says about an image."""

    filename: str  # may be empty
    size: tuple[int, int] | None  # width and height
    things: list[Annotated]


def listed_names(listing: Path) -> list[str]:
    """The first word of each line."""
    lines = listing.read_text("utf-8-sig", errors="surrogateescape").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def image_of(file: Path, filename: str, finder: Finder) -> Path:
    """The image of an XML file: of its own name, or else of the one in it; the nearest, and of no other split."""
    named = PurePosixPath(filename.replace("\\", "/")).name
    split = split_of_path(file, finder.folder) if file.is_relative_to(finder.folder) else None
    whole = [image for image in (finder.ending_in(PurePosixPath(named)) if named else []) if image.stem == file.stem]
    for found in (whole, finder.ending_in(PurePosixPath(f"{file.stem}.jpg")),
                  finder.ending_in(PurePosixPath(named)) if named else []):
        found = [image for image in found if split_of_path(image, finder.folder) in (None, split) or split is None]
        if found:
            near = [len(Path(os.path.commonpath([image, file])).parts) for image in found]
            return found[near.index(max(near))]
    return finder.folder / (named or f"{file.stem}.jpg")


def read_annotation(file: Path) -> Annotation:
    """What an XML file says, with objects that cannot be used marked as such."""
    tree = _parse(file)
    if tree.tag != "annotation":
        raise ValueError(f"{file} is not in VOC's format: it has <{tree.tag}> in place of <annotation>"
                         + ("; export from CVAT as COCO, VOC or YOLO" if tree.tag == "annotations" else ""))
    size, sides = tree.find("size"), None
    if size is not None:
        sides = _side(size, "width", file), _side(size, "height", file)
    return Annotation((tree.findtext("filename") or "").strip(), sides if sides and all(sides) else None,
                      [_object(thing) for thing in tree.findall("object")])


def _object(thing: ET.Element) -> Annotated:
    name, box = (thing.findtext("name") or "").strip(), thing.find("bndbox")
    difficult = (thing.findtext("difficult") or "").strip().lower() in ("1", "1.0", "true", "yes")
    if not name:
        return Annotated(name, "it has no <name>", [], difficult)
    if box is None:
        return Annotated(name, "it has no <bndbox>", [], difficult)
    corners = []
    for edge in ("xmin", "ymin", "xmax", "ymax"):
        text = (box.findtext(edge) or "").strip()
        corner = number(text)
        if corner is None:
            return Annotated(name, f"it has <{edge}> {text!r}, which is not a number", [], difficult)
        corners.append(corner)
    left, top, right, bottom = corners
    if min(corners) >= 0 and max(corners) <= 1 and not all(corner.is_integer() for corner in corners):
        return Annotated(name, SHARES, [], difficult)
    inverted = right < left or bottom < top  # of no width, not of one pixel more than that
    return Annotated(name, "", [left - 1, top - 1, 0. if inverted else right - left + 1, bottom - top + 1], difficult)


def _side(size: ET.Element, tag: str, file: Path) -> int:
    text = (size.findtext(tag) or "").strip()
    found = number(text)
    if found is None or found < 0 or not found.is_integer():
        raise ValueError(f"{file}: <{tag}> is {text!r}, not a number of pixels")
    return int(found)


def _parse(file: Path) -> ET.Element:
    """The tree of an XML file in whatever encoding it names."""
    content = file.read_bytes()
    try:
        try:
            return ET.fromstring(content)
        except (ET.ParseError, ValueError, LookupError) as error:
            # Expat knows few encodings by itself.
            named = re.match(rb"""\s*<\?xml[^>]*encoding\s*=\s*["']([\w.:-]+)["'][^>]*\?>""", content[:300])
            if named is None:
                raise
            try:
                text = content[named.end():].decode(named[1].decode())
            except (LookupError, UnicodeDecodeError):
                raise error from None
            return ET.fromstring(text)
    except (ET.ParseError, ValueError, LookupError, RecursionError) as error:
        raise ValueError(f"{file} is not XML: {error}") from error
