"""Several data sets, each labelled for a task of its own, as one: every batch comes from one of them."""
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from .loading import LoadedData
from .report import DataReport

__all__ = ["MultiTaskData"]


class MultiTaskData(LoadedData):
    """A data set for each task of :class:`visionattn.tasks.MultiTask`; at least two of the three.

    A training batch is one of a single set with the name of its task behind it: ``(images, labels, task)``. An epoch
    draws the sets by ``weights``, in random order and as often as these say, to within one batch; what is drawn depends
    on ``seed`` and the epoch alone. A set goes on where it was in the epoch before, and begins anew, in another order,
    when it is through. Evaluation goes through one set after the other.

    Args:
        classification: Data of a classification task.
        detection: Data of a detection task.
        segmentation: Data of a segmentation task.
        weights: How often the sets are drawn, by task, as ratios; None for their numbers of batches, so that an epoch
            goes through each once.
        batches: Batches of an epoch; None for as many as all sets have together.
        seed: Of the order in which sets are drawn; the sets have seeds of their own.

    Attributes:
        parts: The data by task.

    Raises:
        ValueError: There are fewer than two sets, they have different numbers of channels, or the weights are not
            theirs.
    """

    def __init__(
            self,
            classification: LoadedData | None = None,
            detection: LoadedData | None = None,
            segmentation: LoadedData | None = None,
            weights: dict[str, float] | None = None,
            batches: int | None = None,
            seed: int = 0,
    ):
        given = {"classification": classification, "detection": detection, "segmentation": segmentation}
        self.parts: dict[str, Any] = {task: part for task, part in given.items() if part is not None}
        if len(self.parts) < 2:
            raise ValueError(f"several tasks need data for two of {', '.join(given)} or more, got "
                             f"{'those of ' + next(iter(self.parts)) + ' alone' if self.parts else 'none'}")
        super().__init__(max(part.batch_size for part in self.parts.values()),
                         max(part.num_workers for part in self.parts.values()), seed)
        if batches is not None and batches < 1:
            raise ValueError(f"batches must be 1 or more, got {batches}")
        if weights is not None and set(weights) != set(self.parts):
            raise ValueError(f"weights must be of the tasks {', '.join(self.parts)}, got those of "
                             f"{', '.join(weights) or 'none'}")
        if weights is not None and not all(0 < weight < float("inf") for weight in weights.values()):
            raise ValueError(f"weights must be positive, got {weights}")
        channels = {task: part.in_chans for task, part in self.parts.items()}
        if len(set(channels.values())) > 1:
            raise ValueError("the tasks share a backbone, and their images have different numbers of channels "
                             f"({_listed(channels)}): set in_chans of the data alike")
        self.weights, self.batches = weights, batches
        self.in_chans = next(iter(channels.values()))
        self.multi_label = classification is not None and classification.multi_label
        self.reports = _Reports()
        self.report = self.reports

    @property
    def num_classes(self) -> dict[str, int]:
        """Number of classes of each task."""
        return {task: part.num_classes for task, part in self.parts.items()}

    @property
    def class_names(self) -> dict[str, list[str] | None]:
        """Their names."""
        return {task: getattr(part, "class_names", None) for task, part in self.parts.items()}

    def setup(self, stage: str) -> None:
        """Reads and checks what ``stage`` needs of each set."""
        for task, part in self._joined().items():
            part.setup(stage)
            self.reports.take(task, part.report)

    def train_dataloader(self) -> Any:
        """Batches of one set each."""
        loaders = {task: part.train_dataloader() for task, part in self._joined().items()}
        empty = next((task for task, loader in loaders.items() if not len(loader)), None)
        if empty:
            raise ValueError(f"the {empty} data have no training batch")
        weights = self.weights or {task: len(loader) for task, loader in loaders.items()}
        batches = self.batches or sum(map(len, loaders.values()))
        return _DrawnLoader(loaders, weights, batches, self.seed, self._batches_done)

    def val_dataloader(self) -> list[Any]:
        """Validation images of each set."""
        return [part.val_dataloader() for part in self._joined().values()]

    def test_dataloader(self) -> list[Any]:
        """Test images of each set."""
        return [part.test_dataloader() for part in self._joined().values()]

    def predict_dataloader(self) -> Any:
        """Raises a ValueError: images are predicted by one task."""
        raise ValueError("a prediction is one task's: take the run folder of one, such as RUN/detection, which their "
                         "test leaves")

    def _joined(self) -> dict[str, Any]:
        """The parts, with the trainer that they are used by."""
        for part in self.parts.values():
            part.trainer = self.trainer
        return self.parts


class _DrawnLoader:
    """Batches of several loaders with the name of the one that each is of.

    Args:
        loaders: By name; of :class:`LoadedData`.
        weights: How often each is drawn, as ratios.
        batches: Batches of an epoch.
        seed: Of what is drawn.
        done: Tells how many batches of this epoch are left out, as a run is resumed behind them.
    """

    def __init__(
            self, loaders: Mapping[str, DataLoader], weights: Mapping[str, float], batches: int, seed: int,
            done: Callable[[], int]):
        self.loaders, self.batches, self.seed, self.done = loaders, batches, seed, done
        self.weights = np.array([weights[name] for name in loaders], dtype=np.float64)
        self.sampler, self.epoch = self, 0  # Lightning tells a loader's sampler the epoch

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Draws those of ``epoch`` next."""
        self.epoch = epoch

    def drawn(self, epoch: int) -> np.ndarray:
        """``[batches]``: which loader each batch of an epoch is of.

        Each has its share, rounded up or down so that the mean over the epochs is exact (systematic sampling).
        """
        rng = np.random.default_rng([self.seed, epoch])
        bounds = np.append(0, self.weights.cumsum() / self.weights.sum() * self.batches)
        bounds[-1] = self.batches
        counts = np.diff(np.floor(bounds + rng.random())).astype(int)
        return rng.permutation(np.repeat(np.arange(len(counts)), counts))

    def __iter__(self) -> Iterator[tuple[Any, Any, str]]:
        epoch, done = self.epoch, self.done()
        order = self.drawn(epoch)
        before = sum((np.bincount(self.drawn(past), minlength=len(self.weights)) for past in range(epoch)),
                     np.bincount(order[:done], minlength=len(self.weights)))
        names = list(self.loaders)
        streams = [_endless(self.loaders[name], int(count)) for name, count in zip(names, before, strict=True)]
        for place in order[done:]:
            images, labels = next(streams[place])
            yield images, labels, names[place]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what was done is known to the trainer. Tells Lightning that the loader goes on within epochs."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing."""


def _endless(loader: Any, done: int) -> Iterator[Any]:
    """The batches of a loader of ours, epoch after epoch, behind the first ``done``."""
    epoch, done = divmod(done, len(loader))
    while True:
        loader.sampler.set_epoch(epoch)
        loader.done = lambda: done  # noqa: B023 - asked for at once
        yield from loader
        epoch, done = epoch + 1, 0


class _Reports(DataReport):
    """The tables of several data sets, one below the other."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, DataReport] = {}

    def take(self, task: str, report: DataReport) -> None:
        """Adds what a part of the data says of itself; its splits are called ``task/split``."""
        self.parts[task] = report
        self.splits |= {f"{task}/{split}": part for split, part in report.splits.items()}

    def text(self) -> str:
        """The tables."""
        return "\n".join(f"{task}:\n{report.text()}" for task, report in self.parts.items() if report.splits)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{task} {value}" for task, value in values.items())
