"""Which files are images and which their masks, in folders of one's own."""
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..runtime.folders import find_images, is_image, visible_files, visible_folders
from ..runtime.pixels import ARRAY
from ..runtime.say import say
from .reading import Faults
from .splits import split_folders, split_of

__all__ = ["Names", "Pair", "find_folders", "match"]

IMAGES = {"images", "image", "imgs", "img", "photos", "pictures", "jpegimages", "input", "inputs", "rgb", "original",
          "originals"}
MASKS = {"masks", "mask", "labels", "label", "annotations", "annotation", "annot", "ann", "gt", "groundtruth", "seg",
         "segs", "segmentation", "segmentations", "segmentationclass", "segmentationclasspng", "targets", "target",
         "masks_machine"}
_MASK = ("(?:gtfine_|gtcoarse_)?label(?:train)?ids|masks?|seg(?:s|mentations?)?|labels?|gt|ground_?truth|"
         "annot(?:ation)?s?|ann|targets?|matte|l|p")
_IMAGE = "leftimg8bit|images?|imgs?|photo|pic|rgb|sat|input|color"


class Pair(NamedTuple):
    """An image, its mask and the name of both."""

    name: str
    image: Path
    mask: Path | None  # None of an image without labels


class Names(NamedTuple):
    """How images and masks that belong together are called: ``*`` is what they have in common.

    Attributes:
        image: Such as ``*`` or ``img_*``; without ending.
        mask: Such as ``*_mask``; None tries what is usual.
    """

    image: str = "*"
    mask: str | None = None

    def check(self) -> "Names":
        """Itself; raises a ValueError for names without a ``*``."""
        for option, name in (("image_name", self.image), ("mask_name", self.mask)):
            if name is not None and name.count("*") != 1:
                raise ValueError(f"{option} must have one *, which stands for what an image and its mask have in "
                                 f"common, such as *_mask; got {name!r}")
        return self


def find_folders(
        root: Path, images: str | None = None, masks: str | None = None,
        known: bool = False) -> dict[str, tuple[Path, Path | None]]:
    """Folders of the images and masks of each split: those of ``train`` alone where there are no splits.

    The splits may be folders in those of the images and masks, or hold them, or lie side by side (``train``,
    ``train_masks``); images and masks may be in one folder.

    Args:
        root: The folder of all.
        images: The folder of the images in ``root``; None looks for it.
        masks: The folder of the masks.
        known: The classes are known, so that training images need not be there.

    Raises:
        FileNotFoundError: They cannot be found.
        ValueError: There are splits, but none to train on.
    """
    while True:
        if images is not None or masks is not None:
            own = root / images if images else _by_kind(root, IMAGES) or root / "images"
            theirs = root / masks if masks else _by_kind(root, MASKS) or root / "masks"
            for folder in (own, theirs):
                if not folder.is_dir():
                    raise FileNotFoundError(f"folder {folder} does not exist (image_folder and mask_folder)")
            return _inner_splits(own, theirs, known)
        pair = _by_kind(root, IMAGES), _by_kind(root, MASKS)
        if pair[0] and pair[1]:
            return _inner_splits(pair[0], pair[1], known)
        splits = split_folders(root)
        if splits:
            found = {split: _in_split(root, folder, split) for split, folder in splits.items()}
            if "train" not in found and not known:
                raise ValueError(f"{root} has a folder {next(iter(splits.values())).name} but no folder train")
            return found
        folders = [folder for folder in visible_folders(root) if any(map(is_image, visible_files(folder)))]
        itself = any(is_image(file) for file in visible_files(root) if file.parent == root)
        if itself and not pair[0]:
            return {"train": (root, pair[1] or root)}
        if len(folders) != 1 or itself or pair[0] or pair[1]:
            missing = "masks" if pair[0] else "images"
            raise FileNotFoundError(
                f"folder {root / missing} does not exist: expected images and masks in {root}, each with train and val "
                "(or the other way round); image_folder and mask_folder name other folders")
        say(f"{root} holds nothing but the folder {folders[0].name}: its content is read.")
        root = folders[0]


def match(folders: tuple[Path, Path | None], names: Names, faults: Faults) -> list[Pair]:
    """The images of a folder with their masks in another (or the same), in a fixed order; others go to ``faults``."""
    images, masks = folders
    if masks is None:
        return []
    found = [file for file in find_images(images) if masks == images or masks not in file.parents]
    others = found if masks == images else list(filter(_is_picture, find_images(masks)))
    if names.mask is not None or names.image != "*":
        ways: list[tuple[_Key, _Key]] = [(_template(names.image), _template(names.mask or "*"))]
    else:
        ways = [(str, str), (str.casefold, _stripped(_MASK)), (_stripped(_IMAGE), _stripped(_MASK))]
        ways = ways[1:] if masks == images else ways
    # The first of those that match the most.
    matches = [len(_matched(found, others, images, masks, way, Faults("", "skip"))[0]) for way in ways]
    used = matches.index(max(matches))
    pairs, lone_images, lone_masks = _matched(found, others, images, masks, ways[used], faults)
    if len(ways) > 1:  # not the user's names
        pairs = [pair._replace(name=pair.image.relative_to(images).with_suffix("").as_posix()) for pair in pairs]
    if not pairs and found and others:
        raise ValueError(f"no mask in {masks} has the name of an image in {images}: the first are {found[0].name} and "
                         f"{others[0].name}; set image_name and mask_name to how they are called, such as * and *_mask")
    if pairs and used and names == Names():
        say(f"Masks are matched to images by their names, such as {pairs[0].image.name} and "
                       f"{_name_of(pairs[0].mask)}.")
    for file in lone_images:
        faults.add(str(file), "the image has no mask", f"expected below {masks}")
    for file in lone_masks:
        faults.add(str(file), "the mask has no image", f"expected below {images}")
    return pairs


