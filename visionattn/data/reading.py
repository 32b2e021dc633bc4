"""Files and records that cannot be used: found, named, counted. Shared by the data modules that read folders."""
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

__all__ = ["EXTENSIONS", "Faults", "decoding_fault", "find_faults", "find_images", "header_fault", "read_image",
           "result_names", "shared_files"]

EXTENSIONS = ", ".join(IMG_EXTENSIONS)  # of files that are taken for images, for messages

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
            rank_zero_info(f"{self.source}: {count} {remedy}: {kind}; the first is {self.first[kind, remedy]}")


def find_images(folder: Path) -> list[Path]:
    """Every image below ``folder``, by extension, in a fixed order; says what else it holds."""
    files = sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not name.startswith(".")
    )
    images = [file for file in files if file.suffix.lower() in IMG_EXTENSIONS]
    if len(images) < len(files):
        other = next(file for file in files if file.suffix.lower() not in IMG_EXTENSIONS)
        rank_zero_info(f"{folder} holds {len(files) - len(images)} files that are not images by their name, "
                       f"such as {other.name}: they are not read.")
    return images


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

    Files of one length are compared by their last 16 KiB, where a compressed image has its pixels.
    """
    lengths: dict[int, list[Path]] = {}
    for file in others:
        lengths.setdefault(_length(file), []).append(file)
    ends: dict[int, set[bytes]] = {}
    found = []
    for file in these:
        length = _length(file)
        if length > 0 and length in lengths:
            if length not in ends:
                ends[length] = {_end(other) for other in lengths[length]}
            if _end(file) in ends[length]:
                found.append(file)
    return found


def read_image(file: Path, hint: str) -> Image.Image:
    """An image in RGB.

    Args:
        file: The image.
        hint: What the user can do about a file that cannot be read.

    Raises:
        ValueError: The file cannot be read as an image.
    """
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: {_reason(error)}; {hint}") from error


def header_fault(file: Path, size: tuple[int, int] | None = None) -> str:
    """Why the file's header cannot be read or is not of the ``size`` (width, height) expected, or nothing."""
    return _fault(file, size, decode=False)


def decoding_fault(file: Path, size: tuple[int, int] | None = None) -> str:
    """Why the file cannot be decoded or is not of the ``size`` (width, height) expected, or nothing."""
    return _fault(file, size, decode=True)


def _fault(file: Path, size: tuple[int, int] | None, decode: bool) -> str:
    try:
        with Image.open(file) as image:
            if decode:
                image.load()
            found = image.size
    except Exception as error:  # whatever a damaged file makes a decoder raise
        return _reason(error)
    if size is not None and found != size:
        return f"it is {found[0]} x {found[1]} pixels, not {size[0]} x {size[1]}"
    return ""


def _length(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _end(file: Path) -> bytes:
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 16384))
        return hashlib.blake2b(opened.read(), digest_size=16).digest()


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError) and "cannot identify image file" in str(error):
        return "it is no image or damaged"
    return " ".join(str(error).split()) or type(error).__name__
