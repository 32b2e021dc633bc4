"""Images in folders, one folder a class: the layout of ImageNet and of most people's own data."""
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Literal

from ..runtime.folders import EXTENSIONS, is_image, is_visible, only_images, visible_files, visible_folders
from ..runtime.pixels import MAX_PIXELS
from ..runtime.say import say
from .classification import ClassificationData, Sample
from .reading import Faults
from .report import shortened
from .splits import hold_out, split_folders, split_of

__all__ = ["ImageFolderData"]


class ImageFolderData(ClassificationData):
    """Classification images in ``root/{train,val,test}/<class>/**/*.jpg``.

    The splits may be spelled in any usual way (``Train``, ``training``, ``valid``, ``dev``, ``testing``, ...), and a
    folder that holds nothing but one folder is looked into. The classes are the folders of ``train``, in sorted order.
    Where there is no ``val``, ``val_fraction`` of every class of ``train`` is taken for it; ``root/<class>/*.jpg``,
    without ``train``, is read as training images. Where there is no ``test``, testing uses the validation images. All
    of this is said when it happens. Hidden files and those of operating systems are not looked at, and links are
    followed once. Augmentation and evaluation crops are timm's (``timm.data.create_transform``); files are decoded as
    ``visionattn.runtime.pixels`` says.

    Args:
        root: The folder with the images.
        image_size: Height and width of the images, in pixels.
        batch_size: Images per batch and device.
        num_workers: Loader processes.
        seed: Order of the training images and random numbers of the loader's processes.
        val_fraction: Share of every class that validates where there is no ``val`` folder. The choice is fixed: it
            does not depend on ``seed``.
        on_bad_image: An earlier form of ``on_error``: ``error`` or ``skip``.
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
        mean: Of the channels in [0, 1], for normalisation; None for ImageNet's, or 0.5 where ``in_chans`` is not 3.
        std: The same.
        on_error: What to do with a file that cannot be read as an image. ``raise``: stop and name it (every header is
            checked before training; a file that is cut off is found when it is loaded). ``skip``: decode every file
            once before training and leave out, with a count and the names, those that fail.
        classes: The class folders, as paths in the folder of the split, such as ``[cat, dog]`` or ``[animals/cat]``;
            None takes all, and asks where it is not clear which folders are classes.
        value_range: Of images of more than 8 bits: ``type``, ``file`` or the two values that are black and white.
        max_pixels: Largest image that is decoded.
        min_batches: Least number of training batches of an epoch: where there are fewer, it goes through the images
            several times, each time changed at random anew.
        in_chans: Channels of the images: 3 as a viewer shows them, 1 in grey, or the bands of the files (4 of RGBA
            files; see ``visionattn.runtime.pixels``).
        balanced_sampling: Draw training images so that every class comes equally often.
        repeats: Times that an epoch shows an image, each time changed at random anew, and so many fewer images
            (repeated augmentation, arXiv 1902.05509). Copies go to different devices.
        cache_dir: Folder in which training images are kept decoded (their shorter side twice ``image_size`` at most),
            so that one run alone decodes them, before its first epoch. None decodes in every epoch.
        class_names: The classes in the order of their labels; None takes them from the data. Evaluation takes them from
            the checkpoint, so that the training data need not be there.

    Raises:
        FileNotFoundError: ``root`` or ``predict_root`` does not exist.
        ValueError: No class folders or only one, a class without images, a validation or test class that training does
            not have, folders of which it is not clear whether they are classes, a file that is not an image.
    """

    def __init__(
            self,
            root: str,
            image_size: int = 224,
            batch_size: int = 64,
            num_workers: int = 4,
            seed: int = 0,
            val_fraction: float = 0.2,
            on_bad_image: Literal["error", "skip"] | None = None,
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
            mean: tuple[float, ...] | None = None,
            std: tuple[float, ...] | None = None,
            on_error: Literal["raise", "skip"] = "raise",
            classes: list[str] | None = None,
            value_range: Literal["type", "file"] | tuple[float, float] = "type",
            max_pixels: int = MAX_PIXELS,
            min_batches: int = 1,
            in_chans: int = 3,
            balanced_sampling: bool = False,
            repeats: int = 1,
            cache_dir: str | None = None,
            class_names: list[str] | None = None,
    ):
        if on_bad_image not in (None, "error", "skip"):
            raise ValueError(f"on_bad_image must be error or skip, got {on_bad_image!r}")
        super().__init__(
            root, image_size, batch_size, num_workers, seed, verify, predict_root, scale, hflip, color_jitter,
            auto_augment, random_erasing, interpolation, train_interpolation, crop_pct, mean, std,
            "skip" if on_bad_image == "skip" else on_error, value_range, max_pixels, min_batches, in_chans,
            balanced_sampling, repeats, cache_dir)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        self.val_fraction, self.given = val_fraction, bool(classes)
        self.root, self.folders = _find_splits(Path(root), classes, bool(class_names))
        self.classes = {split: _class_folders(folder, classes) for split, folder in self.folders.items()}
        self.known = bool(class_names)
        self.class_names = class_names or list(self.classes["train"])
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            raise ValueError(f"{self.folders['train']} has one class only, {self.class_names[0]}: there is nothing to "
                             f"tell apart; expected {self.folders['train']}/<class>/*.jpg with two classes or more")
        for split in self.folders:
            if split != "train" or class_names:
                self._match_classes(split)

    def _list_split(self, split: str) -> None:
        if split == "test" and "test" not in self.folders:
            say(f"There is no test folder in {self.root}: the validation images are used.")
            self.setup("validate")
            self.samples["test"] = self.samples["val"]
            return
        held_out = split != "test" and "val" not in self.folders
        source = "train" if held_out else split
        if source not in self.folders:
            raise ValueError(f"{self.root} has no folder {source}, whose images are needed")
        faults = Faults(self.folders[source], self.on_error)
        samples = self._find_samples(source, faults)
        listed = {split: samples}
        if held_out:
            listed["train"], listed["val"] = self._hold_out(samples)
        self._keep(listed, source, faults)

    def _find_samples(self, split: str, faults: Faults) -> list[Sample]:
        """The images of a split that can be used, class by class."""
        folder = self.folders[split]
        owners: dict[Path, str | None] = {path: name for name, path in self.classes[split].items()}
        owners[folder] = owners.get(folder)
        files: dict[str | None, list[Path]] = {name: [] for name in [None, *self.class_names]}
        for file in only_images(sorted(visible_files(folder)), folder):
            files[_owner(file.parent, owners)].append(file)
        if not self.given:
            for file in files[None]:
                faults.note(str(file), "it is in no class folder")
        if files[None]:
            say(f"{folder} has {len(files[None])} images outside of its class folders, such as "
                           f"{files[None][0].name}: they are not read.")
        for name in self.class_names:
            if not files[name] and split == "train":
                raise ValueError(f"class folder {self.classes[split][name]} holds no images ({EXTENSIONS})")
            if not files[name]:
                say(f"{folder} has no images of the class {name!r}: nothing is measured for it.")
        good = set(self._check_files([file for name in self.class_names for file in files[name]], faults))
        for name in self.class_names:
            if split == "train" and not good.intersection(files[name]):
                raise ValueError(f"class folder {self.classes[split][name]} holds no readable image")
        if not good:
            raise ValueError(f"{folder} holds no images that can be used ({EXTENSIONS})")
        return [(file, label) for label, name in enumerate(self.class_names) for file in files[name] if file in good]

    def _hold_out(self, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        images = Counter(label for _, label in samples)
        for label, name in enumerate(self.class_names):
            if images[label] < 2:
                raise ValueError(f"class folder {self.folders['train'] / name} holds a single image: "
                                 "too few to hold some out for validation; add images or make a val folder")
        train, val = hold_out(samples, self.val_fraction)
        say(f"There is no val folder beside the images of {self.folders['train']}: "
                       f"{len(train)} of them train and {len(val)} validate.")
        return train, val

    def _match_classes(self, split: str) -> None:
        """Gives the class folders of a split the names that they have in training."""
        names = {_folded(name): name for name in self.class_names}
        matched = {}
        for name, path in self.classes[split].items():
            own = name if name in self.class_names else names.get(_folded(name))
            if own is None or own in matched:
                others = "is not among those that were trained:" if self.known else (
                    f"{self.folders['train']} does not have; it has")
                raise ValueError(f"{path} is a class that {others} {shortened(self.class_names)}")
            matched[own] = path
        self.classes[split] = matched


def _find_splits(root: Path, classes: list[str] | None, known: bool) -> tuple[Path, dict[str, Path]]:
    """The folder that holds the splits, or the classes, and the folders of the splits; that itself without splits.

    Where the classes are ``known``, training images need not be there.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"image folder {root} does not exist; data.init_args.root must be a folder with "
                                "train/<class>/*.jpg and val/<class>/*.jpg, or <class>/*.jpg")
    while True:
        if classes and all((root / name).is_dir() for name in classes):
            return root, {"train": root}
        folders = visible_folders(root)
        named = _with_like_splits(root, split_folders(root))
        others = [folder.name for folder in folders if folder not in named.values() and _has_images(folder)]
        if "train" in named and visible_folders(named["train"]):
            break
        if known and any(_has_images(folder) for folder in named.values()):
            named = {split: folder for split, folder in named.items() if visible_folders(folder)}
            break
        if named:
            name = next(iter(named.values())).name
            if "train" not in named:
                raise ValueError(f"{root} has a folder {name} but no folder train: put the training images into "
                                 f"{root / 'train'}/<class>{_or_classes(name)}")
            beside = f" beside {shortened(others)}" if others else ""
            raise ValueError(f"{root / name}{beside} holds no class folders: expected {root / name}/<class>/*.jpg"
                             f"{_or_classes(name)}")
        filled = [folder for folder in folders if _has_images(folder)]
        if len(filled) != 1 or _has_images_itself(root) or not _filled_folders(filled[0]):
            return root, {(split_of(root.name, alone=True) if known else None) or "train": root}
        say(f"{root} holds nothing but the folder {filled[0].name}: its content is read.")
        root = filled[0]
    if others:
        say(f"{root} has the folders {shortened(others)} beside its splits: they are not read.")
    if "test" in named and not visible_folders(named["test"]):
        say(f"{named['test']} holds no class folders, so that there is nothing to measure there.")
        del named["test"]
    names = {_folded(folder.name) for folder in visible_folders(named["train"])} if "train" in named else set()
    for split, folder in named.items():
        inner = _filled_folders(folder)
        while (len(inner) == 1 and not classes and not _has_images_itself(folder) and _filled_folders(inner[0])
               and (split == "train" or _folded(inner[0].name) not in names)):
            say(f"{folder} holds nothing but the folder {inner[0].name}: its content is read.")
            named[split] = folder = inner[0]
            inner = _filled_folders(folder)
            if split == "train":
                names = {_folded(entry.name) for entry in inner}
    return root, named


def _with_like_splits(root: Path, named: dict[str, Path]) -> dict[str, Path]:
    """Adds folders such as ``train_small`` that speak of a split and hold the classes that another holds."""
    holds = {folder: {_folded(entry.name) for entry in _filled_folders(folder)} for folder in visible_folders(root)}
    others = [folder for folder in holds
              if folder not in named.values() and split_of(folder.name) not in (None, *named)]
    found = dict(named)
    for folder in others:
        split = split_of(folder.name)
        others_hold = set().union(*(holds[other] for other in [*named.values(), *others] if other != folder))
        if split is not None and len(holds[folder] & others_hold) > 1:
            if split in found:
                raise ValueError(f"{root} has two folders for the split {split}: {found[split].name} and "
                                 f"{folder.name}; put their files together, or move one of them away")
            found[split] = folder
            say(f"{folder} is taken as the {split} split.")
    return found


def _class_folders(folder: Path, classes: list[str] | None) -> dict[str, Path]:
    """The class folders of a split by name.

    Raises:
        ValueError: There are none, or it is not clear which they are.
    """
    if classes:
        found = {name: folder / name for name in classes if (folder / name).is_dir()}
        if not found:
            raise ValueError(f"{folder} holds none of the folders that classes names: {shortened(classes)}")
        return found
    found = {entry.name: entry for entry in visible_folders(folder)}
    if not found:
        raise ValueError(f"{folder} holds no class folders: expected {folder}/<class>/*.jpg")
    for name, entry in found.items():
        for place in (entry, *visible_folders(entry)):
            if split_of(place.name, alone=True):
                raise ValueError(f"{place} looks like a split inside the classes of {folder}: move it out as "
                                 f"<split>/<class>{_or_classes(name)}")
    flat = [name for name, entry in found.items() if _has_images_itself(entry)]
    deep = [name for name, entry in found.items() if name not in flat and len(_filled_folders(entry)) > 1]
    if flat and deep:
        inner = [entry.name for entry in _filled_folders(found[deep[0]])]
        raise ValueError(f"the classes of {folder} are at two depths: {flat[0]} holds images, {deep[0]} only folders "
                         f"({shortened(inner)}): put all classes at one depth{_or_classes(deep[0])}")
    names = {tuple(_folded(entry.name) for entry in _filled_folders(found[name])) for name in deep}
    if len(deep) > 1 and len(deep) == len(found) and len(names) == 1:
        inner = [entry.name for entry in _filled_folders(found[deep[0]])]
        raise ValueError(f"all folders of {folder} hold the same folders ({shortened(inner)}): if those are the "
                         f"classes, put the images of each together, or call {shortened(deep)} train and val; if "
                         f"{shortened(deep)} are, list them by data.init_args.classes")
    if deep:
        inner = [entry.name for entry in _filled_folders(found[deep[0]])]
        say(f"{folder / deep[0]} holds the folders {shortened(inner)}: all their images are of the class "
                       f"{deep[0]}; for other classes set classes to their paths, such as {deep[0]}/{inner[0]}.")
    return found


def _owner(folder: Path, owners: dict[Path, str | None]) -> str | None:
    """The class that a folder is in; ``owners`` holds the class folders and the split's, and learns the others."""
    if folder not in owners:
        owners[folder] = _owner(folder.parent, owners)
    return owners[folder]


def _or_classes(name: str) -> str:
    return f", or list the class folders by data.init_args.classes if {name} is one"


def _filled_folders(folder: Path) -> list[Path]:
    return [entry for entry in visible_folders(folder) if _has_images(entry)]


def _has_images(folder: Path) -> bool:
    """Whether there is an image at any depth."""
    return any(map(is_image, visible_files(folder)))


def _has_images_itself(folder: Path) -> bool:
    return any(is_image(file) and is_visible(file.name) for file in folder.iterdir())


def _folded(name: str) -> str:
    """A name regardless of capitals and of how a system writes accents."""
    return unicodedata.normalize("NFC", name).casefold().strip()