_Key = Callable[[str], str | None]  # of a file name without ending; None: it is not of the kind


def _matched(
        found: list[Path], others: list[Path], images: Path, masks: Path, way: tuple[_Key, _Key], faults: Faults,
) -> tuple[list[Pair], list[Path], list[Path]]:
    """Pairs, and the images and masks that have no partner."""
    image_key, mask_key = way
    if images == masks:  # a mask is what has another name as a mask than as an image
        others = [file for file in found if mask_key(file.stem) not in (None, image_key(file.stem))]
        found = [file for file in found if file not in set(others)]
    own, theirs = _keyed(found, images, image_key, faults), _keyed(others, masks, mask_key, faults)
    common = sorted(own.keys() & theirs.keys())
    lone_images = [own[key] for key in sorted(own.keys() - theirs.keys())]
    lone_masks = [theirs[key] for key in sorted(theirs.keys() - own.keys())]
    return [Pair(key, own[key], theirs[key]) for key in common], lone_images, lone_masks


def _keyed(files: list[Path], folder: Path, key: _Key, faults: Faults) -> dict[str, Path]:
    keyed: dict[str, Path] = {}
    for file in files:
        name = key(file.stem)
        if name is None:
            continue
        path = (PurePosixPath(file.relative_to(folder).as_posix()).parent / name).as_posix()
        if path in keyed:
            faults.add(str(file), "two files have the same name but for the extension", f"the other is {keyed[path]}")
        else:
            keyed[path] = file
    return keyed


def _template(name: str) -> _Key:
    before, _, after = name.partition("*")

    def key(stem: str) -> str | None:
        fits = stem.startswith(before) and stem.endswith(after) and len(stem) >= len(name) - 1
        return stem[len(before):len(stem) - len(after)] if fits else None

    return key


def _stripped(words: str) -> _Key:
    """A name without one of the words at its end or start and the ending of an image, regardless of capitals."""
    def key(stem: str) -> str:
        stem = without_ending(stem.casefold())
        end = re.fullmatch(rf"(.+?)[ _.-]+(?:{words})", stem)
        start = re.fullmatch(rf"(?:{words})(?:[ _.-]+|(?=\d))(.+)", stem)
        return without_ending(end[1] if end else start[1] if start else stem)

    def without_ending(stem: str) -> str:  # of photo.jpg.png, or photo.jpg_mask.png
        return stem.removesuffix(PurePosixPath(stem).suffix) if is_image(Path(stem)) else stem

    return key


def _by_kind(root: Path, kinds: set[str]) -> Path | None:
    """The one folder in ``root`` that is called so; of several the one that holds images."""
    found = [folder for folder in visible_folders(root)
             if kinds & {folder.name.lower(), re.sub(r"[ _.-]", "", folder.name.lower())}]
    if len(found) > 1:
        found = [folder for folder in found if any(map(_is_picture, visible_files(folder)))]
    return found[0] if len(found) == 1 else None


def _is_picture(file: Path) -> bool:
    """Whether a file can be a mask: an array, such as LabelMe leaves beside its masks, is none."""
    return is_image(file) and file.suffix.lower() != ARRAY


def _inner_splits(images: Path, masks: Path, known: bool) -> dict[str, tuple[Path, Path | None]]:
    """The splits in the folders of images and masks."""
    own, theirs = split_folders(images), split_folders(masks)
    if not own:
        return {"train": (images, masks)}
    if "train" not in own and not known:
        raise ValueError(f"{images} has a folder {next(iter(own.values())).name} but no folder train")
    return {split: (folder, _found(masks, split, theirs.get(split))) for split, folder in own.items()}


def _in_split(root: Path, folder: Path, split: str) -> tuple[Path, Path | None]:
    """Images and masks of a split that has a folder of its own."""
    pair = _by_kind(folder, IMAGES), _by_kind(folder, MASKS)
    if None not in pair:
        return pair  # type: ignore[return-value]
    for other in visible_folders(root):  # train_masks beside train
        words = re.sub(r"[ _.-]", "", other.name.lower())
        for kind in sorted(MASKS, key=len, reverse=True):
            if other != folder and kind in words and split_of(words.replace(kind, "", 1), alone=True) == split:
                return pair[0] or folder, other
    return pair[0] or folder, _found(folder, split, pair[1] or (folder if pair[0] is None else None))


def _found(place: Path, split: str, folder: Path | None) -> Path | None:
    if folder is None and split != "test":
        raise FileNotFoundError(f"folder {place / split} does not exist: the {split} images have no masks")
    if folder is None:
        say(f"The test images have no masks in {place}, so that there is nothing to measure there.")
    return folder


def _name_of(file: Path | None) -> str:
    return "" if file is None else file.name
