"""Detection data in YOLO's format: a text file beside each image, and ``data.yaml``."""
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from ..runtime.folders import EXTENSIONS, visible_folders
from ..runtime.pixels import ENDINGS, MAX_PIXELS
from ..runtime.say import say
from .detection import DetectionData, Finder, Listed, Thing, split_of_path, walk
from .polygons import number
from .reading import Faults
from .splits import split_of

__all__ = ["YoloData"]

PIXELS = ("its lengths look like pixels, where shares of the image, from 0 to 1, are expected: divide them by the "
          "image's width and height")
NAMES = ("classes.txt", "obj.names", "names.txt", "labels.txt", "_darknet.labels", "predefined_classes.txt")
NO_LABELS = {"train", "val", "valid", "test", "trainval", "readme", "requirements", "notes",
             *(PurePosixPath(name).stem for name in NAMES)}  # stems of text files that belong to no image
SPLIT_NAMES = ("train", "val", "test")


class YoloData(DetectionData):
    """Images with boxes or polygons in YOLO's format.

    A label file has a line for each object: its class, counted from 0, and centre, width and height of its box or the
    corners of its polygon, all as shares of the image's width and height. It has the name of its image and lies beside
    it or, for an image in a folder ``images``, in the folder ``labels`` there; an image without one is empty. The box
    of a polygon is that around it; with ``masks`` every object needs a polygon. Of key points (``kpt_shape``) the boxes
    are read.

    ``data.yaml`` (or another YAML file that has ``names``) says the classes and where the images of ``train``, ``val``
    and ``test`` are: folders, text files that list images, or several of them, relative to its ``path``, to its own
    folder or to ``root``. Without it the splits are the folders of these names in any usual spelling (``images/train``
    or ``train/images``, ``valid``, ...) or the lists ``train.txt`` and ``val.txt``, and the classes are those of
    ``classes.txt`` or ``obj.names``. Without validation images a fifth of the training images validates; without test
    images testing uses the validation images; both are said.

    Label ``i`` (from 1) is the class ``category_ids[i - 1]`` of the label files.

    Args:
        root: Folder of the data, or its YAML file.
        predict_root: Folder whose images, at any depth, ``predict`` runs over; the test images if None.
        masks: Targets have instance masks, of polygons.
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
        on_error: What to do with a line or file that cannot be used. ``raise``: stop and name it. ``skip``: leave it
            out (cut a box that reaches out of its image) and say how many there were of each kind; every image is
            decoded once for this.
        verify: False leaves out what only a check of all image files can tell.
        orientation: What boxes and polygons refer to where a file has an EXIF orientation: ``seen``, the picture as
            viewers and labelling tools show it, or ``stored``, as it lies in the file.
        value_range: Of images of more than 8 bits: ``type``, ``file`` or the two values that are black and white.
        max_pixels: Largest image that is decoded.
        min_batches: Least number of training batches of an epoch: where there are fewer, it goes through the images
            several times, each time changed at random anew.
        class_names: The classes in the order of their labels; None takes them from the data. Evaluation takes them from
            the checkpoint, so that the training data need not be there.
        in_chans: Channels of the images: 3 as a viewer shows them, 1 in grey, or the bands of the files (4 of RGBA
            files; see ``visionattn.runtime.pixels``).

    Raises:
        FileNotFoundError: A file or folder does not exist.
        ValueError: The message names the file and the line.
    """

    def __init__(
            self,
            root: str = "data/yolo",
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
        if not self.root.exists():
            raise FileNotFoundError(f"{root} does not exist; data.init_args.root must be a folder in YOLO's format, "
                                    "with data.yaml, images and labels")
        self._config: Path | None = self.root if self.root.is_file() else None
        self.root = self.root.parent if self._config else _unwrapped(self.root)
        self._config = self._config or _find_config(self.root)
        content = {} if self._config is None else _read_yaml(self._config)
        if self._config and not _empty(content.get("path")):
            path = Path(os.path.normpath(self._config.parent / str(content["path"]).replace("\\", "/")))
            self.root = path if path.is_dir() else self.root
        self._finder = Finder(self.root)
        self._texts = _by_path(self.root)
        self._owners: dict[Path, tuple[str, Path]] = {}  # split and image that a label file was first read for
        self._key_points = _key_points(content)
        self._splits = self._listed_splits(content) or self._found_splits()
        if not any(self._splits.values()):
            raise ValueError(f"{self.root} holds no images ({EXTENSIONS})")
        names = _names(content, self._config) or self._names_in_files()
        self._refuse_unknown(names.values(), self._config or self.root)
        lacking = next((name for name in self.known if name not in names.values()), None)
        if lacking is not None:
            raise ValueError(f"{self._config or self.root} has no class {lacking!r}, which is one of the classes")
        self.category_ids = [next(key for key, name in sorted(names.items()) if name == one) for one in self.known]
        self._labels: dict[int, int] = {}  # of the numbers in the label files
        for index, name in sorted(names.items()):
            if name not in self.class_names:
                self.category_ids.append(index)
                self.class_names.append(name)
            elif name not in self.known:
                say(f"{self._config or self.root}: two classes are called {name!r}: they are one class.")
            self._labels[index] = self.class_names.index(name) + 1
        self.num_classes = len(self.class_names)

    def _has(self, split: str) -> bool:
        return bool(self._splits.get(split))

    def _source(self, split: str) -> str:
        return f"{self._config or self.root} ({split})"

    def _listed(self, split: str, faults: Faults) -> list[Listed]:
        images, used = [], set()
        for image_id, file in enumerate(self._splits[split], start=1):
            name = file.relative_to(self.root).as_posix() if file.is_relative_to(self.root) else str(file)
            labels = self._label_file(file, split)
            things: list[Thing] = []
            if labels is None:
                faults.note(f"image {name}", "it has no label file", remedy="taken as empty")
            elif not {split, file} & set(self._owners.setdefault(labels, (split, file))):
                faults.add(f"image {name}", "its label file is that of an image of another split", str(labels))
                continue
            else:
                used.add(labels)
                things = self._things(labels, faults)
            images.append(Listed(image_id, name, file, None, things))
        there = next((image for image in images if image.file.is_file()), None)
        if not used and there:
            name = there.name
            raise ValueError(f"{self._source(split)}: no image has a label file; expected one of the name of the image "
                             f"in labels/ or beside the image, such as {_expected(PurePosixPath(name))} for {name}")
        if split == "train" or not self._has("train"):
            self._note_unused(used, faults)
        return images

    def _note_unused(self, used: set[Path], faults: Faults) -> None:
        """Takes note of label files in the folders of the ``used`` ones that belong to no image of any split."""
        folders = {file.parent for file in used}
        known = used | {self._label_file(file, other) for other, files in self._splits.items() for file in files}
        for file in self._texts.values():
            if file.parent in folders and file not in known and file.stem.lower() not in NO_LABELS:
                faults.note(f"label file {file}", "there is no image for it", remedy="not used")

    def _things(self, file: Path, faults: Faults) -> list[Thing]:
        """The objects of a label file."""
        things, lines = [], set()
        for place, line in enumerate(file.read_text("utf-8-sig", errors="replace").splitlines(), start=1):
            first, *rest = line.split() or [""]
            if not first or line.strip().startswith("#"):
                continue
            what, values = f"{file}, line {place}", [number(value) for value in rest]
            index = number(first)
            label = self._labels.get(int(index)) if index is not None and index.is_integer() else None
            if label is None and first in self.class_names:
                label = self.class_names.index(first) + 1
            if label is None:
                faults.add(what, "its class is not in the list of classes",
                           f"class {first[:50]}, the classes are {_shown(self.category_ids)}")
            elif None in values:
                faults.add(what, "it holds something else than numbers", line.strip()[:80])
            elif len(values) != 4 + self._key_points and (len(values) < 6 or len(values) % 2 or self._key_points):
                faults.add(what, "it is neither a box (class and 4 numbers) nor a polygon (class and 3 points or more)",
                           f"{len(values)} numbers after the class")
            elif max(map(abs, values)) > 2:  # type: ignore[arg-type]
                faults.add(what, PIXELS, line.strip()[:80])
            elif tuple(line.split()) in lines:
                faults.note(what, "it is the same as a line before")
            else:
                lines.add(tuple(line.split()))
                things.append(_thing(what, label, values, self._key_points))  # type: ignore[arg-type]
        return things

    def _label_file(self, image: Path, split: str) -> Path | None:
        """The label file of an image: in ``labels`` for ``images``, beside it, or the only one of its name."""
        if image.is_relative_to(self.root):
            parts = image.relative_to(self.root).with_suffix("").parts
            for place in reversed(range(len(parts) - 1)):
                if parts[place].lower() in ("images", "image", "imgs", "img", "jpegimages", "data", "obj_train_data"):
                    for folder in ("labels", "label", "annotations"):
                        found = self._texts.get(_spelled(*parts[:place], folder, *parts[place + 1:]))
                        if found:
                            return found
            for places in (parts, (*parts[:-1], "labels", parts[-1]), ("labels", *parts), ("labels", split, parts[-1]),
                           ("labels", parts[-1])):
                if _spelled(*places) in self._texts and not (places == parts and parts[-1].lower() in NO_LABELS):
                    return self._texts[_spelled(*places)]
        elif (beside := image.with_suffix(".txt")).is_file():
            return beside
        else:  # outside of root: images there are for labels there
            parts = image.with_suffix(".txt").parts
            for place in reversed(range(len(parts) - 1)):
                if parts[place].lower() == "images":
                    there = Path(*parts[:place], "labels", *parts[place + 1:])
                    return there if there.is_file() else None
        return None

    def _listed_splits(self, content: dict[str, Any]) -> dict[str, list[Path]]:
        """The images of each split that the YAML file, or lists in ``root``, name."""
        splits: dict[str, list[Path]] = {}
        for key, value in content.items():
            split = split_of(str(key), alone=True)
            if split and not _empty(value):
                if split in splits:
                    raise ValueError(f"{self._config} names two splits for {split}")
                files: dict[Path, None] = {}
                for place in value if isinstance(value, list) else [value]:
                    path = self._place(str(place))
                    if path is None and (split == "test" or self.known):
                        say(f"{self._config}: {place} does not exist ({key}): there are no {split} images.")
                    elif path is None:
                        raise FileNotFoundError(f"{self._config}: {place} does not exist ({key}); it is looked for in "
                                                f"{self.root}")
                    else:
                        files |= dict.fromkeys(self._images_of(path, split))
                splits[split] = list(files)
        if not content:
            for file in sorted(self.root.glob("*.txt")):
                split = split_of(file.stem, alone=True)
                if split:
                    splits[split] = self._images_of(file, split)
        for split in ("train", "val"):
            if split in splits and not splits[split] and not self.known:
                raise ValueError(f"{self._config or self.root}: there are no images for {split} ({EXTENSIONS})")
        return splits

    def _place(self, value: str) -> Path | None:
        """The file or folder that a YAML file means, from wherever it was written."""
        parts = PurePosixPath(value.replace("\\", "/")).parts
        for folder in (self.root, self._config.parent if self._config else self.root):
            path = folder.joinpath(*parts)
            if path.exists() and (path.is_dir() or path.suffix.lower() == ".txt"):
                return path
        for start in range(1, len(parts)):  # of another machine, or ../train/images where train/images is meant
            if split_of(parts[start - 1], alone=True):
                break  # without it, it would be the images of all splits
            path = self.root.joinpath(*parts[start:])
            if ".." not in parts[start:] and path.exists():
                return path
        return None

    def _images_of(self, path: Path, split: str) -> list[Path]:
        """The images in a folder, or those that a text file lists."""
        if path.is_dir():
            return walk(path, ENDINGS)
        files = []
        for line in path.read_text("utf-8-sig", errors="surrogateescape").splitlines():
            if line.strip():
                beside = path.parent / line.strip()
                file, exact = (beside, True) if beside.is_file() else self._finder.find(line.strip())
                of_other = not exact and split_of_path(file, self.root) not in (None, split)
                files.append(beside if of_other else file)
        return list(dict.fromkeys(files))

    def _found_splits(self) -> dict[str, list[Path]]:
        """The images by the split that a folder is called after; all train where none is."""
        found: dict[str, list[Path]] = {}
        for file in walk(self.root, ENDINGS):
            found.setdefault(split_of_path(file, self.root) or "", []).append(file)
        rest = found.pop("", [])
        if "train" not in found and not rest and found and not self.known:
            raise ValueError(f"{self.root} has images for {' and '.join(found)}, but none to train on")
        if "train" not in found:
            found["train"] = rest
        elif rest:
            say(f"{self.root}: {len(rest)} images in no folder of a split are not read, such as {rest[0]}.")
        return found

    def _names_in_files(self) -> dict[int, str]:
        """The classes where no YAML file says them: of a file of names, or the numbers in the label files."""
        for name in NAMES:
            for file in walk(self.root, [name]):
                if file.name.lower() == name:
                    lines = file.read_text("utf-8-sig", errors="replace").splitlines()
                    return {index: line.strip() for index, line in enumerate(lines) if line.strip()}
        numbers: set[int] = set()
        for split, files in self._splits.items():
            for image in files:
                labels = self._label_file(image, split)
                lines = [] if labels is None else labels.read_text("utf-8-sig", errors="replace").splitlines()
                found = [number(line.split()[0]) for line in lines if line.split()]
                numbers |= {int(value) for value in found if value is not None and value >= 0 and value.is_integer()}
        if not numbers:
            raise ValueError(f"{self.root} has no data.yaml or classes.txt with the names of the classes, and no label "
                             "file with an object")
        say(f"{self.root} has no data.yaml or classes.txt with the names of the classes: they are called "
                       f"{_shown(sorted(numbers))}.")
        return {value: str(value) for value in numbers}


def _thing(what: str, label: int, values: list[float], key_points: int) -> Thing:
    if len(values) == 4 + key_points:
        x, y, w, h = values[:4]
        return Thing(what, label, [x - w / 2, y - h / 2, w, h], shares=True)
    return Thing(what, label, None, [values], shares=True)


def _unwrapped(root: Path) -> Path:
    """The folder in ``root``, where it holds nothing else."""
    inside = visible_folders(root)
    if len(inside) == 1 and not any(entry.is_file() and not entry.name.startswith(".") for entry in root.iterdir()) \
            and split_of(inside[0].name, alone=True) is None and inside[0].name.lower() not in ("images", "labels"):
        say(f"{root} holds the folder {inside[0].name} alone: that is read.")
        return _unwrapped(inside[0])
    return root


def _find_config(root: Path) -> Path | None:
    """``data.yaml`` or the only YAML file in ``root`` that names classes or splits."""
    files = sorted(file for ending in ("yaml", "yml") for file in root.glob(f"*.{ending}") if file.is_file())
    first = [file for file in files if file.stem.lower() in ("data", "dataset")]
    if len(first) == 1:
        return first[0]
    good = [file for file in files if {"names", "train"} & set(map(str, _read_yaml(file)))]
    if len(good) > 1:
        raise ValueError(f"{root} has several YAML files that could describe it: "
                         f"{', '.join(file.name for file in good)}; name one by root")
    return good[0] if good else None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text("utf-8-sig"), Loader=yaml.BaseLoader)  # makes text alone
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a YAML file of YOLO's format: it has no keys")
    return content


