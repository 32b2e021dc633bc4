"""What folders hold: which files are a user's own, and which of them are images."""
import os
from collections.abc import Iterator
from pathlib import Path

from .pixels import ARRAY, ENDINGS, UNREAD
from .say import say

__all__ = ["EXTENSIONS", "find_images", "is_image", "is_visible", "only_images", "visible_files", "visible_folders",
           "without_copies"]

EXTENSIONS = ", ".join(ending for ending in ENDINGS if ending not in UNREAD)  # of images, for messages
SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}


def find_images(folder: Path) -> list[Path]:
    """Every image below ``folder``, by its ending, in a fixed order; says what else it holds."""
    return only_images(sorted(visible_files(folder)), folder)


def only_images(files: list[Path], folder: Path) -> list[Path]:
    """Those of the ``files`` below ``folder`` that are images by their ending; says how many are not."""
    others = [file for file in files if not is_image(file)]
    if others:
        say(f"{folder} holds {len(others)} files that are not images by their name, "
                       f"such as {others[0].name}: they are not read.")
    return without_copies([file for file in files if is_image(file)])


def without_copies(images: list[Path]) -> list[Path]:
    """The images without arrays that lie beside a picture of the same name, such as the caches of other trainers."""
    if not any(file.suffix.lower() == ARRAY for file in images):
        return images
    pictures = {file.with_suffix("") for file in images if file.suffix.lower() != ARRAY}
    copies = [file for file in images if file.suffix.lower() == ARRAY and file.with_suffix("") in pictures]
    if copies:
        say(f"{len(copies)} arrays, such as {copies[0]}, lie beside a picture of the same name: they are not read.")
        known = set(copies)
        return [file for file in images if file not in known]
    return images


def is_image(file: Path) -> bool:
    """Whether the ending is one of an image."""
    return file.suffix.lower() in ENDINGS


def visible_folders(folder: Path) -> list[Path]:
    """The folders in ``folder``, sorted, without hidden ones, those of operating systems and links to parents."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if is_visible(entry.name) and entry.is_dir()]
    return sorted(Path(entry.path) for entry in found if not (entry.is_symlink() and _is_loop(entry.path)))


def is_visible(name: str) -> bool:
    """Whether a file or folder of this name is a user's own, not a hidden one or an operating system's."""
    return not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS | SYSTEM_FILES


def visible_files(folder: Path) -> Iterator[Path]:
    """Every file below ``folder``, without hidden ones and those of operating systems.

    Links are followed, but to no folder that was listed already and to none that holds the link: loops end.

    Raises:
        OSError: A folder cannot be listed.
    """
    seen: set[tuple[int, int]] = set()
    tops = [folder]
    links: list[Path] = []
    while tops:
        for parent, folders, files in os.walk(tops.pop(), onerror=_give_up):
            status = os.stat(parent)
            known = (status.st_dev, status.st_ino) in seen
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not known and is_visible(name))
            if known:
                continue
            yield from (Path(parent, name) for name in sorted(files) if is_visible(name))
            links += [Path(parent, name) for name in folders if os.path.islink(os.path.join(parent, name))]
        while links and not tops:
            link = links.pop(0)
            if not _is_loop(link):
                tops.append(link)


def _is_loop(link: str | Path) -> bool:
    """Whether a link leads to a folder that holds it."""
    return Path(os.path.realpath(Path(link).parent)).is_relative_to(os.path.realpath(link))


def _give_up(error: OSError) -> None:
    raise error
