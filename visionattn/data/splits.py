"""How people spell train, validation and test, and what validates where they did not split."""
import re
from pathlib import Path
from typing import TypeVar

from sklearn.model_selection import train_test_split

from ..runtime.folders import visible_folders

__all__ = ["SPELLINGS", "hold_out", "split_folders", "split_of"]

SPELLINGS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
Sample = TypeVar("Sample")
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


def hold_out(samples: list[tuple[Sample, int]], fraction: float) -> tuple[list, list]:
    """Samples that train and samples that validate, of each label its share; always the same.

    Args:
        samples: Pairs whose second is the label; two or more of each label.
        fraction: Share that validates: one at least of each label, and so many at most that one of each trains.
    """
    labels = [label for _, label in samples]
    classes = len(set(labels))
    count = min(max(round(fraction * len(samples)), classes), len(samples) - classes)
    train, val = train_test_split(samples, test_size=count, random_state=0, stratify=labels)
    return train, val
