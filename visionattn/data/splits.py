"""What folders hold: how people spell train, validation and test, and which files are a user's own."""
import os
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["SPELLINGS", "is_visible", "split_folders", "split_of", "visible_files", "visible_folders"]

SPELLINGS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
BESIDE = r"(?:data|dataset|set|split|images?|imgs?|pics|pictures|photos?|folder|dir|files|x|v|fold|coco|the|my)"


def split_of(name: str, alone: bool = False) -> str | None:
    """The split that a name such as ``Train``, ``valid``, ``instances_val2017`` or ``test-images`` speaks of.

    Args:
        name: Of a folder or file.
        alone: The name says nothing else: ``train_set`` and ``val2017`` are splits, ``test tube`` is not.
    """
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    if alone:
        letters = "".join(words)
        found = {split for split, spellings in SPELLINGS.items()
                 if re.fullmatch(f"{BESIDE}*(?:{'|'.join(spellings)}){BESIDE}*", letters)}
    else:
        found = {split for split, spellings in SPELLINGS.items() if set(words) & set(spellings)}
    return found.pop() if len(found) == 1 else None


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders in ``folder`` that are splits by their name (and by nothing else in it).

    Raises:
        ValueError: Two folders are the same split.
    """
    found: dict[str, Path] = {}
    for entry in visible_folders(folder):
        split = split_of(entry.name, alone=True)
        if split in found:
            raise ValueError(f"{folder} has two folders for the split {split}: {found[split].name} and {entry.name}; "
                             "put their files together, or move one of them away")
        if split is not None:
            found[split] = entry
    return found


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
