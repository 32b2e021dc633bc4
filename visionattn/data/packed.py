"""Images that are packed: in tar files, in WebDataset's shards or in a data set of Hugging Face's ``datasets``."""
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple

from ..runtime.folders import is_image
from ..runtime.pixels import MAX_PIXELS
from ..runtime.say import say
from .classification import ClassificationData, Sample
from .reading import Faults
from .report import shortened
from .splits import hold_out, split_of

__all__ = ["PackedData"]

NAMES = "classnames.txt"  # of WebDataset's shards: a class a line, in the order of the numbers


class Member(NamedTuple):
    """An image in a tar file, which stands where the others have a path; any process may open it."""

    archive: Path
    name: str
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        """The ending of its name."""
        return PurePosixPath(self.name).suffix

    def open(self, mode: str = "rb") -> BinaryIO:
        """Its bytes."""
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))

    def exists(self) -> bool:
        """Whether the tar file is still there."""
        return self.archive.exists()

    def is_file(self) -> bool:
        """Whether the tar file is still there."""
        return self.archive.is_file()

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"


class Row(NamedTuple):
    """An image in a data set of Hugging Face's; it stands where the others have a path."""

    dataset: Any
    column: str
    number: int
    split: str

    @property
    def suffix(self) -> str:
        """Nothing: what it is its bytes say."""
        return ""

    def open(self, mode: str = "rb") -> BinaryIO:
        """Its bytes."""
        image = self.dataset[self.number][self.column]
        if not image or not (image["bytes"] or image["path"]):
            raise ValueError("it is empty")
        return io.BytesIO(image["bytes"]) if image["bytes"] else open(image["path"], "rb")

    def exists(self) -> bool:
        """True: rows do not vanish."""
        return True

    def is_file(self) -> bool:
        """True: rows do not vanish."""
        return True

    def __str__(self) -> str:
        return f"{self.split}[{self.number}]"


