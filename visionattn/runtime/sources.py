"""What a predictor can be given: files, folders, patterns, lists, videos, pictures, arrays, tensors, many of them."""
import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from .inputs import Input, find_inputs
from .pictures import printable
from .pixels import Decoding
from .prepare import AnyImage
from .video import frames, is_video, webcam_of

__all__ = ["Item", "items_of", "opened", "shown", "with_frames"]

KINDS = ("a file, folder, pattern, list of files, video, Pillow image, array [height, width, 3] of uint8, tensor "
         "[3, height, width], or a list or generator of these")
LONGEST = 300  # characters of a name in a message


class Item(NamedTuple):
    """An image to look at.

    Attributes:
        file: What it is called where it is spoken of: its file, or its number.
        source: A path, a Pillow image or an array ``[H, W, channels]``; or a ValueError that says why there is none.
        named: What results are called, of images that a command named.
    """

    file: str
    source: Any
    named: Input | None = None


def items_of(source: Any) -> tuple[Literal["one", "many", "stream"], Iterator[Item]]:
    """The images of a source, and whether it is one, a known number, or as many as come.

    Raises:
        ValueError: It is nothing that can be looked at.
        FileNotFoundError: There is no such file.
    """
    if isinstance(source, (str, Path)) or (isinstance(source, int) and not isinstance(source, bool)):
        return _of_path(str(source))
    if isinstance(source, Image.Image):
        return "one", iter([Item("", source)])
    array = _array_of(source)
    if array is not None:
        if array.ndim == 4:
            return "many", (Item(f"image {index}", one) for index, one in enumerate(array))
        return "one", iter([Item("", array)])
    if isinstance(source, (list, tuple)):
        return "many", _of_each(source)
    if isinstance(source, Iterable) and not isinstance(source, (dict, set, bytes, bytearray)):
        return "stream", _of_each(source)
    raise ValueError(f"{type(source).__name__} is nothing that can be looked at: give {KINDS}")


def with_frames(inputs: Iterable[Input], max_pixels: int) -> Iterator[Item]:
    """The images that a command named, in place of each video its frames, called ``<video>/000001`` and so on."""
    for one in inputs:
        if not is_video(one.file):
            yield Item(str(one.file), one.file, one)
            continue
        try:
            for number, frame in enumerate(frames(one.file, max_pixels), start=1):
                file = one.file / f"{number:06d}"
                yield Item(str(file), frame, Input(file, f"{one.name}/{number:06d}", f"{one.stem}/{number:06d}"))
        except ValueError as error:
            yield Item(str(one.file), error, one)


def opened(item: Item, decoding: Decoding) -> AnyImage:
    """The image as models take it: in RGB or, of other channels than three, ``[channels, H, W]`` in [0, 1].

    Raises:
        ValueError: It cannot be used; the message says why, without its name.
    """
    source = item.source
    if isinstance(source, ValueError):
        raise source
    if isinstance(source, Path):
        return decoding.read(source) if decoding.channels == 3 else decoding.array(source)
    return decoding.picture(source) if isinstance(source, Image.Image) else decoding.values(source)


def shown(name: str) -> str:
    """A name as messages show it: on one line, its end cut off if it is long."""
    name = printable(name)
    return name if len(name) <= LONGEST else f"{name[:LONGEST]} ..."


def _of_path(name: str) -> tuple[Literal["one", "many", "stream"], Iterator[Item]]:
    if "://" in name:
        raise ValueError(f"{shown(name)} is a URL: download it and give the file")
    path = Path(name)
    try:
        path.lstat()
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError):
            raise ValueError(f"{shown(name)} cannot be opened: {getattr(error, 'strerror', error)}") from None
    if is_video(path) and (path.is_file() or webcam_of(name) is not None):
        return "stream", _frames_of(name)
    if path.is_dir() or path.suffix.lower() == ".txt" or (not path.exists() and glob.has_magic(name)):
        return "many", (item for one in find_inputs([name]) for item in _of_file(one.file))
    if not path.exists():
        raise FileNotFoundError(f"{shown(name)} does not exist")
    return "one", iter([Item(name, path)])


def _of_file(file: Path) -> Iterator[Item]:
    return _frames_of(str(file)) if is_video(file) else iter([Item(str(file), file)])


def _frames_of(name: str) -> Iterator[Item]:
    for item in with_frames([Input(Path(name), name, name)], Decoding().max_pixels):
        yield item._replace(named=None)


def _of_each(sources: Iterable[Any]) -> Iterator[Item]:
    for index, source in enumerate(sources):
        if isinstance(source, (list, tuple)):
            raise ValueError(f"image {index} is a {type(source).__name__}, not {KINDS}")
        try:
            _, items = items_of(source)
        except ValueError as error:
            raise ValueError(f"image {index}: {error}") from None
        for item in items:
            yield item if isinstance(item.source, Path) or item.file else item._replace(file=f"image {index}")


def _array_of(source: Any) -> np.ndarray | None:
    """An array with channels last, of a numpy array or a tensor (``[C, H, W]``, ``[H, W]`` or a batch)."""
    if isinstance(source, np.ndarray):
        return source
    if not all(hasattr(source, name) for name in ("detach", "cpu", "ndim", "is_floating_point")):
        return None
    tensor = source.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # numpy has no bfloat16
    array = tensor.numpy()
    return np.moveaxis(array, -3, -1) if array.ndim in (3, 4) else array
