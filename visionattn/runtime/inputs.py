"""The images that a command names: files, folders, patterns and lists, each once, and what their results are called."""
import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .folders import EXTENSIONS, find_images, is_image
from .say import say
from .video import webcam_of

__all__ = ["Input", "find_inputs"]


class Input(NamedTuple):
    """An image to look at.

    Attributes:
        file: Where it is, as it was named.
        name: What its results are called: its path in the folder that holds all that were named.
        stem: The same without its ending where it is the only one then.
    """

    file: Path
    name: str
    stem: str


def find_inputs(arguments: Sequence[str], without: Iterable[Path] = ()) -> list[Input]:
    """The images that arguments of a command line mean, in their order.

    Args:
        arguments: Each a file (of any name), a folder (its images at any depth), a pattern such as ``inbox/**/*.jpg``,
            a list of files (``.txt``: one a line, relative to the current folder or to the list's), or ``-``: such a
            list from the standard input; or a webcam. Lists may part names by NUL, as ``find -print0`` does, for names
            with line breaks.
        without: Files, and folders whose images, are left out, which is said: those of results.

    Raises:
        FileNotFoundError: An argument means nothing that exists.
        ValueError: There are no images.
    """
    files: list[Path] = []
    tops: list[Path] = []  # the folders that names are relative to, unless they have one in common
    for argument in arguments:
        path = Path(argument)
        if webcam_of(argument) is not None:
            found = [path]
        elif argument == "-":
            found = _listed(sys.stdin.buffer.read(), Path(), "the standard input")
        elif path.is_dir():
            found = find_images(path)
            tops.append(path)
        elif path.is_file() and path.suffix.lower() == ".txt":
            found = _listed(path.read_bytes(), path.parent, argument)
        elif os.path.lexists(path):
            found = [path]
        elif glob.has_magic(argument):
            matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
            found = [match for match in matches if is_image(match) and not match.is_dir()]
            found += [file for match in matches if match.is_dir() and "**" not in argument
                      for file in find_images(match)]
            if not found:
                raise FileNotFoundError(f"no image fits {argument!r} ({EXTENSIONS})")
        else:
            raise FileNotFoundError(f"{argument} does not exist")
        if not path.is_dir():
            tops += [file.parent for file in found]
        files += found
    unique = {os.path.abspath(file): file for file in reversed(files)}
    kept = [file for file in files if unique.pop(os.path.abspath(file), None)]
    if len(kept) < len(files):
        say(f"{len(files) - len(kept)} images were named twice: they are read once.")
    if not kept:
        raise ValueError(f"there are no images in {', '.join(arguments)} ({EXTENSIONS})")
    results = {os.path.abspath(path) for path in without}
    images = [file for file in kept if results.isdisjoint(map(str, _with_parents(file)))]
    left_out = set(kept) - set(images)
    if left_out:
        say(f"{len(left_out)} images, such as {min(left_out)}, are of a prediction or of the run: they are not read.")
    if not images:
        raise ValueError(f"there are no images in {', '.join(arguments)} but those of a prediction or of the run")
    return _named(images, os.path.commonpath([os.path.abspath(top) for top in tops]))


def _with_parents(file: Path) -> list[Path]:
    path = Path(os.path.abspath(file))
    return [path, *path.parents]


def _listed(content: bytes, folder: Path, what: str) -> list[Path]:
    """The files of a list, also those that do not exist."""
    if wrong := re.search(rb"[\x01-\x08\x0b\x0c\x0e-\x1f]", content):
        raise ValueError(f"{what} is no list of files: its byte {wrong.start()} is no text")
    names = content.split(b"\0") if b"\0" in content else content.removeprefix(b"\xef\xbb\xbf").splitlines()
    paths = [Path(os.fsdecode(name)) for name in names if name.strip()]
    paths = [folder / path if not os.path.lexists(path) and os.path.lexists(folder / path) else path for path in paths]
    if folders := [path for path in paths if not path.name or path.name == ".."]:
        raise ValueError(f"{what} names {folders[0]}, a folder: a list names files")
    return paths


def _named(files: list[Path], top: str) -> list[Input]:
    names = [Path(os.path.relpath(os.path.abspath(file), top)) for file in files]
    count = Counter(str(name.with_suffix("")).lower() for name in names)
    stems = [name if count[str(name.with_suffix("")).lower()] > 1 else name.with_suffix("") for name in names]
    if len({str(stem).lower() for stem in stems}) < len(stems):  # as with a.jpg, a.png and a.jpg.png
        stems = names
    return [Input(file, name.as_posix(), stem.as_posix())
            for file, name, stem in zip(files, names, stems, strict=True)]