def _names(content: dict[str, Any], file: Path | None) -> dict[int, str]:
    """The names of the classes by their number in the label files; none where the YAML file does not say them."""
    names, count = content.get("names"), content.get("nc")
    if _empty(names):
        names = [str(index) for index in range(int(number(count) or 0))]
    if isinstance(names, dict):
        keys = {number(key): key for key in names}
        if any(key is None or not key.is_integer() or key < 0 for key in keys):
            raise ValueError(f"{file}: the keys of names must be the numbers of the classes, got {_shown(list(names))}")
        found = {int(key): names[text] for key, text in keys.items()}  # type: ignore[arg-type]
    elif isinstance(names, list):
        found = dict(enumerate(names))
    else:
        raise ValueError(f"{file}: names must be a list of names, or numbers with names")
    if not all(isinstance(name, str) and name for name in found.values()):
        raise ValueError(f"{file}: names has something that is no name")
    if not _empty(count) and number(count) != len(found):
        raise ValueError(f"{file}: nc is {count}, but names has {len(found)}")
    return found


def _key_points(content: dict[str, Any]) -> int:
    """How many numbers of a line are key points."""
    shape = content.get("kpt_shape")
    sides = [number(side) for side in shape] if isinstance(shape, list) else []
    return int(sides[0] * sides[1]) if len(sides) == 2 and sides[0] and sides[1] else 0


def _by_path(root: Path) -> dict[str, Path]:
    """The text files below ``root`` by their path without ending, in lower case."""
    return {_spelled(*file.relative_to(root).with_suffix("").parts): file for file in walk(root, [".txt"])}


def _spelled(*parts: str) -> str:
    return "/".join(parts).casefold()


def _expected(name: PurePosixPath) -> PurePosixPath:
    parts = ["labels" if part == "images" else part for part in name.with_suffix(".txt").parts]
    return PurePosixPath(*parts)


def _empty(value: Any) -> bool:
    return value in (None, "", "null", "~", "None", [], {})


def _shown(values: Iterable[Any]) -> str:
    shown = [str(value) for value in values]
    return ", ".join(shown[:10]) + (f", ... ({len(shown)} in all)" if len(shown) > 10 else "")
