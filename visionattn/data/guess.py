"""What kind of data a folder or file holds."""
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..runtime.folders import is_image, visible_files
from .mask_folders import IMAGES, MASKS
from .polygons import number
from .splits import split_of
from .table import find_tables

__all__ = ["DataKind", "guess_data"]

MASKED = re.compile(r".+[_-](?:masks?|seg(?:s|mentations?)?|labels?|labelids|gt)$", re.IGNORECASE)
LOOKED_AT = 200  # files of a kind whose content is looked at
HEAD = 1 << 20  # bytes of a JSON file that are looked at

Task = Literal["classification", "detection", "segmentation"]


class DataKind(NamedTuple):
    """What data are read by.

    Attributes:
        task: ``classification``, ``detection`` or ``segmentation``.
        module: Name of the class in ``visionattn.data``.
        arguments: For its constructor.
        why: What it was told by.
    """

    task: Task
    module: str
    arguments: dict[str, Any]
    why: str


def guess_data(path: str | Path, task: Task | None = None) -> DataKind:
    """Tells what a folder, a COCO file or YOLO's ``data.yaml`` holds, by its names and a look into some files.

    Args:
        path: The folder or file.
        task: What the data are for, where a folder could be for several, such as VOC's.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: No kind of data is known that it could be (for this task).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        kinds = _of_file(path)
    else:
        files = sorted(visible_files(path))
        images = [file for file in files if is_image(file)]
        kinds = [kind for kind in (_coco(path, files), _voc(path, files), _yolo(path, files, images),
                                   _masks(path, images), _table(path, images), _classes(path, images)) if kind]
    kinds = [kind for kind in kinds if task in (None, kind.task)]
    if not kinds:
        raise ValueError(f"{path} holds nothing {f'for {task} ' if task else ''}that is known: expected folders of "
                         "images, with annotations in COCO's, YOLO's or VOC's format or masks if there are any")
    return kinds[0]


def _of_file(file: Path) -> list[DataKind]:
    if file.suffix.lower() in (".yaml", ".yml"):
        return [DataKind("detection", "YoloData", {"root": str(file)}, f"{file.name} is a YAML file")]
    if file.suffix.lower() == ".json":
        return [DataKind("detection", "CocoData", {"root": str(file.parent), "train_annotations": file.name},
                         f"{file.name} is a JSON file")]
    if file.suffix.lower() in (".csv", ".tsv"):
        return [DataKind("classification", "CsvData", {"root": str(file)}, f"{file.name} is a table")]
    raise ValueError(f"{file} is neither a folder, nor COCO's JSON file, YOLO's data.yaml or a CSV table")


def _coco(root: Path, files: list[Path]) -> DataKind | None:
    foreign = None
    for file in _ending(files, ".json"):
        with file.open("rb") as opened:
            head = opened.read(HEAD)
        keys = {key for key in (b"images", b"annotations", b"categories", b"file_name", b"shapes", b"imagePath")
                if b'"%b"' % key in head}
        if {b"images", b"file_name"} <= keys or len(keys & {b"images", b"annotations", b"categories"}) == 3:
            return DataKind("detection", "CocoData", {"root": str(root)}, f"{file.name} is in COCO's format")
        if {b"shapes", b"imagePath"} <= keys:  # which CocoData refuses by its name
            foreign = DataKind("detection", "CocoData", {"root": str(root)}, f"{file.name} is in LabelMe's format")
    return foreign


def _voc(root: Path, files: list[Path]) -> DataKind | None:
    for file in _ending(files, ".xml"):
        with file.open("rb") as opened:
            head = opened.read(500).replace(b"\0", b"")
        if b"<annotation" in head:
            return DataKind("detection", "VocData", {"root": str(root)}, f"{file.name} is in VOC's format")
    return None


def _yolo(root: Path, files: list[Path], images: list[Path]) -> DataKind | None:
    for file in _ending(files, ".yaml", ".yml"):
        if file.parent == root and re.search(r"^(names|nc)\s*:", file.read_text(errors="replace"), re.MULTILINE):
            return DataKind("detection", "YoloData", {"root": str(file)}, f"{file.name} names classes")
    stems = {file.stem for file in images}
    for file in _ending(files, ".txt"):
        if file.stem in stems:
            with file.open(errors="replace") as opened:
                words = opened.readline(10_000).split()
            if len(words) >= 5 and all(number(word) is not None for word in words):
                return DataKind("detection", "YoloData", {"root": str(root)}, f"{file.name} is in YOLO's format")
    return None


def _masks(root: Path, images: list[Path]) -> DataKind | None:
    parts = [{part.lower() for part in file.relative_to(root).parts[:-1]} for file in images]
    layouts = {"cityscapes": ("leftimg8bit", "gtfine"), "voc": ("jpegimages", "segmentationclass")}
    # CVAT's masks look like VOC's and have classes and colours of their own.
    voc = (root / "ImageSets" / "Segmentation").is_dir() and not (root / "labelmap.txt").is_file()
    for layout, folders in layouts.items():
        if all(any(folder in names for names in parts) for folder in folders) and (
                layout == "cityscapes" or voc):
            return DataKind("segmentation", "SegmentationFolderData", {"root": str(root), "layout": layout},
                            f"it has the folders {' and '.join(folders)}")
    plain = {"root": str(root)}
    masks = sum(bool(names & MASKS) for names in parts)
    if masks and any(names & IMAGES for names in parts) and masks >= 0.2 * len(images):
        return DataKind("segmentation", "SegmentationFolderData", plain, "it has folders of images and of masks")
    named = [file for file in images if MASKED.fullmatch(file.stem)]
    if named and len(named) >= 0.4 * len(images):
        return DataKind("segmentation", "SegmentationFolderData", plain, f"{named[0].name} has the name of a mask")
    return None


def _table(root: Path, images: list[Path]) -> DataKind | None:
    tables = find_tables(root)
    folders = {file.parent for file in images if file.parent != root}
    classes = [folder for folder in folders
               if not split_of(folder.name, alone=True) and folder.name.lower() not in IMAGES]
    if not tables or len(classes) > 1:  # images in class folders, with a table about them
        return None
    return DataKind("classification", "CsvData", {"root": str(root)}, f"{tables[0].name} lists images and labels")


def _classes(root: Path, images: list[Path]) -> DataKind | None:
    if not images:
        return None
    return DataKind("classification", "ImageFolderData", {"root": str(root)}, "it holds images without annotations")


def _ending(files: Iterable[Path], *endings: str) -> list[Path]:
    return [file for file in files if file.suffix.lower() in endings][:LOOKED_AT]
