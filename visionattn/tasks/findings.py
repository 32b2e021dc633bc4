"""What a test finds beside its metrics, and the files of the run folder that show it.

A task gathers :class:`Findings` while it tests and hands them to :meth:`visionattn.tasks.base.Task.write_findings`. Of
the images only the worst are kept, and small.
"""
import csv
import heapq
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchmetrics import Metric

from ..runtime.pixels import picture_of
from .charts import Tile, draw_confusion, draw_reliability, draw_sheet

__all__ = ["Findings", "Mistakes", "Sums", "class_rows", "thumbnail"]

WORST = 20  # images on the sheet
SIDE = 240  # their longer side there, in pixels


class Findings(NamedTuple):
    """What a test found; what is None has no file.

    Attributes:
        names: Of the rows and columns of ``confusion``.
        confusion: Counts ``[names, names]``: a row is the truth, a column what was predicted.
        counted: What is counted, a title for the matrix.
        classes: A row of the per-class table each: columns by name; None for what there is not.
        mistakes: The worst images of this process; those of all processes are compared.
        worst: What they are worst in, a title for their sheet.
        calibration: By name: bins, see :func:`visionattn.tasks.calibration.calibration_bins`.
    """

    names: Sequence[str]
    confusion: np.ndarray | None = None
    counted: str = ""
    classes: Sequence[Mapping[str, Any]] | None = None
    mistakes: "Mistakes | None" = None
    worst: str = ""
    calibration: Mapping[str, np.ndarray] | None = None

    def write(self, run: Path, worst: Sequence[Tile]) -> None:
        """Writes the files into the run folder, in place of those of an earlier test.

        Args:
            run: The run folder.
            worst: The worst images of all processes.
        """
        run.mkdir(parents=True, exist_ok=True)
        for name in ("confusion.csv", "confusion.png", "classes.csv", "mistakes.png", "calibration.png"):
            (run / name).unlink(missing_ok=True)
        if self.confusion is not None:
            _write_table(run / "confusion.csv", [["true \\ predicted", *self.names], *(
                [name, *row] for name, row in zip(self.names, self.confusion.tolist(), strict=True))])
            draw_confusion(run / "confusion.png", self.confusion, self.names, self.counted)
        if self.classes:
            columns = list(dict.fromkeys(key for row in self.classes for key in row))
            _write_table(run / "classes.csv", [columns, *([_cell(row.get(key)) for key in columns]
                                                          for row in self.classes)])
        if worst:
            draw_sheet(run / "mistakes.png", worst, self.worst)
        if self.calibration:
            draw_reliability(run / "calibration.png", self.calibration, "Calibration on the test images")


class Mistakes:
    """The worst images of a test, found one by one."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, int, Tile]] = []  # a heap: the least bad is first
        self._count = 0

    def add(self, badness: float, make: Callable[[], Tile]) -> None:
        """Keeps the image that ``make`` gives if it is among the worst: the larger ``badness``, the worse."""
        self._count += 1
        if len(self._kept) < WORST or badness > self._kept[0][0]:
            change = heapq.heappush if len(self._kept) < WORST else heapq.heapreplace
            change(self._kept, (badness, -self._count, make()))

    def take(self) -> list[tuple[float, Tile]]:
        """What was kept, with its badness; nothing is kept any more."""
        kept, self._kept = self._kept, []
        return [(badness, tile) for badness, _, tile in sorted(kept, key=lambda item: item[:2], reverse=True)]

    @staticmethod
    def worst(kept: list[tuple[float, Tile]]) -> list[Tile]:
        """The worst of what several processes kept, the worst first."""
        return [tile for _, tile in sorted(kept, key=lambda item: -item[0])[:WORST]]


class Sums(Metric):
    """The sum of tensors of one shape over all batches and processes."""

    full_state_update = False
    sums: Tensor

    def __init__(self, *shape: int, dtype: torch.dtype = torch.long):
        super().__init__()
        self.add_state("sums", torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Adds ``values``."""
        self.sums += values.to(self.sums)

    def compute(self) -> Tensor:
        """The sum."""
        return self.sums


def class_rows(names: Sequence[str], confusion: np.ndarray, unit: str) -> list[dict[str, Any]]:
    """A row of the per-class table for each of ``names``: counts, precision and recall, None where there is nothing.

    Args:
        names: Of the classes.
        confusion: Counts, a row is the truth; it may have more rows and columns than there are names.
        unit: What is counted, such as ``images``.
    """
    rows: list[dict[str, Any]] = []
    true, predicted = confusion.sum(axis=1).tolist(), confusion.sum(axis=0).tolist()
    for label, name in enumerate(names):
        right = int(confusion[label, label])
        rows.append({"class": name, unit: true[label], "predicted": predicted[label], "right": right,
                     "precision": right / predicted[label] if predicted[label] else None,
                     "recall": right / true[label] if true[label] else None})
    return rows


def thumbnail(image: Tensor, normalisation: Any = None) -> np.ndarray:
    """A small picture ``[H, W, 3]`` (uint8) of ``image [C, H, W]``; of more than three channels the first three.

    Args:
        image: In [0, 1], or normalised.
        normalisation: Mean and standard deviation of the channels if it is normalised.
    """
    image = image.detach().float().cpu()
    if normalisation is not None:
        mean, std = (torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in normalisation)
        image = image * std + mean
    zoom = SIDE / max(image.shape[1:])
    if zoom < 1:
        size = [max(1, round(zoom * length)) for length in image.shape[1:]]
        image = interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
    return np.array(picture_of(image.numpy()))


def _write_table(path: Path, rows: list[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows(rows)


def _cell(value: Any) -> Any:
    return "" if value is None else round(value, 6) if isinstance(value, float) else value
