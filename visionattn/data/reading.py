"""Files and records that cannot be used: found, named, counted. Shared by the data modules that read folders."""
import filecmp
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ..runtime.pixels import AS_SEEN, Decoding, Look
from ..runtime.say import say

__all__ = ["Faults", "check_images", "decoding_fault", "find_faults", "header_fault", "read_image", "read_tensor",
           "result_names", "say_shared", "shared_files"]

UNREADABLE = "the file cannot be read as an image"
SEVERAL = "it has several frames or pages"

LISTED = 10_000  # faults that are kept to be listed one by one

Found = TypeVar("Found")


class Faults:
    """What is wrong with the records of one source: an error at the first of them, or a count of all.

    Args:
        source: The file or folder that the records are in.
        on_error: ``raise`` or ``skip``.
    """

    def __init__(self, source: str | Path, on_error: Literal["raise", "skip"]):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be raise or skip, got {on_error!r}")
        self.source, self.skip = source, on_error == "skip"
        self.kinds: Counter[tuple[str, str]] = Counter()
        self.first: dict[tuple[str, str], str] = {}
        self.listed: list[tuple[str, str, str]] = []  # which, what is wrong, what became of it
        self.more = 0  # how many are not listed

    def add(self, record: str, kind: str, detail: str = "", remedy: str = "left out") -> None:
        """Takes note of one fault.

        Args:
            record: Which record of the source.
            kind: What is wrong, in the same words for all records with this fault.
            detail: The particulars of this one.
            remedy: What becomes of it.

        Raises:
            ValueError: Faults are not to be skipped.
        """
        said = f"{record}: {kind}" + (f" ({detail})" if detail else "")
        if not self.skip:
            raise ValueError(f"{self.source}: {said}; correct it, or set on_error to skip")
        self.note(record, kind, detail, remedy)

    def note(self, record: str, kind: str, detail: str = "", remedy: str = "left out") -> None:
        """Takes note of what is no reason to stop, whatever ``on_error`` says; the arguments are those of ``add``."""
        said = f"{record}: {kind}" + (f" ({detail})" if detail else "")
        self.kinds[kind, remedy] += 1
        self.first.setdefault((kind, remedy), said)
        if len(self.listed) < LISTED:
            self.listed.append((f"{record} ({detail})" if detail else record, kind, remedy))
        else:
            self.more += 1

    def report(self) -> None:
        """Says how many records were left out and why."""
        for (kind, remedy), count in self.kinds.items():
            say(f"{self.source}: {count} {remedy}: {kind}; the first is {self.first[kind, remedy]}")


def result_names(files: list[Path], folder: Path) -> list[str]:
    """Names for what is made of files below ``folder``: their paths in it, without extension where that is unique."""
    whole = [file.relative_to(folder) for file in files]
    count = Counter(str(path.with_suffix("")).lower() for path in whole)
    names = [path if count[str(path.with_suffix("")).lower()] > 1 else path.with_suffix("") for path in whole]
    if len({str(name).lower() for name in names}) < len(names):  # as with a.jpg, a.png and a.jpg.png
        names = whole
    return [name.as_posix() for name in names]


def find_faults(check: Callable[..., Found], *records: Iterable) -> list[Found]:
    """What ``check`` finds in every record (several iterables: in its parts), on several threads."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(check, *records))


def shared_files(these: Iterable[Path], others: Iterable[Path]) -> list[Path]:
    """Those of ``these`` that are among ``others`` too, under the same or another name.

    Files of one length are compared by their last 16 KiB, where a compressed image has its pixels, then as a whole.
    """
    lengths: dict[int, list[Path]] = {}
    for file in others:
        lengths.setdefault(_length(file), []).append(file)
    ends: dict[int, dict[bytes, list[Path]]] = {}
    found = []
    for file in these:
        length = _length(file)
        if length <= 0 or length not in lengths:
            continue
        if length not in ends:
            ends[length] = {}
            for other in lengths[length]:
                ends[length].setdefault(_end(other), []).append(other)
        if any(filecmp.cmp(file, other, shallow=False) for other in ends[length].get(_end(file), [])):
            found.append(file)
    return found


def say_shared(split: str, these: list[Path], train: list[Path]) -> None:
    """Warns with the count of the images of ``split`` that are training images too."""
    shared = shared_files(these, train)
    if shared:
        say(f"Warning: {len(shared)} of {len(these)} {split} images are training images too, such as "
                       f"{shared[0]}: what is measured on them is better than on new images.")


def read_image(file: Path, hint: str, decoding: Decoding = AS_SEEN) -> Image.Image:
    """An image in RGB, as a viewer shows it.

    Args:
        file: The image.
        hint: What the user can do about a file that cannot be read.
        decoding: How it is decoded.

    Raises:
        ValueError: The file cannot be read as an image.
    """
    try:
        return decoding.read(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as an image: {error}; {hint}") from error


def read_tensor(file: Path, hint: str, decoding: Decoding = AS_SEEN) -> Tensor:
    """The same as a tensor ``[channels, H, W]``: uint8 of three channels, float32 in [0, 1] of other numbers."""
    try:
        return torch.from_numpy(decoding.array(file))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as an image: {error}; {hint}") from error


def check_images(files: list[Path], faults: Faults, decoding: Decoding = AS_SEEN) -> list[Path]:
    """The files that can be used; every header is read, and every pixel where faults are skipped."""
    looks = find_faults(partial(decoding.look, decode=faults.skip), files)
    for file, look in zip(files, looks, strict=True):
        if look.fault:
            faults.add(str(file), UNREADABLE, look.fault)
        elif look.animated:
            faults.note(str(file), SEVERAL, remedy="read by the first of them")
    return [file for file, look in zip(files, looks, strict=True) if not look.fault]


def header_fault(file: Path, size: tuple[int, int] | None = None, decoding: Decoding = AS_SEEN) -> str:
    """Why the file cannot be used or, as a viewer shows it, has not the ``size`` (width, height), or nothing."""
    return _fault(decoding.look(file), size)


def decoding_fault(file: Path, size: tuple[int, int] | None = None, decoding: Decoding = AS_SEEN) -> str:
    """The same as :func:`header_fault` where all pixels are read."""
    return _fault(decoding.look(file, decode=True), size)


def _fault(look: Look, size: tuple[int, int] | None) -> str:
    if not look.fault and size is not None and look.size != size:
        return f"it is {look.size[0]} x {look.size[1]} pixels, not {size[0]} x {size[1]}"
    return look.fault


def _length(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _end(file: Path) -> bytes:
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 16384))
        return hashlib.blake2b(opened.read(), digest_size=16).digest()