class PackedData(ClassificationData):
    """Classification images in few large files: the formats of data sets that have millions of them.

    ``tar``: plain tar files; an image's class is the folder in which it lies there. ``wds``: WebDataset's shards, in
    which ``0001.jpg`` and ``0001.cls`` (a number from 0 on) or ``0001.json`` (with ``label``) are of one image; the
    classes' names are the lines of a file ``classnames.txt`` beside the shards, if it is there. ``hfds``: a folder that
    ``datasets`` saved, one with its Parquet, Arrow or CSV files, or the name of a data set on its hub.

    Tar files are taken for the split that their name or folder speaks of: ``train-00001.tar``, ``val/0.tar``. Where
    there are no validation images ``val_fraction`` of every class of the training images is taken, always the same;
    where there are no test images testing uses those of the validation. All of this is said.

    Every image is found by its place, so that epochs are shuffled as a whole and the same in every run, a run goes on
    where it stopped, and several processes evaluate every image once. Tar files must thus lie on a disk.

    Args:
        root: The folder with the tar files, a tar file, or what ``datasets`` is to load.
        format: ``tar``, ``wds`` or ``hfds``.
        image_size: Height and width of the images, in pixels.
        batch_size: Images per batch and device.
        num_workers: Loader processes.
        seed: Order of the training images and random numbers of the loader's processes.
        val_fraction: Share of every class that validates where there are no validation images.
        verify: True reads every image's header before training.
        predict_root: Folder whose images, at any depth, ``predict`` runs over; the test images if None.
        scale: Smallest and largest share of a training image that its random crop covers.
        hflip: Probability of a mirrored training image.
        color_jitter: Strength of random brightness, contrast and saturation where there is no ``auto_augment``.
        auto_augment: timm's policy, such as ``rand-m9-mstd0.5-inc1``, or None.
        random_erasing: Probability that a training image has a random rectangle replaced by noise.
        interpolation: Of evaluation images: ``bilinear`` or ``bicubic``.
        train_interpolation: Of training images: ``bilinear``, ``bicubic`` or ``random``.
        crop_pct: Share of the resized evaluation image that its centre crop keeps.
        mean: Of the channels in [0, 1], for normalisation; None for ImageNet's, or 0.5 where ``in_chans`` is not 3.
        std: The same.
        on_error: ``raise`` or ``skip``: what to do with an image that cannot be read.
        value_range: Of images of more than 8 bits: ``type``, ``file`` or the two values that are black and white.
        max_pixels: Largest image that is decoded.
        min_batches: Least number of training batches of an epoch.
        in_chans: Channels of the images.
        balanced_sampling: Draw training images so that every class comes equally often.
        image_column: Of ``hfds``: the column of the images; None takes the only one there is.
        label_column: Of ``hfds``: the column of the labels; None takes the only one of classes, or ``label``.
        class_names: The classes in the order of their labels; None takes them from the data.
        repeats: Times that an epoch shows an image, each time changed at random anew, and so many fewer images.
        cache_dir: Folder in which training images are kept decoded (their shorter side twice ``image_size`` at most),
            so that one run alone decodes them, before its first epoch. None decodes in every epoch.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        ImportError: ``hfds`` needs the package ``datasets``.
        ValueError: No tar files, or compressed ones; images without a class, one class only, unknown classes.
    """

    def __init__(
            self,
            root: str,
            format: Literal["tar", "wds", "hfds"],
            image_size: int = 224,
            batch_size: int = 64,
            num_workers: int = 4,
            seed: int = 0,
            val_fraction: float = 0.2,
            verify: bool = False,
            predict_root: str | None = None,
            scale: tuple[float, float] = (0.08, 1.0),
            hflip: float = 0.5,
            color_jitter: float = 0.4,
            auto_augment: str | None = "rand-m9-mstd0.5-inc1",
            random_erasing: float = 0.25,
            interpolation: str = "bicubic",
            train_interpolation: str = "random",
            crop_pct: float = 0.875,
            mean: tuple[float, ...] | None = None,
            std: tuple[float, ...] | None = None,
            on_error: Literal["raise", "skip"] = "raise",
            value_range: Literal["type", "file"] | tuple[float, float] = "type",
            max_pixels: int = MAX_PIXELS,
            min_batches: int = 1,
            in_chans: int = 3,
            balanced_sampling: bool = False,
            image_column: str | None = None,
            label_column: str | None = None,
            class_names: list[str] | None = None,
            repeats: int = 1,
            cache_dir: str | None = None,
    ):
        super().__init__(
            root, image_size, batch_size, num_workers, seed, verify, predict_root, scale, hflip, color_jitter,
            auto_augment, random_erasing, interpolation, train_interpolation, crop_pct, mean, std, on_error,
            value_range, max_pixels, min_batches, in_chans, balanced_sampling, repeats, cache_dir)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        self.root, self.val_fraction = root, val_fraction
        if format == "hfds":
            if cache_dir is not None:
                raise ValueError("cache_dir keeps images of files, and format is hfds: leave it out")
            self.source: Any = _Rows(root, image_column, label_column)
        elif format in ("tar", "wds"):
            self.source = _Tars(Path(root), _shard_images if format == "wds" else _tar_images)
        else:
            raise ValueError(f"format must be tar, wds or hfds, got {format!r}")
        self.class_names = list(class_names or self.source.class_names or self._count_classes())
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            raise ValueError(f"{root} has one class only: there is nothing to tell apart")

    def _count_classes(self) -> list[str]:
        """The classes of the training images: the names of their folders, or the numbers up to the largest."""
        labels = {label for _, label in self.source.images("train")}
        if any(isinstance(label, str) for label in labels):
            return sorted(labels)
        return [str(number) for number in range(max(labels) + 1)]

    def _list_split(self, split: str) -> None:
        there = self.source.splits
        if split == "test" and "test" not in there:
            say(f"There are no test images in {self.root}: the validation images are used.")
            self.setup("validate")
            self.samples["test"] = self.samples["val"]
            return
        held_out = split != "test" and "val" not in there
        source = "train" if held_out else split
        faults = Faults(self.root, self.on_error)
        samples = self._labelled(source)
        good = set(self._check_files([file for file, _ in samples], faults))
        samples = [sample for sample in samples if sample[0] in good]
        if not samples:
            raise ValueError(f"{self.root} holds no images of the split {source} that can be used")
        listed = {split: samples}
        if held_out:
            listed["train"], listed["val"] = self._hold_out(samples)
        self._keep(listed, source, faults)

    def _labelled(self, split: str) -> list[Sample]:
        """The images of a split with the numbers of their classes."""
        numbers = {name: number for number, name in enumerate(self.class_names)}
        samples = []
        for file, label in self.source.images(split):
            number = numbers.get(label) if isinstance(label, str) else label
            if number is None or not 0 <= number < self.num_classes:
                raise ValueError(f"{file} is of the class {label}, which the training images do not have; they have "
                                 f"{shortened(self.class_names)}")
            samples.append((file, number))
        return samples

    def _hold_out(self, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        images = Counter(label for _, label in samples)
        few = [self.class_names[label] for label, count in images.items() if count < 2]
        if few:
            raise ValueError(f"class {few[0]} of {self.root} has a single image: too few to hold some out for "
                             "validation; add images or a split for validation")
        train, val = hold_out(samples, self.val_fraction)
        say(f"There are no validation images in {self.root}: {len(train)} of the training images train and {len(val)} "
            "validate.")
        return train, val


class _Tars:
    """The tar files of each split, and what ``read`` finds in them."""

    class_names: list[str] | None = None

    def __init__(self, root: Path, read: Callable[[list[Path]], Iterator[tuple[Member, Any]]]):
        if not root.exists():
            raise FileNotFoundError(
                f"{root} does not exist; data.init_args.root must be a tar file or a folder of them")
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*.tar*") if path.is_file())
        packed = [path for path in files if path.suffix != ".tar"]
        if packed:
            raise ValueError(f"{packed[0]} is no plain tar file: images are found by their place in it, so unpack it "
                             "to a .tar (images are compressed as they are)")
        if not files:
            raise ValueError(f"{root} holds no tar files")
        self.splits: dict[str, list[Path]] = {}
        for file in files:
            split = split_of(file.stem) or (file.parent != root and split_of(file.parent.name, alone=True)) or "train"
            self.splits.setdefault(split, []).append(file)
        self.root, self._read, self._found = root, read, {}  # type: ignore[var-annotated]
        names = (root if root.is_dir() else root.parent) / NAMES
        if read is _shard_images and names.is_file():
            self.class_names = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]

    def images(self, split: str) -> list[tuple[Member, Any]]:
        """The images of a split with their labels, in the order of the files."""
        if split not in self.splits:
            raise ValueError(f"{self.root} has no tar file of the split {split}, whose images are needed")
        if split not in self._found:
            self._found[split] = list(self._read(self.splits[split]))
            if not self._found[split]:
                raise ValueError(f"{self.splits[split][0]} holds no images")
        return self._found[split]


