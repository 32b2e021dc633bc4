"""Training images that are decoded once: kept in one file, which every loader process of this machine maps."""
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image

from ..runtime.pixels import Decoding
from ..runtime.say import say
from .reading import find_faults, read_image

__all__ = ["DecodedImages", "decoded_images"]

TIMES = 2  # of the training size: images whose shorter side is longer than that are shrunk to it


class DecodedImages:
    """Images in RGB by their number, out of a file that :func:`decoded_images` wrote."""

    def __init__(self, path: Path, index: "_Index"):
        self.path, self.index = path, index
        self._pixels: np.ndarray | None = None

    def __getitem__(self, number: int) -> Image.Image:
        """The image, which shares the memory of the file."""
        if self._pixels is None:  # each process maps the file by itself
            self._pixels = np.memmap(self.path, np.uint8, mode="r")
        start, (height, width) = self.index.starts[number], self.index.sizes[number]
        return Image.fromarray(self._pixels[start:start + 3 * height * width].reshape(height, width, 3))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}


def decoded_images(
        folder: Path, files: Sequence[Any], image_size: int, decoding: Decoding, hint: str) -> DecodedImages:
    """The images of ``files``, decoded into a file in ``folder`` unless it is there from before.

    An image whose shorter side is longer than twice ``image_size`` is shrunk to that (Lanczos). What is kept belongs to
    these files with their sizes and times, to ``image_size`` and ``decoding``: where one of them is another, it is made
    anew. Of several processes one makes it and the others wait.

    Args:
        folder: Where it is kept; made if it is not there.
        files: Paths, or what opens like one (:class:`visionattn.data.packed.Member`).
        image_size: Height and width that images are trained at, in pixels.
        decoding: How they are decoded, to three channels.
        hint: What the user can do about a file that cannot be read.

    Raises:
        OSError: There is no room for it.
        ValueError: A file cannot be read as an image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    longest = TIMES * image_size
    key = _key(files, longest, decoding)
    path = folder / f"{key}.rgb"
    with FileLock(folder / f"{key}.lock"):
        index = _Index.read(path.with_suffix(".json"))
        if index is None or not path.is_file() or path.stat().st_size != index.length:
            index = _write(path, files, longest, decoding, hint)
    return DecodedImages(path, index)


class _Index(NamedTuple):
    """Where images are, in bytes, and their heights and widths."""

    starts: list[int]
    sizes: list[tuple[int, int]]

    @classmethod
    def of(cls, sizes: Iterable[tuple[int, int]]) -> "_Index":
        """The index of images that follow one another."""
        sizes = list(sizes)
        ends = np.cumsum([3 * height * width for height, width in sizes], dtype=np.int64).tolist()
        return cls([0, *ends[:-1]], sizes)

    @classmethod
    def read(cls, path: Path) -> "_Index | None":
        """That of a file; None if it is not there or not whole."""
        try:
            return cls.of([(int(height), int(width)) for height, width in json.loads(path.read_text())])
        except (OSError, ValueError, TypeError):
            return None

    @property
    def length(self) -> int:
        """Bytes of all images."""
        height, width = self.sizes[-1]
        return self.starts[-1] + 3 * height * width


def _key(files: Sequence[Any], longest: int, decoding: Decoding) -> str:
    digest = hashlib.sha256(repr((longest, decoding)).encode())
    for file in files:
        stat = (file if isinstance(file, Path) else file.archive).stat()
        digest.update(repr((str(file), getattr(file, "offset", 0), stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def _write(path: Path, files: Sequence[Any], longest: int, decoding: Decoding, hint: str) -> _Index:
    """Decodes on several threads, in the order of the files; what is there is whole or has another name."""
    sizes = [look.size or (longest, longest) for look in find_faults(decoding.look, files)]
    wanted = sum(3 * width * height for width, height in (_shrunk(size, longest) for size in sizes))
    free = shutil.disk_usage(path.parent).free
    if wanted > 0.9 * free:
        raise OSError(f"{path.parent} has no room for the {len(files)} decoded images: they take {wanted / 2**30:.1f} "
                      f"GiB, and {free / 2**30:.1f} GiB are free; name another cache_dir, or leave it out")
    say(f"Decoding the {len(files)} training images once, into {path} ({wanted / 2**20:.0f} MiB).")

    def decode(file: Any) -> np.ndarray:
        image = read_image(file, hint, decoding)
        size = _shrunk(image.size, longest)
        return np.asarray(image if size == image.size else image.resize(size, Image.Resampling.LANCZOS))

    part, shapes = path.with_suffix(".part"), []
    try:
        with part.open("wb") as out, ThreadPoolExecutor() as pool:
            for pixels in _in_order(pool, decode, files):
                out.write(np.ascontiguousarray(pixels).data)
                shapes.append(pixels.shape[:2])
        path.with_suffix(".json").write_text(json.dumps(shapes))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return _Index.of(shapes)


def _in_order(pool: ThreadPoolExecutor, decode: Any, files: Sequence[Any], ahead: int = 64) -> Iterator[np.ndarray]:
    """Results in the order of the files; not more than ``ahead`` wait in memory."""
    rest = iter(files)
    waiting = [pool.submit(decode, file) for file in islice(rest, ahead)]
    while waiting:
        yield waiting.pop(0).result()
        waiting.extend(pool.submit(decode, file) for file in islice(rest, 1))


def _shrunk(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Width and height of an image whose shorter side is ``longest`` at most."""
    factor = min(1.0, longest / min(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
