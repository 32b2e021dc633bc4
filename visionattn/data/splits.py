"""How people spell train, validation and test."""
import re
from pathlib import Path

from ..runtime.folders import visible_folders

__all__ = ["SPELLINGS", "split_folders", "split_of"]

SPELLINGS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
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