class _Rows:
    """The splits of a data set of Hugging Face's."""

    def __init__(self, root: str, image_column: str | None, label_column: str | None):
        try:
            import datasets
        except ImportError as error:
            raise ImportError("format hfds needs the package datasets: pip install datasets") from error
        folder = Path(root)
        saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
        try:
            found: Any = datasets.load_from_disk(root) if saved else datasets.load_dataset(root)
        except Exception as error:  # of many kinds, by what is amiss
            raise ValueError(f"datasets cannot load {root}: {' '.join(str(error).split())[:300]}") from error
        parts = found if isinstance(found, dict) else {"train": found}
        self.splits = {split_of(name, alone=True) or name: part for name, part in parts.items()}
        if "train" not in self.splits:
            raise ValueError(f"{root} has no split train; it has {shortened(list(parts))}")
        features = self.splits["train"].features
        self.image = _column(root, "image_column", image_column, features,
                             lambda feature: isinstance(feature, datasets.Image))
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        wanted = label_column or (None if len(classes) == 1 else "label" if "label" in features else None)
        self.label = _column(root, "label_column", wanted, features,
                             lambda feature: isinstance(feature, datasets.ClassLabel))
        self.class_names = list(getattr(features[self.label], "names", None) or []) or None
        self.splits = {name: part.cast_column(self.image, datasets.Image(decode=False))
                       for name, part in self.splits.items()}

    def images(self, split: str) -> list[tuple[Row, Any]]:
        """The images of a split with their labels."""
        if split not in self.splits:
            raise ValueError(f"the data set has no split {split}; it has {shortened(list(self.splits))}")
        part = self.splits[split]
        return [(Row(part, self.image, number, split), label) for number, label in enumerate(part[self.label])]


def _column(root: str, option: str, wanted: str | None, features: Any, fits: Callable[[Any], bool]) -> str:
    """The column that is ``wanted``, or the only one that ``fits``."""
    found = [name for name, feature in features.items() if fits(feature)] if wanted is None else [wanted]
    if len(found) != 1 or found[0] not in features:
        raise ValueError(f"{root} has the columns {shortened(list(features))}: say which it is by "
                         f"data.init_args.{option}")
    return found[0]


def _members(archive: Path) -> Iterator[Member]:
    """The files in a tar file."""
    try:
        with tarfile.open(archive, "r:") as opened:
            for entry in opened:
                hidden = PurePosixPath(entry.name).name.startswith(".")
                if entry.isfile() and not hidden:
                    yield Member(archive, entry.name, entry.offset_data, entry.size)
    except tarfile.TarError as error:
        raise ValueError(f"{archive} cannot be read as a tar file: {error}") from error


def _tar_images(archives: list[Path]) -> Iterator[tuple[Member, str]]:
    """Images of tar files; their class is the folder, less what all of them have in common."""
    members = [member for archive in archives for member in _members(archive) if is_image(Path(member.name))]
    parents = [PurePosixPath(member.name).parent.as_posix() for member in members]
    if not parents:
        return
    common = os.path.commonpath(parents)
    for member, parent in zip(members, parents, strict=True):
        name = os.path.relpath(parent, common or ".")
        if name == ".":
            raise ValueError(f"{member} lies in no folder of a class: with format tar an image's class is its folder "
                             "(WebDataset's shards are format wds)")
        yield member, name


def _shard_images(archives: list[Path]) -> Iterator[tuple[Member, int]]:
    """Images of WebDataset's shards with their numbers of classes."""
    for archive in archives:
        samples: dict[str, dict[str, Member]] = {}
        for member in _members(archive):
            path = PurePosixPath(member.name)
            key, _, ending = path.name.partition(".")
            samples.setdefault(str(path.parent / key), {})[ending.lower()] = member
        for key, parts in samples.items():
            images = [member for member in parts.values() if is_image(Path(member.name))]
            if images:
                yield images[0], _shard_label(archive, key, parts)


def _shard_label(archive: Path, key: str, parts: dict[str, Member]) -> int:
    try:
        if "cls" in parts:
            return int(parts["cls"].open().read())
        return int(json.loads(parts["json"].open().read())["label"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{archive}: {key} has no class: its .cls must hold a number, or its .json one as label"
                         ) from None
