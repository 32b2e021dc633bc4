"""What a run trains on, said in one table: splits, classes with counts, what was left out and why."""
import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["DataReport", "SplitReport", "aligned", "shortened"]

IMBALANCE = 10  # ratio of the most to the least frequent class from which it is said
FEW = 100  # training images below which it is said
SHOWN = 20  # classes in the table
SPLITS = ("train", "val", "test", "predict")


class SplitReport(NamedTuple):
    """One split of a data set.

    Attributes:
        images: Number of images that are used.
        counts: Objects (or images, or pixels) of each class, by name, in the order of the labels.
        left_out: What is not used or was mended: ``(what it is and where, why, what became of it)``.
        more: Number of faults that ``left_out`` does not list any more.
    """

    images: int
    counts: Mapping[str, int]
    left_out: Sequence[tuple[str, str, str]] = ()
    more: int = 0


class DataReport:
    """The splits of a data set, as they are read.

    Args:
        unit: What ``counts`` count, such as ``objects``.

    Attributes:
        splits: By name: ``train``, ``val``, ``test`` and ``predict``, those that were read.
        notes: Further lines about the data as a whole.
    """

    def __init__(self, unit: str = "objects"):
        self.unit, self.splits, self.notes = unit, dict[str, SplitReport](), list[str]()

    def text(self) -> str:
        """The table, with a line for classes that training lacks or that differ much in their number."""
        names = [split for split in SPLITS if split in self.splits]
        counted = self.unit != "images"
        rows = [["split", "images", *[self.unit] * counted, "left out or mended"]]
        for split in names:
            part = self.splits[split]
            kinds = Counter((why, became) for _, why, became in part.left_out)
            why = "; ".join(f"{count} {became}: {kind}" for (kind, became), count in kinds.most_common(5))
            why += f"; and {part.more} more" if part.more else ""
            total = str(sum(part.counts.values())) if part.counts else "-"
            rows.append([split, str(part.images), *[total] * counted, why or "-"])
        lines = aligned(rows)
        classes = list(dict.fromkeys(name for split in names for name in self.splits[split].counts))
        frequent = sorted(classes, key=lambda name: -sum(self.splits[split].counts.get(name, 0) for split in names))
        shown = [name for name in classes if name in set(frequent[:SHOWN])]
        if shown:
            lines += aligned([[f"class ({self.unit})", *names], *(
                [name, *(str(self.splits[split].counts.get(name, 0)) for split in names)] for name in shown)])
        if len(shown) < len(classes):
            lines.append(f"... and {len(classes) - len(shown)} more classes")
        return "\n".join([*lines, *self.warnings(), *self.notes])

    def warnings(self) -> list[str]:
        """Lines about few images, classes without anything to learn from, and imbalance above 10 : 1."""
        lines = []
        train = self.splits["train"].counts if "train" in self.splits else {}
        for split in ("val", "test"):
            others = self.splits[split].counts if split in self.splits else {}
            lacking = [name for name, count in others.items() if count and train and name not in train]
            if lacking:
                lines.append(f"Training has no {self.unit} of {_named(lacking)}, but {split} has.")
            absent = [name for name, count in others.items() if not count and train.get(name)]
            if absent:
                lines.append(f"{split} has no {self.unit} of {_named(absent)}: nothing is measured for it.")
        absent = [name for name, count in train.items() if not count]
        if absent:
            lines.append(f"Training has no {self.unit} of {_named(absent)}: nothing is learned of it.")
        if "train" in self.splits and self.splits["train"].images < FEW:
            lines.append(f"{self.splits['train'].images} training images are few: start from trained weights (the "
                         "model's pretrained or checkpoint_path) and expect results that vary.")
        present = {name: count for name, count in train.items() if count}
        if present:
            most, least = max(present, key=present.__getitem__), min(present, key=present.__getitem__)
            if present[most] > IMBALANCE * present[least]:
                lines.append(f"Imbalance: training has {present[most]} {self.unit} of {most!r} and {present[least]} of "
                             f"{least!r} ({present[most] / present[least]:.0f} : 1).")
        return lines

    def left_out(self) -> int:
        """Number of faults in all splits."""
        return sum(len(part.left_out) + part.more for part in self.splits.values())

    def write(self, path: Path) -> None:
        """Writes what was left out or mended as a CSV file; nothing if there is nothing."""
        rows = [(split, *fault) for split, part in self.splits.items() for fault in part.left_out]
        if not rows:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows([("split", "what", "why", "what became of it"), *rows])


def shortened(names: Sequence[str]) -> str:
    """Names for a message: the first ten, and how many there are if they are more."""
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as their widest cells."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _named(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
